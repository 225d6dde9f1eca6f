// The launchers by head dim, each instantiated in a .cu file of its own.
#pragma once
#include "params.h"

namespace recgrela::cuda {

bool has_fast_kernels(const GatedRelaParams& p);

template <int D>
int run_forward(const GatedRelaParams& p, Stream stream);
template <int D>
int64_t forward_scratch(const GatedRelaParams& p);
template <>
int run_forward<128>(const GatedRelaParams& p, Stream stream);
template <>
int64_t forward_scratch<128>(const GatedRelaParams& p);
int run_generic_forward(const GatedRelaParams& p, Stream stream);
int64_t generic_forward_scratch(const GatedRelaParams& p);

// On tensor cores: bfloat16 and float16 rows of head dim 64 and 128, see mma_tile.cuh.
bool has_mma_kernels(const GatedRelaParams& p);
template <int D>
int run_mma_forward(const GatedRelaParams& p, Stream stream);
template <int D>
int64_t mma_forward_scratch(const GatedRelaParams& p);

template <int D>
int run_backward(const GatedRelaBackwardParams& p, Stream stream);
template <int D>
int64_t backward_scratch(const GatedRelaParams& p);
template <>
int run_backward<64>(const GatedRelaBackwardParams& p, Stream stream);
template <>
int64_t backward_scratch<64>(const GatedRelaParams& p);
template <>
int run_backward<128>(const GatedRelaBackwardParams& p, Stream stream);
template <>
int64_t backward_scratch<128>(const GatedRelaParams& p);
int run_generic_backward(const GatedRelaBackwardParams& p, Stream stream);
int64_t generic_backward_scratch(const GatedRelaParams& p);

// The convolution's gradients from their parts [parts, H*D, W + 1], the bias' last, always in the
// same order.
template <class A>
int launch_sum_parts(const A* from, int64_t parts, const GatedRelaBackwardParams& p, Stream stream);

}  // namespace recgrela::cuda
