// gated_rela and its backward on CUDA under another operator's name, for rela.cpp.
#pragma once
#include "../ops.h"

namespace recgrela::cuda {
RunForward run_forward;
RunBackward run_backward;
}  // namespace recgrela::cuda
