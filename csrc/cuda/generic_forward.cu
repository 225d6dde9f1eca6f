// gated_rela forward for every other head dim, and for float64.
#include "gated_rela.h"
#include "generic.cuh"

namespace recgrela::cuda {
namespace {

template <class S>
int run(const GatedRelaParams& p, Stream stream) {
  using A = Accumulate<S>;
  GenericArgs args{};
  args.p.forward = p;
  args.scratch = p.scratch;
  return launch(generic_forward_kernel<S>, p.B * p.H, kGenericThreads, GenericRows<A>::bytes(p.D),
                stream, args);
}

}  // namespace

int64_t generic_forward_scratch(const GatedRelaParams& p) {
  const int64_t size = p.dtype == DType::kDouble ? 8 : 4;
  return p.B * p.H * GenericScratch<float>::unit_size(p, false) * size;
}

int run_generic_forward(const GatedRelaParams& p, Stream stream) {
  if (p.dtype == DType::kDouble) return run<double>(p, stream);
  if (p.dtype == DType::kFloat) return run<float>(p, stream);
  if (p.dtype == DType::kBFloat16) return run<BFloat16>(p, stream);
  return run<Half>(p, stream);
}

}  // namespace recgrela::cuda
