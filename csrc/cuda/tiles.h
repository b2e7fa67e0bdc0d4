// How the work is divided, and the products: tiles of the LM head stream through shared memory into tensor cores.
#pragma once

#include "../include/dllm/commit.h"
#include "ptx.h"

namespace dllm {
namespace {

constexpr int kIds = 128;      // ids of a tile; a warp multiplies 32 rows by 32 of them
constexpr int kSegment = 256;  // ids of a unit: 494 units for 126,464 ids, so no card's last round is left half empty
constexpr int kStages = 3;     // parts of tiles in shared memory: one being multiplied, two on their way
constexpr int kPitch = kIds + 4;  // floats between rows of logits: fewer bank conflicts
constexpr int kShare = 4;         // threads that absorb a row
constexpr int kFan = 32;          // states that one merge takes
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

// More rows a tile read the LM head less often, but take shared memory from the depth: two blocks must fit a processor.
template <int kRows>
struct Tile {
    static constexpr int kThreads = kShare * kRows;
    static constexpr int kDepth = kRows == 32 ? 64 : 32;  // elements of a row in a stage
    static constexpr int kChunks = kDepth / 8;            // of 16 bytes
    static constexpr int kStage = (kRows + kIds) * kDepth * 2;
    static constexpr int kShared = kStages * kStage + kRows * kPitch * 4;

    // Where a chunk lies in a stage, in bytes. Permuted, so that eight rows of a column of chunks meet no bank twice.
    __device__ static std::uint32_t at(int row, int chunk) {
        return static_cast<std::uint32_t>((row * kChunks + (chunk ^ (row * kChunks / 8 & (kChunks - 1)))) * 16);
    }
};

struct Call {
    RowStatsArgs stats;  // rows and noise keys: nullptr in a decode step, which has its own
    StepArgs step;       // batch 0: statistics only
    std::int64_t hidden_rows;
    std::int64_t tiles, segments, tickets;  // tickets: of one tile of rows
    std::uint32_t* ticket;                  // [1 + tiles * tickets], all 0 before and after
    RowState* states;                       // [nodes of the tree, rows]
    std::int32_t* ranks;                    // [rows]
};

// -- rows -------------------------------------------------------------------------------------------------------------

// The row of the hidden states that row r of the call means; -1 if there is none.
__device__ std::int64_t hidden_row(const Call& c, std::int64_t r) {
    if (r >= c.stats.count) return -1;
    if (c.stats.rows == nullptr) return r;
    const std::int32_t row = c.stats.rows[r];
    return row >= 0 && row < c.hidden_rows ? row : -1;
}

// The canvas column of row r of a decode step, and its sequence.
__device__ std::int64_t column_of(const StepArgs& step, std::int64_t r, std::int64_t& sequence) {
    sequence = step.sequences[r / step.width];
    return step.progress[sequence * kProgress + kBlockStart] + r % step.width;
}

__device__ void noise_key(const Call& c, std::int64_t r, std::int64_t (&key)[3]) {
    if (c.step.batch == 0) {
        for (int i = 0; i < 3; ++i) key[i] = c.stats.noise_keys[3 * r + i];
        return;
    }
    std::int64_t sequence;
    key[1] = column_of(c.step, r, sequence) - c.step.prompt_length;
    key[0] = c.step.seeds[sequence];
    key[2] = c.step.progress[sequence * kProgress + kStep];
}

__device__ std::int64_t segment_end(const Call& c, std::int64_t segment) {
    const std::int64_t end = (segment + 1) * kSegment;
    return end < c.stats.vocab ? end : c.stats.vocab;
}

// The first unit from `unit` on, in this block's strides, whose tile has a row that matters. Nothing that this reads
// changes before every block is done with its units.
template <int kRows>
__device__ std::int64_t next_unit(const Call& c, std::int64_t unit) {
    const std::int64_t units = c.tiles * c.segments;
    if (c.step.batch == 0 || c.step.all_rows) return unit;
    for (; unit < units; unit += gridDim.x) {
        bool any = false;
        for (int i = static_cast<int>(threadIdx.x) % kWarp; i < kRows; i += kWarp) {
            const std::int64_t r = unit % c.tiles * kRows + i;
            if (r >= c.stats.count) break;
            std::int64_t sequence;
            const std::int64_t column = column_of(c.step, r, sequence);
            any |= c.step.undecided[sequence * c.step.length + column] != 0;
        }
        if (__any_sync(kAll, any)) break;
    }
    return unit;
}

// -- products ---------------------------------------------------------------------------------------------------------

// Brings in the stages of all of this block's units, one after the other, ahead of the products.
template <int kRows>
class Loader {
    using T = Tile<kRows>;
    static constexpr int kStep = T::kThreads / T::kChunks;  // rows between those of a thread: a multiple of eight
    static constexpr int kPasses = (kRows + kStep - 1) / kStep;
    static_assert(kRows % kStep == 0 && kIds % kStep == 0 && kStep % 8 == 0, "every thread copies whole passes");

