// From tensors to the kernels' plain parameters, with the checks of a raw call.
#pragma once
#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace recgrela {

struct SequenceArgs {
  const char* op;
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&gate, &conv_weight, &conv_bias, &lengths, &cu_seqlens;
  const std::optional<Tensor>&kv, &k_sum, &conv, &position;
  const Tensor& inv_freq;
  double eps;
};

Dims check_sequence(const SequenceArgs& args);

// Everything but out, final and the saved states. step_rotation [H, kChunk + 1, D] is filled here.
GatedRelaParams sequence_params(const SequenceArgs& args, const Dims& dims,
                                const Tensor& step_rotation);

DType kernel_dtype(ScalarType dtype);
Rows rows_of(const Tensor& x, bool packed);
const void* data_or_null(const std::optional<Tensor>& x);

// States that are whole tensors: [B, ...], inner dimensions contiguous, any batch stride.
States states_of(const Tensor* kv, const Tensor* k_sum, const Tensor* conv, const Tensor* position);

// Work items a thread should get at least, so that starting it pays.
int64_t grain_size(int64_t items, int64_t D);

}  // namespace recgrela
