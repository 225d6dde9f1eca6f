// The rotary phases of a chunk. Included by every level file.
//
// A rotated row is x * cosines + swapped(x) * sines, `swapped` exchanging the members of each pair:
// cosines [c0, c0, c1, c1, ...], sines [-s0, s0, -s1, s1, ...]. The angle of item j of a chunk is
// the chunk's own plus j steps, added in double by a complex product, so that it is right to float
// rounding at any position. From chunk to chunk the angle turns by kChunk steps; at every segment's
// start (for double rows: at every chunk) it is taken from its position again.

template <class A>
constexpr int64_t kAnew = sizeof(A) == sizeof(double) ? 1 : kSegment / kChunk;

template <class A>
struct Rotation {
  double *cos0, *sin0;  // [D/2]: the chunk's first item
  A *cosines, *sines;   // [kChunk, Dp]
  const double* steps;  // [kChunk + 1, 2, D/2]: cos and sin of j steps
  const double* inv_freq;
  int64_t D, Dp, pairs;
};

template <class A>
void lay_out(Rotation<A>& r, Scratch& scratch, int64_t D, int64_t Dp) {
  r.D = D;
  r.Dp = Dp;
  r.pairs = D / 2;
  r.cos0 = scratch.take<double>(r.pairs);
  r.sin0 = scratch.take<double>(r.pairs);
  r.cosines = scratch.take<A>(kChunk * Dp);
  r.sines = scratch.take<A>(kChunk * Dp);
}

template <class A>
void start_rotation(Rotation<A>& r, int64_t position) {
  for (int64_t i = 0; i < r.pairs; ++i) {
    const double phase = double(position) * r.inv_freq[i];
    r.cos0[i] = position == 0 ? 1.0 : std::cos(phase);
    r.sin0[i] = position == 0 ? 0.0 : std::sin(phase);
  }
}

// From a chunk to the next one (kBack: the one before), whose first item has this position.
template <bool kBack, class A>
void turn_chunk(Rotation<A>& r, int64_t chunk, int64_t position) {
  if (chunk % kAnew<A> == 0) return start_rotation(r, position);
  const double* cos1 = r.steps + kChunk * r.D;
  const double* sin1 = cos1 + r.pairs;
  for (int64_t i = 0; i < r.pairs; ++i) {
    const double c = r.cos0[i], s = r.sin0[i], sine = kBack ? -sin1[i] : sin1[i];
    r.cos0[i] = c * cos1[i] - s * sine;
    r.sin0[i] = s * cos1[i] + c * sine;
  }
}

// x0, x0, x1, x1, ... rounded to A; and -x0, x0, -x1, x1, ...
template <class A>
RECGRELA_INLINE auto twice(Vec<double> x) {
  constexpr int kD = kLanes<double>;
  typedef A Few __attribute__((vector_size(kD * sizeof(A))));
  const Few y = __builtin_convertvector(x, Few);
  if constexpr (kD == 2) {
    return __builtin_shufflevector(y, y, 0, 0, 1, 1);
  } else if constexpr (kD == 4) {
    return __builtin_shufflevector(y, y, 0, 0, 1, 1, 2, 2, 3, 3);
  } else {
    return __builtin_shufflevector(y, y, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  }
}
template <class A>
RECGRELA_INLINE void store_pairs(Vec<double> x, A* to) {
  auto pairs = twice<A>(x);
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}
template <class A>
RECGRELA_INLINE void store_signed_pairs(Vec<double> x, A* to) {
  auto pairs = twice<A>(x);
  decltype(pairs) sign;
  for (int i = 0; i < 2 * kLanes<double>; ++i) sign[i] = i % 2 == 0 ? A(-1) : A(1);
  pairs *= sign;
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}

template <class A>
void fill_rotation(const Rotation<A>& r, int n) {
  using V = Vec<double>;
  constexpr int kD = kLanes<double>;
  const int64_t pairs = r.pairs;
  for (int t = 0; t < n; ++t) {
    const double* cos1 = r.steps + t * r.D;
    const double* sin1 = cos1 + pairs;
    A* to_cos = r.cosines + t * r.Dp;
    A* to_sin = r.sines + t * r.Dp;
    int64_t i = 0;
    for (; i + kD <= pairs; i += kD) {
      const V c0 = load_vector(r.cos0 + i), s0 = load_vector(r.sin0 + i);
      const V c1 = load_vector(cos1 + i), s1 = load_vector(sin1 + i);
      store_pairs(c0 * c1 - s0 * s1, to_cos + 2 * i);
      store_signed_pairs(s0 * c1 + c0 * s1, to_sin + 2 * i);
    }
    for (; i < pairs; ++i) {
      to_cos[2 * i] = to_cos[2 * i + 1] = A(r.cos0[i] * cos1[i] - r.sin0[i] * sin1[i]);
      to_sin[2 * i + 1] = A(r.sin0[i] * cos1[i] + r.cos0[i] * sin1[i]);
      to_sin[2 * i] = -to_sin[2 * i + 1];
    }
  }
}

// kBack: turned back.
template <bool kBack, class A>
RECGRELA_INLINE Vec<A> rotated(Vec<A> x, Vec<A> cosine, Vec<A> sine) {
  const Vec<A> across = swap_pairs<A>(x) * sine;
  return kBack ? x * cosine - across : x * cosine + across;
}
