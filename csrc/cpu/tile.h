// What forward and backward share: one (sequence, head), a chunk of at most kChunk items at a time,
// staged as rows of Dp = D rounded up to whole vectors, zeros behind D. Included by every level
// file.
//
// Keys are staged with the even members of the rotary pairs first, then the odd ones: the products
// q.k do not care, and the rotation becomes two plain half-row loops. States use the same key
// order.

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
  A *kv, *k_sum;       // [rows(D), Dp], [Dp]: the running state
  A *weight, *bias;    // [W, Dp], [Dp]
};

// Rows a square state needs: whole vectors of scalars, so that fixed-size loops may read them.
template <class A>
RECGRELA_INLINE int64_t padded(int64_t D) {
  return (D + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Bump allocation of 64-byte aligned, zeroed scratch. The vector is sized by a dry run.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}
  template <class A>
  A* take(int64_t count) {
    A* at = reinterpret_cast<A*>(base_ + used_);
    used_ += (count * int64_t(sizeof(A)) + 63) / 64 * 64;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Runs body(scratch) on zeroed memory of the size that layout(scratch) asks for.
template <class Layout, class Body>
void with_scratch(Layout&& layout, Body&& body) {
  Scratch dry(nullptr);
  layout(dry);
  const std::size_t bytes = std::size_t(dry.used());
  char* memory = static_cast<char*>(std::aligned_alloc(64, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  __builtin_memset(memory, 0, bytes);
  Scratch real(memory);
  layout(real);
  body();
  std::free(memory);
}

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
  tile.kv = scratch.take<A>(tile.Dp * tile.Dp);
  tile.k_sum = scratch.take<A>(tile.Dp);
  tile.weight = scratch.take<A>(tile.W * tile.Dp);
  tile.bias = scratch.take<A>(tile.Dp);
}

// Where one sequence's rows lie.
struct Span {
  int64_t batch, start, length;  // start: first item along item_stride
};

RECGRELA_INLINE Span span_of(const GatedRelaParams& p, int64_t b) {
  if (p.cu_seqlens) return {0, p.cu_seqlens[b], p.cu_seqlens[b + 1] - p.cu_seqlens[b]};
  return {b, 0, p.lengths ? p.lengths[b] : p.L};
}

template <class S>
RECGRELA_INLINE S* row_at(const Rows& rows, const Span& span, int64_t t, int64_t h) {
  return static_cast<S*>(rows.data) + span.batch * rows.batch_stride +
         (span.start + t) * rows.item_stride + h * rows.head_stride;
}

// rows t0 .. t0+n-1 of one head into dst [n, Dp], dims in their natural order.
template <class A>
void load_rows(A* __restrict dst, int64_t Dp, const Rows& rows, DType dtype, const Span& span,
               int64_t t0, int n, int64_t h, int64_t D) {
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < n; ++t) {
      const S* __restrict from = row_at<const S>(rows, span, t0 + t, h);
      if (std::is_same_v<S, A> && D % kLanes<A> == 0) {
        for (int64_t d = 0; d < D; d += kLanes<A>) {
          store_vector(load_vector(reinterpret_cast<const A*>(from) + d), dst + t * Dp + d);
        }
      } else {
        for (int64_t d = 0; d < D; ++d) dst[t * Dp + d] = widen(from[d]);
      }
    }
  });
}

// The same for rows in key order: even members of the pairs first.
template <class A>
void load_keys(A* __restrict dst, int64_t Dp, const Rows& rows, DType dtype, const Span& span,
               int64_t t0, int n, int64_t h, int64_t D) {
  const int64_t pairs = D / 2;
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < n; ++t) {
      const S* __restrict from = row_at<const S>(rows, span, t0 + t, h);
      A* __restrict even = dst + t * Dp;
      A* __restrict odd = even + pairs;
      if constexpr (std::is_same_v<S, float>) {
        if (D == 16) {
          store_vector(split_pairs(load_vector(from)), even);
          continue;
        }
        if (D % 32 == 0) {
          for (int64_t i = 0; i < pairs; i += 16) {
            const Vec<float> x = load_vector(from + 2 * i), y = load_vector(from + 2 * i + 16);
            store_vector(even_lanes(x, y), even + i);
            store_vector(odd_lanes(x, y), odd + i);
          }
          continue;
        }
      }
      for (int64_t i = 0; i < pairs; ++i) {
        even[i] = widen(from[2 * i]);
        odd[i] = widen(from[2 * i + 1]);
      }
    }
  });
}

