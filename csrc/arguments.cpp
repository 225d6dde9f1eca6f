#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

namespace recgrela {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

Tensor none(const Tensor& like, ScalarType dtype) { return new_empty(like, {0}, dtype); }

Tensor new_rows(const SequenceArgs& a, const Dims& d) {
  return a.cu_seqlens ? new_empty(a.q, {d.packed_items, d.H, d.D})
                      : new_empty(a.q, {d.B, d.L, d.H, d.D});
}

Rows rows_of(const Tensor& x, bool packed) {
  Rows rows;
  rows.data = const_cast<void*>(x.const_data_ptr());
  rows.batch_stride = packed ? 0 : x.stride(0);
  rows.item_stride = x.stride(packed ? 0 : 1);
  rows.head_stride = x.stride(packed ? 1 : 2);
  return rows;
}

// The rows of a step, [B, H, D].
Rows step_rows(const Tensor& x) {
  Rows rows = rows_of(x, true);
  rows.batch_stride = rows.item_stride;
  rows.item_stride = 0;
  return rows;
}

// States that are whole tensors: [B, ...], inner dimensions contiguous, any batch stride.
States states_of(const Tensor& kv, const Tensor& k_sum, const Tensor& conv) {
  States states;
  states.kv = const_cast<void*>(kv.const_data_ptr());
  states.kv_stride = kv.stride(0);
  states.k_sum = const_cast<void*>(k_sum.const_data_ptr());
  states.k_sum_stride = k_sum.stride(0);
  states.conv = const_cast<void*>(conv.const_data_ptr());
  states.conv_stride = conv.stride(0);
  return states;
}

// A new kv, k_sum and conv of every sequence, or three empty tensors.
struct NewStates {
  Tensor kv, k_sum, conv;

  NewStates(const SequenceArgs& a, const Dims& d, bool wanted, States& states)
      : kv(none(a.q, d.acc)), k_sum(none(a.q, d.acc)), conv(none(a.q, d.acc)) {
    if (!wanted) return;
    kv = new_empty(a.q, {d.B, d.H, d.D, d.D}, d.acc);
    k_sum = new_empty(a.q, {d.B, d.H, d.D}, d.acc);
    conv = new_empty(a.q, {d.B, d.W - 1, d.H * d.D}, d.acc);
    states = states_of(kv, k_sum, conv);
  }
};

int64_t chunks_of(const SequenceArgs& a, const Dims& d) {
  return count_chunks(d.B, d.L, d.packed_items, a.cu_seqlens.has_value());
}

}  // namespace

Dims check_sequence(const SequenceArgs& a) {
  const char* op = a.op;
  const bool packed = a.cu_seqlens.has_value();
  RECGRELA_CHECK(a.q.dim() == (packed ? 3 : 4), op, ": q must have shape ",
                 packed ? "[T, H, D]" : "[B, L, H, D]", ", got ", shape_text(a.q));
  check_float(op, a.q);
  check_rows(op, "k", a.k, a.q);
  check_rows(op, "v", a.v, a.q);
  check_rows(op, "gate", a.gate, a.q);
  check_rows(op, "q", a.q, a.q);
  RECGRELA_CHECK(!(packed && a.lengths), op, ": lengths must be None with cu_seqlens");

  Dims d{};
  d.L = packed ? 0 : a.q.size(1);
  d.packed_items = packed ? a.q.size(0) : 0;
  if (packed) {
    RECGRELA_CHECK(a.cu_seqlens->dim() == 1 && a.cu_seqlens->numel() >= 1, op,
                   ": cu_seqlens must have shape [B + 1], got ", shape_text(*a.cu_seqlens));
  }
  d.B = packed ? a.cu_seqlens->size(0) - 1 : a.q.size(0);
  read_parameters(op, a.q, a.inv_freq, a.conv_weight, a.conv_bias, d);
  check_dense(op, "lengths", a.lengths, {d.B}, ScalarType::Long, a.q);
  check_dense(op, "cu_seqlens", a.cu_seqlens, {d.B + 1}, ScalarType::Long, a.q);

  const bool all = a.kv && a.k_sum && a.conv && a.position;
  RECGRELA_CHECK(all || !(a.kv || a.k_sum || a.conv || a.position), op,
                 ": initial state must have kv, k_sum, conv and position, or none of them");
  check_dense(op, "kv", a.kv, {d.B, d.H, d.D, d.D}, d.acc, a.q);
  check_dense(op, "k_sum", a.k_sum, {d.B, d.H, d.D}, d.acc, a.q);
  check_dense(op, "conv", a.conv, {d.B, d.W - 1, d.H * d.D}, d.acc, a.q);
  check_dense(op, "position", a.position, {d.B}, ScalarType::Long, a.q);
  return d;
}

