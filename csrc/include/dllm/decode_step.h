// What Python hands to a native backend: plain pointers and sizes. All checks of shape, type and device are Python's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dllm {

enum class Type : std::int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {  // row-major, unit stride along a row
    const void* data;
    Type type;
    std::int64_t stride;  // elements between rows
};

struct RowStatsArgs {
    Matrix hidden, head;
    std::int64_t dim, vocab;
    const std::int32_t* rows;  // [count], indices into hidden
    std::int64_t count;
    const std::int32_t *banned, *excluded;  // ascending ids
    std::int64_t banned_count, excluded_count;
    const std::int64_t* probe_ids;  // [count, probes]
    std::int64_t probes;
    float temperature;
    const std::int64_t* noise_keys;  // [count, 3]; read when temperature > 0
    // results, [count] each (probe_logits [count, probes])
    std::int64_t *token, *second_token;
    float *logit, *second_logit, *logsumexp, *log_odds, *entropy, *probe_logits;
    const std::int32_t* out_at;  // [count], where a row's results go; nullptr: in order
};

// A block step: which rows there are, how to decide, and the state that it changes (dllm_engine/state.py, rules.py).
struct StepArgs {
    std::int64_t batch, width;      // sequences and rows of the call; statistics are [batch, width]
    const std::int64_t* sequences;  // [batch], rows of the tensors below
    std::int64_t length, prompt_length, block_length, fill_id;
    std::int64_t* tokens;     // [B, length]
    std::uint8_t* undecided;  // [B, length]
    std::int64_t* predicted;  // [B, length]
    std::int64_t* progress;   // [B, 6]
    const std::int64_t* seeds;  // [B]
    const std::int64_t* quota;  // [block_length]
    const float* bounds;        // [block_length]
    const float* weights;       // filter, [2 F^2 + 2 F]; of a position: [(features + 2) F + 1]
    std::int64_t filter_length;  // F, units of the hidden layer; 0 without a filter
    double cut;
    std::int32_t decided_is_one, position, all_rows;  // all_rows: decided ones are scored too
    const std::int64_t* end_ids;
    std::int64_t end_count;           // 0: end of text is off
    const std::int64_t* waiting_ids;  // committed only if nothing before them stays undecided
    std::int64_t waiting_count;
    const std::int64_t* token;   // statistics of the rows
    const float *logit, *second_logit, *log_odds, *entropy;
};

// Scratch that row_stats_cpu needs, in bytes; the caller allocates it, aligned or not.
std::size_t row_stats_cpu_scratch(std::int64_t dim, std::int64_t vocab, std::int64_t count, int threads);

// isa: 0 the best that this CPU has (AVX512-BF16 for bfloat16 by bfloat16), 1 scalar, 2 AVX2. Returns false if the CPU lacks it.
bool row_stats_cpu(const RowStatsArgs& args, int threads, int isa, void* scratch);
// Scores the undecided rows (with all_rows the others too, whose results are else left alone), decides, commits. Rows,
// their number and noise keys in `stats` are not read.
bool decode_step_cpu(RowStatsArgs stats, const StepArgs& step, int threads, int isa, void* scratch);
bool cpu_has_avx2();

// What the GPU backend needs for a call: `tickets` words that are 0 (each launch leaves them 0), and scratch.
struct CudaWorkspace {
    std::int64_t tickets, bytes;
    std::int64_t tile_rows, tiles, segments, tile_tickets, ranks_at;  // how the kernel divides the work
};
CudaWorkspace cuda_workspace(std::int64_t vocab, std::int64_t count);

// One launch on `stream`: no allocation, no wait, so a CUDA graph can hold it. All pointers are the device's. With
// step.batch 0 only the statistics; else count is batch * width, and rows and noise keys are not read. Returns a
// cudaError_t.
int decode_step_cuda(const RowStatsArgs& stats, std::int64_t hidden_rows, const StepArgs& step, std::uint32_t* tickets,
                     void* workspace, void* stream);
const char* cuda_error_text(int error);

}  // namespace dllm