   public:
    __device__ Loader(const Call& c, std::int64_t unit) : c_(c) { begin(unit); }

    // Asks for the next part; past the last one, for nothing.
    __device__ void load(std::uint32_t stage) {
        if (unit_ < c_.tiles * c_.segments) {
            const int thread = static_cast<int>(threadIdx.x), row = thread / T::kChunks, chunk = thread % T::kChunks;
            const std::int64_t column = depth_ + chunk * 8;
            const bool inside = column < c_.stats.dim;
            const auto* head = static_cast<const std::uint16_t*>(c_.stats.head.data);
            const std::uint32_t to = stage + T::at(row, chunk);
#pragma unroll
            for (int i = 0; i < kPasses; ++i) {
                const bool wanted = inside && hidden_[i] != nullptr;
                copy16(to + i * kStep * T::kDepth * 2, wanted ? hidden_[i] + column : head, wanted);
            }
#pragma unroll
            for (int i = 0; i < kIds / kStep; ++i) {
                const std::int64_t id = first_ + row + i * kStep;
                const bool wanted = inside && id < c_.stats.vocab;
                const std::uint16_t* from = wanted ? head + id * c_.stats.head.stride + column : head;
                copy16(to + (kRows + i * kStep) * T::kDepth * 2, from, wanted);
            }
            advance();
        }
        close_copies();
    }

   private:
    __device__ void begin(std::int64_t unit) {
        const auto* hidden = static_cast<const std::uint16_t*>(c_.stats.hidden.data);
        unit_ = next_unit<kRows>(c_, unit);
        first_ = unit_ / c_.tiles * kSegment;
        end_ = segment_end(c_, unit_ / c_.tiles);
        depth_ = 0;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int in_tile = static_cast<int>(threadIdx.x) / T::kChunks + i * kStep;
            const std::int64_t row = hidden_row(c_, unit_ % c_.tiles * kRows + in_tile);
            hidden_[i] = row < 0 ? nullptr : hidden + row * c_.stats.hidden.stride;
        }
    }

    __device__ void advance() {
        depth_ += T::kDepth;
        if (depth_ < c_.stats.dim) return;
        depth_ = 0;
        first_ += kIds;
        if (first_ >= end_) begin(unit_ + gridDim.x);
    }

    const Call& c_;
    std::int64_t unit_, first_, end_, depth_;
    const std::uint16_t* hidden_[kPasses];
};

// A warp's 32 rows by 32 ids: sums[i][j] is the 16 x 8 fragment of rows 16 i and ids 8 j.
using Sums = float[2][4][4];

template <Type kType, int kRows>
__device__ __forceinline__ void multiply(Sums& sums, std::uint32_t stage) {
    using T = Tile<kRows>;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int row = warp / 4 * 32 + lane % 16, id = kRows + warp % 4 * 32 + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int k = 0; k < T::kChunks; k += 2) {
        std::uint32_t a[2][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_matrices(a[i], stage + T::at(row + i * 16, k + lane / 16));
            load_matrices(b[i], stage + T::at(id + i * 16, k + lane / 8 % 2));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                multiply_add<kType>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

__device__ __forceinline__ void put(const Sums& sums, float* logits) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    float* own = logits + (warp / 4 * 32 + lane / 4) * kPitch + warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float* to = own + i * 16 * kPitch + j * 8;
            *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][0], sums[i][j][1]);
            *reinterpret_cast<float2*>(to + 8 * kPitch) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
}

}  // namespace
}  // namespace dllm
