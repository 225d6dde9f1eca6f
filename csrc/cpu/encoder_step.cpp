// encoder_step on the CPU: checks and threads. The loops are in encoder_step.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace recgrela {
namespace {

constexpr int64_t kUsersToShare = 4;  // fewer on a thread are slower than all on one
constexpr int64_t kMostLayers = 1024, kMostWidth = 1 << 24;  // no product of sizes overflows

int64_t count_weights(int64_t layers, int64_t C, int64_t W, int64_t M, bool gate, bool final_norm) {
  const int64_t linear = (gate ? C * C + C : 0) + (C * C + C) + (2 * C * C + 2 * C) + (C * C + C);
  const int64_t conv = W > 0 ? C * W + C : 0;
  return layers * (4 * C + linear + conv + (C * M + M) + (M * C + C)) + (final_norm ? 2 * C : 0);
}

}  // namespace

Tensor encoder_step_cpu(Tensor x, Tensor weights, Tensor inv_freq, Tensor state, Tensor position,
                        OptionalTensor active, int64_t num_layers, int64_t mlp_width,
                        int64_t conv_width, bool gate, bool final_norm, double eps,
                        double layer_norm_eps) {
  const char* op = "encoder_step";
  RECGRELA_CHECK(x.dim() == 2, op, ": x must have shape [B, hidden_size], got ", shape_text(x));
  const ScalarType dtype = x.scalar_type();
  RECGRELA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                 ": x must have dtype float32 or float64, got ", dtype);
  RECGRELA_CHECK(inv_freq.dim() == 2, op, ": inv_freq must have shape [H, D/2], got ",
                 shape_text(inv_freq));
  const int64_t B = x.size(0), C = x.size(1), H = inv_freq.size(0), D = 2 * inv_freq.size(1);
  RECGRELA_CHECK(H * D == C && C > 0, op, ": inv_freq must have shape [H, D/2] with H * D = ", C,
                 ", got ", shape_text(inv_freq));
  RECGRELA_CHECK(num_layers >= 1 && mlp_width >= 1 && conv_width >= 0, op,
                 ": num_layers and mlp_width must be at least 1 and conv_width at least 0, got ",
                 num_layers, ", ", mlp_width, " and ", conv_width);
  RECGRELA_CHECK(num_layers <= kMostLayers && C <= kMostWidth && mlp_width <= kMostWidth &&
                     conv_width <= kMostWidth,
                 op, ": num_layers must be at most ", kMostLayers, " and every width at most ",
                 kMostWidth, ", got ", num_layers, ", ", C, ", ", mlp_width, " and ", conv_width);
  const int64_t kept = conv_width > 0 ? conv_width - 1 : 0;
  const int64_t row = num_layers * C * (D + 1 + kept);
  check_dense(op, "inv_freq", inv_freq, {H, D / 2}, ScalarType::Double, x);
  check_dense(op, "weights", weights,
              {count_weights(num_layers, C, conv_width, mlp_width, gate, final_norm)}, dtype, x);
  check_dense(op, "position", position, {B}, ScalarType::Long, x);
  check_dense(op, "active", active, {B}, ScalarType::Bool, x);
  check_shape(op, "state", state, {B, row});
  RECGRELA_CHECK(state.scalar_type() == dtype, op, ": state must have dtype ", dtype, ", got ",
                 state.scalar_type());
  RECGRELA_CHECK(B == 0 || (x.stride(1) == 1 && state.stride(1) == 1), op,
                 ": x and state must have a contiguous last dimension");
  RECGRELA_CHECK(B <= 1 || state.stride(0) >= row, op,
                 ": state must not overlap between users, got batch stride ", state.stride(0));

  Tensor out = torch::stable::new_empty(x, {B, C});
  EncoderStepParams p{};
  p.is_double = dtype == ScalarType::Double;
  p.has_gate = gate;
  p.has_final_norm = final_norm;
  p.B = B;
  p.num_layers = num_layers;
  p.H = H;
  p.D = D;
  p.W = conv_width;
  p.mlp_width = mlp_width;
  p.eps = eps;
  p.layer_norm_eps = layer_norm_eps;
  p.x = x.const_data_ptr();
  p.x_stride = x.stride(0);
  p.out = out.mutable_data_ptr();
  p.weights = weights.const_data_ptr();
  p.inv_freq = static_cast<const double*>(inv_freq.const_data_ptr());
  p.state = state.mutable_data_ptr();
  p.state_stride = state.stride(0);
  p.position = integers(position);
  p.active = static_cast<const bool*>(data_or_null(active));

  const Kernels& level = kernels();
  run_parallel(op, B, kUsersToShare,
               [&](int64_t begin, int64_t end) { level.encoder_step(p, begin, end); });
  return out;
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("encoder_step", TORCH_BOX(&recgrela::encoder_step_cpu));
}
