// The CUDA kernels' interface: what ../params.h holds and what only they need. Every pointer is a
// device pointer.
#pragma once
#include "../params.h"

namespace recgrela::cuda {

using recgrela::DType, recgrela::GatedRelaStepParams, recgrela::kChunk;
using recgrela::Rows, recgrela::States;

constexpr int kRecentItems = 256;  // items whose sums stay apart from the rest, see forward.cuh

struct GatedRelaParams : SequenceParams {
  void* scratch;  // forward_scratch_bytes() or backward_scratch_bytes(), see below
};

struct GatedRelaBackwardParams : GradientParams {
  GatedRelaParams forward;  // out is not read
};

// Launchers: on `stream` (a cudaStream_t), on the current device, without synchronising. 0, or a
// cudaError_t. Scratch memory holds nothing between calls.
using Stream = void*;
int launch_gated_rela(const GatedRelaParams& p, Stream stream);
int launch_gated_rela_backward(const GatedRelaBackwardParams& p, Stream stream);
int launch_gated_rela_step(const GatedRelaStepParams& p, Stream stream);
int64_t forward_scratch_bytes(const GatedRelaParams& p);
int64_t backward_scratch_bytes(const GatedRelaParams& p);

const char* error_text(int error);
// Waits for the stream and copies `count` integers to the host, for RECGRELA_CHECK=1 alone.
int copy_to_host(int64_t* to, const int64_t* from, int64_t count, Stream stream);

}  // namespace recgrela::cuda
