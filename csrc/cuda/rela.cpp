// rela on CUDA: gated_rela without gate and rank augmentation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"
#include "run.h"

namespace recgrela {
namespace {

// The state of gated_rela with an empty conv window, where a state is given.
OptionalTensor empty_conv(const Tensor& q, const OptionalTensor& kv) {
  if (!kv) return std::nullopt;
  return torch::stable::new_empty(q, {kv->size(0), 0, q.size(q.dim() - 2) * q.size(q.dim() - 1)},
                                  kv->scalar_type());
}

void check_state(const char* op, const OptionalTensor& kv) {
  RECGRELA_CHECK(!kv || kv->dim() == 4, op, ": kv must have shape [B, H, D, D], got ",
                 shape_text(*kv));
}

}  // namespace

RelaResult rela_cuda(Tensor q, Tensor k, Tensor v, Tensor inv_freq, OptionalTensor lengths,
                     OptionalTensor cu_seqlens, OptionalTensor kv, OptionalTensor k_sum,
                     OptionalTensor position, double eps, bool return_final_state,
                     bool save_for_backward) {
  check_state("rela", kv);
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
  check_state("rela_backward", kv);
  check_state("rela_backward", grad_kv);
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
