// rela: gated_rela without gate, rank augmentation and conv state, for both rooms.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "ops.h"

namespace recgrela {

// The state of gated_rela with an empty conv window, where a state is given.
inline OptionalTensor empty_conv(const Tensor& q, const OptionalTensor& kv) {
  if (!kv) return std::nullopt;
  return torch::stable::new_empty(q, {kv->size(0), 0, q.size(q.dim() - 2) * q.size(q.dim() - 1)},
                                  kv->scalar_type());
}

inline void check_rela_state(const char* op, const OptionalTensor& kv) {
  RECGRELA_CHECK(!kv || kv->dim() == 4, op, ": kv must have shape [B, H, D, D], got ",
                 shape_text(*kv));
}

inline RelaResult rela_of(RunForward* run, Tensor q, Tensor k, Tensor v, Tensor inv_freq,
                          OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                          OptionalTensor k_sum, OptionalTensor position, double eps,
                          bool return_final_state, bool save_for_backward) {
  check_rela_state("rela", kv);
  auto [out, final_kv, final_k_sum, final_conv, saved_kv, saved_k_sum] =
      run("rela", q, k, v, std::nullopt, inv_freq, std::nullopt, std::nullopt, lengths, cu_seqlens,
          kv, k_sum, empty_conv(q, kv), position, eps, return_final_state, save_for_backward);
  return {out, final_kv, final_k_sum, saved_kv, saved_k_sum};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rela_backward_of(
    RunBackward* run, Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, Tensor q,
    Tensor k, Tensor v, Tensor inv_freq, OptionalTensor lengths, OptionalTensor cu_seqlens,
    OptionalTensor kv, OptionalTensor k_sum, OptionalTensor position, Tensor saved_kv,
    Tensor saved_k_sum, double eps, bool state_grad) {
  check_rela_state("rela_backward", kv);
  check_rela_state("rela_backward", grad_kv);
  auto [dq, dk, dv, dgate, dweight, dbias, dkv, dk_sum, dconv] =
      run("rela_backward", grad_out, grad_kv, grad_k_sum, empty_conv(q, grad_kv), q, k, v,
          std::nullopt, inv_freq, std::nullopt, std::nullopt, lengths, cu_seqlens, kv, k_sum,
          empty_conv(q, kv), position, saved_kv, saved_k_sum, eps, state_grad);
  return {dq, dk, dv, dkv, dk_sum};
}

}  // namespace recgrela
