// Vectors of the level's register width (RECGRELA_VECTOR_BYTES), exp, SiLU and storage conversion.
// Included by every level file inside the level's namespace, after its target pragma: no include
// guard.

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(RECGRELA_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = RECGRELA_VECTOR_BYTES / int(sizeof(A));
using IntVec = VecOf<int32_t>::type;

#define RECGRELA_INLINE inline __attribute__((always_inline))
#define RECGRELA_NOINLINE __attribute__((noinline))

// The same vector at an address that is only aligned for its elements.
template <class A>
struct UnalignedOf {
  typedef A type __attribute__((vector_size(RECGRELA_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};

template <class A>
RECGRELA_INLINE Vec<A> load_vector(const A* from) {
  return *reinterpret_cast<const typename UnalignedOf<A>::type*>(from);
}
template <class A>
RECGRELA_INLINE void store_vector(Vec<A> x, A* to) {
  *reinterpret_cast<typename UnalignedOf<A>::type*>(to) = x;
}
template <class A>
RECGRELA_INLINE Vec<A> zero_vector() {
  return Vec<A>{};
}

// The members of every adjacent pair change places.
template <class A>
RECGRELA_INLINE Vec<A> swap_pairs(Vec<A> x) {
  if constexpr (kLanes<A> == 2) {
    return __builtin_shufflevector(x, x, 1, 0);
  } else if constexpr (kLanes<A> == 4) {
    return __builtin_shufflevector(x, x, 1, 0, 3, 2);
  } else if constexpr (kLanes<A> == 8) {
    return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
  } else {
    return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  }
}

template <class A>
RECGRELA_INLINE A sum_lanes(Vec<A> x) {
  if constexpr (kLanes<A> == 16) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  } else if constexpr (kLanes<A> == 8) {
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  } else if constexpr (kLanes<A> == 4) {
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
  }
  return x[0] + x[1];
}

// min and max; where y is NaN the result is NaN.
#if defined(__x86_64__)
#if RECGRELA_VECTOR_BYTES == 64
RECGRELA_INLINE Vec<float> smaller(Vec<float> x, Vec<float> y) { return _mm512_min_ps(x, y); }
RECGRELA_INLINE Vec<float> larger(Vec<float> x, Vec<float> y) { return _mm512_max_ps(x, y); }
RECGRELA_INLINE Vec<float> rough_reciprocal(Vec<float> x) { return _mm512_rcp14_ps(x); }
#elif RECGRELA_VECTOR_BYTES == 32
RECGRELA_INLINE Vec<float> smaller(Vec<float> x, Vec<float> y) { return _mm256_min_ps(x, y); }
RECGRELA_INLINE Vec<float> larger(Vec<float> x, Vec<float> y) { return _mm256_max_ps(x, y); }
RECGRELA_INLINE Vec<float> rough_reciprocal(Vec<float> x) { return _mm256_rcp_ps(x); }
#else
RECGRELA_INLINE Vec<float> smaller(Vec<float> x, Vec<float> y) { return _mm_min_ps(x, y); }
RECGRELA_INLINE Vec<float> larger(Vec<float> x, Vec<float> y) { return _mm_max_ps(x, y); }
RECGRELA_INLINE Vec<float> rough_reciprocal(Vec<float> x) { return _mm_rcp_ps(x); }
#endif
// x / y from the processor's estimate of 1/y and what the product leaves over: within 2 units in
// the last place, and a fraction of a division's time. Needs 1/y to be a normal number.
RECGRELA_INLINE Vec<float> quotient(Vec<float> x, Vec<float> y) {
  const Vec<float> r = rough_reciprocal(y), q = x * r;
  return q + r * (x - q * y);
}
#else
RECGRELA_INLINE Vec<float> smaller(Vec<float> x, Vec<float> y) { return x < y ? x : y; }
RECGRELA_INLINE Vec<float> larger(Vec<float> x, Vec<float> y) { return x > y ? x : y; }
RECGRELA_INLINE Vec<float> quotient(Vec<float> x, Vec<float> y) { return x / y; }
#endif
RECGRELA_INLINE Vec<double> smaller(Vec<double> x, Vec<double> y) { return x < y ? x : y; }
RECGRELA_INLINE Vec<double> larger(Vec<double> x, Vec<double> y) { return x > y ? x : y; }
RECGRELA_INLINE Vec<double> quotient(Vec<double> x, Vec<double> y) { return x / y; }

// exp of x in [-87, 88], within 1 unit in the last place. libm's exp is not vectorised. A NaN's
// exponent bits would be added to: every caller must bring x itself into its result.
RECGRELA_INLINE Vec<float> exp_inside(Vec<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  Vec<float> r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  // 1 + r + r^2 q(r): q's terms in pairs, for the latency.
  const Vec<float> r2 = r * r;
  Vec<float> q = r * 8.36871658e-3f + 4.1668389e-2f;
  q = r2 * 1.38145976e-3f + q;
  q = r2 * q + (r * 1.66665211e-1f + 4.9999994e-1f);
  const Vec<float> p = r2 * q + (r + 1.0f);
  // The low bits of `shifted` are n, which goes to the exponent; kRound's own leave with the shift.
  const IntVec bits = reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23);
  return reinterpret_cast<Vec<float>>(bits);
}
RECGRELA_INLINE Vec<double> exp_inside(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The range in which exp and 1 / (1 + exp) are normal numbers.
template <class A>
constexpr A kLowest = sizeof(A) == sizeof(float) ? A(-87) : A(-700);
template <class A>
constexpr A kHighest = -kLowest<A>;

template <class A>
RECGRELA_INLINE Vec<A> splat(A x) {
  return x - zero_vector<A>();  // not 0 + x, which is not x where x is -0
}

// Loaded once: the compiler would rather load anew for every use than spend a register.
template <class V>
RECGRELA_INLINE void keep_in_register(V& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
}

// phi(x) = x + 1 above 0, exp(x) below; never 0. Its derivative is min(phi(x), 1).
template <class A>
RECGRELA_INLINE Vec<A> feature_map(Vec<A> x) {
  const Vec<A> zero = {};
  return exp_inside(larger(splat(kLowest<A>), smaller(zero, x))) + larger(zero, x);
}
template <class A>
RECGRELA_INLINE Vec<A> slope_of(Vec<A> phi) {
  return smaller(splat(A(1)), phi);
}

// SiLU has reached 0 at kLowest. Without that floor the sigmoid, which never gets to 0, would leave
// something of a huge negative x.
template <class A>
RECGRELA_INLINE Vec<A> silu(Vec<A> x) {
  x = larger(splat(kLowest<A>), x);
  return quotient(x, exp_inside(-smaller(splat(kHighest<A>), x)) + A(1));
}

// SiLU(x) and its derivative s + x s (1 - s) from one exp; 1 - s is exp(-x) s, without
// cancellation.
template <class A>
struct SiluAndSlope {
  Vec<A> value, slope;
};
template <class A>
RECGRELA_INLINE SiluAndSlope<A> silu_and_slope(Vec<A> x) {
  x = larger(splat(kLowest<A>), x);
  const Vec<A> e = exp_inside(-smaller(splat(kHighest<A>), x));
  const Vec<A> s = quotient(splat(A(1)), e + A(1)), value = quotient(x, e + A(1));
  return {value, s + value * (e * s)};
}

// x / y where 1/y is at hand, rounded: what the product leaves over is added.
template <class A>
RECGRELA_INLINE Vec<A> divided(Vec<A> x, A y, A reciprocal) {
  const Vec<A> q = x * reciprocal;
  return q + reciprocal * (x - q * y);
}

// x[i] = f(x[i]) for vectors, the last one filled up where count is not a multiple.
template <class A, class F>
RECGRELA_INLINE void map_values(A* x, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store_vector(f(load_vector(x + i)), x + i);
  if (i == count) return;
  A last[kLanes<A>] = {};
  for (int64_t j = 0; j < count - i; ++j) last[j] = x[i + j];
  store_vector(f(load_vector(last)), last);
  for (int64_t j = 0; j < count - i; ++j) x[i + j] = last[j];
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
