// The fallback for CPUs without AVX2: the same order of additions, eight floats in an array.
#include "kernel.h"

namespace dllm {
namespace {

struct Vector {
    float x[kLanes];
    template <class F>
    static Vector each(F f) {
        Vector v;
        for (int i = 0; i < kLanes; ++i) v.x[i] = f(i);
        return v;
    }
    static Vector zero() { return all(0.0f); }
    static Vector all(float a) { return each([&](int) { return a; }); }
    static Vector load(const float* p) { return each([&](int i) { return p[i]; }); }
    void store(float* p) const {
        for (int i = 0; i < kLanes; ++i) p[i] = x[i];
    }
    static Vector fma(const Vector& a, const Vector& b, const Vector& c) {
        return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
    }
    static Vector add(const Vector& a, const Vector& b) { return each([&](int i) { return a.x[i] + b.x[i]; }); }
    static Vector sub(const Vector& a, const Vector& b) { return each([&](int i) { return a.x[i] - b.x[i]; }); }
    static Vector max(const Vector& a, const Vector& b) {
        return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
    }
    static Vector exp(const Vector& a) { return each([&](int i) { return std::exp(a.x[i]); }); }
    // x e^x, 0 where e^x is: -inf times 0 is NaN
    static Vector product(const Vector& a, const Vector& e) {
        return each([&](int i) { return e.x[i] > 0.0f ? a.x[i] * e.x[i] : 0.0f; });
    }
    static bool all_below(const Vector& a, const Vector& b, const Vector& c, float limit) {
        bool below = true;
        for (int i = 0; i < kLanes; ++i) below = below && a.x[i] < limit && b.x[i] < limit && c.x[i] < limit;
        return below;
    }
    float highest() const {
        float most = x[0];
        for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
        return most;
    }
    float total() const { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }
    template <class T, class F>
    static void convert(const T* p, std::int64_t n, float* to, std::int64_t step, F f) {
        for (std::int64_t k = 0; k < n; k += kLanes, to += step)
            for (int i = 0; i < kLanes; ++i) to[i] = f(p[k + i]);
    }
    static void from_f32(const float* p, std::int64_t n, float* to, std::int64_t step) {
        convert(p, n, to, step, [](float x) { return x; });
    }
    static void from_bf16(const std::uint16_t* p, std::int64_t n, float* to, std::int64_t step) {
        convert(p, n, to, step, bf16_to_float);
    }
    static void from_f16(const std::uint16_t* p, std::int64_t n, float* to, std::int64_t step) {
        convert(p, n, to, step, f16_to_float);
    }
};

}  // namespace

const Kernel kScalar = Impl<Vector>::kernel();

}  // namespace dllm
