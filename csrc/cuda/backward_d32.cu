// gated_rela backward at head dim 32, in a file of its own so that files compile side by side.
#include "backward.cuh"

namespace recgrela::cuda {
template int run_backward<32>(const GatedRelaBackwardParams& p, Stream stream);
template int64_t backward_scratch<32>(const GatedRelaParams& p);
}  // namespace recgrela::cuda
