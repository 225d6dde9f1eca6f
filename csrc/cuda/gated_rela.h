// The launchers by head dim, each instantiated in a .cu file of its own.
#pragma once
#include "params.h"

namespace recgrela::cuda {

bool has_fast_kernels(const GatedRelaParams& p);

template <int D>
int run_forward(const GatedRelaParams& p, Stream stream);
template <int D>
int64_t forward_scratch(const GatedRelaParams& p);
int run_generic_forward(const GatedRelaParams& p, Stream stream);
int64_t generic_forward_scratch(const GatedRelaParams& p);

}  // namespace recgrela::cuda
