// One chunk of one sequence and head: phi, rotation, normaliser, and what the rank augmentation
// needs. Included by every level file.
//
// kN is the number of vectors in a row where the compiler should know it, else 0; kTail says that
// the last vector is not full. Rows in scratch are Dp long and 0 behind D.

template <class A>
struct Chunk {
  int n;          // items
  int64_t ahead;  // from an item to the same one of the next chunk to come
  int64_t D, Dp, W;
  A *q, *k;          // [kChunk, Dp]: copies of rows that cannot be read in place
  A *phi_q, *phi_k;  // [kChunk, Dp], backward only
  A *rot_q, *rot_k;  // [kChunk, Dp]
  A* value_rows;     // [W-1 + kChunk, Dp]: copies, where `values` cannot be in place
  Source<A> values;  // row t + W - 1 is v_t: the W - 1 values before the chunk come first
  A* num;            // [kChunk, Dp]
  A *den, *scale;    // [kChunk]: den + eps n, and 1 / that
  A* dots;           // [kChunk, lanes]: one vector to be summed for every item
  A* tail;           // [lanes]: 1 in the lanes that a row's last vector fills, else 0
  A *weight, *bias;  // [W, Dp], [Dp]
  RunningState<A> state;
  Rotation<A> rotation;
};

template <class A>
void lay_out(Chunk<A>& c, Scratch& scratch, const GatedRelaParams& p, bool backward) {
  c.D = p.D;
  c.Dp = padded<A>(p.D);
  c.W = p.W;
  c.ahead = backward ? -kChunk : kChunk;
  const int64_t rows = kChunk * c.Dp;
  for (A** at : {&c.q, &c.k, &c.rot_q, &c.rot_k, &c.num}) *at = scratch.take<A>(rows);
  c.phi_q = backward ? scratch.take<A>(rows) : nullptr;
  c.phi_k = backward ? scratch.take<A>(rows) : nullptr;
  c.value_rows = scratch.take<A>((c.W - 1) * c.Dp + rows);
  c.den = scratch.take<A>(kChunk);
  c.scale = scratch.take<A>(kChunk);
  c.dots = scratch.take<A>(kChunk * kLanes<A>);
  c.tail = scratch.take<A>(kLanes<A>);
  c.weight = scratch.take<A>(c.W * c.Dp);
  c.bias = scratch.take<A>(c.Dp);
  lay_out(c.state, scratch, c.Dp);
  lay_out(c.rotation, scratch, c.D, c.Dp);
}

// Once the scratch is there.
template <class A>
void prepare(Chunk<A>& c) {
  for (int64_t d = c.Dp - kLanes<A>; d < c.D; ++d) c.tail[d - (c.Dp - kLanes<A>)] = A(1);
}

// What depends on the head: conv_weight [H*D, W] as weight [W, Dp], and the frequencies.
template <class A>
void load_head(Chunk<A>& c, const GatedRelaParams& p, int64_t h) {
  load_head(c.rotation, p, h);
  if (p.conv_weight == nullptr) return;
  const A* weight = static_cast<const A*>(p.conv_weight) + h * p.D * p.W;
  const A* bias = static_cast<const A*>(p.conv_bias);
  for (int64_t d = 0; d < p.D; ++d) {
    for (int64_t j = 0; j < p.W; ++j) c.weight[j * c.Dp + d] = weight[d * p.W + j];
    c.bias[d] = bias ? bias[h * p.D + d] : A(0);
  }
}

// The W - 1 values before item t0, from the rows or, before the first item, from the state.
template <class A>
void load_past_values(Chunk<A>& c, const GatedRelaParams& p, const Span& span, int64_t b, int64_t h,
                      int64_t t0) {
  const int64_t past = p.W - 1;
  for (int64_t r = 0; r < past; ++r) {
    const int64_t t = t0 - past + r;
    A* row = c.value_rows + r * c.Dp;
    if (t >= 0) {
      load_rows(row, c.Dp, p.v, p.dtype, span, t, 1, h, p.D);
    } else if (p.initial.conv) {
      const A* from = static_cast<const A*>(p.initial.conv) + b * p.initial.conv_stride +
                      (past + t) * p.H * p.D + h * p.D;
      __builtin_memcpy(row, from, std::size_t(p.D) * sizeof(A));
    } else {
      clear(row, p.D);
    }
  }
}

// The chunk's values and those before it: in place where they are whole vectors of one sequence.
template <class A>
void read_values(Chunk<A>& c, const GatedRelaParams& p, const Span& span, int64_t b, int64_t h,
                 int64_t t0) {
  const int64_t past = p.W - 1;
  if (p.dtype == kNative<A> && c.D == c.Dp && t0 >= past) {
    c.values = {row_at<const A>(p.v, span, t0 - past, h), p.v.item_stride};
    return;
  }
  load_past_values(c, p, span, b, h, t0);
  load_rows(c.value_rows + past * c.Dp, c.Dp, p.v, p.dtype, span, t0, c.n, h, c.D);
  c.values = {c.value_rows, c.Dp};
}

// Items that take every step together.
constexpr int kTogether = RECGRELA_VECTOR_BYTES == 64 ? 2 : 1;

// Calls item_group(t, count) for all n items, count an integral constant.
template <class F>
RECGRELA_INLINE void in_groups(int n, F&& item_group) {
  int t = 0;
  for (; t + kTogether <= n; t += kTogether) {
    item_group(t, std::integral_constant<int, kTogether>{});
  }
  for (; t < n; ++t) item_group(t, std::integral_constant<int, 1>{});
}

