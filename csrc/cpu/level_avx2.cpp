// The kernels for processors with AVX2.
#include "level_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RECGRELA_LEVEL avx2
#define RECGRELA_LEVEL_NAME "avx2"
#define RECGRELA_REGISTER_BYTES 32
#define RECGRELA_KERNELS kAvx2Kernels
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
