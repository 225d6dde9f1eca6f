// gated_rela: which kernel runs.
#include "gated_rela.h"
#include "mma.cuh"

namespace recgrela::cuda {

// The fast kernels hold four taps of the convolution in registers.
bool has_fast_kernels(const GatedRelaParams& p) {
  return p.dtype != DType::kDouble && p.W <= 4 && (p.D == 8 || p.D == 16 || p.D == 32 || p.D == 64);
}

bool has_mma_kernels(const GatedRelaParams& p) {
  const bool two_bytes = p.dtype == DType::kBFloat16 || p.dtype == DType::kHalf;
  return two_bytes && p.W <= 4 && (p.D == 64 || p.D == 128) && has_tensor_cores();
}

int64_t forward_scratch_bytes(const GatedRelaParams& p) {
  if (has_mma_kernels(p)) {
    return p.D == 64 ? mma_forward_scratch<64>(p) : mma_forward_scratch<128>(p);
  }
  if (!has_fast_kernels(p)) return generic_forward_scratch(p);
  if (p.D == 8) return forward_scratch<8>(p);
  if (p.D == 16) return forward_scratch<16>(p);
  if (p.D == 32) return forward_scratch<32>(p);
  return forward_scratch<64>(p);
}

int launch_gated_rela(const GatedRelaParams& p, Stream stream) {
  if (has_mma_kernels(p)) {
    return p.D == 64 ? run_mma_forward<64>(p, stream) : run_mma_forward<128>(p, stream);
  }
  if (!has_fast_kernels(p)) return run_generic_forward(p, stream);
  if (p.D == 8) return run_forward<8>(p, stream);
  if (p.D == 16) return run_forward<16>(p, stream);
  if (p.D == 32) return run_forward<32>(p, stream);
  return run_forward<64>(p, stream);
}

int64_t backward_scratch_bytes(const GatedRelaParams& p) {
  if (!has_fast_kernels(p)) return generic_backward_scratch(p);
  if (p.D == 8) return backward_scratch<8>(p);
  if (p.D == 16) return backward_scratch<16>(p);
  if (p.D == 32) return backward_scratch<32>(p);
  return backward_scratch<64>(p);
}

int launch_gated_rela_backward(const GatedRelaBackwardParams& p, Stream stream) {
  if (!has_fast_kernels(p.forward)) return run_generic_backward(p, stream);
  if (p.forward.D == 8) return run_backward<8>(p, stream);
  if (p.forward.D == 16) return run_backward<16>(p, stream);
  if (p.forward.D == 32) return run_backward<32>(p, stream);
  return run_backward<64>(p, stream);
}

}  // namespace recgrela::cuda
