// Pointers of the device in, nothing out: Python has checked everything (dllm_engine/cuda.py).
#include <stdexcept>
#include <string>

#include "../include/dllm/bindings.h"

namespace {

namespace py = pybind11;

// scratch: tickets, workspace, stream
void launch(const char* name, const dllm::RowStatsArgs& stats, std::int64_t hidden_rows, const dllm::StepArgs& step,
            const py::tuple& scratch) {
    const int error = dllm::decode_step_cuda(stats, hidden_rows, step, dllm::address<std::uint32_t>(scratch, 0),
                                             dllm::address<void>(scratch, 1), dllm::address<void>(scratch, 2));
    if (error != 0) throw std::runtime_error(std::string(name) + ": " + dllm::cuda_error_text(error));
}

void row_stats(const py::tuple& call, std::int64_t hidden_rows, const py::tuple& scratch) {
    launch("row_stats", dllm::row_stats_args(call), hidden_rows, dllm::StepArgs{}, scratch);
}

void decode_step(const py::tuple& call, const py::tuple& step, const py::tuple& scratch) {
    const dllm::RowStatsArgs stats = dllm::row_stats_args(call);
    launch("decode_step", stats, stats.count, dllm::step_args(step, stats), scratch);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "GPU kernels on raw pointers; dllm_engine.ops is the checked way in.";
    m.def("row_stats", &row_stats);
    m.def("decode_step", &decode_step);
    m.def("workspace", [](std::int64_t vocab, std::int64_t count) {
        const dllm::CudaWorkspace needed = dllm::cuda_workspace(vocab, count);
        return py::make_tuple(needed.tickets, needed.bytes);
    });
}
