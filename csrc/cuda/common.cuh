// What every kernel shares: storage types, wrappers of device instructions, the launch. Each
// wrapper has a host twin, so that tests/cuda_shim can run the kernels' own source on a CPU.
//
// Rules of the house, which the shim checks: dynamic shared memory only, through shared_memory();
// warp collectives full-mask and convergent; no return before a barrier; no waiting between blocks.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "params.h"

namespace recgrela::cuda {

#define RECGRELA_DEVICE __device__ __forceinline__

constexpr int kWarp = 32;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <class S>
constexpr bool kTwoBytes = sizeof(S) == 2;

#ifdef RECGRELA_CUDA_SHIM
inline unsigned char* shared_memory() { return shim::shared_memory(); }
inline float half_to_float(uint16_t bits) { return shim::half_to_float(bits); }
inline uint16_t float_to_half(float x) { return shim::float_to_half(x); }
inline uint16_t float_to_bfloat16(float x) { return shim::float_to_bfloat16(x); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline void sincos_half_turns(float x, float* s, float* c) {
  *s = float(std::sin(3.14159265358979323846 * x));
  *c = float(std::cos(3.14159265358979323846 * x));
}
inline void sincos_radians(double x, double* s, double* c) {
  *s = std::sin(x);
  *c = std::cos(x);
}
#else
RECGRELA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
RECGRELA_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
RECGRELA_DEVICE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
RECGRELA_DEVICE uint16_t float_to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#else
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}
RECGRELA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RECGRELA_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RECGRELA_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
RECGRELA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
RECGRELA_DEVICE void sincos_half_turns(float x, float* s, float* c) { sincospif(x, s, c); }
RECGRELA_DEVICE void sincos_radians(double x, double* s, double* c) { sincos(x, s, c); }
#endif

RECGRELA_DEVICE float widen(float x) { return x; }
RECGRELA_DEVICE double widen(double x) { return x; }
RECGRELA_DEVICE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
RECGRELA_DEVICE float widen(Half x) { return half_to_float(x.bits); }
RECGRELA_DEVICE void narrow(float x, float* to) { *to = x; }
RECGRELA_DEVICE void narrow(double x, double* to) { *to = x; }
RECGRELA_DEVICE void narrow(float x, BFloat16* to) { to->bits = float_to_bfloat16(x); }
RECGRELA_DEVICE void narrow(float x, Half* to) { to->bits = float_to_half(x); }

// exp: to float rounding for float rows; two-byte rows are rounded to 8 or 11 bits in the end, so
// one instruction is enough for them.
template <class S>
RECGRELA_DEVICE Accumulate<S> exponential(Accumulate<S> x) {
  if constexpr (kTwoBytes<S>) {
    return exp2_approx(x * 1.44269504f);
  } else if constexpr (std::is_same_v<S, double>) {
    return ::exp(x);
  } else {
    return ::expf(x);
  }
}

// phi(x) = x + 1 above 0, exp(x) below.
template <class S>
RECGRELA_DEVICE Accumulate<S> feature_map(Accumulate<S> x) {
  const Accumulate<S> e = exponential<S>(x);
  return x > 0 ? x + 1 : e;
}

template <class A>
RECGRELA_DEVICE A slope_of(A phi) {  // phi' where phi is given
  return phi < A(1) ? phi : A(1);
}

template <class S>
RECGRELA_DEVICE Accumulate<S> sigmoid(Accumulate<S> x) {
  const Accumulate<S> d = Accumulate<S>(1) + exponential<S>(-x);
  if constexpr (std::is_same_v<S, double>) {
    return 1.0 / d;
  } else {
    return reciprocal_approx(d);
  }
}

template <class S>
RECGRELA_DEVICE Accumulate<S> silu(Accumulate<S> x) {
  return x * sigmoid<S>(x);
}

// SiLU(x) and its slope s (1 + x (1 - s)).
template <class S>
RECGRELA_DEVICE void silu_with_slope(Accumulate<S> x, Accumulate<S>* value, Accumulate<S>* slope) {
  using A = Accumulate<S>;
  const A s = sigmoid<S>(x);
  *value = x * s;
  *slope = s * (A(1) + x * (A(1) - s));
}

// Where one sequence's rows lie, and whether its lengths or cu_seqlens make sense. Offsets are
// always inside the tensors; a sequence that makes none is filled with NaN.
struct Span {
  int64_t batch, start, length;
  bool sound;
};

RECGRELA_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

RECGRELA_DEVICE Span span_of(const GatedRelaParams& p, int64_t b) {
  if (p.cu_seqlens == nullptr) {
    const int64_t length = p.lengths ? p.lengths[b] : p.L;
    const bool sound = length >= 0 && length <= p.L;
    return {b, 0, sound ? length : p.L, sound};
  }
  // A sequence is as unsound as its neighbours, whose rows it would share.
  const int64_t* cu = p.cu_seqlens + b;
  const int64_t begin = cu[0], end = cu[1];
  bool sound = begin >= 0 && begin <= end && end <= p.items;
  sound = sound && (b == 0 ? begin == 0 : cu[-1] <= begin);
  sound = sound && (b == p.B - 1 ? end == p.items : end <= cu[2]);
  if (sound) return {0, begin, end - begin, true};
  const int64_t low = b == 0 ? 0 : clamp(begin < end ? begin : end, 0, p.items);
  const int64_t high = b == p.B - 1 ? p.items : clamp(begin < end ? end : begin, 0, p.items);
  return {0, low, high > low ? high - low : 0, false};
}

template <class S>
RECGRELA_DEVICE S* row_at(const Rows& rows, const Span& span, int64_t t, int64_t h) {
  return static_cast<S*>(rows.data) + span.batch * rows.batch_stride +
         (span.start + t) * rows.item_stride + h * rows.head_stride;
}

// The slot of sequence b's first saved state: T/kChunk + B slots are enough for packed rows.
RECGRELA_DEVICE int64_t first_chunk(const GatedRelaParams& p, const Span& span, int64_t b) {
  return p.cu_seqlens ? span.start / kChunk + b : b * ((p.L + kChunk - 1) / kChunk);
}

RECGRELA_DEVICE int64_t position_of(const GatedRelaParams& p, int64_t b) {
  return p.initial.position ? p.initial.position[b] : 0;
}

// inv_freq as a 64-bit fraction of a turn: multiples of it wrap around exactly.
RECGRELA_DEVICE uint64_t turns_of(double inv_freq) {
  const double turns = inv_freq * 0.15915494309189533577;
  const double fraction = turns - ::floor(turns);
  return uint64_t(::ldexp(fraction, 53)) << 11;
}

// cos and sin of a fixed-point phase.
RECGRELA_DEVICE void rotation_of(uint64_t phase, float* c, float* s) {
  sincos_half_turns(float(int32_t(uint32_t(phase >> 32))) * 4.656612873077393e-10f, s, c);
}

// Memory accesses before and after stay in their order, so that a long unrolled loop of them does
// not fill the registers with what it has read ahead.
RECGRELA_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// Rows of E neighbouring elements: one access where their addresses allow it.
template <class S, int E>
struct alignas(sizeof(S) * E) Pack {
  S at[E];
};

// E elements of a row as they are stored. Two-byte elements stay two to a register until they are
// used.
template <class S, int E>
struct Raw {
  static constexpr int per_word = kTwoBytes<S> ? 2 : 1;
  using Word = std::conditional_t<kTwoBytes<S>, uint32_t, S>;
  Pack<Word, E / per_word> words;

