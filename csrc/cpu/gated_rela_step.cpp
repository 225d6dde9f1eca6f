// gated_rela_step on the CPU: checks and threads. The loop is in gated_rela_step.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "parallel.h"
#include "tensor_params.h"

namespace recgrela {

Tensor gated_rela_step_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                           OptionalTensor conv_weight, OptionalTensor conv_bias, Tensor kv,
                           Tensor k_sum, Tensor conv, Tensor position, OptionalTensor active,
                           double eps) {
  const char* op = "gated_rela_step";
  RECGRELA_CHECK(q.dim() == 3, op, ": q must have shape [B, H, D], got ", shape_text(q));
  check_float(op, q);
  check_rows(op, "q", q, q);
  check_rows(op, "k", k, q);
  check_rows(op, "v", v, q);
  check_rows(op, "gate", gate, q);
  Dims d{};
  read_parameters(op, q, inv_freq, conv_weight, conv_bias, d);
  d.B = q.size(0);
  check_dense(op, "position", position, {d.B}, ScalarType::Long, q);
  check_dense(op, "active", active, {d.B}, ScalarType::Bool, q);
  check_written_state(op, "kv", kv, {d.B, d.H, d.D, d.D}, d, q);
  check_written_state(op, "k_sum", k_sum, {d.B, d.H, d.D}, d, q);
  check_written_state(op, "conv", conv, {d.B, d.W - 1, d.H * d.D}, d, q);

  Tensor out = torch::stable::new_empty(q, {d.B, d.H, d.D});
  const auto rows = [](const Tensor& x) {
    Rows r = rows_of(x, true);  // [B, H, D]: the first dimension is the batch
    r.batch_stride = r.item_stride;
    r.item_stride = 0;
    return r;
  };
  GatedRelaStepParams p{};
  p.dtype = kernel_dtype(d.dtype);
  p.B = d.B;
  p.H = d.H;
  p.D = d.D;
  p.W = d.W;
  p.eps = eps;
  p.q = rows(q);
  p.k = rows(k);
  p.v = rows(v);
  if (gate) p.gate = rows(*gate);
  p.out = rows(out);
  p.inv_freq = static_cast<const double*>(inv_freq.const_data_ptr());
  p.conv_weight = data_or_null(conv_weight);
  p.conv_bias = data_or_null(conv_bias);
  p.state = states_of(&kv, &k_sum, &conv, &position);
  p.active = static_cast<const bool*>(data_or_null(active));

  const Kernels& level = kernels();
  run_parallel(op, d.B * d.H, grain_size(d.D, d.D),
               [&](int64_t begin, int64_t end) { level.gated_rela_step(p, begin, end); });
  return out;
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("gated_rela_step", TORCH_BOX(&recgrela::gated_rela_step_cpu));
}
