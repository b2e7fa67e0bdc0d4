// Select, commit, end of text: what a step does once the statistics of its rows are known. One copy of the decisions for
// host and device; dllm_engine/reference.py (commit_) and rules.py (select) define them.
#pragma once

#include "decode_step.h"
#include "row_stats.h"

namespace dllm {

// Columns of a sequence's progress, as in dllm_engine/state.py.
enum Progress { kBlockStart, kActiveEnd, kStepInBlock, kFailedAt, kStep, kLeft, kProgress };

// The threads that work on one sequence. Every lane makes the same calls in the same order; each of them is a barrier.
struct OneThread {
    static constexpr int lane = 0, lanes = 1;
    void sync() const {}
    std::int64_t least(std::int64_t x) const { return x; }
    std::int64_t most(std::int64_t x) const { return x; }
    std::int64_t total(std::int64_t x) const { return x; }
};

constexpr std::int64_t kMaxFilter = 128;

#ifdef __CUDA_ARCH__
#define DLLM_ROLLED _Pragma("unroll 1")  // unrolled, these loops take registers that the scoring before them needs
#else
#define DLLM_ROLLED
#endif

struct CommitScratch {  // shared by the lanes
    std::int32_t* rank;  // [width]
    double layer[kMaxFilter];
    float confidence[kMaxFilter];
};

constexpr int kFeatures = 15;

DLLM_HD float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// The features of an undecided position, in the order of dllm_engine/features.py: equal to its numbers in every bit,
// given the statistics, so that both ways of a decode decide alike. All divisors are powers of two.
DLLM_HD void position_features(const StepArgs& a, std::int64_t first_row, std::int64_t first_column,
                               std::int64_t active, std::int64_t i, float (&x)[kFeatures]) {
    const float sure = 3.0f;  // the odds of a decided position
    const std::uint8_t* open = a.undecided + first_column;
    const auto odds = [&](std::int64_t j) {
        if (j >= active) return 0.0f;  // right of the block or behind the end of the text
        return j >= 0 && open[j] ? clamped(a.log_odds[first_row + j], -12.0f, 12.0f) / 4.0f : sure;
    };
    float before = sure, greatest = -sure;
    std::int32_t open_before = 0, open_all = 0;
    for (std::int64_t j = 0; j < active; ++j) {
        if (!open[j]) continue;
        const float other = odds(j);
        ++open_all;
        if (other > greatest) greatest = other;
        if (j >= i) continue;
        ++open_before;
        if (other < before) before = other;
    }
    const std::int64_t row = first_row + i;
    x[0] = odds(i);
    x[1] = clamped(a.logit[row] - a.second_logit[row], 0.0f, 12.0f) / 4.0f;
    x[2] = clamped(a.entropy[row], 0.0f, 6.0f) / 2.0f;
    x[3] = static_cast<float>(i) / 32.0f;
    x[4] = odds(i - 2);
    x[5] = odds(i - 1);
    x[6] = odds(i + 1);
    x[7] = odds(i + 2);
    x[8] = i > 0 && open[i - 1] ? 0.0f : 1.0f;
    x[9] = i + 1 < active && !open[i + 1] ? 1.0f : 0.0f;
    x[10] = before;
    x[11] = static_cast<float>(open_before) / 32.0f;
    x[12] = greatest;
    x[13] = static_cast<float>(open_all) / 32.0f;
    x[14] = a.token[row] == a.predicted[first_column + i] ? 1.0f : 0.0f;
}

// What the filter of a position says; in double, so that no order of additions shows.
DLLM_HD double position_filter(const StepArgs& a, const float (&x)[kFeatures]) {
    const std::int64_t units = a.filter_length;
    const float *w1 = a.weights, *b1 = w1 + units * kFeatures, *w2 = b1 + units, *b2 = w2 + units;
    double sum = *b2;
    for (std::int64_t u = 0; u < units; ++u) {
        double unit = b1[u];
        for (int k = 0; k < kFeatures; ++k)
            unit += static_cast<double>(w1[u * kFeatures + k]) * static_cast<double>(x[k]);
        if (unit > 0.0) sum += static_cast<double>(w2[u]) * unit;
    }
    return sum;
}

// An undecided score of -inf (or a failed one) still ranks before every decided position.
DLLM_HD float ranked(float score) {
    const float least = -3.402823466e38f;
    return score >= least ? score : least;
}

// Of two undecided positions: the higher log-odds first, of equal ones the lower position.
DLLM_HD bool ranks_before(const float* odds, std::int64_t i, std::int64_t other) {
    const float own = ranked(odds[i]), rival = ranked(odds[other]);
    return own > rival || (own == rival && i < other);
}

DLLM_HD bool among(std::int64_t id, const std::int64_t* ids, std::int64_t count) {
    DLLM_ROLLED
    for (std::int64_t e = 0; e < count; ++e)
        if (id == ids[e]) return true;
    return false;
}

template <class Team>
DLLM_HD void commit_sequence(const StepArgs& a, std::int64_t call_row, const Team& team, CommitScratch& scratch) {
    const std::int64_t b = a.sequences[call_row], width = a.width;
    std::int64_t* progress = a.progress + b * kProgress;
    std::int64_t* tokens = a.tokens + b * a.length;
    std::uint8_t* undecided = a.undecided + b * a.length;
    std::int64_t* predicted = a.predicted + b * a.length;
    const std::int64_t start = progress[kBlockStart], old_end = progress[kActiveEnd];
    // Rows that fill up a call, all the same one, end before they begin: some must not read what others move on.
    if (start >= old_end) return;
    const std::int64_t* token = a.token + call_row * width;
    const float* odds = a.log_odds + call_row * width;

    // Ranks by log-odds, equal ones by position; the largest n of the bounds; the first failure. What a filter selects
    // then ranks -1.
    std::int64_t failed_at = a.length, picked = 0;
    for (std::int64_t i = team.lane; i < width; i += team.lanes) {
        if (!undecided[start + i]) continue;
        if (token[i] < 0 || odds[i] != odds[i]) failed_at = failed_at < start + i ? failed_at : start + i;
        std::int32_t rank = 0;
        DLLM_ROLLED
        for (std::int64_t j = 0; j < width; ++j) rank += undecided[start + j] && ranks_before(odds, j, i);
        scratch.rank[i] = rank;
        if (a.filter_length == 0 && odds[i] >= a.bounds[rank] && rank + 1 > picked) picked = rank + 1;
    }
    failed_at = team.least(failed_at);
    picked = team.most(picked);

    if (a.position) {
        const std::int64_t active = old_end - start < width ? old_end - start : width;
        for (std::int64_t i = team.lane; i < width; i += team.lanes) {
            if (!undecided[start + i]) continue;
            float x[kFeatures];
            position_features(a, call_row * width, b * a.length + start, active, i, x);
            if (position_filter(a, x) > a.cut) scratch.rank[i] = -1;
        }
    }

    // the published filter: two small layers over the block's confidences, in double so that no order of additions shows
    const std::int64_t size = a.position ? 0 : a.filter_length;
    const float *w1 = a.weights, *b1 = w1 + size * size, *w2 = b1 + size, *b2 = w2 + size * size;
    if (size > 0) {
        for (std::int64_t i = team.lane; i < size; i += team.lanes) {
            float x = 0.0f;
            if (i < width && start + i < old_end) {
                x = a.decided_is_one && !undecided[start + i]
                        ? 1.0f
                        : static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(odds[i]))));
            }
            scratch.confidence[i] = x;
        }
        team.sync();
        for (std::int64_t i = team.lane; i < size; i += team.lanes) {
            double sum = b1[i];
            for (std::int64_t k = 0; k < size; ++k)
                sum += static_cast<double>(w1[i * size + k]) * static_cast<double>(scratch.confidence[k]);
            scratch.layer[i] = sum > 0.0 ? sum : 0.0;
        }
        team.sync();
        for (std::int64_t i = team.lane; i < width; i += team.lanes) {
            if (!undecided[start + i]) continue;
            double sum = b2[i];
            for (std::int64_t k = 0; k < size; ++k) sum += static_cast<double>(w2[i * size + k]) * scratch.layer[k];
            if (sum > a.cut) scratch.rank[i] = -1;
        }
    }

    // ids that wait: behind an undecided position that the rule leaves they do not rank, behind one that the quota
    // leaves too they are not committed
    const std::int64_t quota = a.quota[progress[kStepInBlock]];
    std::int64_t left_out = width, gap = width;
    if (a.waiting_count > 0) {
        for (std::int64_t i = team.lane; i < width; i += team.lanes)
            if (undecided[start + i] && scratch.rank[i] >= picked && i < left_out) left_out = i;
        left_out = team.least(left_out);
    }
    const auto waits = [&](std::int64_t i, std::int64_t behind) {
        return i > behind && among(token[i], a.waiting_ids, a.waiting_count);
    };
    for (std::int64_t i = team.lane; i < width; i += team.lanes) {
        if (!undecided[start + i]) continue;
        std::int32_t rank = scratch.rank[i];
        bool chosen = rank < picked;
        if (!chosen && !waits(i, left_out)) {
            DLLM_ROLLED
            for (std::int64_t j = left_out + 1; j < width; ++j)
                rank -= undecided[start + j] && waits(j, left_out) && ranks_before(odds, j, i);
            chosen = rank < quota;
        }
        scratch.rank[i] = chosen ? -1 : 0;
        if (!chosen && i < gap) gap = i;
    }
    if (a.waiting_count > 0) gap = team.least(gap);
    team.sync();  // a commit changes what other lanes look at

    std::int64_t end = old_end;
    for (std::int64_t i = team.lane; i < width; i += team.lanes) {
        if (!undecided[start + i]) continue;
        predicted[start + i] = token[i];
        if (scratch.rank[i] >= 0 || waits(i, gap) || token[i] < 0 || odds[i] != odds[i]) continue;
        tokens[start + i] = token[i];
        undecided[start + i] = 0;
        if (start + i + 1 < end && among(token[i], a.end_ids, a.end_count)) end = start + i + 1;
    }
    end = team.least(end);  // also a barrier
    for (std::int64_t i = end + team.lane; i < old_end; i += team.lanes) {
        tokens[i] = a.fill_id;
        undecided[i] = 0;
    }
    team.sync();
    std::int64_t in_block = 0, left = 0;
    for (std::int64_t i = a.prompt_length + team.lane; i < end; i += team.lanes) {
        left += undecided[i];
        in_block += undecided[i] && i >= start && i < start + width;
    }
    left = team.total(left);
    in_block = team.total(in_block);
    if (team.lane == 0) {
        progress[kActiveEnd] = end;
        progress[kLeft] = left;
        if (failed_at < progress[kFailedAt]) progress[kFailedAt] = failed_at;
        progress[kStep] += 1;
        progress[kStepInBlock] = in_block > 0 ? progress[kStepInBlock] + 1 : 0;
        if (in_block == 0) progress[kBlockStart] = start + a.block_length;
    }
}

}  // namespace dllm
