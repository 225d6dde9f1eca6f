// gated_rela backward at head dim 128, in a file of its own so that files compile side by side.
#include "backward_wide.cuh"

namespace recgrela::cuda {

template <>
int run_backward<128>(const GatedRelaBackwardParams& p, Stream stream) {
  return run_wide_backward<128>(p, stream);
}
template <>
int64_t backward_scratch<128>(const GatedRelaParams& p) {
  return wide_backward_scratch<128>(p);
}

}  // namespace recgrela::cuda
