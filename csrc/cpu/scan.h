// The hot loop of linear attention, used once forward and three times more backward. Included by
// every level file. For every item in turn:
//   state += a_t b_t^T   and, with kOut,   out_t = (base + state)^T c_t
// state, base [rows, Dp]; a, c [n, rows]; b, out [n, Dp]. base does not move and may be nullptr: 0.
// A few items pass over the state together, one block of its columns at a time, so that a row is
// loaded and stored once for all of them; the sums' order is that of one item after the other.

// Items and vectors of columns that share a pass: what the registers hold.
constexpr bool kManyRegisters = RECGRELA_VECTOR_BYTES == 64;
constexpr int kPassItems = kManyRegisters ? 4 : 2;

template <class A, int kColumns, int kItems, bool kReverse, bool kOut, bool kBase>
RECGRELA_INLINE void scan_pass(const Source<A>& a, const Source<A>& b, const Source<A>& c, A* state,
                               const A* base, int64_t Dp, A* out, int64_t t0, int64_t column,
                               int64_t rows) {
  using V = Vec<A>;
  V value[kItems][kColumns], sum[kItems][kColumns];
  const A *key[kItems], *query[kItems];
  for (int s = 0; s < kItems; ++s) {
    const int64_t t = kReverse ? t0 - s : t0 + s;
    key[s] = a.row(t);
    query[s] = c.row(t);
    for (int m = 0; m < kColumns; ++m) {
      value[s][m] = load_vector(b.row(t) + column + m * kLanes<A>);
      sum[s][m] = V{};
    }
  }
  A* at = state + column;
  for (int64_t i = 0; i < rows; ++i, at += Dp) {
    V row[kColumns], still[kColumns];
    for (int m = 0; m < kColumns; ++m) {
      row[m] = load_vector(at + m * kLanes<A>);
      if (kBase) still[m] = load_vector(base + column + i * Dp + m * kLanes<A>);
    }
    for (int s = 0; s < kItems; ++s) {
      for (int m = 0; m < kColumns; ++m) {
        row[m] += key[s][i] * value[s][m];
        if (kOut) sum[s][m] += query[s][i] * (kBase ? row[m] + still[m] : row[m]);
      }
    }
    for (int m = 0; m < kColumns; ++m) store_vector(row[m], at + m * kLanes<A>);
  }
  for (int s = 0; kOut && s < kItems; ++s) {
    const int64_t t = kReverse ? t0 - s : t0 + s;
    for (int m = 0; m < kColumns; ++m) {
      store_vector(sum[s][m], out + t * Dp + column + m * kLanes<A>);
    }
  }
}

template <class A, int kColumns, bool kReverse, bool kOut, bool kBase>
RECGRELA_NOINLINE void scan_columns(const Source<A>& a, const Source<A>& b, const Source<A>& c,
                                    A* state, const A* base, int64_t Dp, A* out, int64_t first,
                                    int64_t count, int64_t column, int64_t rows) {
  const auto pass = [&](int64_t done, auto items) RECGRELA_INLINE_LAMBDA {
    const int64_t t0 = kReverse ? first - done : first + done;
    scan_pass<A, kColumns, items.value, kReverse, kOut, kBase>(a, b, c, state, base, Dp, out, t0,
                                                               column, rows);
  };
  int64_t done = 0;
  for (; done + kPassItems <= count; done += kPassItems) {
    pass(done, std::integral_constant<int, kPassItems>{});
  }
  for (; done < count; ++done) pass(done, std::integral_constant<int, 1>{});
}

// Items that go through all columns before the next ones: their rows stay in the first-level cache.
RECGRELA_INLINE int64_t scan_items(int64_t Dp) { return Dp <= 16 ? kChunk : Dp <= 32 ? 32 : 16; }

template <bool kReverse, bool kOut, bool kBase, class A>
void scan_all(Source<A> a, Source<A> b, Source<A> c, A* state, const A* base, A* out, int64_t n,
              int64_t D, int64_t Dp) {
  constexpr int64_t kWide = 2 * kLanes<A>;
  const int64_t together = scan_items(Dp);
  for (int64_t done = 0; done < n; done += together) {
    const int64_t count = n - done < together ? n - done : together;
    const int64_t first = kReverse ? n - 1 - done : done;
    int64_t column = 0;
    for (; column + kWide <= Dp; column += kWide) {
      scan_columns<A, 2, kReverse, kOut, kBase>(a, b, c, state, base, Dp, out, first, count, column,
                                                D);
    }
    if (column < Dp) {
      scan_columns<A, 1, kReverse, kOut, kBase>(a, b, c, state, base, Dp, out, first, count, column,
                                                D);
    }
  }
}

template <bool kReverse, bool kOut = true, class A>
void scan(Source<A> a, Source<A> b, Source<A> c, A* state, std::type_identity_t<const A*> base,
          A* out, int64_t n, int64_t D, int64_t Dp) {
  if constexpr (kOut) {
    if (base) return scan_all<kReverse, true, true>(a, b, c, state, base, out, n, D, Dp);
  }
  scan_all<kReverse, kOut, false>(a, b, c, state, base, out, n, D, Dp);
}
