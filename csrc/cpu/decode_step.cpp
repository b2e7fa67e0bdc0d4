// row_stats on the CPU: segments of the vocabulary are shared out to threads; each weight is read once for up to 32 rows.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "../include/dllm/commit.h"
#include "../include/dllm/philox.h"
#include "kernel.h"

namespace dllm {
namespace {

// Ids whose state is kept apart. Fixed, so that results do not depend on the number of threads.
constexpr std::int64_t kSegment = 1536;
static_assert(kSegment % kIds == 0, "a segment is whole groups of ids");

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

#ifdef DLLM_AVX2
bool has_avx512bf16() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512bf16");
}
#endif

// The kernel for a call; isa as in decode_step.h.
Kernel kernel_for(int isa, Type hidden, Type head) {
#ifdef DLLM_AVX2
    if (isa == 1 || !cpu_has_avx2()) return kScalar;
    Kernel kernel = kAvx2;
    if (isa != 2 && hidden == Type::bf16 && head == Type::bf16 && has_avx512bf16()) {
        kernel.elements = bf16::kElements;
        kernel.bytes = bf16::kElements * 2;
        kernel.lanes = bf16::kLanes;
        kernel.tile_ids = bf16::kTileIds;
        kernel.tile_rows = bf16::kTileRows;
        kernel.pack = bf16::pack;
        kernel.products = bf16::products;
        kernel.add_up = bf16::add_up;
    }
    return kernel;
#else
    (void)isa, (void)hidden, (void)head;
    return kScalar;
#endif
}

// Where the parts of the scratch behind the packed rows lie, in bytes. Sized for the kernel that needs most, whichever runs.
struct Layout {
    std::int64_t rows, segments, ids_bytes;
    std::size_t states, worker, worker_size, total;
    Layout(std::int64_t dim, std::int64_t vocab, std::int64_t count, int threads) {
        constexpr std::int64_t most_lanes = 16, most_elements = 32;
        // the packed rows take at most half a megabyte, unless 4 of them are longer
        const std::int64_t bytes = round_up(dim, most_elements) * 4;
        rows = std::max<std::int64_t>(std::min<std::int64_t>({count, kRows, (1 << 19) / bytes}), std::min<std::int64_t>(count, 4));
        segments = (vocab + kSegment - 1) / kSegment;
        ids_bytes = kIds * std::min(bytes, kDepth * 4);
        states = static_cast<std::size_t>(rows * bytes);
        worker = states + static_cast<std::size_t>(round_up(segments * rows * static_cast<std::int64_t>(sizeof(RowState)), 64));
        worker_size = static_cast<std::size_t>(ids_bytes + kIds * rows * most_lanes * 4 + round_up(kIds * rows * 4, 64));
        total = worker + static_cast<std::size_t>(threads) * worker_size;
    }
};

const char* element(const Matrix& m, std::int64_t row, std::int64_t column) {
    return static_cast<const char*>(m.data) + (row * m.stride + column) * (m.type == Type::f32 ? 4 : 2);
}

// Walks an ascending list of ids once; at(id) must be asked in ascending order.
class Marks {
   public:
    Marks(const std::int32_t* ids, std::int64_t count, std::int64_t from)
        : at_(std::lower_bound(ids, ids + count, static_cast<std::int32_t>(from))), end_(ids + count) {}
    bool any_below(std::int64_t id) const { return at_ != end_ && *at_ < id; }
    bool take(std::int64_t id) {
        if (at_ == end_ || *at_ != id) return false;
        ++at_;
        return true;
    }

