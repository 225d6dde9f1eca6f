// gated_rela backward for every other head dim, and for float64.
#include "gated_rela.h"
#include "generic.cuh"

namespace recgrela::cuda {
namespace {

template <class S>
int run(const GatedRelaBackwardParams& p, Stream stream) {
  using A = Accumulate<S>;
  const GatedRelaParams& f = p.forward;
  const GenericArgs args{p, f.scratch};
  const int error = launch(generic_backward_kernel<S>, f.B * f.H, kGenericThreads,
                           GenericRows<A>::bytes(f.D), stream, args);
  if (error != 0 || f.conv_weight == nullptr) return error;
  const A* dparams = static_cast<const A*>(f.scratch) + f.B * f.H * 2 * f.D * f.D;
  return launch_sum_parts<A>(dparams, f.B, p, stream);
}

}  // namespace

int64_t generic_backward_scratch(const GatedRelaParams& p) {
  using Scratch = GenericScratch<float>;
  const int64_t size = p.dtype == DType::kDouble ? 8 : 4;
  return size *
         (p.B * p.H * Scratch::unit_size(p, true) + Scratch::rows(p) * Scratch::item_size(p));
}

int run_generic_backward(const GatedRelaBackwardParams& p, Stream stream) {
  if (p.forward.dtype == DType::kDouble) return run<double>(p, stream);
  if (p.forward.dtype == DType::kFloat) return run<float>(p, stream);
  if (p.forward.dtype == DType::kBFloat16) return run<BFloat16>(p, stream);
  return run<Half>(p, stream);
}

}  // namespace recgrela::cuda