// What map_keys does, for kItems items from t on. z moves along.
template <class A, int kN, bool kTail, bool kKeepPhi, int kItems>
RECGRELA_INLINE void map_items(const Chunk<A>& c, const Source<A>& q, const Source<A>& k, A* z,
                               int t) {
  constexpr int64_t L = kLanes<A>;
  const int64_t nv = kN ? kN : c.Dp / L, D = kN ? kN * L : c.D;
  prefetch_rows<false, kItems>(q, t + c.ahead, D);
  prefetch_rows<false, kItems>(k, t + c.ahead, D);
  prefetch_rows<false, kItems>(c.values, t + c.W - 1 + c.ahead, D);
  Vec<A> dot[kItems] = {};
  for (int64_t m = 0; m < nv; ++m) {
    // Queries, then keys.
    auto phi = feature_map<A>(pack_of<A, 2 * kItems>([&](int i) {
      return load_vector((i < kItems ? q.row(t + i) : k.row(t + i - kItems)) + m * L);
    }));
    if (kTail && m == nv - 1) {  // phi(0) is 1, but the lanes behind D must stay 0
      for (Vec<A>& x : phi.at) x *= load_vector(c.tail);
    }
    Vec<A> sum = load_vector(z + m * L);
    for (int s = 0; s < kItems; ++s) {
      const Vec<A> query = phi.at[s], key = phi.at[kItems + s];
      const int64_t at = ((t + s) * nv + m) * L;
      sum += key;
      dot[s] += query * (load_vector(c.state.k_sum_base + m * L) + sum);
      if (kKeepPhi) {
        store_vector(query, c.phi_q + at);
        store_vector(key, c.phi_k + at);
      }
      const Vec<A> cosine = load_vector(c.rotation.cosines + at);
      const Vec<A> sine = load_vector(c.rotation.sines + at);
      store_vector(rotated<false, A>(query, cosine, sine), c.rot_q + at);
      store_vector(rotated<false, A>(key, cosine, sine), c.rot_k + at);
    }
    store_vector(sum, z + m * L);
  }
  for (int s = 0; s < kItems; ++s) store_vector(dot[s], c.dots + (t + s) * L);
}

// phi of q and k, rotated; z moves on; scale_t = 1 / (phi(q_t) . z_t + eps n_t).
template <class A, int kN, bool kTail, bool kKeepPhi>
RECGRELA_NOINLINE void map_keys(const Chunk<A> c, const Source<A> q, const Source<A> k,
                                int64_t first_count, double eps) {
  in_groups(c.n, [&](int t, auto count) RECGRELA_INLINE_LAMBDA {
    map_items<A, kN, kTail, kKeepPhi, count.value>(c, q, k, c.state.k_sum, t);
  });
  sum_each(c.dots, c.den, c.n);
  for (int t = 0; t < c.n; ++t) {
    c.den[t] += A(eps * double(first_count + t));
    c.scale[t] = A(1) / c.den[t];
  }
}

// Pre-activation of the rank augmentation at item t: bias + sum_j weight_j * v_{t-W+1+j}; and at
// the items behind it.
template <class A, int kW, int kItems>
RECGRELA_INLINE Pack<A, kItems> convolved(const Chunk<A>& c, int64_t nv, int64_t t, int64_t m) {
  constexpr int64_t L = kLanes<A>;
  const int64_t W = kW ? kW : c.W;
  auto sum = pack_of<A, kItems>([&](int) { return load_vector(c.bias + m * L); });
  for (int64_t j = 0; j < W; ++j) {
    const Vec<A> weight = load_vector(c.weight + (j * nv + m) * L);
    for (int s = 0; s < kItems; ++s) {
      sum.at[s] += weight * load_vector(c.values.row(t + s + j) + m * L);
    }
  }
  return sum;
}

// A number of every item, from t on.
template <class A, int kItems>
RECGRELA_INLINE Pack<A, kItems> spread(const A* numbers, int64_t t) {
  return pack_of<A, kItems>([&](int s) { return splat(numbers[t + s]); });
}
// Vector m of every item's row, from t on.
template <class A, int kItems, class Rows>
RECGRELA_INLINE Pack<A, kItems> load_pack(const Rows& rows, int64_t t, int64_t m) {
  return pack_of<A, kItems>([&](int s) { return load_vector(rows.row(t + s) + m * kLanes<A>); });
}
template <class A, int kItems, class Rows>
RECGRELA_INLINE void store_pack(const Pack<A, kItems>& x, const Rows& rows, int64_t t, int64_t m) {
  for (int s = 0; s < kItems; ++s) store_vector(x.at[s], rows.row(t + s) + m * kLanes<A>);
}

template <class A>
Source<A> values_of(const Chunk<A>& c) {
  return {c.values.row(c.W - 1), c.values.stride};
}
template <class A>
Source<A> rows_of(const A* rows, const Chunk<A>& c) {
  return {rows, c.Dp};
}

// Calls f with the row width that the compiler shall know: f(kN, kTail) as integral constants.
template <class A, class F>
RECGRELA_INLINE void with_width(int64_t D, F&& f) {
  const int64_t nv = padded<A>(D) / kLanes<A>;
  const bool whole = D == padded<A>(D);
  using std::integral_constant;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (nv == 1 && whole) return f(integral_constant<int, 1>{}, std::false_type{});
    if (nv == 2 && whole) return f(integral_constant<int, 2>{}, std::false_type{});
    if (nv == 4 && whole) return f(integral_constant<int, 4>{}, std::false_type{});
    if (nv == 8 && whole) return f(integral_constant<int, 8>{}, std::false_type{});
  }
  f(integral_constant<int, 0>{}, std::true_type{});
}