  RECGRELA_DEVICE Accumulate<S> at(int e) const {
    if constexpr (std::is_same_v<S, BFloat16>) {
      const uint32_t word = words.at[e / 2];
      return float_of(e % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else if constexpr (std::is_same_v<S, Half>) {
      return half_to_float(uint16_t(words.at[e / 2] >> (e % 2 * 16)));
    } else {
      return words.at[e];
    }
  }
};

template <class S, int E>
RECGRELA_DEVICE Raw<S, E> load_raw(const S* from, bool aligned) {
  using Words = decltype(Raw<S, E>::words);
  if (aligned) return {*reinterpret_cast<const Words*>(from)};
  Raw<S, E> raw;
#pragma unroll
  for (int i = 0; i < E / Raw<S, E>::per_word; ++i) {
    if constexpr (kTwoBytes<S>) {
      raw.words.at[i] = from[2 * i].bits | uint32_t(from[2 * i + 1].bits) << 16;
    } else {
      raw.words.at[i] = from[i];
    }
  }
  return raw;
}

template <class S, int E>
RECGRELA_DEVICE void store_pack(const Accumulate<S>* values, S* to, bool aligned) {
  Pack<S, E> pack;
#pragma unroll
  for (int e = 0; e < E; ++e) narrow(values[e], &pack.at[e]);
  if (aligned) {
    *reinterpret_cast<Pack<S, E>*>(to) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) to[e] = pack.at[e];
  }
}

// Whether every row of E elements of these rows can be read in one access.
template <class S, int E>
inline bool aligned_rows(std::initializer_list<const Rows*> all) {
  constexpr int64_t bytes = int64_t(sizeof(S)) * E;
  for (const Rows* rows : all) {
    if (rows->data == nullptr) continue;
    const int64_t sum = int64_t(reinterpret_cast<uintptr_t>(rows->data) % bytes) |
                        (rows->batch_stride * int64_t(sizeof(S))) % bytes |
                        (rows->item_stride * int64_t(sizeof(S))) % bytes |
                        (rows->head_stride * int64_t(sizeof(S))) % bytes;
    if (sum != 0) return false;
  }
  return true;
}

// One kernel on `blocks` blocks; the kernels take their parameters by value, as one struct.
template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
           Params params) {
  if (blocks == 0) return 0;
#ifdef RECGRELA_CUDA_SHIM
  (void)stream;
  shim::run(blocks, threads, shared_bytes, [&] { kernel(params); });
  return 0;
#else
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);  // a grid has no more
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  }
  if (error == cudaSuccess) {
    void* arguments[] = {&params};
    error = cudaLaunchKernel(function, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments,
                             size_t(shared_bytes), static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) cudaGetLastError();  // told here, and to nobody else later on
  return int(error);
#endif
}

}  // namespace recgrela::cuda