   private:
    const std::int32_t *at_, *end_;
};

// Scores one segment of the vocabulary for the rows [first_row, first_row + rows) of the call.
void score_segment(const RowStatsArgs& a, const Kernel& kernel, const Layout& at, std::int64_t first_row, int rows,
                   std::int64_t segment, const char* hidden, RowState* states, char* scratch) {
    char* ids = scratch;
    float* sums = reinterpret_cast<float*>(ids + at.ids_bytes);
    float* logits = sums + kIds * at.rows * kernel.lanes;
    const std::int64_t begin = segment * kSegment, end = std::min(begin + kSegment, a.vocab);
    const std::int64_t width = a.head.type == Type::f32 ? 4 : 2;
    Marks banned(a.banned, a.banned_count, begin), excluded(a.excluded, a.excluded_count, begin);
    for (int r = 0; r < rows; ++r) states[r] = empty_row();

    for (std::int64_t first = begin; first < end; first += kIds) {
        const int count = static_cast<int>(std::min<std::int64_t>(kIds, end - first));
        for (std::int64_t k = 0; k < a.dim; k += kDepth) {
            const std::int64_t n = std::min(kDepth, a.dim - k), vectors = (n + kernel.elements - 1) / kernel.elements;
            for (int i = 0; i < count; ++i) {  // what lies where ids beyond the last would be is not looked at
                const int in_tile = i % kernel.tile_ids;
                kernel.pack(element(a.head, first + i, k), a.head.type, n,
                            ids + ((i - in_tile) * vectors + in_tile) * kernel.bytes, kernel.tile_ids * kernel.bytes);
            }
            // while the products are made, the next weights come in
            const bool last = k + kDepth >= a.dim;
            const std::int64_t next_id = last ? first + kIds : first, next_k = last ? 0 : k + kDepth;
            const std::int64_t bytes = std::min(kDepth, a.dim - next_k) * width;
            const Ahead ahead{element(a.head, next_id, next_k), a.head.stride * width, (bytes + 63) / 64,
                              std::clamp<std::int64_t>(end - next_id, 0, kIds)};
            kernel.products(ids, hidden + k / kernel.elements * rows * kernel.bytes, vectors, rows, k == 0, sums, ahead);
        }
        kernel.add_up(sums, rows, logits);

        std::uint8_t flags[kIds];
        const bool flagged = banned.any_below(first + count) || excluded.any_below(first + count);
        if (flagged)
            for (int i = 0; i < count; ++i)
                flags[i] = static_cast<std::uint8_t>((banned.take(first + i) ? 1 : 0) | (excluded.take(first + i) ? 2 : 0));
        for (int r = 0; r < rows; ++r) {
            const float* x = logits + r * kIds;
            const std::int64_t row = first_row + r;
            if (a.temperature > 0) {
                float noise[4];
                for (int i = 0; i < count; ++i) {
                    if (i % 4 == 0) gumbel4(a.noise_keys + 3 * row, static_cast<std::int32_t>((first + i) / 4), noise);
                    add_id(states[r], static_cast<std::int32_t>(first + i), x[i], a.temperature * noise[i % 4],
                           flagged && (flags[i] & 1), flagged && (flags[i] & 2));
                }
            } else {
                kernel.absorb(states[r], x, count, static_cast<std::int32_t>(first), flagged ? flags : nullptr);
            }
            for (std::int64_t p = 0; p < a.probes; ++p) {
                const std::int64_t id = a.probe_ids[row * a.probes + p];
                if (id >= first && id < first + count) a.probe_logits[row * a.probes + p] = x[id - first];
            }
        }
    }
}

}  // namespace

