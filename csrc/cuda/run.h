// gated_rela and its backward under another operator's name, for rela.cpp.
#pragma once
#include "../ops.h"

namespace recgrela::cuda {

ForwardResult run_forward(const char* op, Tensor q, Tensor k, Tensor v, OptionalTensor gate,
                          Tensor inv_freq, OptionalTensor conv_weight, OptionalTensor conv_bias,
                          OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                          OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                          double eps, bool return_final_state, bool save_for_backward);

BackwardResult run_backward(const char* op, Tensor grad_out, OptionalTensor grad_kv,
                            OptionalTensor grad_k_sum, OptionalTensor grad_conv, Tensor q, Tensor k,
                            Tensor v, OptionalTensor gate, Tensor inv_freq,
                            OptionalTensor conv_weight, OptionalTensor conv_bias,
                            OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                            OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                            Tensor saved_kv, Tensor saved_k_sum, double eps, bool state_grad);

}  // namespace recgrela::cuda
