// Every operator of librecgrela, with shapes: the table of contents. Schemas are in library.cpp,
// meaning and formulas in recgrela_ext/ops/reference.py.
//
//   rows    q, k, v, gate, out: [B, L, H, D], or [T, H, D] with cu_seqlens; any strides, the last
//           dimension contiguous; one floating dtype
//   acc     float64 for float64 rows, else float32: conv_weight [H*D, W], conv_bias [H*D], states
//           kv [B, H, D, D], k_sum [B, H, D], conv [B, W-1, H*D], all contiguous
//   other   inv_freq [H, D/2] float64; lengths [B], cu_seqlens [B+1], position [B] int64
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace recgrela {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// out, final kv, final k_sum, final conv (empty unless return_final_state), and the states at every
// chunk's start (empty unless save_for_backward).
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult gated_rela_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                             OptionalTensor conv_weight, OptionalTensor conv_bias,
                             OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                             OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                             double eps, bool return_final_state, bool save_for_backward);

// Gradients of q, k, v, gate, conv_weight, conv_bias and the initial kv, k_sum, conv; what was not
// given, or not asked for with state_grad, is empty.
using BackwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// gated_rela under the name `op`, which stands in error messages, and its backward: each room has
// one of each, and rela runs them too.
using RunForward = ForwardResult(const char* op, Tensor q, Tensor k, Tensor v, OptionalTensor gate,
                                 Tensor inv_freq, OptionalTensor conv_weight,
                                 OptionalTensor conv_bias, OptionalTensor lengths,
                                 OptionalTensor cu_seqlens, OptionalTensor kv, OptionalTensor k_sum,
                                 OptionalTensor conv, OptionalTensor position, double eps,
                                 bool return_final_state, bool save_for_backward);
using RunBackward = BackwardResult(const char* op, Tensor grad_out, OptionalTensor grad_kv,
                                   OptionalTensor grad_k_sum, OptionalTensor grad_conv, Tensor q,
                                   Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                                   OptionalTensor conv_weight, OptionalTensor conv_bias,
                                   OptionalTensor lengths, OptionalTensor cu_seqlens,
                                   OptionalTensor kv, OptionalTensor k_sum, OptionalTensor conv,
                                   OptionalTensor position, Tensor saved_kv, Tensor saved_k_sum,
                                   double eps, bool state_grad);

BackwardResult gated_rela_backward_cpu(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, OptionalTensor grad_conv,
    Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq, OptionalTensor conv_weight,
    OptionalTensor conv_bias, OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
    OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position, Tensor saved_kv,
    Tensor saved_k_sum, double eps, bool state_grad);

// Rows [B, H, D]; kv, k_sum and conv are updated in place and may have any batch stride.
Tensor gated_rela_step_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                           OptionalTensor conv_weight, OptionalTensor conv_bias, Tensor kv,
                           Tensor k_sum, Tensor conv, Tensor position, OptionalTensor active,
                           double eps);

// All layers of one event per user: x [B, C], state [B, F] updated in place, both with any batch
// stride; weights: one buffer, laid out as kernels.h says.
Tensor encoder_step_cpu(Tensor x, Tensor weights, Tensor inv_freq, Tensor state, Tensor position,
                        OptionalTensor active, int64_t num_layers, int64_t mlp_width,
                        int64_t conv_width, bool gate, bool final_norm, double eps,
                        double layer_norm_eps);

// The k items with the largest inner product: hidden [B, C], table [N, C] (int8 with scale [N]
// float32), seen [B, S] ascending, candidates [n] or [B, n] ascending. scores and items [B, k],
// best first; places without an item hold (-inf, padding_idx).
std::tuple<Tensor, Tensor> topk_scores_cpu(Tensor hidden, Tensor table, OptionalTensor scale,
                                           int64_t k, int64_t padding_idx, OptionalTensor seen,
                                           OptionalTensor candidates);

// [residual +] dropout(act(x)), act GELU or the identity, and the gradient of x (which the backward
// needs for GELU alone). Any shape, contiguous; the mask is a function of seed and element number.
Tensor activation_dropout_cpu(Tensor x, OptionalTensor residual, bool gelu, double p, int64_t seed);
Tensor activation_dropout_backward_cpu(Tensor grad, OptionalTensor x, bool gelu, double p,
                                       int64_t seed);

// Mean cross-entropy of the rows of hidden [T, C] whose target [T] int64 is not ignore_index, over
// the rows of table [N, C] without row ignore_index where exclude; and the gradients, empty unless
// asked for. float32 or float64, contiguous. To the score of row t and item bias_items[k] comes
// bias_values[k], k from bias_offsets[t] to bias_offsets[t + 1]. Or, without offsets, to that of
// the item met r-th last in bias_items[bias_begin[t], bias_end[t]) comes bias_values[b], b the
// number of bounds bias_up_to below r.
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_loss_cpu(
    Tensor hidden, Tensor table, Tensor targets, int64_t ignore_index, bool exclude, bool gradients,
    OptionalTensor bias_offsets, OptionalTensor bias_items, OptionalTensor bias_values,
    OptionalTensor bias_begin, OptionalTensor bias_end, OptionalTensor bias_up_to);

// The distinct items of the spans items[begin[r], end[r]), oldest first by their last place:
// offsets [R + 1], of every entry [K] the item and its recency, from 1 for the one met last. items
// [T]; next [T]: where the same item stands next, T or more where nowhere. All int64, contiguous.
std::tuple<Tensor, Tensor, Tensor> recent_items_cpu(Tensor items, Tensor next, Tensor begin,
                                                    Tensor end);

// [residual +] dropout(W2 dropout(GELU(W1 x + b1)) + b2) of rows x [N, C], W1 [M, C], W2 [C, M], C
// and M multiples of 16; pre = W1 x + b1 [N, M], empty unless save_for_backward. The
// gradients: of x, W1, b1, W2, b2. float32 or float64, contiguous; dropout as activation_dropout.
std::tuple<Tensor, Tensor> feed_forward_cpu(Tensor x, Tensor first_weight, Tensor first_bias,
                                            Tensor second_weight, Tensor second_bias,
                                            OptionalTensor residual, double p, int64_t inner_seed,
                                            int64_t outer_seed, bool save_for_backward);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward_cpu(
    Tensor grad, Tensor x, Tensor first_weight, Tensor second_weight, Tensor pre, double p,
    int64_t inner_seed, int64_t outer_seed);

// gated_rela without gate and rank augmentation; its states have no conv.
using RelaResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
RelaResult rela_cpu(Tensor q, Tensor k, Tensor v, Tensor inv_freq, OptionalTensor lengths,
                    OptionalTensor cu_seqlens, OptionalTensor kv, OptionalTensor k_sum,
                    OptionalTensor position, double eps, bool return_final_state,
                    bool save_for_backward);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rela_backward_cpu(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, Tensor q, Tensor k,
    Tensor v, Tensor inv_freq, OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
    OptionalTensor k_sum, OptionalTensor position, Tensor saved_kv, Tensor saved_k_sum, double eps,
    bool state_grad);

}  // namespace recgrela
