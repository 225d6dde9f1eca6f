// gated_rela forward at head dim 128, in a file of its own so that files compile side by side.
#include "forward_wide.cuh"

namespace recgrela::cuda {

template <>
int run_forward<128>(const GatedRelaParams& p, Stream stream) {
  return run_wide_forward<128>(p, stream);
}
template <>
int64_t forward_scratch<128>(const GatedRelaParams& p) {
  return wide_forward_scratch<128>(p);
}

}  // namespace recgrela::cuda
