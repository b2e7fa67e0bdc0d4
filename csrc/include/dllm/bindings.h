// What both modules make of the tuples that Python hands over (dllm_engine/step.py), which has checked everything.
// Matrices are (address, type, stride), lists (address, count).
#pragma once

#include <pybind11/pybind11.h>

#include "decode_step.h"

namespace dllm {

namespace py = pybind11;

template <class T>
T* address(const py::tuple& t, std::size_t i) {
    return reinterpret_cast<T*>(t[i].cast<std::uintptr_t>());
}

inline std::int64_t number(const py::tuple& t, std::size_t i) { return t[i].cast<std::int64_t>(); }

inline Matrix matrix(const py::tuple& m) { return {address<const void>(m, 0), static_cast<Type>(number(m, 1)), number(m, 2)}; }

// call: hidden, head, dim, vocab, rows, banned, excluded, probe_ids, temperature, noise_keys, results (the addresses of
// the fields of RowStats, in its order)
inline RowStatsArgs row_stats_args(const py::tuple& call) {
    const py::tuple rows = call[4], banned = call[5], excluded = call[6], probe_ids = call[7], keys = call[9], out = call[10];
    return {matrix(call[0]), matrix(call[1]), number(call, 2), number(call, 3), address<const std::int32_t>(rows, 0),
            number(rows, 1), address<const std::int32_t>(banned, 0), address<const std::int32_t>(excluded, 0),
            number(banned, 1), number(excluded, 1), address<const std::int64_t>(probe_ids, 0), number(probe_ids, 1),
            call[8].cast<float>(), address<const std::int64_t>(keys, 0), address<std::int64_t>(out, 0),
            address<std::int64_t>(out, 2), address<float>(out, 1), address<float>(out, 3), address<float>(out, 4),
            address<float>(out, 5), address<float>(out, 6), address<float>(out, 7), nullptr};
}

// step: width, sequences, state (tokens, undecided, predicted, progress, seeds, quota), sizes (length, prompt_length,
// block_length, fill_id), rule (bounds, weights, filter_length, cut), flags (decided_is_one, position, all_rows),
// end_ids, waiting_ids
inline StepArgs step_args(const py::tuple& step, const RowStatsArgs& stats) {
    const py::tuple sequences = step[1], state = step[2], sizes = step[3], rule = step[4], flags = step[5];
    const py::tuple end_ids = step[6], waiting_ids = step[7];
    const auto flag = [&](std::size_t i) { return static_cast<std::int32_t>(number(flags, i)); };
    return {number(sequences, 1), number(step, 0), address<const std::int64_t>(sequences, 0), number(sizes, 0),
            number(sizes, 1), number(sizes, 2), number(sizes, 3), address<std::int64_t>(state, 0),
            address<std::uint8_t>(state, 1), address<std::int64_t>(state, 2), address<std::int64_t>(state, 3),
            address<const std::int64_t>(state, 4), address<const std::int64_t>(state, 5), address<const float>(rule, 0),
            address<const float>(rule, 1), number(rule, 2), rule[3].cast<double>(), flag(0), flag(1), flag(2),
            address<const std::int64_t>(end_ids, 0), number(end_ids, 1), address<const std::int64_t>(waiting_ids, 0),
            number(waiting_ids, 1), stats.token, stats.logit, stats.second_logit, stats.log_odds, stats.entropy};
}

}  // namespace dllm
