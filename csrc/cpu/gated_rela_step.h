// gated_rela for one item per sequence, the state updated in place. Included by every level file.

template <class A>
struct StepRows {
  A *q, *k, *v, *gate, *out, *phi_q, *phi_k;  // [Dp]
  A *cosines, *sines;                         // [D/2]
};

template <class A>
void lay_out(StepRows<A>& w, Scratch& scratch, int64_t D) {
  for (A** row : {&w.q, &w.k, &w.v, &w.gate, &w.out, &w.phi_q, &w.phi_k, &w.cosines, &w.sines}) {
    *row = scratch.take<A>(padded<A>(D));
  }
}

// The rotation of one position: cosines and sines [pairs].
template <class A>
void fill_pairs(A* cosines, A* sines, const double* inv_freq, int64_t pairs, int64_t position) {
  for (int64_t i = 0; i < pairs; ++i) {
    const double phase = double(position) * inv_freq[i];
    cosines[i] = A(std::cos(phase));
    sines[i] = A(std::sin(phase));
  }
}

// phi of q and k into phi_q and phi_k, their adjacent pairs turned into q and k.
template <class A>
void turn_keys(StepRows<A>& w, int64_t D, const A* cosines, const A* sines) {
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    store_vector(feature_map<A>(load_vector(w.q + d)), w.phi_q + d);
    store_vector(feature_map<A>(load_vector(w.k + d)), w.phi_k + d);
  }
  for (int64_t i = 0; i < D / 2; ++i) {
    const A c = cosines[i], s = sines[i];
    const int64_t even = 2 * i, odd = even + 1;
    w.q[even] = w.phi_q[even] * c - w.phi_q[odd] * s;
    w.q[odd] = w.phi_q[even] * s + w.phi_q[odd] * c;
    w.k[even] = w.phi_k[even] * c - w.phi_k[odd] * s;
    w.k[odd] = w.phi_k[even] * s + w.phi_k[odd] * c;
  }
}

// kv += k v^T, out = kv^T q / (phi(q).k_sum + eps n)
template <class A>
void step_attention(StepRows<A>& w, A* __restrict kv, A* __restrict k_sum, int64_t D,
                    double count) {
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

// out += SiLU(conv) of the window [W-1, width] and v; weight [D, W], bias [D] or nullptr. q is
// overwritten.
template <class A>
void step_conv(StepRows<A>& w, const A* window, const A* weight, const A* bias, int64_t D,
               int64_t W, int64_t width) {
  for (int64_t d = 0; d < D; ++d) {
    A pre = bias ? bias[d] : A(0);
    for (int64_t j = 0; j + 1 < W; ++j) pre += weight[d * W + j] * window[j * width + d];
    w.q[d] = pre + weight[d * W + W - 1] * w.v[d];
  }
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    store_vector(load_vector(w.out + d) + silu<A>(load_vector(w.q + d)), w.out + d);
  }
}

// out *= SiLU(gate)
template <class A>
void step_gate(StepRows<A>& w, int64_t D) {
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    store_vector(load_vector(w.out + d) * silu<A>(load_vector(w.gate + d)), w.out + d);
  }
}

// The window drops its oldest row and takes v.
template <class A>
void move_window(A* window, const A* v, int64_t D, int64_t W, int64_t width) {
  for (int64_t r = 0; r + 1 < W; ++r) {
    const A* next = r + 2 < W ? window + (r + 1) * width : v;
    for (int64_t d = 0; d < D; ++d) window[r * width + d] = next[d];
  }
}

template <class A>
void step_one(const GatedRelaStepParams& p, int64_t b, int64_t h, StepRows<A>& w) {
  const int64_t D = p.D, width = p.H * D;
  const Span span{b, 0, 1};
  if (p.active && !p.active[b]) return zero_rows<A>(p.out, p.dtype, span, 0, 1, h, D);
  load_rows(w.q, D, p.q, p.dtype, span, 0, 1, h, D);
  load_rows(w.k, D, p.k, p.dtype, span, 0, 1, h, D);
  load_rows(w.v, D, p.v, p.dtype, span, 0, 1, h, D);
  const int64_t position = p.state.position[b];
  fill_pairs(w.cosines, w.sines, p.inv_freq + h * D / 2, D / 2, position);
  turn_keys(w, D, w.cosines, w.sines);
  A* kv = static_cast<A*>(p.state.kv) + b * p.state.kv_stride + h * D * D;
  A* k_sum = static_cast<A*>(p.state.k_sum) + b * p.state.k_sum_stride + h * D;
  step_attention(w, kv, k_sum, D, p.eps * double(position + 1));

  A* window = nullptr;  // there is none at width 1
  if (p.W > 1) window = static_cast<A*>(p.state.conv) + b * p.state.conv_stride + h * D;
  if (p.conv_weight) {
    const A* bias = static_cast<const A*>(p.conv_bias);
    step_conv(w, window, static_cast<const A*>(p.conv_weight) + h * D * p.W,
              bias ? bias + h * D : nullptr, D, p.W, width);
  }
  move_window(window, w.v, D, p.W, width);
  if (p.gate.data) {
    load_rows(w.gate, D, p.gate, p.dtype, span, 0, 1, h, D);
    step_gate(w, D);
  }
  store_rows(w.out, D, p.out, p.dtype, span, 0, 1, h, D);
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
