// Pointers in, nothing out: Python has checked everything (dllm_engine/native.py).
#include <stdexcept>

#include "../include/dllm/bindings.h"

namespace {

namespace py = pybind11;

void row_stats(const py::tuple& call, int threads, int isa, std::uintptr_t scratch) {
    const dllm::RowStatsArgs stats = dllm::row_stats_args(call);
    const py::gil_scoped_release release;
    if (!dllm::row_stats_cpu(stats, threads, isa, reinterpret_cast<void*>(scratch)))
        throw std::runtime_error("row_stats: this CPU has no AVX2, FMA and F16C");
}

void decode_step(const py::tuple& call, const py::tuple& step, int threads, int isa, std::uintptr_t scratch) {
    const dllm::RowStatsArgs stats = dllm::row_stats_args(call);
    const dllm::StepArgs args = dllm::step_args(step, stats);
    const py::gil_scoped_release release;
    if (!dllm::decode_step_cpu(stats, args, threads, isa, reinterpret_cast<void*>(scratch)))
        throw std::runtime_error("decode_step: this CPU has no AVX2, FMA and F16C");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels on raw pointers; dllm_engine.ops is the checked way in.";
    m.def("row_stats", &row_stats);
    m.def("decode_step", &decode_step);
    m.def("scratch_bytes", &dllm::row_stats_cpu_scratch);
    m.def("has_avx2", &dllm::cpu_has_avx2);
}
