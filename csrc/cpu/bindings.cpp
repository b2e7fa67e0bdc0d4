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
                                  at<float>(to(6)), at<float>(to(7))};
    bool ran;
    {
        py::gil_scoped_release release;
        ran = dllm::row_stats_cpu(args, threads, isa, at<void>(scratch));
    }
    if (!ran) throw std::runtime_error("row_stats: this CPU has no AVX2, FMA and F16C");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels on raw pointers; dllm_engine.ops is the checked way in.";
    m.def("row_stats", &row_stats);
    m.def("scratch_bytes", &dllm::row_stats_cpu_scratch);
    m.def("has_avx2", &dllm::cpu_has_avx2);
}
