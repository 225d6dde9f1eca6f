// encoder_step: every layer of one event in one call. Included by every level file.
//   h = LN1(x);  g = W_g h;  u = W_in h;  [q, k] = W_qk u;  v = u
//   x += W_out gated_rela_step(q, k, v, g);   x += W_2 GELU(W_1 LN2(x))
// Up to kUsersAtOnce users share each pass over the weights, 850 KB at hidden 64 and four layers:
// alone, a user's time is that of reading them.

template <class A>
RECGRELA_NOINLINE void map_gelu(A* x, int64_t count) {
  map_values(x, count, [](Vec<A> y) { return gelu<A>(y); });
}

// Some users and columns of `multiply`, all sums in registers. Every sum runs over i in order, so
// that a user's bits do not depend on who shares the pass.
template <class A, bool kAdd, int kUsers, int kVectors>
RECGRELA_INLINE void multiply_tile(const A* x, int64_t x_stride, const A* weight, int64_t width,
                                   const A* bias, A* out, int64_t out_stride, int64_t m) {
  Vec<A> sums[kUsers][kVectors];
  for (int w = 0; w < kVectors; ++w) {
    for (int u = 0; u < kUsers; ++u) sums[u][w] = load_vector(bias + w * kLanes<A>);
  }
  for (int64_t i = 0; i < m; ++i, weight += width) {
    Vec<A> row[kVectors];
    for (int w = 0; w < kVectors; ++w) row[w] = load_vector(weight + w * kLanes<A>);
    for (int w = 0; kUsers > 1 && w < kVectors; ++w) keep_in_register(row[w]);
    for (int u = 0; u < kUsers; ++u) {
      const Vec<A> factor = splat(x[u * x_stride + i]);
      for (int w = 0; w < kVectors; ++w) sums[u][w] += factor * row[w];
    }
  }
  for (int u = 0; u < kUsers; ++u) {
    for (int w = 0; w < kVectors; ++w) {
      A* to = out + u * out_stride + w * kLanes<A>;
      store_vector(kAdd ? sums[u][w] + load_vector(to) : sums[u][w], to);
    }
  }
}

// out [users, n] = bias [n] + x [users, m] weight [m, n], rows of x and out x_stride, out_stride
// apart; with kAdd the sum is added to what out holds. The weight lies in panels of kPanelColumns
// columns, the last one narrower, so that it is read from front to back.
template <class A, bool kAdd>
RECGRELA_NOINLINE void multiply(const A* x, int64_t x_stride, const A* weight, const A* bias,
                                A* out, int64_t out_stride, int users, int64_t m, int64_t n) {
  constexpr int kShare = RECGRELA_VECTOR_BYTES == 64 ? 4 : 2;  // users to a weight in a register
  for (int64_t j = 0; j < n; j += kPanelColumns, weight += kPanelColumns * m) {
    const int64_t width = n - j < kPanelColumns ? n - j : kPanelColumns;
    int64_t c = 0;
    const auto tiles = [&](auto share, auto vectors) {
      constexpr int kUsers = decltype(share)::value, kVectors = decltype(vectors)::value;
      for (; c + kVectors * kLanes<A> <= width; c += kVectors * kLanes<A>) {
        int u = 0;
        for (; u + kUsers <= users; u += kUsers) {
          multiply_tile<A, kAdd, kUsers, kVectors>(x + u * x_stride, x_stride, weight + c, width,
                                                   bias + j + c, out + u * out_stride + j + c,
                                                   out_stride, m);
        }
        for (; u < users; ++u) {
          multiply_tile<A, kAdd, 1, kVectors>(x + u * x_stride, x_stride, weight + c, width,
                                              bias + j + c, out + u * out_stride + j + c,
                                              out_stride, m);
        }
      }
    };
    // Eight sums hide the latency of a multiply-add; a panel is but four vectors of AVX-512 floats.
    if (users == 1) tiles(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{});
    tiles(std::integral_constant<int, kShare>{}, std::integral_constant<int, 4>{});
    tiles(std::integral_constant<int, kShare>{}, std::integral_constant<int, 1>{});
    for (; c < width; ++c) {
      for (int u = 0; u < users; ++u) {
        A sum = bias[j + c];
        for (int64_t i = 0; i < m; ++i) sum += x[u * x_stride + i] * weight[i * width + c];
        A* to = out + u * out_stride + j + c;
        *to = kAdd ? *to + sum : sum;
      }
    }
  }
}

