// Scratch memory, and rows of q, k, v, gate, out and their gradients in and out of it. Included by
// every level file. A staged row has Dp = D rounded up to whole vectors, zeros behind D.
//
// Keys are staged with the even members of the rotary pairs first, then the odd ones: the products
// q.k do not care, and the rotation becomes two plain half-row loops. States use the same key
// order.

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
