// gated_rela and its backward on the CPU under another operator's name, for rela.cpp.
#pragma once
#include "../ops.h"

namespace recgrela {
RunForward run_forward;
RunBackward run_backward;
}  // namespace recgrela
