// From tensors to the kernels' plain parameters, with the checks of a raw call, on CUDA.
#pragma once
#include <optional>
#include <vector>

#include "../checks.h"
#include "params.h"

namespace recgrela::cuda {

using OptionalTensor = std::optional<Tensor>;

struct SequenceArgs {
  const char* op;
  const Tensor &q, &k, &v;
  const OptionalTensor &gate, &conv_weight, &conv_bias, &lengths, &cu_seqlens;
  const OptionalTensor &kv, &k_sum, &conv, &position;
  const Tensor& inv_freq;
  double eps;
};

// The current stream of torch on this device. Throws where torch has no CUDA.
Stream current_stream(const Tensor& on);

// Throws what a launcher reports.
void check_launch(const char* op, int error);

Dims check_sequence(const SequenceArgs& args);
// With RECGRELA_CHECK=1 the values of lengths and cu_seqlens are read back: this synchronises.
void check_values(const SequenceArgs& args, const Dims& dims, Stream stream);
// q, conv_weight and the like of gated_rela_step and check_sequence alike.
void check_parameters(const char* op, const Tensor& q, const Tensor& inv_freq,
                      const OptionalTensor& conv_weight, const OptionalTensor& conv_bias, Dims& d);

// Everything but out, final, the saved states and scratch.
GatedRelaParams sequence_params(const SequenceArgs& args, const Dims& dims);

Rows rows_of(const Tensor& x, bool packed);
States states_of(const Tensor& kv, const Tensor& k_sum, const Tensor& conv, const Tensor* position);
DType kernel_dtype(ScalarType dtype);
const void* data_or_null(const OptionalTensor& x);
std::vector<int64_t> saved_shape(const Dims& d, bool packed);  // [chunks, H, D]

}  // namespace recgrela::cuda
