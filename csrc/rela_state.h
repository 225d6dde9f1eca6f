// States of rela, which have no conv: what both rooms make of them. See cpu/rela.cpp.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "ops.h"

namespace recgrela {

// The state of gated_rela with an empty conv window, where a state is given.
inline OptionalTensor empty_conv(const Tensor& q, const OptionalTensor& kv) {
  if (!kv) return std::nullopt;
  return torch::stable::new_empty(q, {kv->size(0), 0, q.size(q.dim() - 2) * q.size(q.dim() - 1)},
                                  kv->scalar_type());
}

inline void check_rela_state(const char* op, const OptionalTensor& kv) {
  RECGRELA_CHECK(!kv || kv->dim() == 4, op, ": kv must have shape [B, H, D, D], got ",
                 shape_text(*kv));
}

}  // namespace recgrela