bool cpu_has_avx2() {
#ifdef DLLM_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

std::size_t row_stats_cpu_scratch(std::int64_t dim, std::int64_t vocab, std::int64_t count, int threads) {
    return Layout(dim, vocab, count, threads).total + 63;  // it is aligned here
}

bool row_stats_cpu(const RowStatsArgs& a, int threads, int isa, void* scratch) {
    if (isa == 2 && !cpu_has_avx2()) return false;
    const Kernel kernel = kernel_for(isa, a.hidden.type, a.head.type);
    const Layout at(a.dim, a.vocab, a.count, threads);
    char* hidden = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(scratch) + 63) / 64 * 64);
    RowState* states = reinterpret_cast<RowState*>(hidden + at.states);

    for (std::int64_t first_row = 0; first_row < a.count; first_row += at.rows) {
        const int rows = static_cast<int>(std::min(at.rows, a.count - first_row));
        for (std::int64_t k = 0; k < a.dim; k += kDepth) {
            const std::int64_t n = std::min(kDepth, a.dim - k), vectors = (n + kernel.elements - 1) / kernel.elements;
            for (int r = 0; r < rows; ++r) {
                const int in_tile = r % kernel.tile_rows, tile = r - in_tile;
                char* to = hidden + (k / kernel.elements * rows + tile * vectors + in_tile) * kernel.bytes;
                kernel.pack(element(a.hidden, a.rows[first_row + r], k), a.hidden.type, n, to,
                            std::min(kernel.tile_rows, rows - tile) * kernel.bytes);
            }
        }
        std::atomic<std::int64_t> next{0};
        auto work = [&](int worker) {
            char* own = hidden + at.worker + static_cast<std::size_t>(worker) * at.worker_size;
            for (std::int64_t s; (s = next.fetch_add(1)) < at.segments;)
                score_segment(a, kernel, at, first_row, rows, s, hidden, states + s * at.rows, own);
        };
        // starting threads costs about 0.05 ms: not for less than 0.2 ms of work
        const double work_items = static_cast<double>(rows) * static_cast<double>(a.vocab) * static_cast<double>(a.dim);
        const int wanted = work_items < 1e7 ? 1 : static_cast<int>(std::min<std::int64_t>(threads, at.segments));
        std::vector<std::thread> others;
        others.reserve(static_cast<std::size_t>(wanted - 1));
        for (int w = 1; w < wanted; ++w) others.emplace_back(work, w);
        work(0);
        for (auto& thread : others) thread.join();

        for (int r = 0; r < rows; ++r) {
            RowState row = states[r];
            for (std::int64_t s = 1; s < at.segments; ++s) merge_rows(row, states[s * at.rows + r]);
            const RowResult out = finish_row(row);
            const std::int64_t i = a.out_at == nullptr ? first_row + r : a.out_at[first_row + r];
            a.token[i] = out.token;
            a.second_token[i] = out.second_token;
            a.logit[i] = out.logit;
            a.second_logit[i] = out.second_logit;
            a.logsumexp[i] = out.logsumexp;
            a.log_odds[i] = out.log_odds;
            a.entropy[i] = out.entropy;
        }
    }
    return true;
}

bool decode_step_cpu(RowStatsArgs stats, const StepArgs& step, int threads, int isa, void* scratch) {
    std::vector<std::int32_t> rows;
    std::vector<std::int64_t> keys;
    for (std::int64_t r = 0; r < step.batch; ++r) {
        const std::int64_t b = step.sequences[r], *progress = step.progress + b * kProgress;
        for (std::int64_t i = 0; i < step.width; ++i) {
            const std::int64_t column = progress[kBlockStart] + i;
            if (!step.all_rows && !step.undecided[b * step.length + column]) continue;
            rows.push_back(static_cast<std::int32_t>(r * step.width + i));
            keys.insert(keys.end(), {step.seeds[b], column - step.prompt_length, progress[kStep]});
        }
    }
    stats.rows = stats.out_at = rows.data();
    stats.count = static_cast<std::int64_t>(rows.size());
    stats.noise_keys = keys.data();
    if (!rows.empty() && !row_stats_cpu(stats, threads, isa, scratch)) return false;
    std::vector<std::int32_t> ranks(static_cast<std::size_t>(step.width));
    CommitScratch shared;
    shared.rank = ranks.data();
    for (std::int64_t r = 0; r < step.batch; ++r) commit_sequence(step, r, OneThread{}, shared);
    return true;
}

}  // namespace dllm
