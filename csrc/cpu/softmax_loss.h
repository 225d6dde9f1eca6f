// softmax_loss: cross-entropy over all classes and its gradients, a tile of rows at a time. The
// scores of a tile are made, read for the largest, turned into exponentials and multiplied by the
// classes while they are in the second-level cache. Included by every level file.

constexpr int kScoreClasses = RECGRELA_VECTOR_BYTES == 64 ? 12 : 6;  // at once, times two vectors
constexpr int64_t kClassBlock = 64;  // classes whose exponentials are multiplied from the L1 cache

template <class A>
struct LossTile {
  A* scores;      // [classes, kLossRows], then exponentials
  A* transposed;  // hidden [width, kLossRows]
  A* gradient;    // [kLossRows, padded width]
  A *largest, *sum, *wanted;
  RecencyTile<A> recency;
};

// scores = classes . hidden, and the largest of every row.
template <class A>
RECGRELA_NOINLINE void score_tile(const SoftmaxLossParams& p, const LossTile<A>& tile) {
  const A* classes = static_cast<const A*>(p.class_rows);
  Vec<A> largest[2] = {splat(A(-INFINITY)), splat(A(-INFINITY))};
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end;) {
      with_constant<kScoreClasses>(end - j, [&](auto rows) {
        Vec<A> sums[rows()][2] = {};
        add_products(sums, classes + j * p.class_stride, p.class_stride, 1, tile.transposed,
                     kLossRows<A>, p.width);
        for (int r = 0; r < rows(); ++r) {
          for (int v = 0; v < 2; ++v) {
            largest[v] = larger(largest[v], sums[r][v]);
            store_vector(sums[r][v], tile.scores + (j + r) * kLossRows<A> + v * kLanes<A>);
          }
        }
        j += rows();
      });
    }
  };
  if (p.masked < 0) {
    range(0, p.classes);
  } else {
    range(0, p.masked);
    range(p.masked + 1, p.classes);
  }
  for (int v = 0; v < 2; ++v) store_vector(largest[v], tile.largest + v * kLanes<A>);
}

// Calls f(k, place of its score in the tile) for every bias of row i of the tile.
template <class A, class F>
RECGRELA_INLINE void for_bias(const SoftmaxLossParams& p, int64_t row, int64_t i, F&& f) {
  for (int64_t k = p.bias_offsets[row]; k < p.bias_offsets[row + 1]; ++k) {
    const int64_t j = p.bias_items[k] - p.first_class;
    const bool counts = j >= 0 && j < p.classes && j != p.masked;
    f(k, counts ? j * kLossRows<A> + i : -1);
  }
}

// Adds the bias of listed rows [first, first + rows) and finds the largest scores anew.
template <class A>
RECGRELA_NOINLINE void add_bias(const SoftmaxLossParams& p, LossTile<A>& tile, int64_t first,
                                int64_t rows) {
  if (p.span_begin) {
    add_recency_bias(p, tile.recency, tile.scores, first, rows);
  } else {
    const A* values = static_cast<const A*>(p.bias_values);
    for (int64_t i = 0; i < rows; ++i) {
      for_bias<A>(p, p.rows[first + i], i, [&](int64_t k, int64_t place) {
        if (place >= 0) tile.scores[place] += values[k];
      });
    }
  }
  Vec<A> largest[2] = {splat(A(-INFINITY)), splat(A(-INFINITY))};
  for (int64_t j = 0; j < p.classes; ++j) {
    if (j == p.masked) continue;
    for (int v = 0; v < 2; ++v) {
      const A* scores = tile.scores + j * kLossRows<A> + v * kLanes<A>;
      largest[v] = larger(largest[v], load_vector(scores));
    }
  }
  for (int v = 0; v < 2; ++v) store_vector(largest[v], tile.largest + v * kLanes<A>);
}

