// rela on CUDA: gated_rela without gate and rank augmentation.
#include <torch/csrc/stable/library.h>

#include "../rela_state.h"
#include "run.h"

namespace recgrela {
RelaResult rela_cuda(Tensor q, Tensor k, Tensor v, Tensor inv_freq, OptionalTensor lengths,
                     OptionalTensor cu_seqlens, OptionalTensor kv, OptionalTensor k_sum,
                     OptionalTensor position, double eps, bool return_final_state,
                     bool save_for_backward) {
  check_rela_state("rela", kv);
  auto [out, final_kv, final_k_sum, final_conv, saved_kv, saved_k_sum] = cuda::run_forward(
      "rela", q, k, v, std::nullopt, inv_freq, std::nullopt, std::nullopt, lengths, cu_seqlens, kv,
      k_sum, empty_conv(q, kv), position, eps, return_final_state, save_for_backward);
  return {out, final_kv, final_k_sum, saved_kv, saved_k_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rela_backward_cuda(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, Tensor q, Tensor k,
    Tensor v, Tensor inv_freq, OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
    OptionalTensor k_sum, OptionalTensor position, Tensor saved_kv, Tensor saved_k_sum, double eps,
    bool state_grad) {
  check_rela_state("rela_backward", kv);
  check_rela_state("rela_backward", grad_kv);
  auto [dq, dk, dv, dgate, dweight, dbias, dkv, dk_sum, dconv] = cuda::run_backward(
      "rela_backward", grad_out, grad_kv, grad_k_sum, empty_conv(q, grad_kv), q, k, v, std::nullopt,
      inv_freq, std::nullopt, std::nullopt, lengths, cu_seqlens, kv, k_sum, empty_conv(q, kv),
      position, saved_kv, saved_k_sum, eps, state_grad);
  return {dq, dk, dv, dkv, dk_sum};
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CUDA, m) {
  m.impl("rela_forward", TORCH_BOX(&recgrela::rela_cuda));
  m.impl("rela", TORCH_BOX(&recgrela::rela_cuda));
  m.impl("rela_backward", TORCH_BOX(&recgrela::rela_backward_cuda));
}