template <class A>
A sum_values(const A* x, int64_t count) {
  Vec<A> sums = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) sums += load_vector(x + i);
  A sum = sum_lanes<A>(sums);
  for (; i < count; ++i) sum += x[i];
  return sum;
}

// The result may not lie where x does: it holds the squares meanwhile.
template <class A>
void layer_norm(const A* x, const A* weight, const A* bias, A* __restrict out, int64_t n,
                double eps) {
  const A mean = sum_values(x, n) / A(n);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * (x[i] - mean);
  const A scale = A(1) / A(std::sqrt(double(sum_values(out, n)) / double(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

template <class A>
struct EncoderRows {  // a head's row may be read up to whole vectors: what follows is here too
  StepRows<A> head;
  A *x, *h, *gate, *u, *y;  // [kUsersAtOnce, C]
  A* qk;                    // [kUsersAtOnce, 2C]
  A* inner;                 // [kUsersAtOnce, M]
  A *cosines, *sines;       // [kUsersAtOnce, C]
};

template <class A>
void lay_out(EncoderRows<A>& w, Scratch& scratch, const EncoderStepParams& p) {
  const int64_t C = p.H * p.D;
  lay_out(w.head, scratch, p.D);
  // A head is read in whole vectors: that of the last user reaches beyond the rows.
  for (A** rows : {&w.x, &w.h, &w.gate, &w.u, &w.y, &w.cosines, &w.sines}) {
    *rows = scratch.take<A>(kUsersAtOnce * C + kLanes<A>);
  }
  w.qk = scratch.take<A>(kUsersAtOnce * 2 * C + kLanes<A>);
  w.inner = scratch.take<A>(kUsersAtOnce * p.mlp_width);
}

// Hands out the weight buffer piece by piece, in its order.
template <class A>
struct WeightReader {
  const A* at;
  const A* next(int64_t count) {
    const A* piece = at;
    at += count;
    return piece;
  }
};

// y of one user and head from q, k, v and gate, the state of the layer moved on.
template <class A>
void encoder_head(EncoderRows<A>& w, const EncoderStepParams& p, int u, int64_t h, A* state,
                  const A* conv_weight, const A* conv_bias, int64_t position) {
  const int64_t D = p.D, C = p.H * D, at = u * C + h * D;
  const A* q = w.qk + 2 * u * C + h * D;
  const A* v = w.u + at;
  turn_keys(w.head, q, q + C, D, w.cosines + at, w.sines + at);
  A* k_sum = state + C * D;
  step_attention(w.head, v, state + h * D * D, k_sum + h * D, D, p.eps * double(position + 1));
  if (p.W > 0) {
    A* window = k_sum + C + h * D;
    step_conv(w.head, v, window, conv_weight + h * D, conv_bias + h * D, D, p.W, C);
    move_window(window, v, D, p.W, C);
  }
  if (p.has_gate) step_gate(w.head, w.gate + at, D);
  copy_row(w.head.out, w.y + at, D);
}

template <class A>
void encoder_layer(EncoderRows<A>& w, const EncoderStepParams& p, WeightReader<A>& weights,
                   int64_t layer, const int64_t* users, int count) {
  const int64_t C = p.H * p.D, M = p.mlp_width;
  const A* norm_weight = weights.next(C);
  const A* norm_bias = weights.next(C);
  for (int u = 0; u < count; ++u) {
    layer_norm(w.x + u * C, norm_weight, norm_bias, w.h + u * C, C, p.layer_norm_eps);
  }
  if (p.has_gate) {
    const A* gate = weights.next(C * C);
    multiply<A, false>(w.h, C, gate, weights.next(C), w.gate, C, count, C, C);
  }
  const A* in = weights.next(C * C);
  multiply<A, false>(w.h, C, in, weights.next(C), w.u, C, count, C, C);
  const A* qk = weights.next(2 * C * C);
  multiply<A, false>(w.u, C, qk, weights.next(2 * C), w.qk, 2 * C, count, C, 2 * C);
  const A* conv_weight = p.W > 0 ? weights.next(C * p.W) : nullptr;
  const A* conv_bias = p.W > 0 ? weights.next(C) : nullptr;
  const int64_t layer_size = C * (p.D + 1 + (p.W > 0 ? p.W - 1 : 0));
  for (int u = 0; u < count; ++u) {
    A* state = static_cast<A*>(p.state) + users[u] * p.state_stride + layer * layer_size;
    if (u + 1 < count) {
      prefetch_row<true>(state + (users[u + 1] - users[u]) * p.state_stride, layer_size);
    }
    for (int64_t h = 0; h < p.H; ++h) {
      encoder_head(w, p, u, h, state, conv_weight, conv_bias, p.position[users[u]]);
    }
  }
  const A* out = weights.next(C * C);
  multiply<A, true>(w.y, C, out, weights.next(C), w.x, C, count, C, C);
  norm_weight = weights.next(C);
  norm_bias = weights.next(C);
  for (int u = 0; u < count; ++u) {
    layer_norm(w.x + u * C, norm_weight, norm_bias, w.h + u * C, C, p.layer_norm_eps);
  }
  const A* fc1 = weights.next(C * M);
  multiply<A, false>(w.h, C, fc1, weights.next(M), w.inner, M, count, C, M);
  map_gelu(w.inner, count * M);
  const A* fc2 = weights.next(M * C);
  multiply<A, true>(w.inner, M, fc2, weights.next(C), w.x, C, count, M, C);
}

template <class A>
void encoder_users(EncoderRows<A>& w, const EncoderStepParams& p, const int64_t* users, int count) {
  const int64_t C = p.H * p.D;
  for (int u = 0; u < count; ++u) {
    const A* x = static_cast<const A*>(p.x) + users[u] * p.x_stride;
    for (int64_t i = 0; i < C; ++i) w.x[u * C + i] = x[i];
    fill_pairs(w.cosines + u * C, w.sines + u * C, p.inv_freq, C / 2, p.position[users[u]]);
  }
  WeightReader<A> weights{static_cast<const A*>(p.weights)};
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    encoder_layer(w, p, weights, layer, users, count);
  }
  const A* norm_weight = p.has_final_norm ? weights.next(C) : nullptr;
  const A* norm_bias = p.has_final_norm ? weights.next(C) : nullptr;
  for (int u = 0; u < count; ++u) {
    A* out = static_cast<A*>(p.out) + users[u] * C;
    if (p.has_final_norm) {
      layer_norm(w.x + u * C, norm_weight, norm_bias, out, C, p.layer_norm_eps);
    } else {
      for (int64_t i = 0; i < C; ++i) out[i] = w.x[u * C + i];
    }
  }
}

template <class A>
void encoder_range(const EncoderStepParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.H * p.D;
  EncoderRows<A> w;
  with_scratch([&](Scratch& scratch) { lay_out(w, scratch, p); },
               [&] {
                 int64_t users[kUsersAtOnce];
                 for (int64_t b = begin; b < end;) {
                   int count = 0;
                   for (; b < end && count < kUsersAtOnce; ++b) {
                     if (p.active == nullptr || p.active[b]) {
                       users[count++] = b;
                     } else {
                       __builtin_memset(static_cast<A*>(p.out) + b * C, 0,
                                        std::size_t(C) * sizeof(A));
                     }
                   }
                   if (count > 0) encoder_users(w, p, users, count);
                 }
               });
}

void encoder_step(const EncoderStepParams& p, int64_t begin, int64_t end) {
  if (p.is_double) {
    encoder_range<double>(p, begin, end);
  } else {
    encoder_range<float>(p, begin, end);
  }
}
