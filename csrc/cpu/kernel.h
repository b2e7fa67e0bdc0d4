// The inner loops, written once over a vector of eight floats and compiled per instruction set (scalar.cpp, avx2.cpp).
//
// A logit is the sum of eight (bfloat16: sixteen) running sums, kept in vectors over the whole row and added up at the end
// in one order. It depends on nothing but its row and its id: not on the batch, the tile or the number of threads.
#pragma once

#include "../include/dllm/decode_step.h"
#include "../include/dllm/row_stats.h"

namespace dllm {

constexpr int kLanes = 8;
constexpr int kIds = 24;           // ids scored together: a multiple of every tile's and of the 8 lanes
constexpr std::int64_t kDepth = 1024;  // elements of a row in flight: 4 rows of them (16 KB) stay in the first-level cache
constexpr int kRows = 32;          // rows scored together; more rows stream the weights again

// Weights that will be needed next. They are asked for a few cache lines a tile: all at once would stall the tiles.
struct Ahead {
    const char* first;
    std::int64_t stride, lines, ids;  // bytes between ids, cache lines of each
    std::int64_t id = 0, line = 0;
    void fetch(std::int64_t count) {
        for (; count > 0 && id < ids; --count) {
            __builtin_prefetch(first + id * stride + line * 64, 0, 2);
            if (++line == lines) {
                line = 0;
                ++id;
            }
        }
    }
};

struct Kernel {
    int elements, bytes;      // of a vector: 8 floats, or 32 bfloat16 where the CPU multiplies them itself
    int lanes;                // running sums of a logit
    int tile_ids, tile_rows;  // of a full tile; its sums and operands fill the registers
    // Converts n elements and pads the last vector with zeros; a vector goes to every `step`-th byte. So the ids (rows) of
    // a tile are interleaved: two streams to read, not seven whose lines fall into the same cache set.
    void (*pack)(const void* from, Type type, std::int64_t n, char* to, std::int64_t step);
    // sums[id][row][lanes] (+)= products of packed ids [kIds / tile_ids][vectors][tile_ids] and rows
    // [rows / tile_rows][vectors][tile_rows] (the last tile of rows has what is left).
    void (*products)(const char* ids, const char* hidden, std::int64_t vectors, int rows, bool first, float* sums,
                     Ahead ahead);
    // Adds the lanes up: logits[row][kIds].
    void (*add_up)(const float* sums, int rows, float* logits);
    // Absorbs `count` consecutive ids of one row; flag bit 0 bans, bit 1 excludes, nullptr if no id of them is flagged.
    void (*absorb)(RowState& row, const float* logits, int count, std::int32_t first_id, const std::uint8_t* flags);
};

extern const Kernel kScalar, kAvx2;

// bfloat16 by bfloat16 on CPUs with AVX512-BF16; it absorbs like kAvx2. No table of its own: one filled at start would
// run its instructions.
namespace bf16 {
constexpr int kTileIds = 6, kTileRows = 4, kLanes = 16, kElements = 32;
void pack(const void* from, Type type, std::int64_t n, char* to, std::int64_t step);
void products(const char* ids, const char* hidden, std::int64_t vectors, int rows, bool first, float* sums, Ahead ahead);
void add_up(const float* sums, int rows, float* logits);
}  // namespace bf16

namespace {  // each translation unit has its own copy: an AVX2 one must never be linked into the scalar path

template <class V>
struct Impl {
    template <int M, int N>
    static void tile(const float* ids, const float* hidden, std::int64_t depth, bool first, float* sums,
                     std::int64_t sums_stride) {
        V c[M][N];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n)
                c[m][n] = first ? V::zero() : V::load(sums + m * sums_stride + n * kLanes);
        for (std::int64_t k = 0; k < depth; k += kLanes) {
            V w[M];
            for (int m = 0; m < M; ++m) w[m] = V::load(ids + k * M + m * kLanes);
            for (int n = 0; n < N; ++n) {
                const V h = V::load(hidden + k * N + n * kLanes);
                for (int m = 0; m < M; ++m) c[m][n] = V::fma(w[m], h, c[m][n]);
            }
        }
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) c[m][n].store(sums + m * sums_stride + n * kLanes);
    }

    static constexpr int kTileIds = 3, kTileRows = 4;  // 12 sums, 3 ids and a row: AVX2's 16 registers

