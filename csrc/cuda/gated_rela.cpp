// gated_rela and its backward on CUDA: checks, memory, the launch. The kernels are in the .cu
// files.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "run.h"
#include "stream.h"

namespace recgrela {
namespace cuda {
namespace {

using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

// Memory that the launches of one call use and nobody reads afterwards.
Tensor scratch_of(const Tensor& like, int64_t bytes) {
  return new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace

ForwardResult run_forward(const char* op, Tensor q, Tensor k, Tensor v, OptionalTensor gate,
                          Tensor inv_freq, OptionalTensor conv_weight, OptionalTensor conv_bias,
                          OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                          OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                          double eps, bool return_final_state, bool save_for_backward) {
  const SequenceArgs args{op,         q,  k,     v,    gate,     conv_weight, conv_bias, lengths,
                          cu_seqlens, kv, k_sum, conv, position, inv_freq,    eps};
  const Dims d = check_sequence(args);
  check_width(op, d);
  const DeviceGuard guard(q.get_device_index());
  const Stream stream = current_stream(q);
  check_values(args, d, stream);
  GatedRelaParams p{};
  set_sequence(args, d, p);
  const ForwardResult result = new_forward(args, d, return_final_state, save_for_backward, p);
  const Tensor scratch = scratch_of(q, forward_scratch_bytes(p));
  p.scratch = scratch.numel() ? scratch.mutable_data_ptr() : nullptr;
  check_launch(op, launch_gated_rela(p, stream));
  return result;
}

BackwardResult run_backward(const char* op, Tensor grad_out, OptionalTensor grad_kv,
                            OptionalTensor grad_k_sum, OptionalTensor grad_conv, Tensor q, Tensor k,
                            Tensor v, OptionalTensor gate, Tensor inv_freq,
                            OptionalTensor conv_weight, OptionalTensor conv_bias,
                            OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                            OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                            Tensor saved_kv, Tensor saved_k_sum, double eps, bool state_grad) {
  const SequenceArgs args{op,         q,  k,     v,    gate,     conv_weight, conv_bias, lengths,
                          cu_seqlens, kv, k_sum, conv, position, inv_freq,    eps};
  const Dims d = check_sequence(args);
  check_width(op, d);
  const GradientArgs given{grad_out, grad_kv, grad_k_sum, grad_conv, saved_kv, saved_k_sum};
  check_gradients(args, d, given);
  const DeviceGuard guard(q.get_device_index());
  const Stream stream = current_stream(q);
  check_values(args, d, stream);
  GatedRelaBackwardParams p{};
  set_sequence(args, d, p.forward);
  const BackwardResult result = new_backward(args, d, given, state_grad, p.forward, p);
  const Tensor scratch = scratch_of(q, backward_scratch_bytes(p.forward));
  p.forward.scratch = scratch.mutable_data_ptr();
  check_launch(op, launch_gated_rela_backward(p, stream));
  return result;
}

}  // namespace cuda

ForwardResult gated_rela_cuda(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                              OptionalTensor conv_weight, OptionalTensor conv_bias,
                              OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                              OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                              double eps, bool return_final_state, bool save_for_backward) {
  return cuda::run_forward("gated_rela", q, k, v, gate, inv_freq, conv_weight, conv_bias, lengths,
                           cu_seqlens, kv, k_sum, conv, position, eps, return_final_state,
                           save_for_backward);
}

BackwardResult gated_rela_backward_cuda(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, OptionalTensor grad_conv,
    Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq, OptionalTensor conv_weight,
    OptionalTensor conv_bias, OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
    OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position, Tensor saved_kv,
    Tensor saved_k_sum, double eps, bool state_grad) {
  return cuda::run_backward("gated_rela_backward", grad_out, grad_kv, grad_k_sum, grad_conv, q, k,
                            v, gate, inv_freq, conv_weight, conv_bias, lengths, cu_seqlens, kv,
                            k_sum, conv, position, saved_kv, saved_k_sum, eps, state_grad);
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CUDA, m) {
  m.impl("gated_rela_forward", TORCH_BOX(&recgrela::gated_rela_cuda));
  m.impl("gated_rela", TORCH_BOX(&recgrela::gated_rela_cuda));
  m.impl("gated_rela_backward", TORCH_BOX(&recgrela::gated_rela_backward_cuda));
}
