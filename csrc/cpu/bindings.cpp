// Pointers in, nothing out: Python has checked everything (dllm_engine/native.py).
#include <pybind11/pybind11.h>

#include "../include/dllm/decode_step.h"

namespace py = pybind11;
using dllm::Type;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

dllm::Matrix matrix(py::tuple m) {
    return {at<const void>(m[0].cast<std::uintptr_t>()), static_cast<Type>(m[1].cast<int>()), m[2].cast<std::int64_t>()};
}

void row_stats(py::tuple hidden, py::tuple head, std::int64_t dim, std::int64_t vocab, std::uintptr_t rows,
               std::int64_t count, std::uintptr_t banned, std::int64_t banned_count, std::uintptr_t excluded,
               std::int64_t excluded_count, std::uintptr_t probe_ids, std::int64_t probes, float temperature,
               std::uintptr_t noise_keys, py::tuple out, int threads, int isa, std::uintptr_t scratch) {
    const auto to = [&](int i) { return out[static_cast<std::size_t>(i)].cast<std::uintptr_t>(); };
    const dllm::RowStatsArgs args{matrix(hidden), matrix(head), dim, vocab, at<const std::int32_t>(rows), count,
                                  at<const std::int32_t>(banned), at<const std::int32_t>(excluded), banned_count,
                                  excluded_count, at<const std::int64_t>(probe_ids), probes, temperature,
                                  at<const std::int64_t>(noise_keys), at<std::int64_t>(to(0)), at<std::int64_t>(to(1)),
                                  at<float>(to(2)), at<float>(to(3)), at<float>(to(4)), at<float>(to(5)),
                                  at<float>(to(6)), at<float>(to(7)), nullptr};
    bool ran;
    {
        py::gil_scoped_release release;
        ran = dllm::row_stats_cpu(args, threads, isa, at<void>(scratch));
    }
    if (!ran) throw std::runtime_error("row_stats: this CPU has no AVX2, FMA and F16C");
}

// stats: 7 addresses [batch, width]; state: tokens, undecided, predicted, progress, seeds, quota; sizes: length,
// prompt_length, block_length, fill_id; rule: bounds, weights, filter_length, cut; flags: decided_is_one,
// position, all_rows; ids: address and number.
void decode_step(py::tuple hidden, py::tuple head, std::int64_t dim, std::int64_t vocab, py::tuple banned,
                 py::tuple excluded, py::tuple end_ids, py::tuple waiting_ids, float temperature, std::int64_t batch, std::int64_t width,
                 std::uintptr_t sequences, py::tuple state, py::tuple sizes, py::tuple rule, py::tuple flags,
                 py::tuple out, int threads, int isa, std::uintptr_t scratch) {
    const auto address = [](const py::tuple& t, int i) { return t[static_cast<std::size_t>(i)].cast<std::uintptr_t>(); };
    const auto number = [](const py::tuple& t, int i) { return t[static_cast<std::size_t>(i)].cast<std::int64_t>(); };
    const dllm::RowStatsArgs stats{matrix(hidden), matrix(head), dim, vocab, nullptr, 0,
                                   at<const std::int32_t>(address(banned, 0)), at<const std::int32_t>(address(excluded, 0)),
                                   number(banned, 1), number(excluded, 1), nullptr, 0, temperature, nullptr,
                                   at<std::int64_t>(address(out, 0)), at<std::int64_t>(address(out, 1)),
                                   at<float>(address(out, 2)), at<float>(address(out, 3)), at<float>(address(out, 4)),
                                   at<float>(address(out, 5)), at<float>(address(out, 6)), nullptr, nullptr};
    const auto flag = [&](int i) { return static_cast<std::int32_t>(number(flags, i)); };
    const dllm::StepArgs step{batch, width, at<const std::int64_t>(sequences), number(sizes, 0), number(sizes, 1),
                              number(sizes, 2), number(sizes, 3), at<std::int64_t>(address(state, 0)),
                              at<std::uint8_t>(address(state, 1)), at<std::int64_t>(address(state, 2)),
                              at<std::int64_t>(address(state, 3)), at<const std::int64_t>(address(state, 4)),
                              at<const std::int64_t>(address(state, 5)), at<const float>(address(rule, 0)),
                              at<const float>(address(rule, 1)), number(rule, 2), rule[3].cast<double>(), flag(0), flag(1),
                              flag(2), at<const std::int64_t>(address(end_ids, 0)), number(end_ids, 1),
                              at<const std::int64_t>(address(waiting_ids, 0)), number(waiting_ids, 1), stats.token, stats.logit,
                              stats.second_logit, stats.log_odds, stats.entropy};
    bool ran;
    {
        py::gil_scoped_release release;
        ran = dllm::decode_step_cpu(stats, step, threads, isa, at<void>(scratch));
    }
    if (!ran) throw std::runtime_error("decode_step: this CPU has no AVX2, FMA and F16C");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels on raw pointers; dllm_engine.ops is the checked way in.";
    m.def("row_stats", &row_stats);
    m.def("decode_step", &decode_step);
    m.def("scratch_bytes", &dllm::row_stats_cpu_scratch);
    m.def("has_avx2", &dllm::cpu_has_avx2);
    m.def("has_avx512bf16", &dllm::cpu_has_avx512bf16);
}
