// Blocks of a matrix product whose sums stay in registers. Included by every level file.

// Registers for sums: rows x vectors of them, beside one row of b and a spread element of a.
constexpr int kSumRows = 6, kSumVectors = RECGRELA_VECTOR_BYTES == 64 ? 4 : 2;

// sums[r] += sum over k of a[r * a_row + k * a_step] * b[k * b_row ...], k in order.
template <int kRows, int kVectors, class A>
RECGRELA_INLINE void add_products(Vec<A> (&sums)[kRows][kVectors], const A* a, int64_t a_row,
                                  int64_t a_step, const A* b, int64_t b_row, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> from[kVectors];
    for (int v = 0; v < kVectors; ++v) from[v] = load_vector(b + k * b_row + v * kLanes<A>);
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> x = splat(a[r * a_row + k * a_step]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += x * from[v];
    }
  }
}

// Calls f with the constant min(count, kMost), count >= 1.
template <int kMost, class F>
RECGRELA_INLINE void with_constant(int64_t count, F&& f) {
  if constexpr (kMost == 1) {
    f(std::integral_constant<int, 1>{});
  } else if (count >= kMost) {
    f(std::integral_constant<int, kMost>{});
  } else {
    with_constant<kMost - 1>(count, f);
  }
}

// Calls f(first column, constant number of vectors) for panels that cover `columns`, whole vectors.
template <class A, class F>
RECGRELA_INLINE void for_panels(int64_t columns, F&& f) {
  int64_t c = 0;
  const auto take = [&](auto vectors) {
    for (; c + vectors() * kLanes<A> <= columns; c += vectors() * kLanes<A>) f(c, vectors);
  };
  if constexpr (kSumVectors == 4) take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

constexpr int64_t kDepth = 64;  // rows of b that stay in the first-level cache

// b [depth, columns] as multiply_rows reads it: panel after panel, each [depth, its columns].
// Element (k, c) lies at from[k * row + c * column].
template <class A>
void pack_panels(const A* from, int64_t row, int64_t column, int64_t depth, int64_t columns,
                 A* to) {
  for_panels<A>(columns, [&](int64_t c, auto vectors) {
    constexpr int64_t kWidth = vectors() * kLanes<A>;
    A* panel = to + c * depth;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < kWidth; ++j) panel[k * kWidth + j] = from[k * row + (c + j) * column];
    }
  });
}

// to [rows, columns] = [bias +] a [rows, depth] b, b in panels, a's rows a_row apart.
template <class A>
RECGRELA_NOINLINE void multiply_rows(A* to, int64_t rows, int64_t columns, const A* a,
                                     int64_t a_row, int64_t depth, const A* panels, const A* bias) {
  for_panels<A>(columns, [&](int64_t c, auto vectors) {
    constexpr int64_t kWidth = vectors() * kLanes<A>;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t count = depth - k < kDepth ? depth - k : kDepth;
      const A* b = panels + c * depth + k * kWidth;
      const A* start = bias == nullptr ? nullptr : bias + c;
      for (int64_t i = 0; i < rows;) {
        with_constant<kSumRows>(rows - i, [&](auto at_once) {
          Vec<A> sums[at_once()][vectors()];
          for (int r = 0; r < at_once(); ++r) {
            const A* before = k > 0 ? to + (i + r) * columns + c : start;
            for (int v = 0; v < vectors(); ++v) {
              sums[r][v] = before ? load_vector(before + v * kLanes<A>) : zero_vector<A>();
            }
          }
          add_products(sums, a + i * a_row + k, a_row, 1, b, kWidth, count);
          for (int r = 0; r < at_once(); ++r) {
            A* at = to + (i + r) * columns + c;
            for (int v = 0; v < vectors(); ++v) store_vector(sums[r][v], at + v * kLanes<A>);
          }
          i += at_once();
        });
      }
    }
  });
}

// to [a_columns, columns] += a^T b of `rows` rows, a [rows, a_columns], b [rows, columns].
template <class A>
RECGRELA_NOINLINE void add_outer_products(A* to, int64_t rows, const A* a, int64_t a_columns,
                                          const A* b, int64_t columns) {
  for (int64_t m = 0; m < a_columns;) {
    with_constant<kSumRows>(a_columns - m, [&](auto at_once) {
      for_panels<A>(columns, [&](int64_t c, auto vectors) {
        Vec<A> sums[at_once()][vectors()] = {};
        add_products(sums, a + m, 1, a_columns, b + c, columns, rows);
        for (int r = 0; r < at_once(); ++r) {
          A* at = to + (m + r) * columns + c;
          for (int v = 0; v < vectors(); ++v, at += kLanes<A>) {
            store_vector(load_vector(at) + sums[r][v], at);
          }
        }
      });
      m += at_once();
    });
  }
}

// to [columns] += the sum of `rows` rows.
template <class A>
void add_rows(A* to, const A* from, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    Vec<A> sum = load_vector(to + c);
    for (int64_t i = 0; i < rows; ++i) sum += load_vector(from + i * columns + c);
    store_vector(sum, to + c);
  }
}
