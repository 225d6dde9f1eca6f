// gated_rela backward at head dim 16, in a file of its own so that files compile side by side.
#include "backward.cuh"

namespace recgrela::cuda {
template int run_backward<16>(const GatedRelaBackwardParams& p, Stream stream);
template int64_t backward_scratch<16>(const GatedRelaParams& p);
}  // namespace recgrela::cuda
