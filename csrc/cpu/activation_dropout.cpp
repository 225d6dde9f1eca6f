// activation_dropout on the CPU: checks and threads. The loops are in activation_dropout.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "../arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace recgrela {
namespace {

constexpr double kWords = 4294967296.0;  // 2^32

void check_like(const char* op, const char* name, const Tensor& x, const char* like_name,
                const Tensor& like) {
  RECGRELA_CHECK(shape_text(x) == shape_text(like), op, ": ", name, " must have the shape of ",
                 like_name, ' ', shape_text(like), ", got ", shape_text(x));
  RECGRELA_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
                 like_name, ", ", like.scalar_type(), ", got ", x.scalar_type());
  RECGRELA_CHECK(x.device() == like.device(), op, ": ", name, " must be on the device of ",
                 like_name);
  RECGRELA_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
}

Tensor run(const char* op, void (*kernel)(const ActivationDropoutParams&, int64_t, int64_t),
           const char* first_name, const Tensor& first, const char* second_name,
           const OptionalTensor& second, bool gelu, double p, int64_t seed) {
  const ScalarType dtype = first.scalar_type();
  RECGRELA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                     dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                 op, ": ", first_name, " must have a floating dtype, got ", dtype);
  RECGRELA_CHECK(p >= 0.0 && p < 1.0, op, ": p must lie in [0, 1), got ", p);
  check_like(op, first_name, first, first_name, first);
  if (second) check_like(op, second_name, *second, first_name, first);

  Tensor out = torch::stable::empty_like(first);
  const double dropped = std::min(std::nearbyint(p * kWords), kWords - 1.0);
  ActivationDropoutParams params{};
  params.dtype = kernel_dtype(dtype);
  params.gelu = gelu;
  params.numel = first.numel();
  params.seed = static_cast<uint64_t>(seed);
  params.dropped = static_cast<uint32_t>(dropped);
  params.scale = kWords / (kWords - dropped);
  params.first = first.const_data_ptr();
  params.second = data_or_null(second);
  params.out = out.mutable_data_ptr();
  constexpr int64_t kGrain = 16;  // blocks a thread should get at least
  torch::stable::parallel_for(0, (params.numel + kDropoutBlock - 1) / kDropoutBlock, kGrain,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return out;
}

}  // namespace

Tensor activation_dropout_cpu(Tensor x, OptionalTensor residual, bool gelu, double p,
                              int64_t seed) {
  return run("activation_dropout", kernels().activation_dropout, "x", x, "residual", residual, gelu,
             p, seed);
}

Tensor activation_dropout_backward_cpu(Tensor grad, OptionalTensor x, bool gelu, double p,
                                       int64_t seed) {
  const char* op = "activation_dropout_backward";
  RECGRELA_CHECK(gelu == x.has_value(), op, ": x must be given with gelu and not without it");
  return run(op, kernels().activation_dropout_backward, "grad", grad, "x", x, gelu, p, seed);
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("activation_dropout", TORCH_BOX(&recgrela::activation_dropout_cpu));
  m.impl("activation_dropout_backward", TORCH_BOX(&recgrela::activation_dropout_backward_cpu));
}