void check_gradients(const SequenceArgs& a, const Dims& d, const GradientArgs& g) {
  const char* op = a.op;
  check_rows(op, "grad_out", g.grad_out, a.q);
  const bool any = g.grad_kv || g.grad_k_sum || g.grad_conv;
  RECGRELA_CHECK(!any || (g.grad_kv && g.grad_k_sum && g.grad_conv), op,
                 ": grad_kv, grad_k_sum and grad_conv must be given together");
  check_dense(op, "grad_kv", g.grad_kv, {d.B, d.H, d.D, d.D}, d.acc, a.q);
  check_dense(op, "grad_k_sum", g.grad_k_sum, {d.B, d.H, d.D}, d.acc, a.q);
  check_dense(op, "grad_conv", g.grad_conv, {d.B, d.W - 1, d.H * d.D}, d.acc, a.q);
  const int64_t chunks = chunks_of(a, d);
  check_dense(op, "saved_kv", g.saved_kv, {chunks, d.H, d.D, d.D}, d.acc, a.q);
  check_dense(op, "saved_k_sum", g.saved_k_sum, {chunks, d.H, d.D}, d.acc, a.q);
}

void set_sequence(const SequenceArgs& a, const Dims& d, SequenceParams& p) {
  const bool packed = a.cu_seqlens.has_value();
  p.dtype = kernel_dtype(d.dtype);
  p.B = d.B;
  p.L = d.L;
  p.H = d.H;
  p.D = d.D;
  p.W = d.W;
  p.items = d.packed_items;
  p.eps = a.eps;
  p.q = rows_of(a.q, packed);
  p.k = rows_of(a.k, packed);
  p.v = rows_of(a.v, packed);
  if (a.gate) p.gate = rows_of(*a.gate, packed);
  p.inv_freq = static_cast<const double*>(a.inv_freq.const_data_ptr());
  p.conv_weight = data_or_null(a.conv_weight);
  p.conv_bias = data_or_null(a.conv_bias);
  if (a.lengths) p.lengths = integers(*a.lengths);
  if (a.cu_seqlens) p.cu_seqlens = integers(*a.cu_seqlens);
  if (!a.kv) return;
  p.initial = states_of(*a.kv, *a.k_sum, *a.conv);
  p.initial.position = integers(*a.position);
}

ForwardResult new_forward(const SequenceArgs& a, const Dims& d, bool return_final_state,
                          bool save_for_backward, SequenceParams& p) {
  const bool packed = a.cu_seqlens.has_value();
  Tensor out = new_rows(a, d);
  p.out = rows_of(out, packed);
  const NewStates final(a, d, return_final_state, p.final);
  Tensor saved_kv = none(a.q, d.acc), saved_k_sum = none(a.q, d.acc);
  if (save_for_backward) {
    // Ragged sequences leave slots unused: those are zero, so that equal calls give equal tensors.
    const bool ragged = packed || a.lengths;
    const std::vector<int64_t> square{chunks_of(a, d), d.H, d.D, d.D};
    const std::vector<int64_t> row{square[0], d.H, d.D};
    saved_kv = ragged ? new_zeros(a.q, square, d.acc) : new_empty(a.q, square, d.acc);
    saved_k_sum = ragged ? new_zeros(a.q, row, d.acc) : new_empty(a.q, row, d.acc);
    p.saved_kv = saved_kv.mutable_data_ptr();
    p.saved_k_sum = saved_k_sum.mutable_data_ptr();
  }
  return {out, final.kv, final.k_sum, final.conv, saved_kv, saved_k_sum};
}

