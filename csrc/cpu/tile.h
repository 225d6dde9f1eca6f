// What forward and backward share: one (sequence, head), a chunk of at most kChunk items at a time,
// staged in scratch. Included by every level file.

template <class A>
struct Tile {
  int n;  // items in this chunk
  int64_t D, Dp, W;
  A *phi_q, *phi_k;    // [kChunk, Dp]
  A *rot_q, *rot_k;    // [kChunk, Dp]
  A *cosines, *sines;  // [kChunk, Dp], see fill_rotation
  A* values;           // [W-1 + kChunk, Dp]: row t + W - 1 is v_t
  A* num;              // [kChunk, Dp], then o
  A* den;              // [kChunk]
  A* augmented;        // [kChunk, Dp], pre-activation, then a
  RunningState<A> state;
  A *weight, *bias;  // [W, Dp], [Dp]
};

template <class A>
void lay_out(Tile<A>& tile, Scratch& scratch, const GatedRelaParams& p) {
  tile.D = p.D;
  tile.Dp = padded<A>(p.D);
  tile.W = p.W;
  const int64_t chunk = kChunk * tile.Dp;
  for (A** rows : {&tile.phi_q, &tile.phi_k, &tile.rot_q, &tile.rot_k, &tile.cosines, &tile.sines,
                   &tile.num, &tile.augmented}) {
    *rows = scratch.take<A>(chunk);
  }
  tile.values = scratch.take<A>((tile.W - 1) * tile.Dp + chunk);
  tile.den = scratch.take<A>(kChunk);
  lay_out(tile.state, scratch, tile.Dp);
  tile.weight = scratch.take<A>(tile.W * tile.Dp);
  tile.bias = scratch.take<A>(tile.Dp);
}

// conv_weight [H*D, W] of head h as weight [W, Dp].
template <class A>
void load_conv(Tile<A>& tile, const GatedRelaParams& p, int64_t h) {
  if (p.conv_weight == nullptr) return;
  const A* weight = static_cast<const A*>(p.conv_weight) + h * p.D * p.W;
  const A* bias = static_cast<const A*>(p.conv_bias);
  for (int64_t d = 0; d < p.D; ++d) {
    for (int64_t j = 0; j < p.W; ++j) tile.weight[j * tile.Dp + d] = weight[d * p.W + j];
    tile.bias[d] = bias ? bias[h * p.D + d] : A(0);
  }
}

// The W - 1 values before item t0, from the rows or, before the first item, from the state.
template <class A>
void load_past_values(Tile<A>& tile, const GatedRelaParams& p, const Span& span, int64_t b,
                      int64_t t0, int64_t h) {
  const int64_t past = p.W - 1;
  const States& state = p.initial;
  for (int64_t r = 0; r < past; ++r) {
    const int64_t t = t0 - past + r;
    A* row = tile.values + r * tile.Dp;
    if (t >= 0) {
      load_rows(row, tile.Dp, p.v, p.dtype, span, t, 1, h, p.D);
    } else if (state.conv) {
      const A* from = static_cast<const A*>(state.conv) + b * state.conv_stride +
                      (past + t) * p.H * p.D + h * p.D;
      for (int64_t d = 0; d < p.D; ++d) row[d] = from[d];
    } else {
      for (int64_t d = 0; d < p.D; ++d) row[d] = A(0);
    }
  }
}

// The rotation of a chunk's items, in key order: cosines [c | c] and sines [-s | s] per row, so
// that a turned row is x * cosines + swapped(x) * sines. The angle of row j is the chunk's start
// plus j steps, added in double: right to float rounding at any position.
template <class A>
void fill_rotation(Tile<A>& tile, const double* inv_freq, const double* step_rotation,
                   int64_t start) {
  const int64_t D = tile.D, Dp = tile.Dp, pairs = D / 2;
  double start_cos[kMaxPairs], start_sin[kMaxPairs];
  for (int64_t first = 0; first < pairs; first += kMaxPairs) {
    const int64_t count = pairs - first < kMaxPairs ? pairs - first : kMaxPairs;
    for (int64_t i = 0; i < count; ++i) {
      const double phase = double(start) * inv_freq[first + i];
      start_cos[i] = std::cos(phase);
      start_sin[i] = std::sin(phase);
    }
    for (int t = 0; t < tile.n; ++t) {
      const double* step_cos = step_rotation + t * D + first;
      const double* step_sin = step_cos + pairs;
      A* c = tile.cosines + t * Dp + first;
      A* s = tile.sines + t * Dp + first;
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        const Vec<double> cos0 = load_vector(start_cos + i), sin0 = load_vector(start_sin + i);
        const Vec<double> cos1 = load_vector(step_cos + i), sin1 = load_vector(step_sin + i);
        const Vec<double> cosine = cos0 * cos1 - sin0 * sin1, sine = sin0 * cos1 + cos0 * sin1;
        store_eight(cosine, c + i);
        store_eight(cosine, c + pairs + i);
        store_eight(-sine, s + i);
        store_eight(sine, s + pairs + i);
      }
      for (; i < count; ++i) {
        c[i] = c[pairs + i] = A(start_cos[i] * step_cos[i] - start_sin[i] * step_sin[i]);
        s[pairs + i] = A(start_sin[i] * step_cos[i] + start_cos[i] * step_sin[i]);
        s[i] = -s[pairs + i];
      }
    }
  }
}

