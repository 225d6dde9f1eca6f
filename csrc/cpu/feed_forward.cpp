// feed_forward on the CPU: checks, memory and threads. The loops are in feed_forward.h.
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
constexpr int64_t kFewestTiles = 3, kMostGroups = 32;

// Everything both directions share but the results.
FeedForwardParams read_arguments(const char* op, const Tensor& x, const Tensor& first_weight,
                                 const Tensor& second_weight, double p, int64_t inner_seed,
                                 int64_t outer_seed) {
  const ScalarType dtype = x.scalar_type();
  RECGRELA_CHECK(x.dim() == 2, op, ": x must have shape [N, C], got ", shape_text(x));
  RECGRELA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                 ": x must have dtype float32 or float64, got ", dtype);
  RECGRELA_CHECK(first_weight.dim() == 2, op, ": first_weight must have shape [M, C], got ",
                 shape_text(first_weight));
  FeedForwardParams params{};
  params.is_double = dtype == ScalarType::Double;
  params.rows = x.size(0);
  params.width = x.size(1);
  params.inner = first_weight.size(0);
  // Whole vectors of every level; and tiles that begin where a block of the dropout does.
  constexpr int64_t whole = kDropoutBlock / kTileRows;
  static_assert(whole % 16 == 0);
  RECGRELA_CHECK(params.width > 0 && params.inner > 0 && params.width % whole == 0 &&
                     params.inner % whole == 0,
                 op, ": widths must be multiples of ", whole, ", got ", params.width, " and ",
                 params.inner);
  check_dense(op, "x", x, {params.rows, params.width}, dtype, x);
  check_dense(op, "first_weight", first_weight, {params.inner, params.width}, dtype, x);
  check_dense(op, "second_weight", second_weight, {params.width, params.inner}, dtype, x);
  RECGRELA_CHECK(p >= 0.0 && p < 1.0, op, ": p must lie in [0, 1), got ", p);
  const double dropped = std::min(std::nearbyint(p * kWords), kWords - 1.0);
  params.dropped = static_cast<uint32_t>(dropped);
  params.scale = kWords / (kWords - dropped);
  params.inner_seed = static_cast<uint64_t>(inner_seed);
  params.outer_seed = static_cast<uint64_t>(outer_seed);
  params.x = x.const_data_ptr();
  params.first_weight = first_weight.const_data_ptr();
  params.second_weight = second_weight.const_data_ptr();
  return params;
}

struct Panels {
  Tensor first, second;
};

Panels pack(FeedForwardParams& params, bool backward, const Tensor& like) {
  const int64_t size = params.width * params.inner;
  Panels panels{torch::stable::new_empty(like, {size}), torch::stable::new_empty(like, {size})};
  kernels().feed_forward_pack(params, backward, panels.first.mutable_data_ptr(),
                              panels.second.mutable_data_ptr());
  params.first_panels = panels.first.const_data_ptr();
  params.second_panels = panels.second.const_data_ptr();
  return panels;
}

// Adds the groups' gradients up in the first group's place.
template <class A>
void sum_groups(const FeedForwardParams& p, int64_t groups, A* dw1, A* db1, A* dw2, A* db2) {
  const int64_t C = p.width, M = p.inner, size = M * C, part = 2 * size + M + C;
  A* sums = static_cast<A*>(p.partial);
  constexpr int64_t kGrain = 4096;  // elements
  torch::stable::parallel_for(0, part, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t g = 1; g < groups; ++g) {
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[g * part + i];
    }
  });
  std::copy_n(sums, size, dw1);
  const A* turned = sums + size;  // W2's gradient, [M, C]
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t m = 0; m < M; ++m) dw2[c * M + m] = turned[m * C + c];
  }
  std::copy_n(sums + 2 * size, M, db1);
  std::copy_n(sums + 2 * size + M, C, db2);
}

}  // namespace