BackwardResult new_backward(const SequenceArgs& a, const Dims& d, const GradientArgs& given,
                            bool state_grad, SequenceParams& forward, GradientParams& p) {
  const bool packed = a.cu_seqlens.has_value();
  forward.saved_kv = const_cast<void*>(given.saved_kv.const_data_ptr());
  forward.saved_k_sum = const_cast<void*>(given.saved_k_sum.const_data_ptr());
  p.grad_out = rows_of(given.grad_out, packed);
  if (given.grad_kv) p.grad_final = states_of(*given.grad_kv, *given.grad_k_sum, *given.grad_conv);
  Tensor dq = new_rows(a, d), dk = new_rows(a, d), dv = new_rows(a, d), dgate = none(a.q, d.dtype);
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  if (a.gate) {
    dgate = new_rows(a, d);
    p.dgate = rows_of(dgate, packed);
  }
  Tensor dweight = none(a.q, d.acc), dbias = none(a.q, d.acc);
  if (a.conv_weight) {
    dweight = new_empty(a.q, {d.H * d.D, d.W}, d.acc);
    p.dweight = dweight.mutable_data_ptr();
  }
  if (a.conv_bias) {
    dbias = new_empty(a.q, {d.H * d.D}, d.acc);
    p.dbias = dbias.mutable_data_ptr();
  }
  const NewStates initial(a, d, state_grad, p.grad_initial);
  return {dq, dk, dv, dgate, dweight, dbias, initial.kv, initial.k_sum, initial.conv};
}

Dims check_step(const StepArgs& a) {
  RECGRELA_CHECK(a.q.dim() == 3, kStep, ": q must have shape [B, H, D], got ", shape_text(a.q));
  check_float(kStep, a.q);
  check_rows(kStep, "q", a.q, a.q);
  check_rows(kStep, "k", a.k, a.q);
  check_rows(kStep, "v", a.v, a.q);
  check_rows(kStep, "gate", a.gate, a.q);
  Dims d{};
  read_parameters(kStep, a.q, a.inv_freq, a.conv_weight, a.conv_bias, d);
  d.B = a.q.size(0);
  check_dense(kStep, "position", a.position, {d.B}, ScalarType::Long, a.q);
  check_dense(kStep, "active", a.active, {d.B}, ScalarType::Bool, a.q);
  check_written_state(kStep, "kv", a.kv, {d.B, d.H, d.D, d.D}, d, a.q);
  check_written_state(kStep, "k_sum", a.k_sum, {d.B, d.H, d.D}, d, a.q);
  check_written_state(kStep, "conv", a.conv, {d.B, d.W - 1, d.H * d.D}, d, a.q);
  return d;
}

GatedRelaStepParams step_params(const StepArgs& a, const Dims& d, const Tensor& out) {
  GatedRelaStepParams p{};
  p.dtype = kernel_dtype(d.dtype);
  p.B = d.B;
  p.H = d.H;
  p.D = d.D;
  p.W = d.W;
  p.eps = a.eps;
  p.q = step_rows(a.q);
  p.k = step_rows(a.k);
  p.v = step_rows(a.v);
  if (a.gate) p.gate = step_rows(*a.gate);
  p.out = step_rows(out);
  p.inv_freq = static_cast<const double*>(a.inv_freq.const_data_ptr());
  p.conv_weight = data_or_null(a.conv_weight);
  p.conv_bias = data_or_null(a.conv_bias);
  p.state = states_of(a.kv, a.k_sum, a.conv);
  p.state.position = integers(a.position);
  p.active = static_cast<const bool*>(data_or_null(a.active));
  return p;
}

DType kernel_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Double) return DType::kDouble;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  if (dtype == ScalarType::Half) return DType::kHalf;
  return DType::kFloat;
}

const void* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

}  // namespace recgrela
