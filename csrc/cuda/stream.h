// What the wrappers of the CUDA kernels need of the device: torch's stream, errors of a launch, the
// checks that are CUDA's own.
#pragma once
#include "../arguments.h"
#include "params.h"

namespace recgrela::cuda {

// The current stream of torch on this device. Throws where torch has no CUDA.
Stream current_stream(const Tensor& on);

// Throws what a launcher reports.
void check_launch(const char* op, int error);

// What the generic kernels hold of one item must fit into shared memory.
void check_width(const char* op, const Dims& dims);

// With RECGRELA_CHECK=1 the values of lengths and cu_seqlens are read back: this synchronises.
void check_values(const SequenceArgs& args, const Dims& dims, Stream stream);

}  // namespace recgrela::cuda
