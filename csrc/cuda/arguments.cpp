#include "arguments.h"

#include <cstdlib>
#include <cstring>

// Torch's own function, by way of libtorch: NULL where torch was built without CUDA, and then no
// CUDA tensor reaches an operator.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

// Whether the torch in this process has CUDA streams, for the tests.
extern "C" __attribute__((visibility("default"))) int recgrela_has_cuda_streams() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

namespace recgrela::cuda {

Stream current_stream(const Tensor& on) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("recgrela_ext: torch was built without CUDA");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream) != 0) {
    throw std::runtime_error("recgrela_ext: torch does not tell its current CUDA stream");
  }
  return stream;
}

void check_launch(const char* op, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + error_text(error));
}

void check_parameters(const char* op, const Tensor& q, const Tensor& inv_freq,
                      const OptionalTensor& conv_weight, const OptionalTensor& conv_bias, Dims& d) {
  check_float(op, q);
  read_parameters(op, q, inv_freq, conv_weight, conv_bias, d);
  // What the generic kernels hold of one item must fit into shared memory.
  const int64_t most = d.acc == ScalarType::Double ? 2048 : 4096;
  RECGRELA_CHECK(d.D <= most, op, ": q must have a last dimension of at most ", most,
                 " on CUDA, got ", d.D);
}

Dims check_sequence(const SequenceArgs& a) {
  const char* op = a.op;
  const bool packed = a.cu_seqlens.has_value();
  RECGRELA_CHECK(a.q.dim() == (packed ? 3 : 4), op, ": q must have shape ",
                 packed ? "[T, H, D]" : "[B, L, H, D]", ", got ", shape_text(a.q));
  Dims d{};
  check_parameters(op, a.q, a.inv_freq, a.conv_weight, a.conv_bias, d);
  check_rows(op, "q", a.q, a.q);
  check_rows(op, "k", a.k, a.q);
  check_rows(op, "v", a.v, a.q);
  check_rows(op, "gate", a.gate, a.q);
  RECGRELA_CHECK(!(packed && a.lengths), op, ": lengths must be None with cu_seqlens");
  if (packed) {
    RECGRELA_CHECK(a.cu_seqlens->dim() == 1 && a.cu_seqlens->numel() >= 1, op,
                   ": cu_seqlens must have shape [B + 1], got ", shape_text(*a.cu_seqlens));
  }
  d.L = packed ? 0 : a.q.size(1);
  d.packed_items = packed ? a.q.size(0) : 0;
  d.B = packed ? a.cu_seqlens->size(0) - 1 : a.q.size(0);
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

void check_values(const SequenceArgs& a, const Dims& d, Stream stream) {
  const char* wish = std::getenv("RECGRELA_CHECK");
  if (wish == nullptr || std::strcmp(wish, "1") != 0) return;
  const auto read = [&](const Tensor& x) {
    std::vector<int64_t> values(x.numel());
    check_launch(a.op, copy_to_host(values.data(), static_cast<const int64_t*>(x.const_data_ptr()),
                                    x.numel(), stream));
    return values;
  };
  if (a.lengths) check_lengths(a.op, read(*a.lengths).data(), d.B, d.L);
  if (a.cu_seqlens) check_cu_seqlens(a.op, read(*a.cu_seqlens).data(), d.B, d.packed_items);
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

const void* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

States states_of(const Tensor& kv, const Tensor& k_sum, const Tensor& conv,
                 const Tensor* position) {
  States states;
  states.kv = const_cast<void*>(kv.const_data_ptr());
  states.kv_stride = kv.stride(0);
  states.k_sum = const_cast<void*>(k_sum.const_data_ptr());
  states.k_sum_stride = k_sum.stride(0);
  states.conv = const_cast<void*>(conv.const_data_ptr());
  states.conv_stride = conv.stride(0);
  if (position) states.position = static_cast<const int64_t*>(position->const_data_ptr());
  return states;
}

GatedRelaParams sequence_params(const SequenceArgs& a, const Dims& d) {
  const bool packed = a.cu_seqlens.has_value();
  GatedRelaParams p{};
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
  p.lengths = static_cast<const int64_t*>(data_or_null(a.lengths));
  p.cu_seqlens = static_cast<const int64_t*>(data_or_null(a.cu_seqlens));
  if (a.kv) p.initial = states_of(*a.kv, *a.k_sum, *a.conv, &*a.position);
  return p;
}

std::vector<int64_t> saved_shape(const Dims& d, bool packed) {
  const int64_t chunks =
      packed ? d.packed_items / kChunk + d.B : d.B * ((d.L + kChunk - 1) / kChunk);
  return {chunks, d.H, d.D};
}

}  // namespace recgrela::cuda
