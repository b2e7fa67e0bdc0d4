// The online state of one LM-head row, and its merge. One copy of the math for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DLLM_HD __host__ __device__ __forceinline__
#else
#define DLLM_HD inline
#endif

namespace dllm {

// What has been seen of a row so far. The sums leave the winner out: sigmoid(log-odds) then goes on telling rows apart
// whose float32 probability has already rounded to 1. They are doubles: 126,464 float32 additions lose too much.
struct RowState {
    float won;        // the score that won: logit, plus noise when sampling
    float logit;      // of the winner, without noise
    float inside;     // of the winner, as the normaliser sees it: -inf if excluded
    float best;       // the two best allowed ids, without noise
    float second;
    float top;        // largest logit among the rest; the sums below are relative to it
    std::int32_t token;
    std::int32_t best_id;
    std::int32_t second_id;
    std::int32_t bad;  // NaN or +inf was seen
    double sum;        // Σ e^(x - top) over the rest of the normaliser
    double weighted;   // Σ (x - top) e^(x - top)
};

struct RowResult {
    std::int64_t token, second_token;
    float logit, second_logit, logsumexp, log_odds, entropy;
};

DLLM_HD RowState empty_row() {
    const float none = -INFINITY;
    return {none, none, none, none, none, none, -1, -1, -1, 0, 0.0, 0.0};
}

// e^shift, shift at most 0. A card has few units for doubles, and float32 errs by 1e-7 of the part that is scaled.
DLLM_HD double scale_of(double shift) {
#ifdef __CUDA_ARCH__
    return expf(static_cast<float>(shift));
#else
    return exp(shift);
#endif
}

// Adds to the rest what another partial sum (top, sum, weighted) holds.
DLLM_HD void add_rest(RowState& row, float top, double sum, double weighted) {
    if (top == -INFINITY) return;  // an empty part: -inf minus -inf must not be taken
    if (top > row.top) {
        if (row.top != -INFINITY) {
            const double shift = static_cast<double>(row.top) - top, scale = scale_of(shift);
            row.weighted = (row.weighted + shift * row.sum) * scale;
            row.sum *= scale;
        }
        row.top = top;
        row.sum += sum;
        row.weighted += weighted;
    } else {
        const double shift = static_cast<double>(top) - row.top, scale = scale_of(shift);
        row.sum += sum * scale;
        row.weighted += (weighted + shift * sum) * scale;
    }
}

// One more id, larger than all before it: equal logits keep the lower id.
DLLM_HD void add_id(RowState& row, std::int32_t id, float logit, float noise, bool banned, bool excluded) {
    if (!(logit < INFINITY)) row.bad = 1;  // NaN too
    const float inside = excluded ? -INFINITY : logit;
    if (banned || logit == -INFINITY) {
        add_rest(row, inside, 1.0, 0.0);
        return;
    }
    const float score = logit + noise;
    if (score > row.won) {
        add_rest(row, row.inside, 1.0, 0.0);
        row.won = score;
        row.logit = logit;
        row.inside = inside;
        row.token = id;
    } else {
        add_rest(row, inside, 1.0, 0.0);
    }
    if (logit > row.best) {
        row.second = row.best;
        row.second_id = row.best_id;
        row.best = logit;
        row.best_id = id;
    } else if (logit > row.second) {
        row.second = logit;
        row.second_id = id;
    }
}

// Whether an id goes before another: the higher score, of equals the lower id.
DLLM_HD bool before(float score, std::int32_t id, float other, std::int32_t other_id) {
    return score > other || (score == other && id < other_id);
}

// Merges what `other` saw of the same row, other ids. Associative up to rounding: always merge in the same order.
DLLM_HD void merge_rows(RowState& row, const RowState& other) {
    row.bad |= other.bad;
    add_rest(row, other.top, other.sum, other.weighted);
    if (before(other.won, other.token, row.won, row.token)) {
        add_rest(row, row.inside, 1.0, 0.0);
        row.won = other.won;
        row.logit = other.logit;
        row.inside = other.inside;
        row.token = other.token;
    } else {
        add_rest(row, other.inside, 1.0, 0.0);
    }
    if (before(other.best, other.best_id, row.best, row.best_id)) {
        const bool own = before(row.best, row.best_id, other.second, other.second_id);
        row.second = own ? row.best : other.second;
        row.second_id = own ? row.best_id : other.second_id;
        row.best = other.best;
        row.best_id = other.best_id;
    } else if (before(other.best, other.best_id, row.second, row.second_id)) {
        row.second = other.best;
        row.second_id = other.best_id;
    }
}

DLLM_HD RowResult finish_row(const RowState& row) {
    RowResult out;
    out.token = row.bad ? -1 : row.token;
    out.logit = row.logit;
    const bool drew_best = row.best_id == row.token;  // always, unless sampling took another
    out.second_token = drew_best ? row.second_id : row.best_id;
    out.second_logit = drew_best ? row.second : row.best;
    const double rest = row.top == -INFINITY ? -INFINITY : row.top + log(row.sum);
    out.log_odds = row.inside == -INFINITY ? -INFINITY : static_cast<float>(row.inside - rest);
    RowState all = row;
    add_rest(all, row.inside, 1.0, 0.0);
    out.logsumexp = all.top == -INFINITY ? -INFINITY : static_cast<float>(all.top + log(all.sum));
    out.entropy = static_cast<float>(log(all.sum) - all.weighted / all.sum);
    return out;
}

}  // namespace dllm