template <class A>
void store_rows(const A* __restrict src, int64_t Dp, const Rows& rows, DType dtype,
                const Span& span, int64_t t0, int n, int64_t h, int64_t D) {
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < n; ++t) {
      S* __restrict to = row_at<S>(rows, span, t0 + t, h);
      if (std::is_same_v<S, A> && D % kLanes<A> == 0) {
        for (int64_t d = 0; d < D; d += kLanes<A>) {
          store_vector(load_vector(src + t * Dp + d), reinterpret_cast<A*>(to) + d);
        }
      } else {
        for (int64_t d = 0; d < D; ++d) narrow(src[t * Dp + d], to + d);
      }
    }
  });
}

template <class A>
void store_keys(const A* __restrict src, int64_t Dp, const Rows& rows, DType dtype,
                const Span& span, int64_t t0, int n, int64_t h, int64_t D) {
  const int64_t pairs = D / 2;
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < n; ++t) {
      S* __restrict to = row_at<S>(rows, span, t0 + t, h);
      const A* __restrict even = src + t * Dp;
      const A* __restrict odd = even + pairs;
      if constexpr (std::is_same_v<S, float>) {
        if (D == 16) {
          store_vector(join_pairs(load_vector(even)), to);
          continue;
        }
        if (D % 32 == 0) {
          for (int64_t i = 0; i < pairs; i += 16) {
            const Vec<float> x = load_vector(even + i), y = load_vector(odd + i);
            store_vector(interleave_low(x, y), to + 2 * i);
            store_vector(interleave_high(x, y), to + 2 * i + 16);
          }
          continue;
        }
      }
      for (int64_t i = 0; i < pairs; ++i) {
        narrow(even[i], to + 2 * i);
        narrow(odd[i], to + 2 * i + 1);
      }
    }
  });
}

// Padding rows t0 .. L-1 of an output or gradient: exactly zero.
template <class A>
void zero_rows(const Rows& rows, DType dtype, const Span& span, int64_t t0, int64_t L, int64_t h,
               int64_t D) {
  if (rows.data == nullptr) return;
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t t = t0; t < L; ++t) {
      __builtin_memset(row_at<S>(rows, span, t, h), 0, std::size_t(D) * sizeof(S));
    }
  });
}

// Row i of a state in key order is row key_of(i, D) in the natural order.
RECGRELA_INLINE int64_t key_of(int64_t i, int64_t D) {
  return i < D / 2 ? 2 * i : 2 * (i - D / 2) + 1;
}

// A user's state of head h into kv [Dp, Dp] and k_sum [Dp], in key order.
template <class A>
void load_state(A* kv, A* k_sum, const States& state, int64_t b, int64_t h, int64_t D, int64_t Dp) {
  const A* from = static_cast<const A*>(state.kv) + b * state.kv_stride + h * D * D;
  const A* sums = static_cast<const A*>(state.k_sum) + b * state.k_sum_stride + h * D;
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) kv[i * Dp + j] = from[key_of(i, D) * D + j];
    k_sum[i] = sums[key_of(i, D)];
  }
}

template <class A>
void store_state(const A* kv, const A* k_sum, const States& state, int64_t b, int64_t h, int64_t D,
                 int64_t Dp) {
  A* to = static_cast<A*>(state.kv) + b * state.kv_stride + h * D * D;
  A* sums = static_cast<A*>(state.k_sum) + b * state.k_sum_stride + h * D;
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) to[key_of(i, D) * D + j] = kv[i * Dp + j];
    sums[key_of(i, D)] = k_sum[i];
  }
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

