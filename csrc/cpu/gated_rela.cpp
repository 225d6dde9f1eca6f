// gated_rela and its backward on the CPU: checks, memory, threads. The loops are in
// gated_rela_forward.h and gated_rela_backward.h.
#include "gated_rela.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace recgrela {
namespace {

using torch::stable::new_empty;

constexpr int64_t kMaxGroups = 128;  // of sequences that share one partial weight gradient

int64_t mean_length(const Dims& d) { return d.packed_items ? d.packed_items / (d.B + 1) : d.L; }

Dims check(const SequenceArgs& args) {
  const Dims d = check_sequence(args);
  if (args.lengths) check_lengths(args.op, *args.lengths, d.L);
  if (args.cu_seqlens) check_cu_seqlens(args.op, *args.cu_seqlens, d.packed_items);
  return d;
}

int64_t longest_sequence(const GatedRelaParams& p, const Dims& d) {
  int64_t longest = d.L;
  for (int64_t b = 0; p.cu_seqlens && b < d.B; ++b) {
    longest = std::max(longest, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
  }
  return longest;
}

// The rotations of a chunk's steps and of the first chunks of all sequences: as many as pay, and as
// leave the second-level cache to the rows.
struct Rotations {
  Tensor steps, chunks;
};
Rotations make_rotations(const SequenceArgs& args, const Dims& d, GatedRelaParams& p) {
  constexpr int64_t kMostBytes = 512 << 10;
  Rotations made;
  made.steps = new_empty(args.q, {d.H, kChunk + 1, d.D}, ScalarType::Double);
  double* to = static_cast<double*>(made.steps.mutable_data_ptr());
  fill_step_rotation(to, p.inv_freq, d.H, d.D, p.dtype);
  p.step_rotation = to;
  const int64_t chunk = d.H * 2 * kChunk * padded_row(d.D, p.dtype);
  const int64_t bytes = chunk * (p.dtype == DType::kDouble ? 8 : 4);
  if (d.B < 2 || d.H == 0) return made;  // nobody to share them with
  p.kept_chunks = std::min((longest_sequence(p, d) + kChunk - 1) / kChunk, kMostBytes / bytes);
  if (p.kept_chunks == 0) return made;
  made.chunks = new_empty(args.q, {p.kept_chunks * chunk}, d.acc);
  p.rotations = made.chunks.mutable_data_ptr();
  kernels().rotation_tables(p);
  return made;
}

// Everything but out, final and the saved states.
Rotations set_params(const SequenceArgs& args, const Dims& d, GatedRelaParams& p) {
  set_sequence(args, d, p);
  return make_rotations(args, d, p);
}

// total[i] = sum over groups, always in the order of the groups.
template <class A>
void sum_groups(const Tensor& partial, void* total, int64_t size, int64_t groups) {
  const A* from = static_cast<const A*>(partial.const_data_ptr());
  A* to = static_cast<A*>(total);
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
  const int64_t longest = longest_sequence(p, d);
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
  const Dims d = check(args);
  GatedRelaParams p{};
  const Rotations rotations = set_params(args, d, p);
  const ForwardResult result = new_forward(args, d, return_final_state, save_for_backward, p);
  run_kernel(op, p, d, q);
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
  const Dims d = check(args);
  const GradientArgs given{grad_out, grad_kv, grad_k_sum, grad_conv, saved_kv, saved_k_sum};
  check_gradients(args, d, given);
  GatedRelaBackwardParams p{};
  const Rotations rotations = set_params(args, d, p.forward);
  const BackwardResult result = new_backward(args, d, given, state_grad, p.forward, p);
  p.groups = d.B < kMaxGroups ? d.B : kMaxGroups;
  const int64_t partials = conv_weight ? p.groups : 0;
  const Tensor dweight_partial = new_empty(q, {partials, d.H * d.D, d.W}, d.acc);
  const Tensor dbias_partial = new_empty(q, {partials, d.H * d.D}, d.acc);
  if (conv_weight) {
    p.dweight_partial = dweight_partial.mutable_data_ptr();
    p.dbias_partial = dbias_partial.mutable_data_ptr();
  }

  const Kernels& level = kernels();
  const int64_t per_group = p.groups ? d.B / p.groups : 0;
  run_parallel(op, p.groups * d.H, grain_size(per_group * mean_length(d), d.D),
               [&](int64_t begin, int64_t end) { level.gated_rela_backward(p, begin, end); });
  const auto sum = d.acc == ScalarType::Double ? sum_groups<double> : sum_groups<float>;
  if (conv_weight) sum(dweight_partial, p.dweight, d.H * d.D * d.W, p.groups);
  if (conv_bias) sum(dbias_partial, p.dbias, d.H * d.D, p.groups);
  return result;
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
