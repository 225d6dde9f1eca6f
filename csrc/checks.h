// What memory safety needs of the arguments of a raw torch.ops call; the public Python functions
// check the same and more. A failed check throws std::invalid_argument, which Python sees as a
// ValueError without a stack trace. Never throw inside parallel_for: the text is lost
// (cpu/parallel.h).
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace recgrela {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define RECGRELA_CHECK(condition, ...) \
  if (!(condition)) ::recgrela::fail(__VA_ARGS__)

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline const int64_t* integers(const Tensor& x) {
  return static_cast<const int64_t*>(x.const_data_ptr());
}

inline std::string shape_text(const Tensor& x) {
  std::ostringstream text;
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "[") << x.size(i);
  return x.dim() ? text.str() + "]" : "[]";
}

struct Dims {
  int64_t B, L, H, D, W;
  int64_t packed_items;  // T, 0 unless packed
  ScalarType dtype, acc;
};

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  if (x.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (int64_t size : shape) {
    if (x.size(i++) != size) return false;
  }
  return true;
}

inline void check_shape(const char* op, const char* name, const Tensor& x,
                        std::initializer_list<int64_t> shape) {
  if (has_shape(x, shape)) return;
  std::ostringstream wanted;
  const char* separator = "[";
  for (int64_t size : shape) {
    wanted << separator << size;
    separator = ", ";
  }
  fail(op, ": ", name, " must have shape ", wanted.str(), "], got ", shape_text(x));
}

// A dense argument: its shape, dtype, device, contiguous.
inline void check_dense(const char* op, const char* name, const std::optional<Tensor>& x,
                        std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& q) {
  if (!x) return;
  check_shape(op, name, *x, shape);
  RECGRELA_CHECK(x->scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype, ", got ",
                 x->scalar_type());
  RECGRELA_CHECK(x->device() == q.device(), op, ": ", name, " must be on the device of q");
  RECGRELA_CHECK(x->is_contiguous(), op, ": ", name, " must be contiguous");
}

// A rows argument: the shape, dtype and device of q, last dimension contiguous.
inline void check_rows(const char* op, const char* name, const std::optional<Tensor>& x,
                       const Tensor& q) {
  if (!x) return;
  RECGRELA_CHECK(shape_text(*x) == shape_text(q), op, ": ", name, " must have the shape of q ",
                 shape_text(q), ", got ", shape_text(*x));
  RECGRELA_CHECK(x->scalar_type() == q.scalar_type(), op, ": ", name, " must have the dtype of q, ",
                 q.scalar_type(), ", got ", x->scalar_type());
  RECGRELA_CHECK(x->device() == q.device(), op, ": ", name, " must be on the device of q");
  RECGRELA_CHECK(x->numel() == 0 || x->stride(x->dim() - 1) == 1, op, ": ", name,
                 " must have a contiguous last dimension, got stride ", x->stride(x->dim() - 1));
}

inline void check_float(const char* op, const Tensor& q) {
  const ScalarType dtype = q.scalar_type();
  RECGRELA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                     dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                 op, ": q must have a floating dtype, got ", dtype);
  const int64_t D = q.size(q.dim() - 1);
  RECGRELA_CHECK(D >= 2 && D % 2 == 0, op, ": q must have an even last dimension, got ", D);
}

// H, D, W and dtypes of q [..., H, D], with the checks of what every operator takes beside its
// rows.
inline void read_parameters(const char* op, const Tensor& q, const Tensor& inv_freq,
                            const std::optional<Tensor>& conv_weight,
                            const std::optional<Tensor>& conv_bias, Dims& d) {
  d.dtype = q.scalar_type();
  d.acc = d.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  d.H = q.size(q.dim() - 2);
  d.D = q.size(q.dim() - 1);
  d.W = 1;
  if (conv_weight) {
    RECGRELA_CHECK(conv_weight->dim() == 2 && conv_weight->size(1) >= 1, op,
                   ": conv_weight must have shape [H*D, W] with W >= 1, got ",
                   shape_text(*conv_weight));
    d.W = conv_weight->size(1);
  }
  RECGRELA_CHECK(!conv_bias || conv_weight, op, ": conv_bias must be None without conv_weight");
  check_dense(op, "inv_freq", inv_freq, {d.H, d.D / 2}, ScalarType::Double, q);
  check_dense(op, "conv_weight", conv_weight, {d.H * d.D, d.W}, d.acc, q);
  check_dense(op, "conv_bias", conv_bias, {d.H * d.D}, d.acc, q);
}

// A state that is written in place: one user contiguous, any stride between users.
inline void check_written_state(const char* op, const char* name, const Tensor& x,
                                std::initializer_list<int64_t> shape, const Dims& d,
                                const Tensor& q) {
  check_shape(op, name, x, shape);
  RECGRELA_CHECK(x.scalar_type() == d.acc, op, ": ", name, " must have dtype ", d.acc, ", got ",
                 x.scalar_type());
  RECGRELA_CHECK(x.device() == q.device(), op, ": ", name, " must be on the device of q");
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i > 0; --i) {
    RECGRELA_CHECK(x.numel() == 0 || x.size(i) == 1 || x.stride(i) == expected, op, ": ", name,
                   " must be contiguous inside one sequence");
    expected *= x.size(i);
  }
  RECGRELA_CHECK(x.numel() == 0 || x.size(0) == 1 || x.stride(0) >= expected, op, ": ", name,
                 " must not overlap between sequences, got batch stride ", x.stride(0));
}

// Values a kernel will index with, in host memory: on CUDA, reading them back would synchronise.
inline void check_lengths(const char* op, const int64_t* values, int64_t B, int64_t L) {
  for (int64_t b = 0; b < B; ++b) {
    RECGRELA_CHECK(values[b] >= 0 && values[b] <= L, op, ": lengths must be between 0 and L = ", L,
                   ", got ", values[b], " at ", b);
  }
}

inline void check_cu_seqlens(const char* op, const int64_t* values, int64_t B, int64_t items) {
  RECGRELA_CHECK(values[0] == 0, op, ": cu_seqlens must start with 0, got ", values[0]);
  for (int64_t b = 0; b < B; ++b) {
    RECGRELA_CHECK(values[b] <= values[b + 1], op, ": cu_seqlens must not decrease, got ",
                   values[b], " before ", values[b + 1], " at ", b);
  }
  RECGRELA_CHECK(values[B] == items, op, ": cu_seqlens must end with the number of rows ", items,
                 ", got ", values[B]);
}

inline void check_lengths(const char* op, const Tensor& lengths, int64_t L) {
  check_lengths(op, integers(lengths), lengths.numel(), L);
}

inline void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t items) {
  const auto* values = integers(cu_seqlens);
  check_cu_seqlens(op, values, cu_seqlens.numel() - 1, items);
}

}  // namespace recgrela
