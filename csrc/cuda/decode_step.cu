// row_stats and decode_step on a GPU, in one launch: tensor-core tiles of the LM head, an online state of every row, a
// tree of merges, then the decisions.
//
// A unit of work is a tile of rows and a segment of the vocabulary. Which logits are added up in which order depends on
// the sizes of the LM head alone, so a row's results are bitwise the same in any batch and in every run.
#include <cstring>

#include "../include/dllm/commit.h"
#include "../include/dllm/philox.h"
#include "tiles.h"

namespace dllm {
namespace {

// -- states -----------------------------------------------------------------------------------------------------------

// Walks an ascending list of ids once.
class Marks {
   public:
    __device__ Marks(const std::int32_t* ids, std::int64_t count, std::int64_t from) : at_(ids), end_(ids + count) {
        while (count > 0) {
            const std::int64_t half = count / 2;
            const bool below = at_[half] < from;
            at_ += below ? half + 1 : 0;
            count = below ? count - half - 1 : half;
        }
    }
    __device__ bool any_below(std::int64_t id) const { return at_ != end_ && *at_ < id; }
    __device__ bool has(std::int64_t id) {  // ids in ascending order
        while (any_below(id)) ++at_;
        return at_ != end_ && *at_ == id;
    }

   private:
    const std::int32_t *at_, *end_;
};

// Absorbs the thread's share of a row's tile: every fourth group of four ids.
__device__ void absorb(RowState& row, const float* logits, const Call& c, std::int64_t first, std::int64_t r) {
    const RowStatsArgs& a = c.stats;
    const int own = static_cast<int>(threadIdx.x) % kShare * 4;
    const bool noisy = a.temperature > 0;
    std::int64_t key[3] = {0, 0, 0};
    if (noisy) noise_key(c, r, key);
    Marks banned(a.banned, a.banned_count, first), excluded(a.excluded, a.excluded_count, first);

    for (std::int64_t p = threadIdx.x % kShare; p < a.probes; p += kShare) {
        const std::int64_t id = a.probe_ids[r * a.probes + p];
        if (id >= first && id < first + kIds && id < a.vocab) a.probe_logits[r * a.probes + p] = logits[id - first];
    }

    // Usual case: all plain ids. They get a state of their own in float32, or join the rest if none can win.
    bool plain = first + kIds <= a.vocab && !banned.any_below(first + kIds) && !excluded.any_below(first + kIds);
    RowState part = empty_row();
    if (plain) {
#pragma unroll 1
        for (int j = own; j < kIds; j += 4 * kShare) {
            const float4 four = *reinterpret_cast<const float4*>(logits + j);
            const float x[4] = {four.x, four.y, four.z, four.w};
            float noise[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (noisy) gumbel4(key, static_cast<std::int32_t>((first + j) / 4), noise);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const std::int32_t id = static_cast<std::int32_t>(first + j + e);
                plain &= x[e] < INFINITY;  // false for NaN too
                const float score = x[e] + a.temperature * noise[e];
                if (score > part.won) {
                    part.won = score;
                    part.logit = part.inside = x[e];
                    part.token = id;
                }
                if (x[e] > part.best) {
                    part.second = part.best;
                    part.second_id = part.best_id;
                    part.best = x[e];
                    part.best_id = id;
                } else if (x[e] > part.second) {
                    part.second = x[e];
                    part.second_id = id;
                }
            }
        }
    }
    if (!plain) {
#pragma unroll 1
        for (int j = own; j < kIds && first + j < a.vocab; j += 4 * kShare) {
            float noise[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (noisy) gumbel4(key, static_cast<std::int32_t>((first + j) / 4), noise);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const std::int64_t id = first + j + e;
                if (id < a.vocab)
                    add_id(row, static_cast<std::int32_t>(id), logits[j + e], a.temperature * noise[e], banned.has(id),
                           excluded.has(id));
            }
        }
        return;
    }
    const bool joins = part.won <= row.won && part.best <= row.second && part.best <= row.top;
    const float top = joins ? row.top : part.token == part.best_id ? part.second : part.best;
    float sum = 0.0f, weighted = 0.0f;
    if (top > -INFINITY) {
#pragma unroll 1
        for (int j = own; j < kIds; j += 4 * kShare) {
            const float4 four = *reinterpret_cast<const float4*>(logits + j);
            const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float shift = x[e] - top, scale = expf(shift);
                const bool counts = scale > 0.0f && (joins || part.token != first + j + e);
                sum += counts ? scale : 0.0f;
                weighted += counts ? shift * scale : 0.0f;
            }
        }
    }
    if (joins) {
        row.sum += sum;
        row.weighted += weighted;
    } else {
        part.top = top;
        part.sum = sum;
        part.weighted = weighted;
        merge_rows(row, part);
    }
}

constexpr int kStateWords = sizeof(RowState) / 8;
static_assert(sizeof(RowState) % 8 == 0, "a state is moved in words of eight bytes");

// Merges the four shares of each row; the first thread of the four then holds the whole.
__device__ void merge_shares(RowState& row) {
#pragma unroll
    for (int distance = 1; distance < kShare; distance *= 2) {
        unsigned long long words[kStateWords];
        memcpy(words, &row, sizeof(RowState));
#pragma unroll
        for (int i = 0; i < kStateWords; ++i) words[i] = __shfl_down_sync(kAll, words[i], distance);
        RowState other;
        memcpy(&other, words, sizeof(RowState));
        merge_rows(row, other);
    }
}

// Whether this block is the last of `members`. What the others wrote before is then visible to all its threads, and
// the ticket is 0 again.
__device__ bool arrives_last(std::uint32_t* ticket, std::int64_t members) {
    __threadfence();
    __syncthreads();
    const unsigned last = static_cast<unsigned>(members - 1);
    const bool is_last = __syncthreads_or(threadIdx.x == 0 && atomicInc(ticket, last) == last);
    if (is_last) __threadfence();
    return is_last;
}

// Writes the states of a tile's rows over one segment. The last of 32 neighbours merges them and goes on with the
// result, level by level; the block that is left at the end writes the rows' results.
template <int kRows>
__device__ void climb(RowState& row, const Call& c, std::int64_t tile, std::int64_t segment) {
    const RowStatsArgs& a = c.stats;
    const int share = static_cast<int>(threadIdx.x) % kShare;
    const std::int64_t r = tile * kRows + threadIdx.x / kShare;
    std::uint32_t* ticket = c.ticket + 1 + tile * c.tickets;
    RowState* level = c.states + r;
    merge_shares(row);
    for (std::int64_t nodes = c.segments, node = segment; nodes > 1;) {
        if (share == 0 && r < a.count) level[node * a.count] = row;
        const std::int64_t group = node / kFan, from = group * kFan;
        const int members = static_cast<int>(nodes - from < kFan ? nodes - from : kFan);
        if (!arrives_last(ticket + group, members)) return;
        row = empty_row();
        constexpr int kOwn = kFan / kShare, kAtOnce = 4;  // loads under way together: each takes a microsecond
#pragma unroll 1
        for (int m = share * kOwn; m < (share + 1) * kOwn; m += kAtOnce) {
            RowState parts[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                parts[i] = empty_row();
                if (m + i >= members || r >= a.count) continue;
                // past the first-level cache, which need not hold what other processors wrote
                const auto* words = reinterpret_cast<const unsigned long long*>(level + (from + m + i) * a.count);
                unsigned long long copy[kStateWords];
#pragma unroll
                for (int w = 0; w < kStateWords; ++w) copy[w] = __ldcg(words + w);
                memcpy(&parts[i], copy, sizeof(RowState));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) merge_rows(row, parts[i]);
        }
        merge_shares(row);
        level += nodes * a.count;
        nodes = (nodes + kFan - 1) / kFan;
        ticket += nodes;
        node = group;
    }
    if (share != 0 || r >= a.count) return;
    const RowResult out = finish_row(row);
    a.token[r] = out.token;
    a.second_token[r] = out.second_token;
    a.logit[r] = out.logit;
    a.second_logit[r] = out.second_logit;
    a.logsumexp[r] = out.logsumexp;
    a.log_odds[r] = out.log_odds;
    a.entropy[r] = out.entropy;
}

// -- decisions --------------------------------------------------------------------------------------------------------

// A warp decides for a sequence. Shuffles do not order memory, so every exchange is a barrier first.
struct WarpTeam {
    static constexpr int lanes = kWarp;
    int lane;
    __device__ void sync() const { __syncwarp(); }
    template <class Join>
    __device__ std::int64_t over_all(long long x, Join join) const {
        __syncwarp();
        for (int distance = kWarp / 2; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(kAll, x, distance));
        return x;
    }
    __device__ std::int64_t least(std::int64_t x) const {
        return over_all(x, [](long long p, long long q) { return p < q ? p : q; });
    }
    __device__ std::int64_t most(std::int64_t x) const {
        return over_all(x, [](long long p, long long q) { return p > q ? p : q; });
    }
    __device__ std::int64_t total(std::int64_t x) const {
        return over_all(x, [](long long p, long long q) { return p + q; });
    }
};

template <Type kType, int kRows>
__global__ void __launch_bounds__(Tile<kRows>::kThreads, 2) decode_step_kernel(const __grid_constant__ Call c) {
    using T = Tile<kRows>;
    extern __shared__ __align__(128) unsigned char shared[];
    const std::uint32_t stages = shared_address(shared);
    float* logits = reinterpret_cast<float*>(shared + kStages * T::kStage);
    const std::int64_t row_in_tile = threadIdx.x / kShare, units = c.tiles * c.segments;

    Loader<kRows> loader(c, blockIdx.x);
    int stage = 0, ahead = kStages - 1;
    for (int s = 0; s < ahead; ++s) loader.load(stages + s * T::kStage);
    std::int64_t unit = next_unit<kRows>(c, blockIdx.x);
    for (; unit < units; unit = next_unit<kRows>(c, unit + gridDim.x)) {
        const std::int64_t tile = unit % c.tiles, segment = unit / c.tiles, r = tile * kRows + row_in_tile;
        const std::int64_t begin = segment * kSegment, end = segment_end(c, segment);
        RowState row = empty_row();
        row.bad = hidden_row(c, r) < 0;
        for (std::int64_t first = begin; first < end; first += kIds) {
            Sums sums = {};
            for (std::int64_t k = 0; k < c.stats.dim; k += T::kDepth) {
                wait_for_copies<kStages - 2>();
                __syncthreads();  // the part is there for all, and nobody reads the one before it any more
                loader.load(stages + ahead * T::kStage);
                multiply<kType, kRows>(sums, stages + stage * T::kStage);
                stage = stage + 1 == kStages ? 0 : stage + 1;
                ahead = ahead + 1 == kStages ? 0 : ahead + 1;
            }
            put(sums, logits);
            __syncthreads();
            if (r < c.stats.count) absorb(row, logits + row_in_tile * kPitch, c, first, r);
        }
        climb<kRows>(row, c, tile, segment);
    }

    if (c.step.batch == 0 || !arrives_last(c.ticket, gridDim.x)) return;
    constexpr int kWarps = T::kThreads / kWarp;
    static_assert(kWarps * sizeof(CommitScratch) <= T::kShared, "the stages' memory holds every warp's scratch");
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    CommitScratch& scratch = reinterpret_cast<CommitScratch*>(shared)[warp];
    for (std::int64_t s = warp; s < c.step.batch; s += kWarps) {
        if (threadIdx.x % kWarp == 0) scratch.rank = c.ranks + s * c.step.width;
        __syncwarp();
        commit_sequence(c.step, s, WarpTeam{static_cast<int>(threadIdx.x) % kWarp}, scratch);
    }
}

// -- host -------------------------------------------------------------------------------------------------------------

template <Type kType, int kRows>
cudaError_t launch_tiles(const Call& c, cudaStream_t stream) {
    using T = Tile<kRows>;
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const auto kernel = decode_step_kernel<kType, kRows>;
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kShared);
    if (error != cudaSuccess) return error;
    const std::int64_t units = c.tiles * c.segments, most = 2 * static_cast<std::int64_t>(processors);
    kernel<<<static_cast<unsigned>(units < most ? units : most), T::kThreads, T::kShared, stream>>>(c);
    return cudaGetLastError();
}

}  // namespace

