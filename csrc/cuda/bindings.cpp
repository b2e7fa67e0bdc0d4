// Pointers of the device in, nothing out: Python has checked everything (dllm_engine/cuda.py).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../include/dllm/decode_step.h"

namespace py = pybind11;
using dllm::Type;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
T* address(const py::tuple& t, int i) {
    return at<T>(t[static_cast<std::size_t>(i)].cast<std::uintptr_t>());
}

std::int64_t number(const py::tuple& t, int i) { return t[static_cast<std::size_t>(i)].cast<std::int64_t>(); }

dllm::Matrix matrix(const py::tuple& m) {
    return {address<const void>(m, 0), static_cast<Type>(m[1].cast<int>()), number(m, 2)};
}

// scratch: tickets, workspace, stream
void launch(const char* name, const dllm::RowStatsArgs& stats, std::int64_t hidden_rows, const dllm::StepArgs& step,
            const py::tuple& scratch) {
    const int error = dllm::decode_step_cuda(stats, hidden_rows, step, address<std::uint32_t>(scratch, 0),
                                             address<void>(scratch, 1), address<void>(scratch, 2));
    if (error != 0) throw std::runtime_error(std::string(name) + ": " + dllm::cuda_error_text(error));
}

void row_stats(const py::tuple& hidden, const py::tuple& head, std::int64_t hidden_rows, std::int64_t dim,
               std::int64_t vocab, std::uintptr_t rows, std::int64_t count, const py::tuple& banned,
               const py::tuple& excluded, const py::tuple& probe_ids, float temperature, std::uintptr_t noise_keys,
               const py::tuple& out, const py::tuple& scratch) {
    const dllm::RowStatsArgs stats{matrix(hidden), matrix(head), dim, vocab, at<const std::int32_t>(rows), count,
                                   address<const std::int32_t>(banned, 0), address<const std::int32_t>(excluded, 0),
                                   number(banned, 1), number(excluded, 1), address<const std::int64_t>(probe_ids, 0),
                                   number(probe_ids, 1), temperature, at<const std::int64_t>(noise_keys),
                                   address<std::int64_t>(out, 0), address<std::int64_t>(out, 1), address<float>(out, 2),
                                   address<float>(out, 3), address<float>(out, 4), address<float>(out, 5),
                                   address<float>(out, 6), address<float>(out, 7), nullptr};
    launch("row_stats", stats, hidden_rows, dllm::StepArgs{}, scratch);
}

// out: 7 addresses [batch, width]; state: tokens, undecided, predicted, progress, seeds, quota; sizes: length,
// prompt_length, block_length, fill_id; rule: bounds, weights, filter_length, cut; flags: decided_is_one,
// position, all_rows; ids: address and number.
void decode_step(const py::tuple& hidden, const py::tuple& head, std::int64_t dim, std::int64_t vocab,
                 const py::tuple& banned, const py::tuple& excluded, const py::tuple& end_ids, const py::tuple& waiting_ids, float temperature,
                 std::int64_t batch, std::int64_t width, std::uintptr_t sequences, const py::tuple& state,
                 const py::tuple& sizes, const py::tuple& rule, const py::tuple& flags, const py::tuple& out,
                 const py::tuple& scratch) {
    const dllm::RowStatsArgs stats{matrix(hidden), matrix(head), dim, vocab, nullptr, batch * width,
                                   address<const std::int32_t>(banned, 0), address<const std::int32_t>(excluded, 0),
                                   number(banned, 1), number(excluded, 1), nullptr, 0, temperature, nullptr,
                                   address<std::int64_t>(out, 0), address<std::int64_t>(out, 1), address<float>(out, 2),
                                   address<float>(out, 3), address<float>(out, 4), address<float>(out, 5),
                                   address<float>(out, 6), nullptr, nullptr};
    const auto flag = [&](int i) { return static_cast<std::int32_t>(number(flags, i)); };
    const dllm::StepArgs step{batch, width, at<const std::int64_t>(sequences), number(sizes, 0), number(sizes, 1),
                              number(sizes, 2), number(sizes, 3), address<std::int64_t>(state, 0),
                              address<std::uint8_t>(state, 1), address<std::int64_t>(state, 2),
                              address<std::int64_t>(state, 3), address<const std::int64_t>(state, 4),
                              address<const std::int64_t>(state, 5), address<const float>(rule, 0),
                              address<const float>(rule, 1), number(rule, 2), rule[3].cast<double>(), flag(0), flag(1), flag(2),
                              address<const std::int64_t>(end_ids, 0), number(end_ids, 1),
                              address<const std::int64_t>(waiting_ids, 0), number(waiting_ids, 1), stats.token, stats.logit,
                              stats.second_logit, stats.log_odds, stats.entropy};
    launch("decode_step", stats, stats.count, step, scratch);
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
