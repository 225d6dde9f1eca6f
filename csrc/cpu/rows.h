// Scratch memory, and rows of q, k, v, gate, out and their gradients in and out of it. Included by
// every level file. A staged row has Dp = D rounded up to whole vectors; what lies behind D is 0.

template <class A>
RECGRELA_INLINE int64_t padded(int64_t D) {
  return (D + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Bump allocation of 64-byte aligned, zeroed scratch. The memory is sized by a dry run. Blocks of
// whole pages would lie on the same lines of the first-level cache, so each is followed by a gap.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}
  template <class A>
  A* take(int64_t count) {
    A* at = reinterpret_cast<A*>(base_ + used_);
    used_ += (count * int64_t(sizeof(A)) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    if (base_ != nullptr) __asan_poison_memory_region(base_ + used_, kGap);  // else nobody sees
#endif
    used_ += kGap;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kGap = 5 * 64;
  char* base_;
  int64_t used_ = 0;
};

// Runs body() on zeroed memory of the size that layout(scratch) asks for.
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

template <class A>
constexpr DType kNative = sizeof(A) == sizeof(double) ? DType::kDouble : DType::kFloat;

// Fetches rows that the next chunk will need: rows of one head lie apart, which the processor does
// not foresee well. Any address will do.
template <bool kWrite, class A>
RECGRELA_INLINE void prefetch_row(const A* row, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(A);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(row + d, kWrite, 2);
}

// n rows of one head, `stride` apart: the tensor's own memory, or a copy in scratch.
template <class A>
struct Source {
  const A* data;
  int64_t stride;
  RECGRELA_INLINE const A* row(int64_t t) const { return data + t * stride; }
};
template <class A>
struct Sink {
  A* data;
  int64_t stride;
  RECGRELA_INLINE A* row(int64_t t) const { return data + t * stride; }
};

template <bool kWrite, int kItems, class Rows>
RECGRELA_INLINE void prefetch_rows(const Rows& rows, int64_t t, int64_t D) {
  for (int s = 0; s < kItems; ++s) prefetch_row<kWrite>(rows.row(t + s), D);
}

// One row between storage and scratch.
template <class S, class A>
RECGRELA_INLINE void copy_row(const S* __restrict from, A* __restrict to, int64_t D) {
  int64_t d = 0;
  if constexpr (std::is_same_v<S, A>) {
    for (; d + kLanes<A> <= D; d += kLanes<A>) store_vector(load_vector(from + d), to + d);
    for (; d < D; ++d) to[d] = from[d];
  } else if constexpr (sizeof(S) < sizeof(A)) {
    for (; d < D; ++d) to[d] = widen(from[d]);
  } else {
    for (; d < D; ++d) narrow(from[d], to + d);
  }
}

// Rows t0 .. t0+n-1 of one head into dst [n, Dp].
template <class A>
RECGRELA_NOINLINE void load_rows(A* __restrict dst, int64_t Dp, const Rows& rows, DType dtype,
                                 const Span& span, int64_t t0, int n, int64_t h, int64_t D) {
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < n; ++t) {
      const S* __restrict from = row_at<const S>(rows, span, t0 + t, h);
      copy_row(from, dst + t * Dp, D);
    }
  });
}

template <class A>
RECGRELA_NOINLINE void store_rows(const A* __restrict src, int64_t Dp, const Rows& rows,
                                  DType dtype, const Span& span, int64_t t0, int n, int64_t h,
                                  int64_t D) {
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < n; ++t) {
      copy_row(src + t * Dp, row_at<S>(rows, span, t0 + t, h), D);
    }
  });
}

// The rows in place where they are whole vectors of A, else copied to `copy`.
template <class A>
Source<A> read_rows(A* copy, int64_t Dp, const Rows& rows, DType dtype, const Span& span,
                    int64_t t0, int n, int64_t h, int64_t D) {
  if (dtype == kNative<A> && D == Dp) return {row_at<const A>(rows, span, t0, h), rows.item_stride};
  load_rows(copy, Dp, rows, dtype, span, t0, n, h, D);
  return {copy, Dp};
}

// Where to write rows: in place where they are whole vectors of A, else to `copy`, which
// finish_rows takes home.
template <class A>
Sink<A> open_rows(A* copy, int64_t Dp, const Rows& rows, DType dtype, const Span& span, int64_t t0,
                  int64_t h, int64_t D) {
  if (dtype == kNative<A> && D == Dp) return {row_at<A>(rows, span, t0, h), rows.item_stride};
  return {copy, Dp};
}
template <class A>
void finish_rows(const A* copy, const Sink<A>& sink, int64_t Dp, const Rows& rows, DType dtype,
                 const Span& span, int64_t t0, int n, int64_t h, int64_t D) {
  if (sink.data == copy) store_rows(copy, Dp, rows, dtype, span, t0, n, h, D);
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
