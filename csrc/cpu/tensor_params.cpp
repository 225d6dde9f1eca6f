#include "tensor_params.h"

namespace recgrela {

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
  if (a.lengths) check_lengths(op, *a.lengths, d.L);
  if (packed) check_cu_seqlens(op, *a.cu_seqlens, d.packed_items);

  const bool all = a.kv && a.k_sum && a.conv && a.position;
  RECGRELA_CHECK(all || !(a.kv || a.k_sum || a.conv || a.position), op,
                 ": initial state must have kv, k_sum, conv and position, or none of them");
  check_dense(op, "kv", a.kv, {d.B, d.H, d.D, d.D}, d.acc, a.q);
  check_dense(op, "k_sum", a.k_sum, {d.B, d.H, d.D}, d.acc, a.q);
  check_dense(op, "conv", a.conv, {d.B, d.W - 1, d.H * d.D}, d.acc, a.q);
  check_dense(op, "position", a.position, {d.B}, ScalarType::Long, a.q);
  return d;
}

DType kernel_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Double) return DType::kDouble;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  if (dtype == ScalarType::Half) return DType::kHalf;
  return DType::kFloat;
}

Rows rows_of(const Tensor& x, bool packed) {
  Rows rows;
  rows.data = const_cast<void*>(x.const_data_ptr());
  rows.batch_stride = packed ? 0 : x.stride(0);
  rows.item_stride = x.stride(packed ? 0 : 1);
  rows.head_stride = x.stride(packed ? 1 : 2);
  return rows;
}

const void* data_or_null(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

States states_of(const Tensor* kv, const Tensor* k_sum, const Tensor* conv,
                 const Tensor* position) {
  States states;
  if (kv == nullptr) return states;
  states.kv = const_cast<void*>(kv->const_data_ptr());
  states.kv_stride = kv->stride(0);
  states.k_sum = const_cast<void*>(k_sum->const_data_ptr());
  states.k_sum_stride = k_sum->stride(0);
  if (conv) {
    states.conv = const_cast<void*>(conv->const_data_ptr());
    states.conv_stride = conv->stride(0);
  }
  if (position) states.position = static_cast<const int64_t*>(position->const_data_ptr());
  return states;
}

GatedRelaParams sequence_params(const SequenceArgs& a, const Dims& d, const Tensor& step_rotation) {
  const bool packed = a.cu_seqlens.has_value();
  GatedRelaParams p{};
  p.dtype = kernel_dtype(d.dtype);
  p.B = d.B;
  p.L = d.L;
  p.H = d.H;
  p.D = d.D;
  p.W = d.W;
  p.eps = a.eps;
  p.q = rows_of(a.q, packed);
  p.k = rows_of(a.k, packed);
  p.v = rows_of(a.v, packed);
  if (a.gate) p.gate = rows_of(*a.gate, packed);
  p.inv_freq = static_cast<const double*>(a.inv_freq.const_data_ptr());
  double* table = static_cast<double*>(step_rotation.mutable_data_ptr());
  fill_step_rotation(table, p.inv_freq, d.H, d.D, p.dtype);
  p.step_rotation = table;
  p.conv_weight = data_or_null(a.conv_weight);
  p.conv_bias = data_or_null(a.conv_bias);
  p.lengths = static_cast<const int64_t*>(data_or_null(a.lengths));
  p.cu_seqlens = static_cast<const int64_t*>(data_or_null(a.cu_seqlens));
  if (a.kv) p.initial = states_of(&*a.kv, &*a.k_sum, &*a.conv, &*a.position);
  return p;
}

int64_t grain_size(int64_t items, int64_t D) { return 1 + 16384 / (items * D + 1); }

}  // namespace recgrela
