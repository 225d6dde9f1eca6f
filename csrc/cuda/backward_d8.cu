// gated_rela backward at head dim 8, in a file of its own so that files compile side by side.
#include "backward.cuh"

namespace recgrela::cuda {
template int run_backward<8>(const GatedRelaBackwardParams& p, Stream stream);
template int64_t backward_scratch<8>(const GatedRelaParams& p);
}  // namespace recgrela::cuda