    static void products(const char* packed_ids, const char* packed_hidden, std::int64_t vectors, int rows, bool first,
                         float* sums, Ahead ahead) {
        const float *ids = reinterpret_cast<const float*>(packed_ids), *hidden = reinterpret_cast<const float*>(packed_hidden);
        const std::int64_t stride = static_cast<std::int64_t>(rows) * kLanes, depth = vectors * kLanes;
        const std::int64_t tiles = kIds / kTileIds * ((rows + kTileRows - 1) / kTileRows), lines = (ahead.ids * ahead.lines + tiles - 1) / tiles;
        // rows inside: the three ids stay in the first-level cache for all of them
        for (int i = 0; i < kIds; i += kTileIds) {
            const float* three = ids + i * depth;
            float* to = sums + i * stride;
            for (int r = 0; r < rows; r += kTileRows) {
                ahead.fetch(lines);
                const float* group = hidden + r * depth;
                float* out = to + r * kLanes;
                switch (rows - r) {
                    case 1: tile<3, 1>(three, group, depth, first, out, stride); break;
                    case 2: tile<3, 2>(three, group, depth, first, out, stride); break;
                    case 3: tile<3, 3>(three, group, depth, first, out, stride); break;
                    default: tile<3, 4>(three, group, depth, first, out, stride); break;
                }
            }
        }
    }

    static void add_up(const float* sums, int rows, float* logits) {
        for (int id = 0; id < kIds; ++id)
            for (int r = 0; r < rows; ++r)
                logits[r * kIds + id] = V::load(sums + (static_cast<std::int64_t>(id) * rows + r) * kLanes).total();
    }

    static void absorb(RowState& row, const float* logits, int count, std::int32_t first_id,
                       const std::uint8_t* flags) {
        // Usual case: all plain ids, none of which can be one of the two best. Then they only join the rest.
        if (flags == nullptr && count == kIds) {
            const V a = V::load(logits), b = V::load(logits + 8), c = V::load(logits + 16);
            const float most = V::max(V::max(a, b), c).highest();
            if (V::all_below(a, b, c, INFINITY) && most <= row.second && most <= row.top && row.top > -INFINITY) {
                const V top = V::all(row.top);
                const V x = V::sub(a, top), y = V::sub(b, top), z = V::sub(c, top);
                const V ex = V::exp(x), ey = V::exp(y), ez = V::exp(z);
                row.sum += V::add(V::add(ex, ey), ez).total();
                row.weighted += V::add(V::add(V::product(x, ex), V::product(y, ey)), V::product(z, ez)).total();
                return;
            }
        }
        for (int i = 0; i < count; ++i) {
            const int flag = flags == nullptr ? 0 : flags[i];
            add_id(row, first_id + i, logits[i], 0.0f, flag & 1, flag & 2);
        }
    }

    static void pack(const void* from, Type type, std::int64_t n, char* to_bytes, std::int64_t step_bytes) {
        const std::int64_t whole = n / kLanes * kLanes, step = step_bytes / 4;
        const std::size_t width = type == Type::f32 ? 4 : 2;
        float* to = reinterpret_cast<float*>(to_bytes);
        const auto convert = [&](const void* p, std::int64_t count, float* out) {
            if (type == Type::f32) V::from_f32(static_cast<const float*>(p), count, out, step);
            else if (type == Type::bf16) V::from_bf16(static_cast<const std::uint16_t*>(p), count, out, step);
            else V::from_f16(static_cast<const std::uint16_t*>(p), count, out, step);
        };
        convert(from, whole, to);
        if (whole == n) return;
        alignas(4) unsigned char last[kLanes * 4] = {};  // zeros are zero in every type
        __builtin_memcpy(last, static_cast<const char*>(from) + static_cast<std::size_t>(whole) * width,
                         static_cast<std::size_t>(n - whole) * width);
        convert(last, kLanes, to + whole / kLanes * step);
    }

    static constexpr Kernel kernel() { return {kLanes, kLanes * 4, kLanes, kTileIds, kTileRows, pack, products, add_up, absorb}; }
};

inline float bits_to_float(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

inline float bf16_to_float(std::uint16_t h) { return bits_to_float(static_cast<std::uint32_t>(h) << 16); }

inline float f16_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, exponent = h >> 10 & 31u, low = h & 0x3FFu;
    if (exponent == 31) return bits_to_float(sign | 0x7F800000u | low << 13);
    if (exponent == 0) {  // zero or subnormal: low * 2^-24 is exact
        const float x = static_cast<float>(low) * 0x1p-24f;
        return sign ? -x : x;
    }
    return bits_to_float(sign | (exponent + 112) << 23 | low << 13);
}

}  // namespace
}  // namespace dllm
