// feed_forward: [residual +] dropout(W2 dropout(GELU(W1 x + b1)) + b2) and its gradients, a tile of
// rows at a time, whose inner rows never leave the second-level cache. Included by every level
// file.

// The dropout of `count` elements from element `first` on, whole blocks but for the last.
template <class F>
RECGRELA_INLINE void for_dropout_blocks(int64_t first, int64_t count, F&& f) {
  for (int64_t i = 0; i < count; i += kDropoutBlock) {
    f((first + i) / kDropoutBlock, i, count - i < kDropoutBlock ? count - i : kDropoutBlock);
  }
}

RECGRELA_INLINE ActivationDropoutParams dropout_of(const FeedForwardParams& p, bool gelu) {
  ActivationDropoutParams d{};
  d.gelu = gelu;
  d.seed = gelu ? p.inner_seed : p.outer_seed;
  d.dropped = p.dropped;
  d.scale = p.scale;
  return d;
}

template <class A>
void feed_forward_tiles(const FeedForwardParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.width, M = p.inner;
  const ActivationDropoutParams inner = dropout_of(p, true), outer = dropout_of(p, false);
  A *own_pre, *active, *result;
  const auto layout = [&](Scratch& memory) {
    own_pre = memory.take<A>(p.pre ? 0 : kTileRows * M);
    active = memory.take<A>(kTileRows * M);
    result = memory.take<A>(kTileRows * C);
  };
  with_scratch(layout, [&] {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows;
      const int64_t rows = p.rows - first < kTileRows ? p.rows - first : kTileRows;
      A* pre = p.pre ? static_cast<A*>(p.pre) + first * M : own_pre;
      multiply_rows(pre, rows, M, static_cast<const A*>(p.x) + first * C, C, C,
                    static_cast<const A*>(p.first_panels), static_cast<const A*>(p.first_bias));
      for_dropout_blocks(first * M, rows * M, [&](int64_t block, int64_t at, int64_t count) {
        activate_block<A, A>(inner, pre + at, nullptr, active + at, block, count);
      });
      multiply_rows(result, rows, C, active, M, M, static_cast<const A*>(p.second_panels),
                    static_cast<const A*>(p.second_bias));
      const A* residual = static_cast<const A*>(p.residual);
      A* out = static_cast<A*>(p.out) + first * C;
      for_dropout_blocks(first * C, rows * C, [&](int64_t block, int64_t at, int64_t count) {
        activate_block<A, A>(outer, result + at, residual ? residual + first * C + at : nullptr,
                             out + at, block, count);
      });
    }
  });
}

// From pre and the gradient of the dropped activation: that activation and, in place, the gradient
// of pre.
template <class A>
RECGRELA_NOINLINE void differentiate_inner_block(const ActivationDropoutParams& p, const A* pre,
                                                 A* grad, A* active, int64_t block, int64_t count) {
  Factors<A> factors(p, block);
  const Vec<A> highest = splat(kNormalEnd<A>);
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const Vec<A> x = larger(-highest, load_vector(pre + i)), inside = smaller(highest, x);
    const Normal<A> normal = normal_at(inside);
    const Vec<A> factor = factors.next();
    store_vector(x * normal.share * factor, active + i);
    const Vec<A> slope = normal.share + inside * normal.density;
    store_vector(load_vector(grad + i) * factor * slope, grad + i);
  }
}

// Groups of tiles, each with weight gradients of its own: W1 [M, C], W2 transposed [M, C], b1, b2.
template <class A>
void feed_forward_groups(const FeedForwardParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.width, M = p.inner, part = 2 * M * C + M + C;
  const ActivationDropoutParams inner = dropout_of(p, true), outer = dropout_of(p, false);
  A *branch, *grad, *active;
  const auto layout = [&](Scratch& memory) {
    branch = memory.take<A>(kTileRows * C);
    grad = memory.take<A>(kTileRows * M);
    active = memory.take<A>(kTileRows * M);
  };
  with_scratch(layout, [&] {
    for (int64_t group = begin; group < end; ++group) {
      A* sums = static_cast<A*>(p.partial) + group * part;
      for (int64_t i = 0; i < part; ++i) sums[i] = A(0);
      const int64_t last = (group + 1) * p.group_tiles * kTileRows;
      const int64_t stop = last < p.rows ? last : p.rows;
      for (int64_t first = group * p.group_tiles * kTileRows; first < stop; first += kTileRows) {
        const int64_t rows = stop - first < kTileRows ? stop - first : kTileRows;
        const A* grad_out = static_cast<const A*>(p.grad_out) + first * C;
        for_dropout_blocks(first * C, rows * C, [&](int64_t block, int64_t at, int64_t count) {
          differentiate_block<A, A>(outer, grad_out + at, nullptr, branch + at, block, count);
        });
        multiply_rows<A>(grad, rows, M, branch, C, C, static_cast<const A*>(p.second_panels),
                         nullptr);
        const A* pre = static_cast<const A*>(p.pre) + first * M;
        for_dropout_blocks(first * M, rows * M, [&](int64_t block, int64_t at, int64_t count) {
          differentiate_inner_block(inner, pre + at, grad + at, active + at, block, count);
        });
        multiply_rows<A>(static_cast<A*>(p.out) + first * C, rows, C, grad, M, M,
                         static_cast<const A*>(p.first_panels), nullptr);
        add_outer_products(sums, rows, grad, M, static_cast<const A*>(p.x) + first * C, C);
        add_outer_products(sums + M * C, rows, active, M, branch, C);
        add_rows(sums + 2 * M * C, grad, rows, M);
        add_rows(sums + 2 * M * C + M, branch, rows, C);
      }
    }
  });
}

// The panels of both weights, W1 [M, C] and W2 [C, M]: transposed forward, as they are backward.
template <class A>
void pack_weights(const FeedForwardParams& p, bool backward, void* first, void* second) {
  const int64_t C = p.width, M = p.inner;
  const A *w1 = static_cast<const A*>(p.first_weight), *w2 = static_cast<const A*>(p.second_weight);
  if (backward) {
    pack_panels(w1, C, 1, M, C, static_cast<A*>(first));
    pack_panels(w2, M, 1, C, M, static_cast<A*>(second));
  } else {
    pack_panels(w1, 1, C, C, M, static_cast<A*>(first));
    pack_panels(w2, 1, M, M, C, static_cast<A*>(second));
  }
}

inline void feed_forward_pack(const FeedForwardParams& p, bool backward, void* first,
                              void* second) {
  p.is_double ? pack_weights<double>(p, backward, first, second)
              : pack_weights<float>(p, backward, first, second);
}
inline void feed_forward(const FeedForwardParams& p, int64_t begin, int64_t end) {
  p.is_double ? feed_forward_tiles<double>(p, begin, end)
              : feed_forward_tiles<float>(p, begin, end);
}
inline void feed_forward_backward(const FeedForwardParams& p, int64_t begin, int64_t end) {
  p.is_double ? feed_forward_groups<double>(p, begin, end)
              : feed_forward_groups<float>(p, begin, end);
}
