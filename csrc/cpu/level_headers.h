// Every standard header the kernels use. A level file includes this before its target pragma, so
// that no inline function of the library is compiled for a processor that may not be there.
#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
