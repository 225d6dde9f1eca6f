// Every schema of the library, one operator a paragraph. Kernels register themselves in csrc/cpu
// and csrc/cuda. `<op>_forward` has no autograd formula and is called when nothing needs a
// gradient: a formula registered from Python costs about 10 us a call even under no_grad.
#include <torch/csrc/stable/library.h>

#define GATED_RELA_ARGS                                                                 \
  "(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor inv_freq, Tensor? conv_weight, " \
  "Tensor? conv_bias, Tensor? lengths, Tensor? cu_seqlens, Tensor? kv, Tensor? k_sum, " \
  "Tensor? conv, Tensor? position, float eps, bool return_final_state, "                \
  "bool save_for_backward) -> (Tensor out, Tensor final_kv, Tensor final_k_sum, "       \
  "Tensor final_conv, Tensor saved_kv, Tensor saved_k_sum)"

#define RELA_ARGS                                                                         \
  "(Tensor q, Tensor k, Tensor v, Tensor inv_freq, Tensor? lengths, Tensor? cu_seqlens, " \
  "Tensor? kv, Tensor? k_sum, Tensor? position, float eps, bool return_final_state, "     \
  "bool save_for_backward) -> (Tensor out, Tensor final_kv, Tensor final_k_sum, "         \
  "Tensor saved_kv, Tensor saved_k_sum)"

#define FEED_FORWARD_ARGS                                                           \
  "(Tensor x, Tensor first_weight, Tensor first_bias, Tensor second_weight, "       \
  "Tensor second_bias, Tensor? residual, float p, int inner_seed, int outer_seed, " \
  "bool save_for_backward) -> (Tensor out, Tensor pre)"

STABLE_TORCH_LIBRARY(recgrela, m) {
  m.def("gated_rela_forward" GATED_RELA_ARGS);
  m.def("gated_rela" GATED_RELA_ARGS);
  m.def(
      "gated_rela_backward(Tensor grad_out, Tensor? grad_kv, Tensor? grad_k_sum, "
      "Tensor? grad_conv, Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor inv_freq, "
      "Tensor? conv_weight, Tensor? conv_bias, Tensor? lengths, Tensor? cu_seqlens, Tensor? kv, "
      "Tensor? k_sum, Tensor? conv, Tensor? position, Tensor saved_kv, Tensor saved_k_sum, "
      "float eps, bool state_grad) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
      "Tensor grad_gate, Tensor grad_conv_weight, Tensor grad_conv_bias, "
      "Tensor grad_initial_kv, Tensor grad_initial_k_sum, Tensor grad_initial_conv)");

  m.def(
      "gated_rela_step(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor inv_freq, "
      "Tensor? conv_weight, Tensor? conv_bias, Tensor(a!) kv, Tensor(b!) k_sum, Tensor(c!) conv, "
      "Tensor position, Tensor? active, float eps) -> Tensor");

  m.def(
      "encoder_step(Tensor x, Tensor weights, Tensor inv_freq, Tensor(a!) state, Tensor position, "
      "Tensor? active, int num_layers, int mlp_width, int conv_width, bool gate, bool final_norm, "
      "float eps, float layer_norm_eps) -> Tensor");

  m.def(
      "topk_scores(Tensor hidden, Tensor table, Tensor? scale, int k, int padding_idx, "
      "Tensor? seen, Tensor? candidates) -> (Tensor scores, Tensor items)");

  m.def("activation_dropout(Tensor x, Tensor? residual, bool gelu, float p, int seed) -> Tensor");
  m.def(
      "activation_dropout_backward(Tensor grad, Tensor? x, bool gelu, float p, int seed) "
      "-> Tensor");

  m.def(
      "softmax_loss(Tensor hidden, Tensor table, Tensor targets, int ignore_index, "
      "bool exclude, bool gradients, Tensor? bias_offsets, Tensor? bias_items, "
      "Tensor? bias_values, Tensor? bias_begin=None, Tensor? bias_end=None, "
      "Tensor? bias_up_to=None) -> (Tensor loss, Tensor grad_hidden, Tensor grad_table, "
      "Tensor grad_bias)");

  m.def(
      "recent_items(Tensor items, Tensor next, Tensor begin, Tensor end) -> (Tensor offsets, "
      "Tensor recent, Tensor recency)");

  m.def("feed_forward_forward" FEED_FORWARD_ARGS);
  m.def("feed_forward" FEED_FORWARD_ARGS);
  m.def(
      "feed_forward_backward(Tensor grad, Tensor x, Tensor first_weight, Tensor second_weight, "
      "Tensor pre, float p, int inner_seed, int outer_seed) -> (Tensor grad_x, "
      "Tensor grad_first_weight, Tensor grad_first_bias, Tensor grad_second_weight, "
      "Tensor grad_second_bias)");

  m.def("rela_forward" RELA_ARGS);
  m.def("rela" RELA_ARGS);
  m.def(
      "rela_backward(Tensor grad_out, Tensor? grad_kv, Tensor? grad_k_sum, Tensor q, Tensor k, "
      "Tensor v, Tensor inv_freq, Tensor? lengths, Tensor? cu_seqlens, Tensor? kv, "
      "Tensor? k_sum, Tensor? position, Tensor saved_kv, Tensor saved_k_sum, float eps, "
      "bool state_grad) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
      "Tensor grad_initial_kv, Tensor grad_initial_k_sum)");
}