// exp of classes [begin, end) in place, added to the rows' sums; NaN stays NaN.
template <class A>
RECGRELA_NOINLINE void exp_block(const SoftmaxLossParams& p, const LossTile<A>& tile, int64_t begin,
                                 int64_t end) {
  Vec<A> largest[2], sum[2];
  for (int v = 0; v < 2; ++v) {
    largest[v] = load_vector(tile.largest + v * kLanes<A>);
    sum[v] = zero_vector<A>();
  }
  for (int64_t j = begin; j < end; ++j) {
    A* scores = tile.scores + j * kLossRows<A>;
    for (int v = 0; v < 2; ++v) {
      const Vec<A> below = load_vector(scores + v * kLanes<A>) - largest[v];
      const Vec<A> x = larger(splat(kLowest<A>), below);
      Vec<A> e = below > kLowest<A> ? exp_inside(x) : zero_vector<A>();
      e = j == p.masked ? zero_vector<A>() : e + (x - x);
      sum[v] += e;
      store_vector(e, scores + v * kLanes<A>);
    }
  }
  for (int v = 0; v < 2; ++v) {
    store_vector(load_vector(tile.sum + v * kLanes<A>) + sum[v], tile.sum + v * kLanes<A>);
  }
}

// gradient += exponentials of classes [begin, end) times these classes.
template <class A>
RECGRELA_NOINLINE void add_gradient_block(const SoftmaxLossParams& p, const LossTile<A>& tile,
                                          int64_t rows, int64_t begin, int64_t end) {
  const A* classes = static_cast<const A*>(p.class_rows) + begin * p.class_stride;
  for_panels<A>(p.class_stride, [&](int64_t c, auto vectors) {
    for (int64_t i = 0; i < rows;) {
      with_constant<kSumRows>(rows - i, [&](auto at_once) {
        Vec<A> sums[at_once()][vectors()] = {};
        add_products(sums, tile.scores + begin * kLossRows<A> + i, 1, kLossRows<A>, classes + c,
                     p.class_stride, end - begin);
        for (int r = 0; r < at_once(); ++r) {
          A* to = tile.gradient + (i + r) * p.class_stride + c;
          for (int v = 0; v < vectors(); ++v, to += kLanes<A>) {
            store_vector(load_vector(to) + sums[r][v], to);
          }
        }
        i += at_once();
      });
    }
  });
}

// Rows [first, first + rows) of the listed ones: loss, gradients of hidden and of the bias, and
// what class_gradients needs, the differences of probabilities and targets times the sum, and
// hidden over the sum.
template <class A>
void loss_tile(const SoftmaxLossParams& p, LossTile<A>& tile, int64_t first, int64_t rows) {
  const A *hidden = static_cast<const A*>(p.hidden), *classes = static_cast<const A*>(p.class_rows);
  for (int64_t i = 0; i < kLossRows<A>; ++i) {
    const A* from = hidden + p.rows[first + (i < rows ? i : 0)] * p.width;
    for (int64_t k = 0; k < p.width; ++k) tile.transposed[k * kLossRows<A> + i] = from[k];
    tile.sum[i] = A(0);
  }
  score_tile(p, tile);
  if (p.bias_values) add_bias(p, tile, first, rows);
  for (int64_t i = 0; i < rows; ++i) {
    tile.wanted[i] = tile.scores[p.targets[first + i] * kLossRows<A> + i];
  }
  for (int64_t i = 0; i < rows * p.class_stride; ++i) tile.gradient[i] = A(0);
  for (int64_t j = 0; j < p.classes; j += kClassBlock) {
    const int64_t end = p.classes - j < kClassBlock ? p.classes : j + kClassBlock;
    exp_block(p, tile, j, end);
    if (p.gradients) add_gradient_block(p, tile, rows, j, end);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const double behind = double(tile.largest[i]) - double(tile.wanted[i]);
    p.losses[first + i] = std::log(double(tile.sum[i])) + behind;
    if (!p.gradients) continue;
    const int64_t row = p.rows[first + i], y = p.targets[first + i];
    const A share = A(1) / A(p.num_rows), factor = share / tile.sum[i];
    A* to = static_cast<A*>(p.grad_hidden) + row * p.width;
    A* scaled = static_cast<A*>(p.scaled) + (first - p.chunk_begin + i) * p.class_stride;
    const A *from = hidden + row * p.width, *target = classes + y * p.class_stride;
    for (int64_t c = 0; c < p.width; ++c) {
      to[c] = tile.gradient[i * p.class_stride + c] * factor - target[c] * share;
      scaled[c] = from[c] * factor;
    }
    tile.scores[y * kLossRows<A> + i] -= tile.sum[i];
    if (p.bias_offsets) {
      A* gradient = static_cast<A*>(p.grad_bias);
      for_bias<A>(p, row, i, [&](int64_t k, int64_t place) {
        gradient[k] = place >= 0 ? tile.scores[place] * factor : A(0);
      });
    }
    if (p.span_begin) tile.recency.factor[i] = factor;
  }
  if (p.span_begin && p.gradients) {
    double* sums = p.bucket_gradients + first / kLossRows<A> * p.buckets;
    sum_recency_gradients(p, tile.recency, tile.scores, first, rows, sums);
  }
}

