// Runs the CPU core on exactly sized heap blocks, under the sanitizers: any read or write beside them stops the program.
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/include/dllm/commit.h"
#include "../csrc/include/dllm/decode_step.h"

using namespace dllm;

static std::mt19937 rng(1);
static std::int64_t draw(std::int64_t low, std::int64_t high) { return low + static_cast<std::int64_t>(rng() % static_cast<unsigned>(high - low)); }

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
std::unique_ptr<T[], Free> block(std::int64_t n) {  // exactly n elements, so that one more is an error
    return std::unique_ptr<T[], Free>(static_cast<T*>(std::malloc(static_cast<std::size_t>(n) * sizeof(T))));
}

static std::unique_ptr<char[], Free> matrix(Type type, std::int64_t rows, std::int64_t stride, std::int64_t dim, bool broken) {
    const std::int64_t n = (rows - 1) * stride + dim;
    const std::size_t width = type == Type::f32 ? 4 : 2;
    auto data = block<char>(n * static_cast<std::int64_t>(width));
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < n; ++i) {
        float x = normal(rng);
        if (broken && draw(0, 200) == 0) x = draw(0, 2) ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity();
        std::uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const std::uint16_t half = type == Type::bf16 ? static_cast<std::uint16_t>(bits >> 16) : static_cast<std::uint16_t>(0x3800u | (bits & 0x83FFu));
        std::memcpy(data.get() + static_cast<std::size_t>(i) * width, width == 4 ? static_cast<const void*>(&x) : &half, width);
    }
    return data;
}

// A team of threads, as a warp is on a GPU: barriers and reductions that really wait, so that the thread sanitizer sees a
// missing one.
struct Meeting {
    std::mutex mutex;
    std::condition_variable changed;
    int arrived = 0, round = 0;
    std::vector<std::int64_t> values;
    void wait(int lanes) {
        std::unique_lock<std::mutex> lock(mutex);
        const int own = round;
        if (++arrived == lanes) arrived = 0, ++round, changed.notify_all();
        else changed.wait(lock, [&] { return round != own; });
    }
};
struct ThreadTeam {
    int lane, lanes;
    Meeting* meeting;
    void sync() const { meeting->wait(lanes); }
    template <class Join>
    std::int64_t over_all(std::int64_t x, Join join) const {
        meeting->values[static_cast<std::size_t>(lane)] = x;
        sync();
        for (const std::int64_t other : meeting->values) x = join(x, other);
        sync();
        return x;
    }
    std::int64_t least(std::int64_t x) const { return over_all(x, [](auto p, auto q) { return p < q ? p : q; }); }
    std::int64_t most(std::int64_t x) const { return over_all(x, [](auto p, auto q) { return p > q ? p : q; }); }
    std::int64_t total(std::int64_t x) const { return over_all(x, [](auto p, auto q) { return p + q; }) - x; }
};

