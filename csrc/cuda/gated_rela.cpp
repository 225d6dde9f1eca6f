// gated_rela and its backward on CUDA: checks, memory, the launch. The kernels are in the .cu
// files.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "arguments.h"
#include "run.h"

namespace recgrela {
namespace cuda {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::accelerator::DeviceGuard;

Tensor none(const Tensor& like, ScalarType dtype) { return new_empty(like, {0}, dtype); }

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
  const bool packed = cu_seqlens.has_value();
  const DeviceGuard guard(q.get_device_index());
  const Stream stream = current_stream(q);
  check_values(args, d, stream);
  GatedRelaParams p = sequence_params(args, d);

  Tensor out =
      packed ? new_empty(q, {d.packed_items, d.H, d.D}) : new_empty(q, {d.B, d.L, d.H, d.D});
  p.out = rows_of(out, packed);
  Tensor final_kv = none(q, d.acc), final_k_sum = none(q, d.acc), final_conv = none(q, d.acc);
  if (return_final_state) {
    final_kv = new_empty(q, {d.B, d.H, d.D, d.D}, d.acc);
    final_k_sum = new_empty(q, {d.B, d.H, d.D}, d.acc);
    final_conv = new_empty(q, {d.B, d.W - 1, d.H * d.D}, d.acc);
    p.final = states_of(final_kv, final_k_sum, final_conv, nullptr);
  }
  Tensor saved_kv = none(q, d.acc), saved_k_sum = none(q, d.acc);
  if (save_for_backward) {
    // Ragged sequences leave slots unused: those are zero, so that equal calls give equal tensors.
    const std::vector<int64_t> shape = saved_shape(d, packed);
    const std::vector<int64_t> square{shape[0], d.H, d.D, d.D};
    const bool ragged = packed || lengths;
    saved_kv = ragged ? new_zeros(q, square, d.acc) : new_empty(q, square, d.acc);
    saved_k_sum = ragged ? new_zeros(q, shape, d.acc) : new_empty(q, shape, d.acc);
    p.saved_kv = saved_kv.mutable_data_ptr();
    p.saved_k_sum = saved_k_sum.mutable_data_ptr();
  }
  const Tensor scratch = scratch_of(q, forward_scratch_bytes(p));
  p.scratch = scratch.numel() ? scratch.mutable_data_ptr() : nullptr;
  check_launch(op, launch_gated_rela(p, stream));
  return {out, final_kv, final_k_sum, final_conv, saved_kv, saved_k_sum};
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
  const bool packed = cu_seqlens.has_value();
  check_rows(op, "grad_out", grad_out, q);
  const bool any = grad_kv || grad_k_sum || grad_conv;
  RECGRELA_CHECK(!any || (grad_kv && grad_k_sum && grad_conv), op,
                 ": grad_kv, grad_k_sum and grad_conv must be given together");
  check_dense(op, "grad_kv", grad_kv, {d.B, d.H, d.D, d.D}, d.acc, q);
  check_dense(op, "grad_k_sum", grad_k_sum, {d.B, d.H, d.D}, d.acc, q);
  check_dense(op, "grad_conv", grad_conv, {d.B, d.W - 1, d.H * d.D}, d.acc, q);
  const std::vector<int64_t> shape = saved_shape(d, packed);
  check_dense(op, "saved_kv", saved_kv, {shape[0], d.H, d.D, d.D}, d.acc, q);
  check_dense(op, "saved_k_sum", saved_k_sum, {shape[0], d.H, d.D}, d.acc, q);
  const DeviceGuard guard(q.get_device_index());
  const Stream stream = current_stream(q);
  check_values(args, d, stream);

  GatedRelaBackwardParams p{};
  p.forward = sequence_params(args, d);
  p.forward.saved_kv = saved_kv.mutable_data_ptr();
  p.forward.saved_k_sum = saved_k_sum.mutable_data_ptr();
  p.grad_out = rows_of(grad_out, packed);
  if (any) p.grad_final = states_of(*grad_kv, *grad_k_sum, *grad_conv, nullptr);
  const auto like_rows = [&] {
    return packed ? new_empty(q, {d.packed_items, d.H, d.D}) : new_empty(q, {d.B, d.L, d.H, d.D});
  };
  Tensor dq = like_rows(), dk = like_rows(), dv = like_rows(), dgate = none(q, d.dtype);
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  if (gate) {
    dgate = like_rows();
    p.dgate = rows_of(dgate, packed);
  }
  Tensor dweight = none(q, d.acc), dbias = none(q, d.acc);
  if (conv_weight) {
    dweight = new_empty(q, {d.H * d.D, d.W}, d.acc);
    p.dweight = dweight.mutable_data_ptr();
  }
  if (conv_bias) {
    dbias = new_empty(q, {d.H * d.D}, d.acc);
    p.dbias = dbias.mutable_data_ptr();
  }
  Tensor dkv = none(q, d.acc), dk_sum = none(q, d.acc), dconv = none(q, d.acc);
  if (state_grad) {
    dkv = new_empty(q, {d.B, d.H, d.D, d.D}, d.acc);
    dk_sum = new_empty(q, {d.B, d.H, d.D}, d.acc);
    dconv = new_empty(q, {d.B, d.W - 1, d.H * d.D}, d.acc);
    p.grad_initial = states_of(dkv, dk_sum, dconv, nullptr);
  }
  const Tensor scratch = scratch_of(q, backward_scratch_bytes(p.forward));
  p.forward.scratch = scratch.mutable_data_ptr();
  check_launch(op, launch_gated_rela_backward(p, stream));
  return {dq, dk, dv, dgate, dweight, dbias, dkv, dk_sum, dconv};
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
