// Vectors of 64 bytes in the compiler's own vector types, exp, and storage conversion. Included by
// every level file inside the level's namespace, after its target pragma: no include guard.

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(64)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = 64 / sizeof(A);

#define RECGRELA_INLINE inline __attribute__((always_inline))
#define RECGRELA_NOINLINE __attribute__((noinline))

// The same vector at an address that is only aligned for its elements.
template <class A>
struct UnalignedOf {
  typedef A type __attribute__((vector_size(64), aligned(sizeof(A)), may_alias));
};

template <class A>
RECGRELA_INLINE Vec<A> load_vector(const A* from) {
  return *reinterpret_cast<const typename UnalignedOf<A>::type*>(from);
}
template <class A>
RECGRELA_INLINE void store_vector(Vec<A> x, A* to) {
  *reinterpret_cast<typename UnalignedOf<A>::type*>(to) = x;
}

// Two vectors of neighbouring pairs -> their even members, their odd members; and back.
RECGRELA_INLINE Vec<float> even_lanes(Vec<float> x, Vec<float> y) {
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
RECGRELA_INLINE Vec<float> odd_lanes(Vec<float> x, Vec<float> y) {
  return __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
RECGRELA_INLINE Vec<float> interleave_low(Vec<float> even, Vec<float> odd) {
  return __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
RECGRELA_INLINE Vec<float> interleave_high(Vec<float> even, Vec<float> odd) {
  return __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                 15, 31);
}
// One vector of 8 pairs -> [even members | odd members], and back.
RECGRELA_INLINE Vec<float> split_pairs(Vec<float> x) {
  return __builtin_shufflevector(x, x, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
}
RECGRELA_INLINE Vec<float> join_pairs(Vec<float> x) {
  return __builtin_shufflevector(x, x, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
}
RECGRELA_INLINE Vec<float> swap_halves(Vec<float> x) {
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Eight doubles, rounded to A.
template <class A>
RECGRELA_INLINE void store_eight(Vec<double> x, A* to) {
  typedef A Eight __attribute__((vector_size(8 * sizeof(A)), aligned(sizeof(A)), may_alias));
  const Eight rounded = __builtin_convertvector(x, Eight);
  *reinterpret_cast<Eight*>(to) = rounded;
}

RECGRELA_INLINE float sum_lanes(Vec<float> x) {
  typedef float Vec8 __attribute__((vector_size(32)));
  typedef float Vec4 __attribute__((vector_size(16)));
  const Vec8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vec4 b =
      __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

RECGRELA_INLINE double sum_lanes(Vec<double> x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// exp for float, within 1 unit in the last place on [-87, 88]; arguments outside are clamped, so
// the result is never 0 nor infinite. libm's exp is not vectorised; this loop is. NaN stays NaN.
RECGRELA_INLINE float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + kRound) - kRound;
  float r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // n is NaN for a NaN argument; the cast must still be defined.
  const int32_t exponent = (x == x ? static_cast<int32_t>(n) : 0) + 127;
  const int32_t bits = exponent << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

RECGRELA_INLINE double exp_clamped(double x) {
  x = x < -700.0 ? -700.0 : x;
  x = x > 700.0 ? 700.0 : x;
  return std::exp(x);
}

template <class A>
RECGRELA_INLINE A sigmoid(A x) {
  return A(1) / (A(1) + exp_clamped(-x));
}

// Where SiLU has reached 0. Without the floor the sigmoid, which never gets to 0, would leave
// something of a huge negative x.
template <class A>
RECGRELA_INLINE A silu_floor(A x) {
  constexpr A kFloor = sizeof(A) == sizeof(float) ? A(-87) : A(-700);
  return x < kFloor ? kFloor : x;
}

template <class A>
RECGRELA_INLINE A silu(A x) {
  x = silu_floor(x);
  return x * sigmoid(x);
}

// phi(x) = x + 1 above 0, exp(x) below; its derivative is min(phi(x), 1).
template <class A>
RECGRELA_INLINE A feature_map(A x) {
  const A e = exp_clamped(x);
  return x > A(0) ? x + A(1) : e;
}

// Whole-tile loops: long, over one stretch of memory each, so that the compiler vectorises them at
// every level (its own vector types have no fast select below AVX-512).

// x = phi(x)
template <class A>
RECGRELA_NOINLINE void map_features(A* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = feature_map(x[i]);
}
// x = min(x, 1), the slope of phi where x is phi.
template <class A>
RECGRELA_NOINLINE void scale_by_slope(A* __restrict x, const A* __restrict phi, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= phi[i] < A(1) ? phi[i] : A(1);
}
// out += SiLU(pre)
template <class A>
RECGRELA_NOINLINE void add_silu(A* __restrict out, const A* __restrict pre, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += silu(pre[i]);
}
// out *= SiLU(gate)
template <class A>
RECGRELA_NOINLINE void scale_by_silu(A* __restrict out, const A* __restrict gate, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] *= silu(gate[i]);
}
// y = SiLU(gate) * o:  dgate = dy * o * SiLU'(gate),  d(o) = dy * SiLU(gate)
template <class A>
RECGRELA_NOINLINE void differentiate_gate(A* __restrict dgate, A* __restrict d_o,
                                          const A* __restrict dy, const A* __restrict o,
                                          const A* __restrict gate, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const A g = silu_floor(gate[i]), s = sigmoid(g);
    dgate[i] = dy[i] * o[i] * (s * (A(1) + g * (A(1) - s)));
    d_o[i] = dy[i] * (g * s);
  }
}
// a = SiLU(pre):  dpre = da * SiLU'(pre)
template <class A>
RECGRELA_NOINLINE void differentiate_silu(A* __restrict dpre, const A* __restrict da,
                                          const A* __restrict pre, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const A x = silu_floor(pre[i]), s = sigmoid(x);
    dpre[i] = da[i] * (s * (A(1) + x * (A(1) - s)));
  }
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

RECGRELA_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
RECGRELA_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

RECGRELA_INLINE float widen(float x) { return x; }
RECGRELA_INLINE double widen(double x) { return x; }
RECGRELA_INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
RECGRELA_INLINE float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  uint32_t bits = magnitude + (112u << 23);
  bits = exponent == 0x0f800000u ? bits + (112u << 23) : bits;  // infinity, NaN
  const uint32_t subnormal =
      float_to_bits(bits_to_float(magnitude + (113u << 23)) - bits_to_float(113u << 23));
  return bits_to_float((exponent == 0 ? subnormal : bits) | sign);
}

RECGRELA_INLINE void narrow(float x, float* out) { *out = x; }
RECGRELA_INLINE void narrow(double x, double* out) { *out = x; }
RECGRELA_INLINE void narrow(float x, BFloat16* out) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x == x ? rounded : 0x7fc0u);
}
RECGRELA_INLINE void narrow(float x, Half* out) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a subnormal half's last bit with the float's.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = uint16_t(half | sign);
}

// Calls f with a null pointer of the storage type, which tells the generic lambda its type.
template <class A, class F>
RECGRELA_INLINE void with_storage(DType dtype, F&& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (dtype == DType::kHalf) {
    f(static_cast<Half*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}
