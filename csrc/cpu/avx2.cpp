// Compiled with -mavx2 -mfma -mf16c; run only after row_stats_cpu has asked the CPU.
#include <immintrin.h>

#include "kernel.h"

namespace dllm {
namespace {

struct Vector {
    __m256 x;
    static Vector zero() { return {_mm256_setzero_ps()}; }
    static Vector all(float a) { return {_mm256_set1_ps(a)}; }
    static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, x); }
    static Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
    static Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.x, b.x)}; }
    static Vector sub(Vector a, Vector b) { return {_mm256_sub_ps(a.x, b.x)}; }
    static Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.x, b.x)}; }
    static Vector product(Vector a, Vector e) {
        const __m256 some = _mm256_cmp_ps(e.x, _mm256_setzero_ps(), _CMP_GT_OQ);
        return {_mm256_and_ps(_mm256_mul_ps(a.x, e.x), some)};
    }
    static bool all_below(Vector a, Vector b, Vector c, float limit) {
        const __m256 l = _mm256_set1_ps(limit);
        const __m256 below = _mm256_and_ps(_mm256_and_ps(_mm256_cmp_ps(a.x, l, _CMP_LT_OQ), _mm256_cmp_ps(b.x, l, _CMP_LT_OQ)),
                                           _mm256_cmp_ps(c.x, l, _CMP_LT_OQ));
        return _mm256_movemask_ps(below) == 255;
    }
    float highest() const {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
    }
    float total() const {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_shuffle_ps(y, y, 0xB1));  // (0+1), (2+3)
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehl_ps(y, y)));
    }
    // e^x for x ≤ 0: Cody-Waite reduction and a polynomial on [-ln2/2, ln2/2], within 2 ulp; 0 below -87.
    static Vector exp(Vector a) {
        const __m256 small = _mm256_cmp_ps(a.x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
        const __m256 x = _mm256_max_ps(a.x, _mm256_set1_ps(-87.0f));
        const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
        r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
        __m256 p = _mm256_set1_ps(1.0f / 5040);
        const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
        for (const float c : coefficients) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
        const __m256 y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
        return {_mm256_andnot_ps(small, y)};
    }
    static void from_f32(const float* p, std::int64_t n, float* to, std::int64_t step) {
        for (std::int64_t k = 0; k < n; k += kLanes, to += step) _mm256_storeu_ps(to, _mm256_loadu_ps(p + k));
    }
    static void from_bf16(const std::uint16_t* p, std::int64_t n, float* to, std::int64_t step) {
        for (std::int64_t k = 0; k < n; k += kLanes, to += step) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k));
            _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
        }
    }
    static void from_f16(const std::uint16_t* p, std::int64_t n, float* to, std::int64_t step) {
        for (std::int64_t k = 0; k < n; k += kLanes, to += step)
            _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k))));
    }
};

}  // namespace

const Kernel kAvx2 = Impl<Vector>::kernel();

}  // namespace dllm
