// gated_rela and its backward on the CPU: checks, memory, threads. The loops are in
// gated_rela_forward.h and gated_rela_backward.h.
#include "gated_rela.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "parallel.h"
#include "tensor_params.h"

namespace recgrela {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

constexpr int64_t kMaxGroups = 128;  // of sequences that share one partial weight gradient

Tensor none(const Tensor& like, ScalarType dtype) { return new_empty(like, {0}, dtype); }

int64_t mean_length(const Dims& d) { return d.packed_items ? d.packed_items / (d.B + 1) : d.L; }

// dweight[i] = sum over groups, always in the order of the groups.
template <class A>
void sum_groups(const Tensor& partial, const Tensor& total, int64_t groups) {
  const A* from = static_cast<const A*>(partial.const_data_ptr());
  A* to = static_cast<A*>(total.mutable_data_ptr());
  const int64_t size = total.numel();
  for (int64_t i = 0; i < size; ++i) to[i] = A(0);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[g * size + i];
  }
}

// More threads than sequences and heads share the work on long histories: once for the sums of each
// segment, once for the results. Both ways give the same bits.
void run_kernel(const char* op, GatedRelaParams& p, const Dims& d, const Tensor& like) {
  const Kernels& level = kernels();
  const int64_t pairs = d.B * d.H;
  int64_t longest = d.L;
  for (int64_t b = 0; p.cu_seqlens && b < d.B; ++b) {
    longest = std::max(longest, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
  }
  // Half of the work is done twice, so a few idle threads are not worth it.
  const bool split = longest > kSegment && pairs * 2 <= int64_t(torch::stable::get_num_threads());
  if (!split) {
    run_parallel(op, pairs, grain_size(mean_length(d), d.D),
                 [&](int64_t begin, int64_t end) { level.gated_rela(p, begin, end); });
    return;
  }
  p.segments = (longest + kSegment - 1) / kSegment;
  const Tensor sums = new_empty(like, {pairs, p.segments, d.D + 1, d.D}, d.acc);
  p.segment_sums = sums.mutable_data_ptr();
  run_parallel(op, pairs * p.segments, 1,
               [&](int64_t begin, int64_t end) { level.segment_sums(p, begin, end); });
  join_segments(p);
  run_parallel(op, pairs * p.segments, 1,
               [&](int64_t begin, int64_t end) { level.gated_rela(p, begin, end); });
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
  const Tensor step_rotation = new_empty(q, {d.H, kChunk + 1, d.D}, ScalarType::Double);
  GatedRelaParams p = sequence_params(args, d, step_rotation);

  Tensor out =
      packed ? new_empty(q, {d.packed_items, d.H, d.D}) : new_empty(q, {d.B, d.L, d.H, d.D});
  p.out = rows_of(out, packed);
  Tensor final_kv = none(q, d.acc), final_k_sum = none(q, d.acc), final_conv = none(q, d.acc);
  if (return_final_state) {
    final_kv = new_empty(q, {d.B, d.H, d.D, d.D}, d.acc);
    final_k_sum = new_empty(q, {d.B, d.H, d.D}, d.acc);
    final_conv = new_empty(q, {d.B, d.W - 1, d.H * d.D}, d.acc);
    p.final = states_of(&final_kv, &final_k_sum, &final_conv, nullptr);
  }
  Tensor saved_kv = none(q, d.acc), saved_k_sum = none(q, d.acc);
  if (save_for_backward) {
    // Ragged sequences leave slots unused: those are zero, so that equal calls give equal tensors.
    const int64_t chunks = count_chunks(d.B, d.L, d.packed_items, packed);
    const auto make = packed || lengths ? [](const Tensor& like, std::vector<int64_t> size,
                                             ScalarType t) { return new_zeros(like, size, t); }
                                        : [](const Tensor& like, std::vector<int64_t> size,
                                             ScalarType t) { return new_empty(like, size, t); };
    saved_kv = make(q, {chunks, d.H, d.D, d.D}, d.acc);
    saved_k_sum = make(q, {chunks, d.H, d.D}, d.acc);
    p.saved_kv = saved_kv.mutable_data_ptr();
    p.saved_k_sum = saved_k_sum.mutable_data_ptr();
  }

  run_kernel(op, p, d, q);
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
  const int64_t chunks = count_chunks(d.B, d.L, d.packed_items, packed);
  check_dense(op, "saved_kv", saved_kv, {chunks, d.H, d.D, d.D}, d.acc, q);
  check_dense(op, "saved_k_sum", saved_k_sum, {chunks, d.H, d.D}, d.acc, q);

  const Tensor step_rotation = new_empty(q, {d.H, kChunk + 1, d.D}, ScalarType::Double);
  GatedRelaBackwardParams p{};
  p.forward = sequence_params(args, d, step_rotation);
  p.forward.saved_kv = saved_kv.mutable_data_ptr();
  p.forward.saved_k_sum = saved_k_sum.mutable_data_ptr();
  p.grad_out = rows_of(grad_out, packed);
  if (any) p.grad_final = states_of(&*grad_kv, &*grad_k_sum, &*grad_conv, nullptr);

  const auto like_rows = [&] {
    return packed ? new_empty(q, {d.packed_items, d.H, d.D}) : new_empty(q, {d.B, d.L, d.H, d.D});
  };
  Tensor dq = like_rows(), dk = like_rows(), dv = like_rows();
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  Tensor dgate = none(q, d.dtype);
  if (gate) {
    dgate = like_rows();
    p.dgate = rows_of(dgate, packed);
  }

  p.groups = d.B < kMaxGroups ? d.B : kMaxGroups;
  Tensor dweight = none(q, d.acc), dbias = none(q, d.acc);
  Tensor dweight_partial = none(q, d.acc), dbias_partial = none(q, d.acc);
  if (conv_weight) {
    dweight = new_empty(q, {d.H * d.D, d.W}, d.acc);
    dbias = new_empty(q, {d.H * d.D}, d.acc);
    dweight_partial = new_empty(q, {p.groups, d.H * d.D, d.W}, d.acc);
    dbias_partial = new_empty(q, {p.groups, d.H * d.D}, d.acc);
    p.dweight_partial = dweight_partial.mutable_data_ptr();
    p.dbias_partial = dbias_partial.mutable_data_ptr();
  }

  Tensor dkv = none(q, d.acc), dk_sum = none(q, d.acc), dconv = none(q, d.acc);
  if (state_grad) {
    dkv = new_empty(q, {d.B, d.H, d.D, d.D}, d.acc);
    dk_sum = new_empty(q, {d.B, d.H, d.D}, d.acc);
    dconv = new_empty(q, {d.B, d.W - 1, d.H * d.D}, d.acc);
    p.grad_initial = states_of(&dkv, &dk_sum, &dconv, nullptr);
  }

  const Kernels& level = kernels();
  const int64_t per_group = p.groups ? d.B / p.groups : 0;
  run_parallel(op, p.groups * d.H, grain_size(per_group * mean_length(d), d.D),
               [&](int64_t begin, int64_t end) { level.gated_rela_backward(p, begin, end); });
  if (conv_weight) {
    const auto sum = d.acc == ScalarType::Double ? sum_groups<double> : sum_groups<float>;
    sum(dweight_partial, dweight, p.groups);
    sum(dbias_partial, dbias, p.groups);
  }
  if (!conv_bias) dbias = none(q, d.acc);
  return {dq, dk, dv, dgate, dweight, dbias, dkv, dk_sum, dconv};
}

ForwardResult gated_rela_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq,
                             OptionalTensor conv_weight, OptionalTensor conv_bias,
                             OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
                             OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position,
                             double eps, bool return_final_state, bool save_for_backward) {
  return run_forward("gated_rela", q, k, v, gate, inv_freq, conv_weight, conv_bias, lengths,
                     cu_seqlens, kv, k_sum, conv, position, eps, return_final_state,
                     save_for_backward);
}

BackwardResult gated_rela_backward_cpu(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, OptionalTensor grad_conv,
    Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor inv_freq, OptionalTensor conv_weight,
    OptionalTensor conv_bias, OptionalTensor lengths, OptionalTensor cu_seqlens, OptionalTensor kv,
    OptionalTensor k_sum, OptionalTensor conv, OptionalTensor position, Tensor saved_kv,
    Tensor saved_k_sum, double eps, bool state_grad) {
  return run_backward("gated_rela_backward", grad_out, grad_kv, grad_k_sum, grad_conv, q, k, v,
                      gate, inv_freq, conv_weight, conv_bias, lengths, cu_seqlens, kv, k_sum, conv,
                      position, saved_kv, saved_k_sum, eps, state_grad);
}

}  // namespace recgrela

STABLE_TORCH_LIBRARY_IMPL(recgrela, CPU, m) {
  m.impl("gated_rela_forward", TORCH_BOX(&recgrela::gated_rela_cpu));
  m.impl("gated_rela", TORCH_BOX(&recgrela::gated_rela_cpu));
  m.impl("gated_rela_backward", TORCH_BOX(&recgrela::gated_rela_backward_cpu));
}
