// rela on CUDA: gated_rela without gate and rank augmentation.
#include "../rela.h"

#include <torch/csrc/stable/library.h>

#include "run.h"

namespace recgrela {
RelaResult rela_cuda(Tensor q, Tensor k, Tensor v, Tensor inv_freq, OptionalTensor lengths,
                     OptionalTensor cu_seqlens, OptionalTensor kv, OptionalTensor k_sum,
                     OptionalTensor position, double eps, bool return_final_state,
                     bool save_for_backward) {
  return rela_of(cuda::run_forward, q, k, v, inv_freq, lengths, cu_seqlens, kv, k_sum, position,
                 eps, return_final_state, save_for_backward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rela_backward_cuda(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, Tensor q, Tensor k,
    Tensor v, Tensor inv_freq, OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
    OptionalTensor k_sum, OptionalTensor position, Tensor saved_kv, Tensor saved_k_sum, double eps,
    bool state_grad) {
  return rela_backward_of(cuda::run_backward, grad_out, grad_kv, grad_k_sum, q, k, v, inv_freq,
                          lengths, cu_seqlens, kv, k_sum, position, saved_kv, saved_k_sum, eps,
                          state_grad);
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CUDA, m) {
  m.impl("rela_forward", TORCH_BOX(&recgrela::rela_cuda));
  m.impl("rela", TORCH_BOX(&recgrela::rela_cuda));
  m.impl("rela_backward", TORCH_BOX(&recgrela::rela_backward_cuda));
}