CudaWorkspace cuda_workspace(std::int64_t vocab, std::int64_t count) {
    CudaWorkspace w{};
    w.tile_rows = count <= 32 ? 32 : 64;
    w.tiles = (count + w.tile_rows - 1) / w.tile_rows;
    w.segments = (vocab + kSegment - 1) / kSegment;
    std::int64_t states = 0;
    for (std::int64_t nodes = w.segments; nodes > 1;) {
        states += nodes;
        nodes = (nodes + kFan - 1) / kFan;
        w.tile_tickets += nodes;
    }
    w.tickets = 1 + w.tiles * w.tile_tickets;
    w.ranks_at = states * count * static_cast<std::int64_t>(sizeof(RowState));
    w.bytes = w.ranks_at + count * 4;
    return w;
}

int decode_step_cuda(const RowStatsArgs& stats, std::int64_t hidden_rows, const StepArgs& step, std::uint32_t* tickets,
                     void* workspace, void* stream) {
    const CudaWorkspace w = cuda_workspace(stats.vocab, stats.count);
    const Call c{stats, step, hidden_rows, w.tiles, w.segments, w.tile_tickets, tickets,
                 static_cast<RowState*>(workspace),
                 reinterpret_cast<std::int32_t*>(static_cast<char*>(workspace) + w.ranks_at)};
    const auto queue = static_cast<cudaStream_t>(stream);
    const bool few = w.tile_rows == 32;
    if (stats.count <= 0 || stats.dim % 8 != 0 || stats.hidden.type != stats.head.type) return cudaErrorInvalidValue;
    switch (stats.head.type) {
        case Type::bf16: return few ? launch_tiles<Type::bf16, 32>(c, queue) : launch_tiles<Type::bf16, 64>(c, queue);
        case Type::f16: return few ? launch_tiles<Type::f16, 32>(c, queue) : launch_tiles<Type::f16, 64>(c, queue);
        default: return cudaErrorInvalidValue;
    }
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dllm