// The one hot loop, used forward and, three times more, backward: for every item in turn
//   state += a_t b_t^T   and   out_t = state^T c_t
// state [rows, Dp]; a, b, c, out [n, Dp]; reverse walks the items from the last to the first.
template <class A, int NV, int kRows, bool kReverse>
void scan_fixed(const A* a, const A* b, const A* c, A* state, A* out, int n) {
  using V = Vec<A>;
  static_assert(NV == 1, "the state is held in registers");
  V held[kRows];
  V* rows = reinterpret_cast<V*>(state);
  for (int i = 0; i < kRows; ++i) held[i] = rows[i];
  for (int step = 0; step < n; ++step) {
    const int t = kReverse ? n - 1 - step : step;
    const V value = reinterpret_cast<const V*>(b)[t];
    const A* at = a + t * kLanes<A>;
    const A* ct = c + t * kLanes<A>;
    V sums[4] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      held[i] += at[i] * value;
      sums[i % 4] += ct[i] * held[i];
    }
    reinterpret_cast<V*>(out)[t] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  for (int i = 0; i < kRows; ++i) rows[i] = held[i];
}

template <class A, int NV, bool kReverse>
void scan_blocked(const A* a, const A* b, const A* c, A* state, A* out, int n, int64_t D,
                  int64_t vectors) {
  using V = Vec<A>;
  const int64_t nv = NV ? NV : vectors;
  const int64_t Dp = nv * kLanes<A>;
  V* rows = reinterpret_cast<V*>(state);
  for (int step = 0; step < n; ++step) {
    const int t = kReverse ? n - 1 - step : step;
    const V* value = reinterpret_cast<const V*>(b + t * Dp);
    V* to = reinterpret_cast<V*>(out + t * Dp);
    const A* at = a + t * Dp;
    const A* ct = c + t * Dp;
    if constexpr (NV > 0) {
      V sums[NV] = {};
      for (int64_t i = 0; i < D; ++i) {
        for (int m = 0; m < NV; ++m) {
          const V row = rows[i * NV + m] + at[i] * value[m];
          rows[i * NV + m] = row;
          sums[m] += ct[i] * row;
        }
      }
      for (int m = 0; m < NV; ++m) to[m] = sums[m];
    } else {
      for (int64_t m = 0; m < nv; ++m) {
        V sum = {};
        for (int64_t i = 0; i < D; ++i) {
          const V row = rows[i * nv + m] + at[i] * value[m];
          rows[i * nv + m] = row;
          sum += ct[i] * row;
        }
        to[m] = sum;
      }
    }
  }
}

template <class A, bool kReverse>
void scan(const A* a, const A* b, const A* c, A* state, A* out, int n, int64_t D) {
  const int64_t vectors = padded<A>(D) / kLanes<A>;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (D <= 8) return scan_fixed<A, 1, 8, kReverse>(a, b, c, state, out, n);
    if (D <= 16) return scan_fixed<A, 1, 16, kReverse>(a, b, c, state, out, n);
    if (vectors == 2) return scan_blocked<A, 2, kReverse>(a, b, c, state, out, n, D, 2);
    if (vectors == 4) return scan_blocked<A, 4, kReverse>(a, b, c, state, out, n, D, 4);
    if (vectors == 8) return scan_blocked<A, 8, kReverse>(a, b, c, state, out, n, D, 8);
  }
  scan_blocked<A, 0, kReverse>(a, b, c, state, out, n, D, vectors);
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

// den_t = phi(q_t) . (k_sum + phi(k_0) + ... + phi(k_t)) + eps * n_t; k_sum moves on.
template <class A>
void normalise(Tile<A>& tile, int64_t first_count, double eps) {
  using V = Vec<A>;
  const int64_t nv = tile.Dp / kLanes<A>;
  V* sums = reinterpret_cast<V*>(tile.k_sum);
  for (int t = 0; t < tile.n; ++t) {
    const V* key = reinterpret_cast<const V*>(tile.phi_k + t * tile.Dp);
    const V* query = reinterpret_cast<const V*>(tile.phi_q + t * tile.Dp);
    V dot = {};
    for (int64_t m = 0; m < nv; ++m) {
      sums[m] += key[m];
      dot += query[m] * sums[m];
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
