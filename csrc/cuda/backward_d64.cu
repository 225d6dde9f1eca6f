// gated_rela backward at head dim 64, in a file of its own so that files compile side by side.
#include "backward_wide.cuh"

namespace recgrela::cuda {

template <>
int run_backward<64>(const GatedRelaBackwardParams& p, Stream stream) {
  return run_wide_backward<64>(p, stream);
}
template <>
int64_t backward_scratch<64>(const GatedRelaParams& p) {
  return wide_backward_scratch<64>(p);
}

}  // namespace recgrela::cuda
