// gated_rela forward on tensor cores at head dim 128, in a file of its own so that files compile
// side by side.
#include "mma_forward.cuh"

namespace recgrela::cuda {
template int run_mma_forward<128>(const GatedRelaParams& p, Stream stream);
template int64_t mma_forward_scratch<128>(const GatedRelaParams& p);
}  // namespace recgrela::cuda
