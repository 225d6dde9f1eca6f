// The rotary phases of a chunk. Included by every level file.
//
// A rotated row is x * cosines + swapped(x) * sines, `swapped` exchanging the members of each pair:
// cosines [c0, c0, c1, c1, ...], sines [-s0, s0, -s1, s1, ...]. The angle of item j of a chunk is
// the chunk's own plus j steps, added in double by a complex product, so that it is right to float
// rounding at any position. From chunk to chunk the angle turns by kChunk steps; at every segment's
// start (for double rows: at every chunk) it is taken from its position again. The first chunks of
// sequences that start at 0 are the same for all of them: rotation_tables makes them once per call.

template <class A>
constexpr int64_t kAnew = sizeof(A) == sizeof(double) ? 1 : kSegment / kChunk;

template <class A>
struct Rotation {
  double *cos0, *sin0;         // [D/2]: the chunk's first item
  A *own_cosines, *own_sines;  // [kChunk, Dp]
  const A *cosines, *sines;    // [kChunk, Dp] of the chunk at hand: own or kept
  const double* steps;         // [kChunk + 1, 2, D/2]: cos and sin of j steps
  const double* inv_freq;
  const A* kept;  // [kept_chunks, 2, kChunk, Dp]: cosines and sines
  int64_t kept_chunks;
  int64_t D, Dp, pairs;
};

template <class A>
void lay_out(Rotation<A>& r, Scratch& scratch, int64_t D, int64_t Dp) {
  r.D = D;
  r.Dp = Dp;
  r.pairs = D / 2;
  r.cos0 = scratch.take<double>(r.pairs);
  r.sin0 = scratch.take<double>(r.pairs);
  r.own_cosines = scratch.take<A>(kChunk * Dp);
  r.own_sines = scratch.take<A>(kChunk * Dp);
}

template <class A>
void load_head(Rotation<A>& r, const GatedRelaParams& p, int64_t h) {
  r.inv_freq = p.inv_freq + h * r.pairs;
  r.steps = p.step_rotation + h * (kChunk + 1) * r.D;
  r.kept_chunks = p.kept_chunks;
  r.kept = static_cast<const A*>(p.rotations) + h * p.kept_chunks * 2 * kChunk * r.Dp;
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

// The phases of n items from the chunk's own.
template <class A>
void fill_rotation(const Rotation<A>& r, int n, A* cosines, A* sines) {
  using V = Vec<double>;
  constexpr int kD = kLanes<double>;
  const int64_t pairs = r.pairs;
  for (int t = 0; t < n; ++t) {
    const double* cos1 = r.steps + t * r.D;
    const double* sin1 = cos1 + pairs;
    A* to_cos = cosines + t * r.Dp;
    A* to_sin = sines + t * r.Dp;
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

template <class A>
bool is_kept(const Rotation<A>& r, int64_t chunk, int64_t start) {
  return start == 0 && chunk < r.kept_chunks;
}

// After turn_chunk or start_rotation: the phases of the chunk's n items.
template <class A>
void set_rotation(Rotation<A>& r, int64_t chunk, int64_t start, int n) {
  if (is_kept(r, chunk, start)) {
    r.cosines = r.kept + chunk * 2 * kChunk * r.Dp;
    r.sines = r.cosines + kChunk * r.Dp;
    return;
  }
  fill_rotation(r, n, r.own_cosines, r.own_sines);
  r.cosines = r.own_cosines;
  r.sines = r.own_sines;
}

// kBack: turned back.
template <bool kBack, class A>
RECGRELA_INLINE Vec<A> rotated(Vec<A> x, Vec<A> cosine, Vec<A> sine) {
  const Vec<A> across = swap_pairs<A>(x) * sine;
  return kBack ? x * cosine - across : x * cosine + across;
}

template <class A>
void fill_tables(const GatedRelaParams& p) {
  Rotation<A> r;
  with_scratch([&](Scratch& scratch) { lay_out(r, scratch, p.D, padded<A>(p.D)); },
               [&] {
                 for (int64_t h = 0; h < p.H; ++h) {
                   load_head(r, p, h);
                   A* to = const_cast<A*>(r.kept);
                   for (int64_t chunk = 0; chunk < p.kept_chunks; ++chunk) {
                     turn_chunk<false>(r, chunk, chunk * kChunk);
                     fill_rotation(r, kChunk, to, to + kChunk * r.Dp);
                     to += 2 * kChunk * r.Dp;
                   }
                 }
               });
}

void rotation_tables(const GatedRelaParams& p) {
  p.dtype == DType::kDouble ? fill_tables<double>(p) : fill_tables<float>(p);
}