std::tuple<Tensor, Tensor> feed_forward_cpu(Tensor x, Tensor first_weight, Tensor first_bias,
                                            Tensor second_weight, Tensor second_bias,
                                            OptionalTensor residual, double p, int64_t inner_seed,
                                            int64_t outer_seed, bool save_for_backward) {
  const char* op = "feed_forward";
  FeedForwardParams params =
      read_arguments(op, x, first_weight, second_weight, p, inner_seed, outer_seed);
  const ScalarType dtype = x.scalar_type();
  check_dense(op, "first_bias", first_bias, {params.inner}, dtype, x);
  check_dense(op, "second_bias", second_bias, {params.width}, dtype, x);
  check_dense(op, "residual", residual, {params.rows, params.width}, dtype, x);
  Tensor out = torch::stable::new_empty(x, {params.rows, params.width});
  Tensor pre = save_for_backward ? torch::stable::new_empty(x, {params.rows, params.inner})
                                 : torch::stable::new_empty(x, {0});
  params.first_bias = first_bias.const_data_ptr();
  params.second_bias = second_bias.const_data_ptr();
  params.residual = data_or_null(residual);
  params.out = out.mutable_data_ptr();
  params.pre = save_for_backward ? pre.mutable_data_ptr() : nullptr;
  const Panels panels = pack(params, false, x);
  run_parallel(op, (params.rows + kTileRows - 1) / kTileRows, 1,
               [&](int64_t begin, int64_t end) { kernels().feed_forward(params, begin, end); });
  return {out, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward_cpu(
    Tensor grad, Tensor x, Tensor first_weight, Tensor second_weight, Tensor pre, double p,
    int64_t inner_seed, int64_t outer_seed) {
  const char* op = "feed_forward_backward";
  FeedForwardParams params =
      read_arguments(op, x, first_weight, second_weight, p, inner_seed, outer_seed);
  const ScalarType dtype = x.scalar_type();
  const int64_t C = params.width, M = params.inner;
  check_dense(op, "grad", grad, {params.rows, C}, dtype, x);
  check_dense(op, "pre", pre, {params.rows, M}, dtype, x);
  const int64_t tiles = (params.rows + kTileRows - 1) / kTileRows;
  params.group_tiles = std::max(kFewestTiles, (tiles + kMostGroups - 1) / kMostGroups);
  const int64_t groups =
      std::max<int64_t>((tiles + params.group_tiles - 1) / params.group_tiles, 1);
  Tensor partial = torch::stable::new_empty(x, {groups, 2 * M * C + M + C});
  Tensor grad_x = torch::stable::new_empty(x, {params.rows, C});
  Tensor dw1 = torch::stable::new_empty(x, {M, C}), db1 = torch::stable::new_empty(x, {M});
  Tensor dw2 = torch::stable::new_empty(x, {C, M}), db2 = torch::stable::new_empty(x, {C});
  params.grad_out = grad.const_data_ptr();
  params.pre = const_cast<void*>(pre.const_data_ptr());
  params.out = grad_x.mutable_data_ptr();
  params.partial = partial.mutable_data_ptr();
  const Panels panels = pack(params, true, x);
  run_parallel(op, groups, 1, [&](int64_t begin, int64_t end) {
    kernels().feed_forward_backward(params, begin, end);
  });
  const auto sum = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    sum_groups(params, groups, static_cast<A*>(dw1.mutable_data_ptr()),
               static_cast<A*>(db1.mutable_data_ptr()), static_cast<A*>(dw2.mutable_data_ptr()),
               static_cast<A*>(db2.mutable_data_ptr()));
  };
  params.is_double ? sum(static_cast<double*>(nullptr)) : sum(static_cast<float*>(nullptr));
  return {grad_x, dw1, db1, dw2, db2};
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("feed_forward_forward", TORCH_BOX(&recgrela::feed_forward_cpu));
  m.impl("feed_forward", TORCH_BOX(&recgrela::feed_forward_cpu));
  m.impl("feed_forward_backward", TORCH_BOX(&recgrela::feed_forward_backward_cpu));
}
