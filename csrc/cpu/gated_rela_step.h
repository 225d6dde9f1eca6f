// gated_rela for one item per sequence, the state updated in place. Included by every level file.

template <class A>
struct StepRows {
  A *phi_q, *phi_k, *q, *k;  // [Dp]: feature maps, and turned
  A* out;                    // [Dp]
};

template <class A>
void lay_out(StepRows<A>& w, Scratch& scratch, int64_t D) {
  for (A** row : {&w.phi_q, &w.phi_k, &w.q, &w.k, &w.out}) *row = scratch.take<A>(padded<A>(D));
}

// The rotation of one position: cosines and sines [2 pairs].
template <class A>
void fill_pairs(A* cosines, A* sines, const double* inv_freq, int64_t pairs, int64_t position) {
  for (int64_t i = 0; i < pairs; ++i) {
    const double phase = double(position) * inv_freq[i];
    cosines[2 * i] = cosines[2 * i + 1] = A(std::cos(phase));
    sines[2 * i + 1] = A(std::sin(phase));
    sines[2 * i] = -sines[2 * i + 1];
  }
}

// phi of q and k into phi_q and phi_k, their adjacent pairs turned into w.q and w.k. Reads whole
// vectors, as do the functions below.
template <class A>
void turn_keys(StepRows<A>& w, const A* q, const A* k, int64_t D, const A* cosines,
               const A* sines) {
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    const Vec<A> cosine = load_vector(cosines + d), sine = load_vector(sines + d);
    const Vec<A> phi_q = feature_map<A>(load_vector(q + d));
    const Vec<A> phi_k = feature_map<A>(load_vector(k + d));
    store_vector(phi_q, w.phi_q + d);
    store_vector(phi_k, w.phi_k + d);
    store_vector(rotated<false, A>(phi_q, cosine, sine), w.q + d);
    store_vector(rotated<false, A>(phi_k, cosine, sine), w.k + d);
  }
}

// Columns from j on, as many as whole groups of kVectors vectors: kv += k v^T, out = kv^T q.
template <class A, int kVectors>
RECGRELA_INLINE int64_t step_columns(StepRows<A>& w, const A* v, A* kv, int64_t D, int64_t j) {
  for (; j + kVectors * kLanes<A> <= D; j += kVectors * kLanes<A>) {
    Vec<A> value[kVectors], sum[kVectors];
    for (int m = 0; m < kVectors; ++m) {
      value[m] = load_vector(v + j + m * kLanes<A>);
      sum[m] = zero_vector<A>();
    }
    for (int64_t i = 0; i < D; ++i) {
      A* at = kv + i * D + j;
      for (int m = 0; m < kVectors; ++m) {
        const Vec<A> row = load_vector(at + m * kLanes<A>) + w.k[i] * value[m];
        store_vector(row, at + m * kLanes<A>);
        sum[m] += w.q[i] * row;
      }
    }
    for (int m = 0; m < kVectors; ++m) store_vector(sum[m], w.out + j + m * kLanes<A>);
  }
  return j;
}

// kv += k v^T, out = kv^T q / (phi(q).k_sum + eps n)
template <class A>
void step_attention(StepRows<A>& w, const A* v, A* kv, A* k_sum, int64_t D, double count) {
  A den = A(0);
  for (int64_t d = 0; d < D; ++d) {
    k_sum[d] += w.phi_k[d];
    den += w.phi_q[d] * k_sum[d];
  }
  int64_t j = step_columns<A, 8>(w, v, kv, D, 0);
  j = step_columns<A, 2>(w, v, kv, D, j);
  j = step_columns<A, 1>(w, v, kv, D, j);
  for (; j < D; ++j) {
    A sum = A(0);
    for (int64_t i = 0; i < D; ++i) {
      kv[i * D + j] += w.k[i] * v[j];
      sum += w.q[i] * kv[i * D + j];
    }
    w.out[j] = sum;
  }
  const A scale = A(1) / (den + A(count));
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    store_vector(load_vector(w.out + d) * scale, w.out + d);
  }
}

// out += SiLU(conv) of the window and v; window [W-1] and weight [W] in rows `width` apart, bias
// [D] or nullptr. w.q is overwritten.
template <class A>
void step_conv(StepRows<A>& w, const A* v, const A* window, const A* weight, const A* bias,
               int64_t D, int64_t W, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes<A> <= D; d += kLanes<A>) {
    Vec<A> sum = bias ? load_vector(bias + d) : zero_vector<A>();
    for (int64_t j = 0; j + 1 < W; ++j) {
      sum += load_vector(weight + j * width + d) * load_vector(window + j * width + d);
    }
    store_vector(sum + load_vector(weight + (W - 1) * width + d) * load_vector(v + d), w.q + d);
  }
  for (; d < D; ++d) {
    A sum = bias ? bias[d] : A(0);
    for (int64_t j = 0; j + 1 < W; ++j) sum += weight[j * width + d] * window[j * width + d];
    w.q[d] = sum + weight[(W - 1) * width + d] * v[d];
  }
  for (d = 0; d < D; d += kLanes<A>) {
    store_vector(load_vector(w.out + d) + silu<A>(load_vector(w.q + d)), w.out + d);
  }
}

