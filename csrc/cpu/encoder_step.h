// encoder_step: every layer of one event in one call. Included by every level file.
//   h = LN1(x);  g = W_g h;  u = W_in h;  [q, k] = W_qk u;  v = u
//   x += W_out gated_rela_step(q, k, v, g);   x += W_2 GELU(W_1 LN2(x))
// A few users share each pass over the weights, which at hidden 64 fit the second-level cache.

template <class A>
RECGRELA_NOINLINE void map_gelu(A* x, int64_t count) {
  map_values(x, count, [](Vec<A> y) { return gelu<A>(y); });
}

// out [users, n] = bias [n] + x [users, m] weight [m, n], rows of x and out x_stride, out_stride
// apart; with kAdd the sum is added to what out holds.
template <class A, bool kAdd>
void multiply(const A* x, int64_t x_stride, const A* weight, const A* bias, A* out,
              int64_t out_stride, int users, int64_t m, int64_t n) {
  using V = Vec<A>;
  // 64 floats: as many sums as hide a multiply-add's latency.
  constexpr int kWide = RECGRELA_VECTOR_BYTES == 64 ? 4 : 8;
  constexpr int64_t kStep = kWide * kLanes<A>;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    for (int u = 0; u < users; ++u) {
      const A* row = x + u * x_stride;
      V sums[kWide];
      for (int w = 0; w < kWide; ++w) sums[w] = load_vector(bias + j + w * kLanes<A>);
      for (int64_t i = 0; i < m; ++i) {
        const A* from = weight + i * n + j;
        for (int w = 0; w < kWide; ++w) sums[w] += row[i] * load_vector(from + w * kLanes<A>);
      }
      A* to = out + u * out_stride + j;
      for (int w = 0; w < kWide; ++w) {
        if (kAdd) sums[w] += load_vector(to + w * kLanes<A>);
        store_vector(sums[w], to + w * kLanes<A>);
      }
    }
  }
  for (; j < n; ++j) {
    for (int u = 0; u < users; ++u) {
      A sum = bias[j];
      for (int64_t i = 0; i < m; ++i) sum += x[u * x_stride + i] * weight[i * n + j];
      A* to = out + u * out_stride + j;
      *to = kAdd ? *to + sum : sum;
    }
  }
}

template <class A>
void layer_norm(const A* x, const A* weight, const A* bias, A* out, int64_t n, double eps) {
  A mean = A(0), square = A(0);
  for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= A(n);
  for (int64_t i = 0; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
  const A scale = A(1) / A(std::sqrt(double(square) / double(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

template <class A>
struct EncoderRows {
  StepRows<A> head;
  A *x, *h, *gate, *u, *y;  // [kUsersAtOnce, C]
  A* qk;                    // [kUsersAtOnce, 2C]
  A* inner;                 // [kUsersAtOnce, M]
  A *cosines, *sines;       // [kUsersAtOnce, C/2]
};

template <class A>
void lay_out(EncoderRows<A>& w, Scratch& scratch, const EncoderStepParams& p) {
  const int64_t C = p.H * p.D;
  lay_out(w.head, scratch, p.D);
  for (A** rows : {&w.x, &w.h, &w.gate, &w.u, &w.y, &w.cosines, &w.sines}) {
    *rows = scratch.take<A>(kUsersAtOnce * C);
  }
  w.qk = scratch.take<A>(kUsersAtOnce * 2 * C);
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
  const int64_t D = p.D, C = p.H * D;
  for (int64_t d = 0; d < D; ++d) {
    w.head.q[d] = w.qk[u * 2 * C + h * D + d];
    w.head.k[d] = w.qk[u * 2 * C + C + h * D + d];
    w.head.v[d] = w.u[u * C + h * D + d];
    if (p.has_gate) w.head.gate[d] = w.gate[u * C + h * D + d];
  }
  const int64_t pairs = (u * C + h * D) / 2;
  turn_keys(w.head, D, w.cosines + pairs, w.sines + pairs);
  A* k_sum = state + C * D;
  step_attention(w.head, state + h * D * D, k_sum + h * D, D, p.eps * double(position + 1));
  if (p.W > 0) {
    A* window = k_sum + C + h * D;
    step_conv(w.head, window, conv_weight + h * D * p.W, conv_bias + h * D, D, p.W, C);
    move_window(window, w.head.v, D, p.W, C);
  }
  if (p.has_gate) step_gate(w.head, D);
  for (int64_t d = 0; d < D; ++d) w.y[u * C + h * D + d] = w.head.out[d];
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
    fill_pairs(w.cosines + u * C / 2, w.sines + u * C / 2, p.inv_freq, C / 2, p.position[users[u]]);
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
  with_scratch(
      [&](Scratch& scratch) { lay_out(w, scratch, p); },
      [&] {
        int64_t users[kUsersAtOnce];
        for (int64_t block = begin; block < end; ++block) {
          int count = 0;
          for (int64_t b = block * kUsersAtOnce; b < p.B && b < (block + 1) * kUsersAtOnce; ++b) {
            if (p.active == nullptr || p.active[b]) {
              users[count++] = b;
            } else {
              __builtin_memset(static_cast<A*>(p.out) + b * C, 0, std::size_t(C) * sizeof(A));
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
