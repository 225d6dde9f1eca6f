// The kernels for processors with AVX512.
#include "level_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define RECGRELA_LEVEL avx512
#define RECGRELA_LEVEL_NAME "avx512"
#define RECGRELA_REGISTER_BYTES 64
#define RECGRELA_KERNELS kAvx512Kernels
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
