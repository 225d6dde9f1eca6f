// gated_rela backward at head dim 64, in a file of its own so that files compile side by side.
#include "backward.cuh"

namespace recgrela::cuda {
template int run_backward<64>(const GatedRelaBackwardParams& p, Stream stream);
template int64_t backward_scratch<64>(const GatedRelaParams& p);
}  // namespace recgrela::cuda
