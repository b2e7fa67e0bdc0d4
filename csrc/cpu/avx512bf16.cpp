// Compiled with -mavx512f -mavx512bw -mavx512bf16; run only after row_stats_cpu has asked the CPU. Products of bfloat16 are
// exact in float32, and the sums are float32; the instruction takes subnormals for 0.
#include <immintrin.h>

#include "kernel.h"

namespace dllm::bf16 {
namespace {

__m512bh load(const char* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    __m512bh vector;
    __builtin_memcpy(&vector, &bits, sizeof(vector));
    return vector;
}

template <int N>
void tile(const char* ids, const char* hidden, std::int64_t vectors, bool first, float* sums, std::int64_t stride) {
    __m512 c[kTileIds][N];
    for (int m = 0; m < kTileIds; ++m)
        for (int n = 0; n < N; ++n)
            c[m][n] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m * stride + n * kLanes);
    for (std::int64_t k = 0; k < vectors; ++k, ids += kTileIds * 64, hidden += N * 64) {
        __m512bh h[N];
        for (int n = 0; n < N; ++n) h[n] = load(hidden + n * 64);
        for (int m = 0; m < kTileIds; ++m) {
            const __m512bh w = load(ids + m * 64);
            for (int n = 0; n < N; ++n) c[m][n] = _mm512_dpbf16_ps(c[m][n], w, h[n]);
        }
    }
    for (int m = 0; m < kTileIds; ++m)
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums + m * stride + n * kLanes, c[m][n]);
}

}  // namespace

void pack(const void* from, Type, std::int64_t n, char* to, std::int64_t step) {
    const auto* p = static_cast<const std::uint16_t*>(from);
    std::int64_t k = 0;
    for (; k + kElements <= n; k += kElements, to += step) _mm512_storeu_si512(to, _mm512_loadu_si512(p + k));
    if (k < n) _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16((1u << (n - k)) - 1u, p + k));
}

void products(const char* ids, const char* hidden, std::int64_t vectors, int rows, bool first, float* sums, Ahead ahead) {
    const std::int64_t stride = static_cast<std::int64_t>(rows) * kLanes;
    const std::int64_t tiles = kIds / kTileIds * ((rows + kTileRows - 1) / kTileRows);
    const std::int64_t lines = (ahead.ids * ahead.lines + tiles - 1) / tiles;
    for (int i = 0; i < kIds; i += kTileIds) {
        const char* six = ids + i * vectors * 64;
        for (int r = 0; r < rows; r += kTileRows) {
            ahead.fetch(lines);
            const char* group = hidden + r * vectors * 64;
            float* to = sums + i * stride + r * kLanes;
            switch (rows - r) {
                case 1: tile<1>(six, group, vectors, first, to, stride); break;
                case 2: tile<2>(six, group, vectors, first, to, stride); break;
                case 3: tile<3>(six, group, vectors, first, to, stride); break;
                default: tile<4>(six, group, vectors, first, to, stride); break;
            }
        }
    }
}

void add_up(const float* sums, int rows, float* logits) {
    for (int id = 0; id < kIds; ++id)
        for (int r = 0; r < rows; ++r) {
            const __m512 x = _mm512_loadu_ps(sums + (static_cast<std::int64_t>(id) * rows + r) * kLanes);
            logits[r * kIds + id] = _mm512_reduce_add_ps(x);  // a tree: one order
        }
}

}  // namespace dllm::bf16
