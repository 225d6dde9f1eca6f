// gated_rela forward at head dim 64, in a file of its own so that files compile side by side.
#include "forward.cuh"

namespace recgrela::cuda {
template int run_forward<64>(const GatedRelaParams& p, Stream stream);
template int64_t forward_scratch<64>(const GatedRelaParams& p);
}  // namespace recgrela::cuda
