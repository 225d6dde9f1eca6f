// Vectors of the level's register width (RECGRELA_VECTOR_BYTES). Included by every level file
// inside the level's namespace, after its target pragma: no include guard.

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
#define RECGRELA_INLINE_LAMBDA __attribute__((always_inline))

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

RECGRELA_INLINE Vec<float> widen_bytes(const int8_t* from) {
#if defined(__x86_64__) && RECGRELA_VECTOR_BYTES == 64
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__x86_64__) && RECGRELA_VECTOR_BYTES == 32
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = float(from[i]);
  return x;
#endif
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

// Lane i of the result is the sum of rows[i]: rows and their halves are added in pairs, which costs
// two shuffles a row where sum_lanes takes four.
template <class A, int kGroup, int... I>
RECGRELA_INLINE Vec<A> add_halves(Vec<A> x, Vec<A> y, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<A>, kHalf = kGroup / 2;
  const Vec<A> low = __builtin_shufflevector(x, y, (I % kGroup < kHalf ? I : I - kHalf + L)...);
  const Vec<A> high = __builtin_shufflevector(x, y, (I % kGroup < kHalf ? I + kHalf : I + L)...);
  return low + high;
}
template <class A, int kGroup = kLanes<A>>
RECGRELA_INLINE Vec<A> sum_rows(Vec<A>* rows) {
  if constexpr (kGroup == 1) {
    return rows[0];
  } else {
    for (int i = 0; i < kGroup / 2; ++i) {
      rows[i] = add_halves<A, kGroup>(rows[i], rows[i + kGroup / 2],
                                      std::make_integer_sequence<int, kLanes<A>>{});
    }
    return sum_rows<A, kGroup / 2>(rows);
  }
}
// sums[t] is the sum of the vector rows + t * kLanes. Whole groups of kLanes are read and written.
template <class A>
RECGRELA_INLINE void sum_each(const A* rows, A* sums, int64_t n) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t t = 0; t < n; t += L) {
    Vec<A> group[L];
    for (int64_t i = 0; i < L; ++i) group[i] = load_vector(rows + (t + i) * L);
    store_vector(sum_rows<A>(group), sums + t);
  }
}

// rows[i][j] and rows[j][i] change places: blocks of kHalf lanes for kHalf = 1, 2, 4, ...
template <class A, int kHalf, int... I>
RECGRELA_INLINE void turn_blocks(Vec<A>& x, Vec<A>& y, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<A>;
  const Vec<A> low = __builtin_shufflevector(x, y, (I & kHalf ? I - kHalf + L : I)...);
  y = __builtin_shufflevector(x, y, (I & kHalf ? I + L : I + kHalf)...);
  x = low;
}
template <class A, int kHalf = 1>
RECGRELA_INLINE void turn_square(Vec<A>* rows) {
  if constexpr (kHalf < kLanes<A>) {
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & kHalf) continue;
      turn_blocks<A, kHalf>(rows[i], rows[i + kHalf], std::make_integer_sequence<int, kLanes<A>>{});
    }
    turn_square<A, 2 * kHalf>(rows);
  }
}

// A few vectors that take every step together: while one waits for its result, the others keep the
// processor busy. The processor's own window is too short for that in long formulas.
template <class A, int kCount>
struct Pack {
  Vec<A> at[kCount];
};
template <class A, int kCount, class F>
RECGRELA_INLINE Pack<A, kCount> pack_of(F&& f) {
  Pack<A, kCount> x;
  for (int i = 0; i < kCount; ++i) x.at[i] = f(i);
  return x;
}
#define RECGRELA_PACK_OPERATOR(OP)                                                         \
  template <class A, int n>                                                                \
  RECGRELA_INLINE Pack<A, n> operator OP(const Pack<A, n>& x, const Pack<A, n>& y) {       \
    return pack_of<A, n>([&](int i) { return x.at[i] OP y.at[i]; });                       \
  }                                                                                        \
  template <class A, int n>                                                                \
  RECGRELA_INLINE Pack<A, n> operator OP(const Pack<A, n>& x, std::type_identity_t<A> y) { \
    return pack_of<A, n>([&](int i) { return x.at[i] OP y; });                             \
  }
RECGRELA_PACK_OPERATOR(+)
RECGRELA_PACK_OPERATOR(-)
RECGRELA_PACK_OPERATOR(*)
#undef RECGRELA_PACK_OPERATOR
template <class A, int n>
RECGRELA_INLINE Pack<A, n> operator-(const Pack<A, n>& x) {
  return pack_of<A, n>([&](int i) { return -x.at[i]; });
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
#else
RECGRELA_INLINE Vec<float> smaller(Vec<float> x, Vec<float> y) { return x < y ? x : y; }
RECGRELA_INLINE Vec<float> larger(Vec<float> x, Vec<float> y) { return x > y ? x : y; }
RECGRELA_INLINE Vec<float> rough_reciprocal(Vec<float> x) { return 1.0f / x; }
#endif
RECGRELA_INLINE Vec<double> smaller(Vec<double> x, Vec<double> y) { return x < y ? x : y; }
RECGRELA_INLINE Vec<double> larger(Vec<double> x, Vec<double> y) { return x > y ? x : y; }
RECGRELA_INLINE Vec<double> rough_reciprocal(Vec<double> x) { return 1.0 / x; }
template <class A, int n>
RECGRELA_INLINE Pack<A, n> smaller(std::type_identity_t<Vec<A>> x, const Pack<A, n>& y) {
  return pack_of<A, n>([&](int i) { return smaller(x, y.at[i]); });
}
template <class A, int n>
RECGRELA_INLINE Pack<A, n> larger(std::type_identity_t<Vec<A>> x, const Pack<A, n>& y) {
  return pack_of<A, n>([&](int i) { return larger(x, y.at[i]); });
}
template <class A, int n>
RECGRELA_INLINE Pack<A, n> rough_reciprocal(const Pack<A, n>& x) {
  return pack_of<A, n>([&](int i) { return rough_reciprocal(x.at[i]); });
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
