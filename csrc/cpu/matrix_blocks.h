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
