// Whether this machine has the instructions that RECGRELA_CPU_LEVEL asks for.
#pragma once
#include <cstdio>
#include <stdexcept>

#include "cpu/kernels.h"

constexpr int kSkipped = 77;  // what ctest takes for a test that was left out

// Prints the level, or why there is none.
inline bool has_level() {
  try {
    std::printf("level %s of %s\n", recgrela::kernels().level, recgrela::available_levels());
    return true;
  } catch (const std::invalid_argument& missing) {
    std::printf("%s\n", missing.what());
    return false;
  }
}