int main() {
    int calls = 0;
    for (const Type type : {Type::f32, Type::bf16, Type::f16})
        for (const std::int64_t dim : {1, 7, 64, 130, 1030})
            for (const std::int64_t vocab : {1, 23, 24, 127, 1600})
                for (const std::int64_t count : {1, 3, 4, 33}) {
                    const std::int64_t stride = dim + draw(0, 3), hidden_rows = count + 2;
                    const bool broken = draw(0, 4) == 0;
                    auto hidden = matrix(type, hidden_rows, stride, dim, broken), head = matrix(type, vocab, stride, dim, broken);
                    auto rows = block<std::int32_t>(count);
                    auto keys = block<std::int64_t>(3 * count), probe_ids = block<std::int64_t>(2 * count);
                    for (std::int64_t i = 0; i < count; ++i) rows[i] = static_cast<std::int32_t>(draw(0, hidden_rows));
                    for (std::int64_t i = 0; i < 3 * count; ++i) keys[i] = draw(0, 1000);
                    for (std::int64_t i = 0; i < 2 * count; ++i) probe_ids[i] = draw(0, vocab);
                    auto banned = block<std::int32_t>(1);
                    banned[0] = static_cast<std::int32_t>(vocab - 1);
                    auto ids = block<std::int64_t>(2 * count);
                    auto values = block<float>(5 * count), probes = block<float>(2 * count);
                    const int threads = static_cast<int>(draw(1, 4)), isa = static_cast<int>(draw(0, 3));
                    RowStatsArgs args{{hidden.get(), type, stride}, {head.get(), type, stride}, dim, vocab, rows.get(), count,
                                      banned.get(), nullptr, 1, 0, probe_ids.get(), 2, draw(0, 2) ? 0.7f : 0.0f, keys.get(),
                                      ids.get(), ids.get() + count, values.get(), values.get() + count, values.get() + 2 * count,
                                      values.get() + 3 * count, values.get() + 4 * count, probes.get(), nullptr};
                    const std::size_t size = row_stats_cpu_scratch(dim, vocab, count, threads);
                    void* scratch = std::aligned_alloc(64, (size + 63) / 64 * 64);
                    if (!row_stats_cpu(args, threads, isa == 2 && !cpu_has_avx2() ? 1 : isa, scratch)) return 1;
                    std::free(scratch);
                    ++calls;
                }
    for (int round = 0; round < 200; ++round) {
        const std::int64_t batch = draw(1, 4), width = draw(1, 9), prompt = draw(0, 3), blocks = draw(1, 3), length = prompt + blocks * width;
        const bool position = draw(0, 2);
        const std::int64_t dim = 16, vocab = 40, filter = draw(0, 4) ? draw(position ? 1 : width, 12) : 0, count = batch * width;
        const std::int64_t parameters = position ? (kFeatures + 2) * filter + 1 : 2 * filter * filter + 2 * filter;
        auto hidden = matrix(Type::f32, count, dim, dim, round % 5 == 0), head = matrix(Type::f32, vocab, dim, dim, false);
        auto sequences = block<std::int64_t>(batch), tokens = block<std::int64_t>(batch * length), seeds = block<std::int64_t>(batch);
        auto progress = block<std::int64_t>(batch * kProgress), quota = block<std::int64_t>(width), ends = block<std::int64_t>(1);
        auto undecided = block<std::uint8_t>(batch * length);
        auto predicted = block<std::int64_t>(batch * length);
        auto bounds = block<float>(width), weights = block<float>(filter > 0 ? parameters : 0);
        ends[0] = 3;
        for (std::int64_t i = 0; i < width; ++i) quota[i] = draw(1, 4), bounds[i] = static_cast<float>(draw(-3, 3));
        for (std::int64_t i = 0; filter > 0 && i < parameters; ++i) weights[i] = static_cast<float>(draw(-3, 4));
        for (std::int64_t b = 0; b < batch; ++b) {
            sequences[b] = b;
            seeds[b] = b;
            const std::int64_t start = prompt + width * draw(0, blocks);
            const std::int64_t values[kProgress] = {start, length, draw(0, width), length, draw(0, 5), width};
            std::memcpy(progress.get() + b * kProgress, values, sizeof(values));
            for (std::int64_t i = 0; i < length; ++i) {
                tokens[b * length + i] = 39;
                predicted[b * length + i] = draw(-1, vocab);
                undecided[b * length + i] = i >= start && (draw(0, 2) || i == start);
            }
        }
        auto ids = block<std::int64_t>(2 * count);
        auto values = block<float>(5 * count);
        for (std::int64_t i = 0; i < 2 * count; ++i) ids[i] = 0;
        for (std::int64_t i = 0; i < 5 * count; ++i) values[i] = -INFINITY;
        const RowStatsArgs stats{{hidden.get(), Type::f32, dim}, {head.get(), Type::f32, dim}, dim, vocab, nullptr, 0, nullptr, nullptr,
                                 0, 0, nullptr, 0, round % 3 ? 0.0f : 1.0f, nullptr, ids.get(), ids.get() + count, values.get(),
                                 values.get() + count, values.get() + 2 * count, values.get() + 3 * count, values.get() + 4 * count,
                                 nullptr, nullptr};
        const StepArgs step{batch, width, sequences.get(), length, prompt, width, 1, tokens.get(), undecided.get(),
                            predicted.get(), progress.get(), seeds.get(), quota.get(), bounds.get(), weights.get(), filter, 0.5,
                            round % 2, filter > 0 && position, filter > 0 && !position && round % 2 == 0, ends.get(), round % 4 ? 1 : 0, ends.get(), round % 5 < 3 ? 1 : 0,
                            ids.get(), values.get(), values.get() + count, values.get() + 3 * count, values.get() + 4 * count};
        const std::size_t size = row_stats_cpu_scratch(dim, vocab, count, 2);
        void* scratch = std::aligned_alloc(64, (size + 63) / 64 * 64);
        const std::vector<std::int64_t> old_tokens(tokens.get(), tokens.get() + batch * length), old_progress(progress.get(), progress.get() + batch * kProgress);
        const std::vector<std::int64_t> old_predicted(predicted.get(), predicted.get() + batch * length);
        const std::vector<std::uint8_t> old_undecided(undecided.get(), undecided.get() + batch * length);
        if (!decode_step_cpu(stats, step, 2, 0, scratch)) return 1;
        std::free(scratch);
        // the same decisions by several threads
        auto team_tokens = old_tokens, team_progress = old_progress, team_predicted = old_predicted;
        auto team_undecided = old_undecided;
        StepArgs by_team = step;
        by_team.tokens = team_tokens.data();
        by_team.predicted = team_predicted.data();
        by_team.progress = team_progress.data();
        by_team.undecided = team_undecided.data();
        const int lanes = static_cast<int>(draw(2, 5));
        for (std::int64_t r = 0; r < batch; ++r) {
            Meeting meeting;
            meeting.values.resize(static_cast<std::size_t>(lanes));
            std::vector<std::int32_t> ranks(static_cast<std::size_t>(width));
            CommitScratch shared;
            shared.rank = ranks.data();
            std::vector<std::thread> threads;
            for (int lane = 0; lane < lanes; ++lane)
                threads.emplace_back([&, lane] { commit_sequence(by_team, r, ThreadTeam{lane, lanes, &meeting}, shared); });
            for (auto& thread : threads) thread.join();
        }
        if (std::memcmp(team_tokens.data(), tokens.get(), team_tokens.size() * 8) != 0 ||
            std::memcmp(team_predicted.data(), predicted.get(), team_predicted.size() * 8) != 0 ||
            std::memcmp(team_progress.data(), progress.get(), team_progress.size() * 8) != 0 ||
            std::memcmp(team_undecided.data(), undecided.get(), team_undecided.size()) != 0)
            return 2;
        ++calls;
    }
    std::printf("%d calls\n", calls);
    return 0;
}
