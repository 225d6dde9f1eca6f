// gated_rela_step on CUDA: checks and the launch. The kernel is in gated_rela_step.cu.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "stream.h"

namespace recgrela {

using namespace cuda;

Tensor gated_rela_step_cuda(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                            OptionalTensor conv_weight, OptionalTensor conv_bias, Tensor kv,
                            Tensor k_sum, Tensor conv, Tensor position, OptionalTensor active,
                            double eps) {
  const StepArgs args{q,        k,  v,     gate, conv_weight, conv_bias, active,
                      inv_freq, kv, k_sum, conv, position,    eps};
  const Dims d = check_step(args);
  check_width(kStep, d);
  Tensor out = torch::stable::new_empty(q, {d.B, d.H, d.D});
  const GatedRelaStepParams p = step_params(args, d, out);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check_launch(kStep, launch_gated_rela_step(p, current_stream(q)));
  return out;
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CUDA, m) {
  m.impl("gated_rela_step", TORCH_BOX(&recgrela::gated_rela_step_cuda));
}
