// activation_dropout: [residual +] dropout(act(x)) and its gradient, one pass each, the mask made
// anew from (seed, index) both times. Included by every level file.

// One 32-bit word per lane of A.
template <class A>
struct WordsOf;
template <>
struct WordsOf<float> {
  typedef uint32_t type __attribute__((vector_size(RECGRELA_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(RECGRELA_VECTOR_BYTES)));
  typedef int32_t wide __attribute__((vector_size(RECGRELA_VECTOR_BYTES)));
};
template <>
struct WordsOf<double> {
  typedef uint32_t type __attribute__((vector_size(RECGRELA_VECTOR_BYTES / 2)));
  typedef int32_t mask __attribute__((vector_size(RECGRELA_VECTOR_BYTES / 2)));
  typedef int64_t wide __attribute__((vector_size(RECGRELA_VECTOR_BYTES)));
};

// The finaliser of splitmix64 (Steele, Lea and Flood 2014).
RECGRELA_INLINE uint64_t mix_bits(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// What dropout multiplies the elements of one block with, 0 or the scale, a vector at a time. Each
// block has two keys of its own; inside it a word of index i is hashed by two multiplications.
template <class A>
class Factors {
  using Words = typename WordsOf<A>::type;
  using Mask = typename WordsOf<A>::mask;
  using Wide = typename WordsOf<A>::wide;

 public:
  RECGRELA_INLINE Factors(const ActivationDropoutParams& p, int64_t block)
      : threshold_(int32_t(p.dropped ^ 0x80000000u)), scale_(splat(A(p.scale))) {
    const uint64_t key = mix_bits(mix_bits(p.seed) + uint64_t(block));
    key_ = uint32_t(key >> 32);
    for (int i = 0; i < kLanes<A>; ++i) words_[i] = uint32_t(key) + uint32_t(i) * kStep;
  }

  RECGRELA_INLINE Vec<A> next() {
    Words w = words_;
    words_ += uint32_t(kLanes<A>) * kStep;
    w = (w ^ (w >> 16)) * 0x7feb352du;
    w = (w ^ (w >> 15) ^ key_) * 0x846ca68bu;  // its high bits decide
    const Mask dropped = reinterpret_cast<Mask>(w) < threshold_;
    return reinterpret_cast<Vec<A>>(~__builtin_convertvector(dropped, Wide) &
                                    reinterpret_cast<Wide>(scale_));
  }

 private:
  static constexpr uint32_t kStep = 0x9e3779b9u;
  Words words_;
  uint32_t key_;
  int32_t threshold_;
  Vec<A> scale_;
};

constexpr int64_t kStaged = 64;  // elements at a time of what is no float or double, or no vector

// to[i] = f(first[i], second[i]) in order; f never uses `second` where it is null.
template <class A, class S, class F>
RECGRELA_INLINE void map_pairs(const S* first, const S* second, S* to, int64_t count, F&& f) {
  alignas(64) A a[kStaged] = {}, b[kStaged] = {}, c[kStaged];
  for (int64_t i = 0; i < count; i += kStaged) {
    const int64_t n = count - i < kStaged ? count - i : kStaged;
    const A *x = a, *y = b;
    A* out = c;
    const bool direct = std::is_same_v<S, A> && n == kStaged;
    if constexpr (std::is_same_v<S, A>) {
      if (direct) {
        x = first + i;
        y = second == nullptr ? b : second + i;
        out = to + i;
      }
    }
    if (!direct) {
      copy_row(first + i, a, n);
      if (second != nullptr) copy_row(second + i, b, n);
    }
    for (int64_t j = 0; j < kStaged; j += kLanes<A>) {
      store_vector(f(load_vector(x + j), load_vector(y + j)), out + j);
    }
    if (!direct) copy_row(c, to + i, n);
  }
}

template <class A, class S>
RECGRELA_NOINLINE void activate_block(const ActivationDropoutParams& p, const S* x,
                                      const S* residual, S* out, int64_t block, int64_t count) {
  Factors<A> factors(p, block);
  const bool add = residual != nullptr;  // a sum with 0 would change the sign of -0
  if (p.gelu) {
    map_pairs<A>(x, residual, out, count, [&](Vec<A> u, Vec<A> r) {
      const Vec<A> y = gelu<A>(u) * factors.next();
      return add ? y + r : y;
    });
  } else {
    map_pairs<A>(x, residual, out, count, [&](Vec<A> u, Vec<A> r) {
      const Vec<A> y = u * factors.next();
      return add ? y + r : y;
    });
  }
}

template <class A, class S>
RECGRELA_NOINLINE void differentiate_block(const ActivationDropoutParams& p, const S* grad,
                                           const S* x, S* out, int64_t block, int64_t count) {
  Factors<A> factors(p, block);
  if (p.gelu) {
    map_pairs<A>(grad, x, out, count,
                 [&](Vec<A> g, Vec<A> u) { return g * factors.next() * gelu_slope<A>(u); });
  } else {
    map_pairs<A>(grad, x, out, count, [&](Vec<A> g, Vec<A>) { return g * factors.next(); });
  }
}

// The blocks [begin, end): `first` and `second` are x and the residual, or the gradient and x.
template <class A, bool kBackward>
void dropout_range(const ActivationDropoutParams& p, int64_t begin, int64_t end) {
  with_storage<A>(p.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S *first = static_cast<const S*>(p.first), *second = static_cast<const S*>(p.second);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kDropoutBlock;
      const int64_t count = p.numel - at < kDropoutBlock ? p.numel - at : kDropoutBlock;
      const S* other = second == nullptr ? nullptr : second + at;
      S* out = static_cast<S*>(p.out) + at;
      if constexpr (kBackward) {
        differentiate_block<A, S>(p, first + at, other, out, block, count);
      } else {
        activate_block<A, S>(p, first + at, other, out, block, count);
      }
    }
  });
}

void activation_dropout(const ActivationDropoutParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    dropout_range<double, false>(p, begin, end);
  } else {
    dropout_range<float, false>(p, begin, end);
  }
}

void activation_dropout_backward(const ActivationDropoutParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    dropout_range<double, true>(p, begin, end);
  } else {
    dropout_range<float, true>(p, begin, end);
  }
}