// Rows turned forward (kBack false) or back. src and dst may be the same rows.
template <bool kBack, class A>
void rotate_rows(const Tile<A>& tile, const A* src, A* dst) {
  const int64_t D = tile.D, Dp = tile.Dp, pairs = D / 2;
  for (int t = 0; t < tile.n; ++t) {
    const A* from = src + t * Dp;
    const A* c = tile.cosines + t * Dp;
    const A* s = tile.sines + t * Dp;
    A* to = dst + t * Dp;
    if constexpr (std::is_same_v<A, float>) {
      if (D == 16) {
        const Vec<float> x = load_vector(from);
        const Vec<float> across = swap_halves(x) * load_vector(s);
        store_vector(kBack ? x * load_vector(c) - across : x * load_vector(c) + across, to);
        continue;
      }
      if (D % 32 == 0) {
        for (int64_t i = 0; i < pairs; i += 16) {
          const Vec<float> a = load_vector(from + i), b = load_vector(from + pairs + i);
          const Vec<float> cosine = load_vector(c + i), sine = load_vector(s + pairs + i);
          store_vector(kBack ? a * cosine + b * sine : a * cosine - b * sine, to + i);
          store_vector(kBack ? b * cosine - a * sine : b * cosine + a * sine, to + pairs + i);
        }
        continue;
      }
    }
    for (int64_t i = 0; i < pairs; ++i) {
      const A a = from[i], b = from[pairs + i], sine = kBack ? -s[pairs + i] : s[pairs + i];
      to[i] = a * c[i] - b * sine;
      to[pairs + i] = b * c[i] + a * sine;
    }
  }
}

// Stages chunk [t0, t0 + n) of head h: phi, rotated phi, values and the values before them.
template <class A>
void stage(Tile<A>& tile, const GatedRelaParams& p, const Span& span, int64_t b, int64_t h,
           int64_t t0, int n) {
  const int64_t Dp = tile.Dp, D = p.D;
  tile.n = n;
  load_keys(tile.phi_q, Dp, p.q, p.dtype, span, t0, n, h, D);
  load_keys(tile.phi_k, Dp, p.k, p.dtype, span, t0, n, h, D);
  map_features(tile.phi_q, n * Dp);
  map_features(tile.phi_k, n * Dp);
  if (D < Dp) {  // phi(0) is 1, but lanes behind D must stay 0
    for (int t = 0; t < n; ++t) {
      for (int64_t d = D; d < Dp; ++d) tile.phi_q[t * Dp + d] = tile.phi_k[t * Dp + d] = A(0);
    }
  }
  const int64_t position = (p.initial.position ? p.initial.position[b] : 0) + t0;
  fill_rotation(tile, p.inv_freq + h * D / 2, p.step_rotation + h * kChunk * D, position);
  rotate_rows<false>(tile, tile.phi_q, tile.rot_q);
  rotate_rows<false>(tile, tile.phi_k, tile.rot_k);
  load_past_values(tile, p, span, b, t0, h);
  load_rows(tile.values + (p.W - 1) * Dp, Dp, p.v, p.dtype, span, t0, n, h, D);
}

// den_t = phi(q_t) . (z + phi(k_0) + ... + phi(k_t)) + eps * n_t; z moves on.
template <class A>
void normalise(Tile<A>& tile, int64_t first_count, double eps) {
  using V = Vec<A>;
  const int64_t nv = tile.Dp / kLanes<A>;
  V* recent = reinterpret_cast<V*>(tile.state.k_sum);
  const V* base = reinterpret_cast<const V*>(tile.state.k_sum_base);
  for (int t = 0; t < tile.n; ++t) {
    const V* key = reinterpret_cast<const V*>(tile.phi_k + t * tile.Dp);
    const V* query = reinterpret_cast<const V*>(tile.phi_q + t * tile.Dp);
    V dot = {};
    for (int64_t m = 0; m < nv; ++m) {
      recent[m] += key[m];
      dot += query[m] * (base[m] + recent[m]);
    }
    tile.den[t] = sum_lanes(dot) + A(eps * double(first_count + t));
  }
}

// Pre-activation of the rank augmentation: bias + sum_j weight_j * v_{t-W+1+j}.
template <class A>
void convolve(Tile<A>& tile) {
  using V = Vec<A>;
  const int64_t nv = tile.Dp / kLanes<A>;
  const V* bias = reinterpret_cast<const V*>(tile.bias);
  const V* weight = reinterpret_cast<const V*>(tile.weight);
  const V* values = reinterpret_cast<const V*>(tile.values);
  V* to = reinterpret_cast<V*>(tile.augmented);
  for (int t = 0; t < tile.n; ++t) {
    for (int64_t m = 0; m < nv; ++m) {
      V sum = bias[m];
      for (int64_t j = 0; j < tile.W; ++j) sum += weight[j * nv + m] * values[(t + j) * nv + m];
      to[t * nv + m] = sum;
    }
  }
}

// num becomes o = num / den.
template <class A>
void divide(Tile<A>& tile) {
  using V = Vec<A>;
  const int64_t nv = tile.Dp / kLanes<A>;
  V* rows = reinterpret_cast<V*>(tile.num);
  for (int t = 0; t < tile.n; ++t) {
    const A scale = A(1) / tile.den[t];
    for (int64_t m = 0; m < nv; ++m) rows[t * nv + m] *= scale;
  }
}
