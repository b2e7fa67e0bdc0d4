// The roof of the CPU kernel: how many products and sums a second the vector units make when nothing waits for memory.
#include <immintrin.h>

#include <thread>
#include <vector>

static float loop(long rounds) {
    const __m256 a = _mm256_set1_ps(0.999999f), b = _mm256_set1_ps(1e-7f);
    // enough chains to hide the latency of an FMA, few enough for sixteen registers; single variables stay in registers
    // and start from different values, or the compiler makes one chain of them
    const auto from = [](int i) { return _mm256_set1_ps(1e-9f * static_cast<float>(i)); };
    __m256 s0 = from(0), s1 = from(1), s2 = from(2), s3 = from(3), s4 = from(4), s5 = from(5);
    __m256 s6 = from(6), s7 = from(7), s8 = from(8), s9 = from(9), s10 = from(10), s11 = from(11);
    for (long r = 0; r < rounds; ++r) {
        s0 = _mm256_fmadd_ps(s0, a, b), s1 = _mm256_fmadd_ps(s1, a, b), s2 = _mm256_fmadd_ps(s2, a, b);
        s3 = _mm256_fmadd_ps(s3, a, b), s4 = _mm256_fmadd_ps(s4, a, b), s5 = _mm256_fmadd_ps(s5, a, b);
        s6 = _mm256_fmadd_ps(s6, a, b), s7 = _mm256_fmadd_ps(s7, a, b), s8 = _mm256_fmadd_ps(s8, a, b);
        s9 = _mm256_fmadd_ps(s9, a, b), s10 = _mm256_fmadd_ps(s10, a, b), s11 = _mm256_fmadd_ps(s11, a, b);
    }
    s0 = _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)), _mm256_add_ps(s4, s5));
    s6 = _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(s6, s7), _mm256_add_ps(s8, s9)), _mm256_add_ps(s10, s11));
    return _mm256_cvtss_f32(_mm256_add_ps(s0, s6));
}

// Floating-point operations made: two for each of eight lanes of twelve chains.
extern "C" double run_fma(int threads, long rounds, float* sink) {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([=] { sink[t] = loop(rounds); });
    sink[0] = loop(rounds);
    for (auto& thread : others) thread.join();
    return 2.0 * 8 * 12 * static_cast<double>(rounds) * threads;
}
