// From the tensors of a raw call to the kernels' plain parameters, for both rooms: checks, memory
// for the results, pointers. What a kernel reads from lengths and cu_seqlens is checked by the
// rooms themselves, since reading it back from a GPU would wait for it.
#pragma once
#include "checks.h"
#include "ops.h"
#include "params.h"

namespace recgrela {

struct SequenceArgs {
  const char* op;  // stands in error messages
  const Tensor &q, &k, &v;
  const OptionalTensor &gate, &conv_weight, &conv_bias, &lengths, &cu_seqlens;
  const OptionalTensor &kv, &k_sum, &conv, &position;
  const Tensor& inv_freq;
  double eps;
};

struct GradientArgs {
  const Tensor& grad_out;
  const OptionalTensor &grad_kv, &grad_k_sum, &grad_conv;
  const Tensor &saved_kv, &saved_k_sum;
};

Dims check_sequence(const SequenceArgs& args);
void check_gradients(const SequenceArgs& args, const Dims& dims, const GradientArgs& gradients);

// Everything but out, final and the saved states.
void set_sequence(const SequenceArgs& args, const Dims& dims, SequenceParams& p);

// The results of a forward pass, in memory that is not yet written, and the pointers to them.
ForwardResult new_forward(const SequenceArgs& args, const Dims& dims, bool return_final_state,
                          bool save_for_backward, SequenceParams& p);

// The same of a backward pass; `forward` gets its saved states, `p` what comes in as well.
BackwardResult new_backward(const SequenceArgs& args, const Dims& dims, const GradientArgs& given,
                            bool state_grad, SequenceParams& forward, GradientParams& p);

struct StepArgs {
  const Tensor &q, &k, &v;
  const OptionalTensor &gate, &conv_weight, &conv_bias, &active;
  const Tensor &inv_freq, &kv, &k_sum, &conv, &position;
  double eps;
};

constexpr const char* kStep = "gated_rela_step";

Dims check_step(const StepArgs& args);
// A new `out` is written to, the state in place.
GatedRelaStepParams step_params(const StepArgs& args, const Dims& dims, const Tensor& out);

DType kernel_dtype(ScalarType dtype);
const void* data_or_null(const OptionalTensor& x);

}  // namespace recgrela
