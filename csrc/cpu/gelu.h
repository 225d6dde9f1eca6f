// GELU(x) = x Phi(x), Phi the normal distribution, and its derivative. Included by every level
// file.

// Phi(x) and its derivative exp(-x^2 / 2) / sqrt(2 pi).
template <class A>
struct Normal {
  Vec<A> share, density;
};

// Beyond it GELU is 0, x or smaller than any error; nothing below becomes subnormal or overflows.
template <class A>
constexpr A kNormalEnd = A(12.5);

// erfc(a) = exp(-a^2) t P(t) with t = 1 / (1 + 0.43 a): a least-maximum fit of the relative error,
// 8.4e-8 for every a. Without the cancellation of 1 + erf, GELU keeps its digits below 0. libm's
// erf is not vectorised. x lies in [-kNormalEnd, kNormalEnd].
RECGRELA_INLINE Normal<float> normal_at(Vec<float> x) {
  const Vec<float> a = larger(x, -x) * 0.707106781f;
  const Vec<float> t = quotient(splat(1.0f), a * 0.43f + 1.0f);
  Vec<float> p = t * 0.0737079924f - 0.310373688f;
  p = p * t + 0.383706274f;
  p = p * t - 0.0857263146f;
  p = p * t + 0.246844754f;
  p = p * t + 0.204951001f;
  p = p * t + 0.244375459f;
  p = p * t + 0.242514607f;
  const Vec<float> e = exp_inside(-a * a);
  const Vec<float> tail = p * t * e * 0.5f;
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.398942280f};
}
RECGRELA_INLINE Normal<double> normal_at(Vec<double> x) {
  Normal<double> normal;
  for (int i = 0; i < kLanes<double>; ++i) {
    normal.share[i] = 0.5 * std::erfc(-0.7071067811865476 * x[i]);
    normal.density[i] = 0.3989422804014327 * std::exp(-0.5 * x[i] * x[i]);
  }
  return normal;
}

template <class A>
RECGRELA_INLINE Vec<A> gelu(Vec<A> x) {
  const Vec<A> end = splat(kNormalEnd<A>);
  x = larger(-end, x);
  return x * normal_at(smaller(end, x)).share;
}

template <class A>
RECGRELA_INLINE Vec<A> gelu_slope(Vec<A> x) {
  const Vec<A> end = splat(kNormalEnd<A>);
  x = smaller(end, larger(-end, x));
  const Normal<A> normal = normal_at(x);
  return normal.share + x * normal.density;
}
