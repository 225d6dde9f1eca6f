// The running sums of linear attention, S [D, D] and z [D], and the loop that moves them. Included
// by every level file.
//
// A float32 sum that has grown large rounds every further item away: after 4,000 items the error is
// 50 units in the last place. So the last few hundred items have a sum of their own, which starts
// at zero and is added to the rest as a whole.

constexpr int kRecentItems = 256;  // multiple of kChunk

template <class A>
struct RunningState {
  A *kv, *k_sum;            // [Dp, Dp], [Dp]: of the recent items
  A *kv_base, *k_sum_base;  // of those before
  bool has_base;
  int recent;
};

template <class A>
void lay_out(RunningState<A>& s, Scratch& scratch, int64_t Dp) {
  s.kv = scratch.take<A>(Dp * Dp);
  s.k_sum = scratch.take<A>(Dp);
  s.kv_base = scratch.take<A>(Dp * Dp);
  s.k_sum_base = scratch.take<A>(Dp);
}

template <class A>
void clear(RunningState<A>& s, int64_t Dp) {
  __builtin_memset(s.kv, 0, std::size_t(Dp * Dp) * sizeof(A));
  __builtin_memset(s.k_sum, 0, std::size_t(Dp) * sizeof(A));
  __builtin_memset(s.kv_base, 0, std::size_t(Dp * Dp) * sizeof(A));
  __builtin_memset(s.k_sum_base, 0, std::size_t(Dp) * sizeof(A));
  s.has_base = false;
  s.recent = 0;
}

// n items have been added; from time to time the recent sums join the base.
template <class A>
void moved_on(RunningState<A>& s, int n, int64_t Dp) {
  s.recent += n;
  if (s.recent < kRecentItems) return;
  for (int64_t i = 0; i < Dp * Dp; ++i) {
    s.kv_base[i] += s.kv[i];
    s.kv[i] = A(0);
  }
  for (int64_t i = 0; i < Dp; ++i) {
    s.k_sum_base[i] += s.k_sum[i];
    s.k_sum[i] = A(0);
  }
  s.has_base = true;
  s.recent = 0;
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

// The whole of a running state.
template <class A>
void store_sum(RunningState<A>& s, const States& state, int64_t b, int64_t h, int64_t D,
               int64_t Dp) {
  for (int64_t i = 0; i < Dp * Dp; ++i) s.kv[i] += s.kv_base[i];
  for (int64_t i = 0; i < Dp; ++i) s.k_sum[i] += s.k_sum_base[i];
  store_state(s.kv, s.k_sum, state, b, h, D, Dp);
}

// The hot loop, used forward and, three times more, backward: for every item in turn
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

// out_t += base^T c_t for every item: the part of the sums that does not move.
template <class A, int kRows>
void add_base_fixed(const A* c, const A* base, A* out, int n) {
  using V = Vec<A>;
  V held[kRows];
  for (int i = 0; i < kRows; ++i) held[i] = reinterpret_cast<const V*>(base)[i];
  for (int t = 0; t < n; ++t) {
    const A* ct = c + t * kLanes<A>;
    V sums[4] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sums[i % 4] += ct[i] * held[i];
    reinterpret_cast<V*>(out)[t] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

template <class A>
void add_base(const A* c, const A* base, A* out, int n, int64_t D) {
  using V = Vec<A>;
  const int64_t nv = padded<A>(D) / kLanes<A>, Dp = nv * kLanes<A>;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (D <= 8) return add_base_fixed<A, 8>(c, base, out, n);
    if (D <= 16) return add_base_fixed<A, 16>(c, base, out, n);
  }
  constexpr int kItems = 8;  // items that share each row of the base
  for (int t0 = 0; t0 < n; t0 += kItems) {
    const int count = n - t0 < kItems ? n - t0 : kItems;
    for (int64_t m = 0; m < nv; ++m) {
      V sums[kItems] = {};
      for (int64_t i = 0; i < D; ++i) {
        const V row = reinterpret_cast<const V*>(base)[i * nv + m];
        for (int t = 0; t < kItems; ++t) sums[t] += c[(t0 + (t < count ? t : 0)) * Dp + i] * row;
      }
      for (int t = 0; t < count; ++t) reinterpret_cast<V*>(out)[(t0 + t) * nv + m] += sums[t];
    }
  }
}

// The scan over the recent sums, and what the base adds to it.
template <class A, bool kReverse>
void scan(const A* a, const A* b, const A* c, A* recent, const A* base, A* out, int n, int64_t D) {
  scan<A, kReverse>(a, b, c, recent, out, n, D);
  if (base != nullptr) add_base(c, base, out, n, D);
}
