// gated_rela_step on the CPU: checks and threads. The loop is in gated_rela_step.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace recgrela {

Tensor gated_rela_step_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                           OptionalTensor conv_weight, OptionalTensor conv_bias, Tensor kv,
                           Tensor k_sum, Tensor conv, Tensor position, OptionalTensor active,
                           double eps) {
  const StepArgs args{q,        k,  v,     gate, conv_weight, conv_bias, active,
                      inv_freq, kv, k_sum, conv, position,    eps};
  const Dims d = check_step(args);
  Tensor out = torch::stable::new_empty(q, {d.B, d.H, d.D});
  const GatedRelaStepParams p = step_params(args, d, out);
  const Kernels& level = kernels();
  run_parallel(kStep, d.B * d.H, grain_size(d.D, d.D),
               [&](int64_t begin, int64_t end) { level.gated_rela_step(p, begin, end); });
  return out;
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("gated_rela_step", TORCH_BOX(&recgrela::gated_rela_step_cpu));
}