template <class A>
void loss_tiles(const SoftmaxLossParams& p, int64_t begin, int64_t end) {
  LossTile<A> tile;
  const auto layout = [&](Scratch& memory) {
    tile.transposed = memory.take<A>(p.width * kLossRows<A>);
    tile.gradient = memory.take<A>(kLossRows<A> * p.class_stride);
    tile.largest = memory.take<A>(kLossRows<A>);
    tile.sum = memory.take<A>(kLossRows<A>);
    tile.wanted = memory.take<A>(kLossRows<A>);
    if (p.span_begin) take_recency_tile(p, memory, tile.recency);
  };
  with_scratch(layout, [&] {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = p.chunk_begin + t * kLossRows<A>;
      const int64_t left = p.chunk_end - first;
      tile.scores = static_cast<A*>(p.scores) + t * p.classes * kLossRows<A>;
      loss_tile(p, tile, first, left < kLossRows<A> ? left : kLossRows<A>);
    }
  });
}

// Gradients of classes [begin, end), the chunk's part: differences times hidden. Every group of
// rows is summed by itself and then added, so that the sum does not depend on the size of a chunk.
template <class A>
void add_class_gradients(const SoftmaxLossParams& p, int64_t begin, int64_t end) {
  const A *scores = static_cast<const A*>(p.scores), *scaled = static_cast<const A*>(p.scaled);
  A* gradient = static_cast<A*>(p.grad_classes);
  const int64_t rows = p.chunk_end - p.chunk_begin;
  const auto add_group = [&](int64_t j, int64_t first, int64_t last, auto at_once) {
    for_panels<A>(p.class_stride, [&](int64_t c, auto vectors) {
      Vec<A> sums[at_once()][vectors()] = {};
      for (int64_t i = first; i < last; i += kLossRows<A>) {
        const int64_t depth = last - i < kLossRows<A> ? last - i : kLossRows<A>;
        add_products(sums, scores + i * p.classes + j * kLossRows<A>, kLossRows<A>, 1,
                     scaled + i * p.class_stride + c, p.class_stride, depth);
      }
      const bool add = p.chunk_begin + first > 0;
      for (int r = 0; r < at_once(); ++r) {
        A* to = gradient + (j + r) * p.class_stride + c;
        for (int v = 0; v < vectors(); ++v, to += kLanes<A>) {
          store_vector(add ? load_vector(to) + sums[r][v] : sums[r][v], to);
        }
      }
    });
  };
  for (int64_t first = 0; first < rows; first += p.group_rows) {
    const int64_t last = rows - first < p.group_rows ? rows : first + p.group_rows;
    for (int64_t j = begin; j < end;) {
      with_constant<kSumRows>(end - j, [&](auto at_once) {
        add_group(j, first, last, at_once);
        j += at_once();
      });
    }
  }
}

inline int64_t loss_tile_rows(const SoftmaxLossParams& p) {
  return p.is_double ? kLossRows<double> : kLossRows<float>;
}
inline void softmax_loss(const SoftmaxLossParams& p, int64_t begin, int64_t end) {
  p.is_double ? loss_tiles<double>(p, begin, end) : loss_tiles<float>(p, begin, end);
}
inline void softmax_class_gradients(const SoftmaxLossParams& p, int64_t begin, int64_t end) {
  p.is_double ? add_class_gradients<double>(p, begin, end)
              : add_class_gradients<float>(p, begin, end);
}
