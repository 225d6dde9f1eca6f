// gated_rela for one item per sequence, the state updated in place. Included by every level file.

template <class A>
struct StepRows {
  A *q, *k, *v, *gate, *out, *phi_q, *phi_k;  // [Dp]
};

template <class A>
void lay_out(StepRows<A>& w, Scratch& scratch, int64_t D) {
  for (A** row : {&w.q, &w.k, &w.v, &w.gate, &w.out, &w.phi_q, &w.phi_k}) {
    *row = scratch.take<A>(padded<A>(D));
  }
}

// Turns the adjacent pairs of phi by position * inv_freq.
template <class A>
void rotate_pairs(const A* phi_q, const A* phi_k, A* q, A* k, int64_t D, const double* inv_freq,
                  int64_t position) {
  for (int64_t i = 0; i < D / 2; ++i) {
    const double phase = double(position) * inv_freq[i];
    const A c = A(std::cos(phase)), s = A(std::sin(phase));
    const int64_t even = 2 * i, odd = even + 1;
    q[even] = phi_q[even] * c - phi_q[odd] * s;
    q[odd] = phi_q[even] * s + phi_q[odd] * c;
    k[even] = phi_k[even] * c - phi_k[odd] * s;
    k[odd] = phi_k[even] * s + phi_k[odd] * c;
  }
}

// kv += k v^T, out = kv^T q / (phi(q).k_sum + eps n)
template <class A>
void step_attention(StepRows<A>& w, A* __restrict kv, A* __restrict k_sum, int64_t D, double count) {
  A den = A(0);
  for (int64_t d = 0; d < D; ++d) {
    k_sum[d] += w.phi_k[d];
    den += w.phi_q[d] * k_sum[d];
    w.out[d] = A(0);
  }
  A* __restrict out = w.out;
  const A* __restrict v = w.v;
  for (int64_t i = 0; i < D; ++i) {
    const A key = w.k[i], query = w.q[i];
    A* __restrict row = kv + i * D;
    for (int64_t j = 0; j < D; ++j) {
      row[j] += key * v[j];
      out[j] += query * row[j];
    }
  }
  const A scale = A(1) / (den + A(count));
  for (int64_t d = 0; d < D; ++d) out[d] *= scale;
}

// out += SiLU(conv); the window moves by one item.
template <class A>
void step_conv(StepRows<A>& w, A* window, const GatedRelaStepParams& p, int64_t h) {
  const int64_t D = p.D, W = p.W, width = p.H * D;
  const A* weight = static_cast<const A*>(p.conv_weight) + h * D * W;
  const A* bias = static_cast<const A*>(p.conv_bias);
  for (int64_t d = 0; d < D; ++d) {
    A pre = bias ? bias[h * D + d] : A(0);
    for (int64_t j = 0; j + 1 < W; ++j) pre += weight[d * W + j] * window[j * width + d];
    pre += weight[d * W + W - 1] * w.v[d];
    w.out[d] += pre * sigmoid(pre);
  }
}

template <class A>
void step_one(const GatedRelaStepParams& p, int64_t b, int64_t h, StepRows<A>& w) {
  const int64_t D = p.D, Dp = padded<A>(D), width = p.H * D;
  const Span span{b, 0, 1};
  if (p.active && !p.active[b]) return zero_rows<A>(p.out, p.dtype, span, 0, 1, h, D);
  load_rows(w.q, Dp, p.q, p.dtype, span, 0, 1, h, D);
  load_rows(w.k, Dp, p.k, p.dtype, span, 0, 1, h, D);
  load_rows(w.v, Dp, p.v, p.dtype, span, 0, 1, h, D);
  for (int64_t d = 0; d < D; ++d) {
    w.phi_q[d] = feature_map(w.q[d]);
    w.phi_k[d] = feature_map(w.k[d]);
  }
  const int64_t position = p.state.position[b];
  rotate_pairs(w.phi_q, w.phi_k, w.q, w.k, D, p.inv_freq + h * D / 2, position);
  A* kv = static_cast<A*>(p.state.kv) + b * p.state.kv_stride + h * D * D;
  A* k_sum = static_cast<A*>(p.state.k_sum) + b * p.state.k_sum_stride + h * D;
  step_attention(w, kv, k_sum, D, p.eps * double(position + 1));

  A* window = static_cast<A*>(p.state.conv) + b * p.state.conv_stride + h * D;
  if (p.conv_weight) step_conv(w, window, p, h);
  for (int64_t r = 0; r + 1 < p.W; ++r) {
    const A* next = r + 2 < p.W ? window + (r + 1) * width : w.v;
    for (int64_t d = 0; d < D; ++d) window[r * width + d] = next[d];
  }
  if (p.gate.data) {
    load_rows(w.gate, Dp, p.gate, p.dtype, span, 0, 1, h, D);
    for (int64_t d = 0; d < D; ++d) w.out[d] *= w.gate[d] * sigmoid(w.gate[d]);
  }
  store_rows(w.out, Dp, p.out, p.dtype, span, 0, 1, h, D);
}

template <class A>
void step_range(const GatedRelaStepParams& p, int64_t begin, int64_t end) {
  StepRows<A> w;
  with_scratch([&](Scratch& scratch) { lay_out(w, scratch, p.D); },
               [&] {
                 for (int64_t i = begin; i < end; ++i) step_one(p, i / p.H, i % p.H, w);
               });
}

void gated_rela_step(const GatedRelaStepParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    step_range<double>(p, begin, end);
  } else {
    step_range<float>(p, begin, end);
  }
}
