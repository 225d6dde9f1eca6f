// exp and what is made of it: phi, SiLU and their derivatives, on vectors. Included by every level
// file. V is a Vec or a Pack.

// x / y from the processor's estimate of 1/y and what the product leaves over: within 2 units in
// the last place, and a fraction of a division's time. Needs 1/y to be a normal number.
template <class V>
RECGRELA_INLINE V quotient(const V& x, const V& y) {
  const V r = rough_reciprocal(y), q = x * r;
  return q + r * (x - q * y);
}

// exp of x in [-87, 88], within 1.5 units in the last place; by the table within 2, and within 5
// below -20. libm's exp is not vectorised. A NaN's exponent bits may be added to: every caller must
// bring x itself into its result.
#if defined(__x86_64__) && RECGRELA_VECTOR_BYTES >= 32
// x ln 2 = n + r, n in parts of kParts: 2^n is an entry of a table that a register holds, its
// exponent added to, and exp(r) takes three terms.
constexpr int kParts = RECGRELA_VECTOR_BYTES / 4, kPartBits = kParts == 16 ? 4 : 3;
constexpr int kPartShift = 23 - kPartBits;  // from the low bits of n to the exponent

// 2^(j / kParts), less what the low bits of n will add.
constexpr std::array<int32_t, kParts> make_powers() {
  constexpr float kSixteenths[16] = {1.00000000f, 1.04427378f, 1.09050773f, 1.13878863f,
                                     1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                     1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                     1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  std::array<int32_t, kParts> powers{};
  for (int j = 0; j < kParts; ++j) {
    powers[j] = std::bit_cast<int32_t>(kSixteenths[j * (16 / kParts)]) - (j << kPartShift);
  }
  return powers;
}
alignas(64) constexpr std::array<int32_t, kParts> kPowers = make_powers();

// 2^n, n in parts the low bits of `shifted`.
RECGRELA_INLINE Vec<float> power_of_two(Vec<float> shifted) {
  const IntVec n = reinterpret_cast<IntVec>(shifted);
#if RECGRELA_VECTOR_BYTES == 64
  const __m512i power =
      _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(n), _mm512_load_si512(kPowers.data()));
#else
  const __m256i power = _mm256_permutevar8x32_epi32(
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kPowers.data())),
      reinterpret_cast<__m256i>(n));
#endif
  return reinterpret_cast<Vec<float>>(reinterpret_cast<IntVec>(power) + (n << kPartShift));
}
template <int n>
RECGRELA_INLINE Pack<float, n> power_of_two(const Pack<float, n>& shifted) {
  return pack_of<float, n>([&](int i) { return power_of_two(shifted.at[i]); });
}
template <class V>
RECGRELA_INLINE V exp_float(const V& x) {
  constexpr float kRound = 1.5f * float(1 << kPartShift);  // adding it rounds to parts
  constexpr float kEnd = 0.693147182f / (2 * kParts);      // of |r|
  // Of (1/24) r^4, what 1/2 r^2 can take over.
  constexpr float kHalf = 0.5f + 0.828427f / 24 * kEnd * kEnd;
  const V shifted = x * 1.44269504f + kRound;
  const V r = x - (shifted - kRound) * 0.693147182f;
  const V p = (r * r) * (r * 0.166666667f + kHalf) + r;
  const V power = power_of_two(shifted);
  return power * p + power;
}
#else
// p * 2^n, n the low bits of `shifted`: they go to the exponent, and what is above them leaves.
RECGRELA_INLINE Vec<float> scaled(Vec<float> p, Vec<float> shifted) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<IntVec>(p) +
                                      (reinterpret_cast<IntVec>(shifted) << 23));
}
template <int n>
RECGRELA_INLINE Pack<float, n> scaled(const Pack<float, n>& p, const Pack<float, n>& shifted) {
  return pack_of<float, n>([&](int i) { return scaled(p.at[i], shifted.at[i]); });
}
template <class V>
RECGRELA_INLINE V exp_float(const V& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x * 1.44269504f + kRound;
  const V n = shifted - kRound;
  V r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  // 1 + r + r^2 q(r): q's terms in pairs, for the latency.
  const V r2 = r * r;
  V q = r * 8.36871658e-3f + 4.1668389e-2f;
  q = r2 * 1.38145976e-3f + q;
  q = r2 * q + (r * 1.66665211e-1f + 4.9999994e-1f);
  return scaled(r2 * q + (r + 1.0f), shifted);
}
#endif
RECGRELA_INLINE Vec<float> exp_inside(Vec<float> x) { return exp_float(x); }
template <int n>
RECGRELA_INLINE Pack<float, n> exp_inside(const Pack<float, n>& x) {
  return exp_float(x);
}
RECGRELA_INLINE Vec<double> exp_inside(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
template <int n>
RECGRELA_INLINE Pack<double, n> exp_inside(const Pack<double, n>& x) {
  return pack_of<double, n>([&](int i) { return exp_inside(x.at[i]); });
}

// The range in which exp and 1 / (1 + exp) are normal numbers.
template <class A>
constexpr A kLowest = sizeof(A) == sizeof(float) ? A(-87) : A(-700);
template <class A>
constexpr A kHighest = -kLowest<A>;

// phi(x) = x + 1 above 0, exp(x) below; never 0. Its derivative is min(phi(x), 1).
template <class A, class V>
RECGRELA_INLINE V feature_map(const V& x) {
  const Vec<A> zero = {};
  return exp_inside(larger(splat(kLowest<A>), smaller(zero, x))) + larger(zero, x);
}
template <class A>
RECGRELA_INLINE Vec<A> slope_of(Vec<A> phi) {
  return smaller(splat(A(1)), phi);
}

// SiLU has reached 0 at kLowest. Without that floor the sigmoid, which never gets to 0, would leave
// something of a huge negative x.
template <class A, class V>
RECGRELA_INLINE V silu(V x) {
  x = larger(splat(kLowest<A>), x);
  return quotient(x, exp_inside(-smaller(splat(kHighest<A>), x)) + A(1));
}

// SiLU(x) and its derivative s (1 + x (1 - s)) from one exp; 1 - s is exp(-x) s, without
// cancellation.
template <class V>
struct SiluAndSlope {
  V value, slope;
};
template <class A, class V>
RECGRELA_INLINE SiluAndSlope<V> silu_and_slope(V x) {
  x = larger(splat(kLowest<A>), x);
  const V e = exp_inside(-smaller(splat(kHighest<A>), x)), y = e + A(1);
  const V r = rough_reciprocal(y), s = r + r * (-(y * r) + A(1)), value = x * s;
  return {value, s * (x * (e * s) + A(1))};
}

// x / y where 1/y is at hand, rounded: what the product leaves over is added.
template <class V>
RECGRELA_INLINE V divided(const V& x, const V& y, const V& reciprocal) {
  const V q = x * reciprocal;
  return q + reciprocal * (x - q * y);
}