// out *= SiLU(gate)
template <class A>
void step_gate(StepRows<A>& w, const A* gate, int64_t D) {
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    store_vector(load_vector(w.out + d) * silu<A>(load_vector(gate + d)), w.out + d);
  }
}

// The window drops its oldest row and takes v.
template <class A>
void move_window(A* window, const A* v, int64_t D, int64_t W, int64_t width) {
  for (int64_t r = 0; r + 1 < W; ++r) {
    copy_row(r + 2 < W ? window + (r + 1) * width : v, window + r * width, D);
  }
}

template <class A>
struct StepScratch {
  StepRows<A> rows;
  A *q, *k, *v, *gate, *cosines, *sines;  // [Dp]
  A* conv_weight;                         // [W, H*D], turned round
};

template <class A>
void lay_out(StepScratch<A>& s, Scratch& scratch, const GatedRelaStepParams& p) {
  lay_out(s.rows, scratch, p.D);
  for (A** row : {&s.q, &s.k, &s.v, &s.gate, &s.cosines, &s.sines}) {
    *row = scratch.take<A>(padded<A>(p.D));
  }
  s.conv_weight = scratch.take<A>(p.conv_weight ? p.W * p.H * p.D : 0);
}

template <class A>
void turn_conv_weight(StepScratch<A>& s, const GatedRelaStepParams& p) {
  const int64_t width = p.H * p.D;
  for (int64_t d = 0; p.conv_weight && d < width; ++d) {
    const A* taps = static_cast<const A*>(p.conv_weight) + d * p.W;
    for (int64_t j = 0; j < p.W; ++j) s.conv_weight[j * width + d] = taps[j];
  }
}

template <class A>
void step_one(const GatedRelaStepParams& p, int64_t b, int64_t h, StepScratch<A>& s) {
  const int64_t D = p.D, width = p.H * D;
  const Span span{b, 0, 1};
  StepRows<A>& w = s.rows;
  if (p.active && !p.active[b]) return zero_rows<A>(p.out, p.dtype, span, 0, 1, h, D);
  load_rows(s.q, D, p.q, p.dtype, span, 0, 1, h, D);
  load_rows(s.k, D, p.k, p.dtype, span, 0, 1, h, D);
  load_rows(s.v, D, p.v, p.dtype, span, 0, 1, h, D);
  const int64_t position = p.state.position[b];
  fill_pairs(s.cosines, s.sines, p.inv_freq + h * D / 2, D / 2, position);
  turn_keys(w, s.q, s.k, D, s.cosines, s.sines);
  A* kv = static_cast<A*>(p.state.kv) + b * p.state.kv_stride + h * D * D;
  A* k_sum = static_cast<A*>(p.state.k_sum) + b * p.state.k_sum_stride + h * D;
  step_attention(w, s.v, kv, k_sum, D, p.eps * double(position + 1));

  A* window = nullptr;  // there is none at width 1
  if (p.W > 1) window = static_cast<A*>(p.state.conv) + b * p.state.conv_stride + h * D;
  if (p.conv_weight) {
    const A* bias = static_cast<const A*>(p.conv_bias);
    step_conv(w, s.v, window, s.conv_weight + h * D, bias ? bias + h * D : nullptr, D, p.W, width);
  }
  move_window(window, s.v, D, p.W, width);
  if (p.gate.data) {
    load_rows(s.gate, D, p.gate, p.dtype, span, 0, 1, h, D);
    step_gate(w, s.gate, D);
  }
  store_rows(w.out, D, p.out, p.dtype, span, 0, 1, h, D);
}

template <class A>
void step_range(const GatedRelaStepParams& p, int64_t begin, int64_t end) {
  StepScratch<A> s;
  with_scratch([&](Scratch& scratch) { lay_out(s, scratch, p); },
               [&] {
                 turn_conv_weight(s, p);
                 for (int64_t i = begin; i < end; ++i) step_one(p, i / p.H, i % p.H, s);
               });
}

void gated_rela_step(const GatedRelaStepParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    step_range<double>(p, begin, end);
  } else {
    step_range<float>(p, begin, end);
  }
}
