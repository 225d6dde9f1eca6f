// gated_rela backward: one reverse sweep over the chunks of a sequence, from the states the forward
// saved at each chunk's start. Included by every level file.
//
// Forward:  num_t = S_t^T R phi(q_t),  den_t = phi(q_t).z_t + eps n_t,  o = num / den
//           y = SiLU(g) (o + a),  a = SiLU(pre),  pre = conv(v)
// With dO = SiLU(g) dy, dnum = dO / den, dden = -(dO.o) / den, and the sums over s >= t
//           T_t = sum R phi(q_s) dnum_s^T,   y_t = sum dden_s phi(q_s):
//           dphi(q_t) = R^T (S_t dnum_t) + dden_t z_t     dphi(k_t) = R^T (T_t v_t) + y_t
//           dv_t = T_t^T R phi(k_t) + transposed conv of dpre,   dpre = dO SiLU'(pre)
// S_t dnum_t and T_t v_t are scans over the transposed states, so no loop sums across lanes.

template <class A>
struct BackwardTile {
  Tile<A> tile;
  A *gate, *dy, *dgate;      // [kChunk, Dp]
  A *dnum, *dden;            // [kChunk, Dp], [kChunk]
  A *drot, *dphi, *dvalues;  // [kChunk, Dp]
  A* dpre;                   // [kChunk + W-1, Dp]: behind row n-1 the rows of the later chunk
  RunningState<A> later;     // T and y
  A *transposed, *transposed_base;  // [Dp, Dp]
  A* k_sum_start;                   // [Dp]
  A *dweight, *dbias;               // [W, Dp], [Dp]
};

template <class A>
void lay_out(BackwardTile<A>& w, Scratch& scratch, const GatedRelaParams& p) {
  lay_out(w.tile, scratch, p);
  const int64_t Dp = w.tile.Dp;
  for (A** rows : {&w.gate, &w.dy, &w.dgate, &w.dnum, &w.drot, &w.dphi, &w.dvalues}) {
    *rows = scratch.take<A>(kChunk * Dp);
  }
  w.dden = scratch.take<A>(kChunk);
  w.dpre = scratch.take<A>((kChunk + p.W - 1) * Dp);
  lay_out(w.later, scratch, Dp);
  w.transposed = scratch.take<A>(Dp * Dp);
  w.transposed_base = scratch.take<A>(Dp * Dp);
  w.k_sum_start = scratch.take<A>(Dp);
  w.dweight = scratch.take<A>(p.W * Dp);
  w.dbias = scratch.take<A>(Dp);
}

template <class A>
void transpose(const A* from, A* to, int64_t D, int64_t Dp) {
  __builtin_memset(to, 0, std::size_t(Dp * Dp) * sizeof(A));
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) to[j * Dp + i] = from[i * Dp + j];
  }
}

// From dy to dgate, dpre, dnum and dden. On entry num holds o and augmented the pre-activation.
template <class A>
void differentiate_rows(BackwardTile<A>& w, const GatedRelaParams& p) {
  using V = Vec<A>;
  Tile<A>& tile = w.tile;
  const int64_t nv = tile.Dp / kLanes<A>, count = tile.n * tile.Dp;
  V* dnum = reinterpret_cast<V*>(w.dnum);
  const V* out = reinterpret_cast<const V*>(tile.num);
  if (p.gate.data) {
    A* sum = w.dphi;  // o + a; dphi itself comes later
    __builtin_memcpy(sum, tile.num, std::size_t(count) * sizeof(A));
    if (p.conv_weight) add_silu(sum, tile.augmented, count);
    differentiate_gate(w.dgate, w.dnum, w.dy, sum, w.gate, count);
  } else {
    __builtin_memcpy(w.dnum, w.dy, std::size_t(count) * sizeof(A));
  }
  if (p.conv_weight) differentiate_silu(w.dpre, w.dnum, tile.augmented, count);
  for (int t = 0; t < tile.n; ++t) {
    const A scale = A(1) / tile.den[t];
    V dot = {};
    for (int64_t m = t * nv; m < (t + 1) * nv; ++m) {
      dot += dnum[m] * out[m];
      dnum[m] *= scale;
    }
    w.dden[t] = -sum_lanes(dot) * scale;
  }
}

template <class A>
void backward_queries(BackwardTile<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                      int64_t h, int64_t t0) {
  using V = Vec<A>;
  Tile<A>& tile = w.tile;
  const GatedRelaParams& f = p.forward;
  const int64_t D = f.D, Dp = tile.Dp;
  // S_t dnum_t with S transposed: rows are value dims, lanes are keys.
  scan<A, false>(tile.values + (f.W - 1) * Dp, tile.rot_k, w.dnum, w.transposed, w.drot, tile.n, D);
  rotate_rows<true>(tile, w.drot, w.dphi);
  const int64_t nv = Dp / kLanes<A>;
  V* z = reinterpret_cast<V*>(w.k_sum_start);
  V* dphi = reinterpret_cast<V*>(w.dphi);
  const V* phi_k = reinterpret_cast<const V*>(tile.phi_k);
  for (int t = 0; t < tile.n; ++t) {
    for (int64_t m = 0; m < nv; ++m) {
      z[m] += phi_k[t * nv + m];
      dphi[t * nv + m] += w.dden[t] * z[m];
    }
  }
  scale_by_slope(w.dphi, tile.phi_q, tile.n * Dp);
  store_keys(w.dphi, Dp, p.dq, f.dtype, span, t0, tile.n, h, D);
}

template <class A>
void backward_keys(BackwardTile<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                   int64_t h, int64_t t0) {
  using V = Vec<A>;
  Tile<A>& tile = w.tile;
  const GatedRelaParams& f = p.forward;
  const int64_t D = f.D, Dp = tile.Dp;
  const A* values = tile.values + (f.W - 1) * Dp;
  const bool has_base = w.later.has_base;
  transpose(w.later.kv, w.transposed, D, Dp);
  if (has_base) transpose(w.later.kv_base, w.transposed_base, D, Dp);
  scan<A, true>(w.dnum, tile.rot_q, values, w.transposed, has_base ? w.transposed_base : nullptr,
                w.drot, tile.n, D);  // T_t v_t
  scan<A, true>(tile.rot_q, w.dnum, tile.rot_k, w.later.kv, has_base ? w.later.kv_base : nullptr,
                w.dvalues, tile.n, D);  // T_t^T R phi(k_t)
  rotate_rows<true>(tile, w.drot, w.dphi);
  const int64_t nv = Dp / kLanes<A>;
  V* y = reinterpret_cast<V*>(w.later.k_sum);
  const V* y_base = reinterpret_cast<const V*>(w.later.k_sum_base);
  V* dphi = reinterpret_cast<V*>(w.dphi);
  const V* phi_q = reinterpret_cast<const V*>(tile.phi_q);
  for (int t = tile.n - 1; t >= 0; --t) {
    for (int64_t m = 0; m < nv; ++m) {
      y[m] += w.dden[t] * phi_q[t * nv + m];
      dphi[t * nv + m] += y_base[m] + y[m];
    }
  }
  scale_by_slope(w.dphi, tile.phi_k, tile.n * Dp);
  store_keys(w.dphi, Dp, p.dk, f.dtype, span, t0, tile.n, h, D);
  moved_on(w.later, tile.n, Dp);
}

// pre_t = bias + sum_j weight_j v_{t-W+1+j}, so v_t feeds pre_{t+W-1-j} through weight_j.
template <class A>
void backward_conv(BackwardTile<A>& w, const GatedRelaParams& p) {
  using V = Vec<A>;
  const int64_t nv = w.tile.Dp / kLanes<A>, W = p.W;
  V* dv = reinterpret_cast<V*>(w.dvalues);
  const V* dpre = reinterpret_cast<const V*>(w.dpre);
  const V* values = reinterpret_cast<const V*>(w.tile.values);
  for (int64_t m = 0; m < nv; ++m) {
    for (int64_t j = 0; j < W; ++j) {
      const V weight = reinterpret_cast<const V*>(w.tile.weight)[j * nv + m];
      V dweight = {};
      for (int t = 0; t < w.tile.n; ++t) {
        dv[t * nv + m] += weight * dpre[(t + W - 1 - j) * nv + m];
        dweight += dpre[t * nv + m] * values[(t + j) * nv + m];
      }
      reinterpret_cast<V*>(w.dweight)[j * nv + m] += dweight;
    }
    V dbias = {};
    for (int t = 0; t < w.tile.n; ++t) dbias += dpre[t * nv + m];
    reinterpret_cast<V*>(w.dbias)[m] += dbias;
  }
}

// The final conv state holds the last W - 1 values: its gradient goes back to them.
template <class A>
const A* grad_final_conv(const GatedRelaBackwardParams& p, int64_t b, int64_t h, int64_t m) {
  if (p.grad_final.conv == nullptr) return nullptr;
  const GatedRelaParams& f = p.forward;
  return static_cast<const A*>(p.grad_final.conv) + b * p.grad_final.conv_stride + m * f.H * f.D +
         h * f.D;
}

template <class A>
void add_grad_final_conv(BackwardTile<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                         int64_t b, int64_t h, int64_t t0) {
  const int64_t past = p.forward.W - 1;
  for (int64_t m = 0; m < past; ++m) {
    const int64_t t = span.length + m - past - t0;
    const A* from = grad_final_conv<A>(p, b, h, m);
    if (from == nullptr || t < 0 || t >= w.tile.n) continue;
    for (int64_t d = 0; d < p.forward.D; ++d) w.dvalues[t * w.tile.Dp + d] += from[d];
  }
}

template <class A>
void store_grad_initial(BackwardTile<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                        int64_t b, int64_t h) {
  if (p.grad_initial.kv == nullptr) return;
  const GatedRelaParams& f = p.forward;
  const int64_t Dp = w.tile.Dp;
  store_sum(w.later, p.grad_initial, b, h, f.D, Dp);
  for (int64_t r = 0; r < f.W - 1; ++r) {
    A* to = static_cast<A*>(p.grad_initial.conv) + b * p.grad_initial.conv_stride + r * f.H * f.D +
            h * f.D;
    const A* from = r >= span.length ? grad_final_conv<A>(p, b, h, r - span.length) : nullptr;
    for (int64_t d = 0; d < f.D; ++d) {
      A sum = from ? from[d] : A(0);
      for (int64_t j = 0; j <= r && f.conv_weight; ++j) {
        sum += w.tile.weight[j * Dp + d] * w.dpre[(r - j) * Dp + d];
      }
      to[d] = sum;
    }
  }
}

template <class A>
void load_saved(BackwardTile<A>& w, const GatedRelaParams& p, int64_t chunk, int64_t h) {
  const int64_t D = p.D, Dp = w.tile.Dp;
  const A* kv = static_cast<const A*>(p.saved_kv) + (chunk * p.H + h) * D * D;
  const A* k_sum = static_cast<const A*>(p.saved_k_sum) + (chunk * p.H + h) * D;
  RunningState<A>& state = w.tile.state;
  clear(state, Dp);
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) state.kv[i * Dp + j] = kv[i * D + j];
    state.k_sum[i] = w.k_sum_start[i] = k_sum[i];
  }
}

template <class A>
void backward_chunk(BackwardTile<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                    int64_t b, int64_t h, int64_t t0, int n, int64_t chunk) {
  const GatedRelaParams& f = p.forward;
  Tile<A>& tile = w.tile;
  const int64_t D = f.D, Dp = tile.Dp, past = f.W - 1;
  const int64_t position = (f.initial.position ? f.initial.position[b] : 0) + t0;
  load_saved(w, f, chunk, h);
  transpose(tile.state.kv, w.transposed, D, Dp);
  stage(tile, f, span, b, h, t0, n);
  scan<A, false>(tile.rot_k, tile.values + past * Dp, tile.rot_q, tile.state.kv, tile.num, n, D);
  normalise(tile, position + 1, f.eps);
  divide(tile);
  if (f.conv_weight) convolve(tile);
  if (f.gate.data) load_rows(w.gate, Dp, f.gate, f.dtype, span, t0, n, h, D);
  load_rows(w.dy, Dp, p.grad_out, f.dtype, span, t0, n, h, D);
  differentiate_rows(w, f);
  if (f.gate.data) store_rows(w.dgate, Dp, p.dgate, f.dtype, span, t0, n, h, D);
  backward_queries(w, p, span, h, t0);
  backward_keys(w, p, span, h, t0);
  if (f.conv_weight) backward_conv(w, f);
  add_grad_final_conv(w, p, span, b, h, t0);
  store_rows(w.dvalues, Dp, p.dv, f.dtype, span, t0, n, h, D);
}

template <class A>
void backward_one(const GatedRelaBackwardParams& p, int64_t b, int64_t h, BackwardTile<A>& w) {
  const GatedRelaParams& f = p.forward;
  const Span span = span_of(f, b);
  const int64_t Dp = w.tile.Dp, past = f.W - 1;
  clear(w.later, Dp);
  __builtin_memset(w.dpre, 0, std::size_t((kChunk + past) * Dp) * sizeof(A));
  if (p.grad_final.kv) {
    load_state(w.later.kv_base, w.later.k_sum_base, p.grad_final, b, h, f.D, Dp);
    w.later.has_base = true;
  }

  const int64_t chunks = (span.length + kChunk - 1) / kChunk;
  for (int64_t c = chunks - 1; c >= 0; --c) {
    const int64_t t0 = c * kChunk;
    const int n = int(span.length - t0 < kChunk ? span.length - t0 : kChunk);
    if (c < chunks - 1) {
      // The two ranges overlap where W - 1 > kChunk.
      __builtin_memmove(w.dpre + kChunk * Dp, w.dpre, std::size_t(past * Dp) * sizeof(A));
    }
    backward_chunk(w, p, span, b, h, t0, n, first_chunk(f, b) + c);
  }
  store_grad_initial(w, p, span, b, h);
  if (f.lengths) {
    for (const Rows* rows : {&p.dq, &p.dk, &p.dv, &p.dgate}) {
      zero_rows<A>(*rows, f.dtype, span, span.length, f.L, h, f.D);
    }
  }
}

// One group of consecutive sequences adds up its share of the weight gradients: the sums' order
// depends on B alone, never on the number of threads.
template <class A>
void backward_group(const GatedRelaBackwardParams& p, int64_t group, int64_t h,
                    BackwardTile<A>& w) {
  const GatedRelaParams& f = p.forward;
  const int64_t Dp = w.tile.Dp;
  load_conv(w.tile, f, h);
  for (int64_t i = 0; i < f.W * Dp; ++i) w.dweight[i] = A(0);
  for (int64_t d = 0; d < Dp; ++d) w.dbias[d] = A(0);
  const int64_t end = f.B * (group + 1) / p.groups;
  for (int64_t b = f.B * group / p.groups; b < end; ++b) backward_one(p, b, h, w);
  if (f.conv_weight == nullptr) return;
  const int64_t channel = (group * f.H + h) * f.D;
  for (int64_t d = 0; d < f.D; ++d) {
    for (int64_t j = 0; j < f.W; ++j) {
      static_cast<A*>(p.dweight_partial)[(channel + d) * f.W + j] = w.dweight[j * Dp + d];
    }
    static_cast<A*>(p.dbias_partial)[channel + d] = w.dbias[d];
  }
}

template <class A>
void backward_range(const GatedRelaBackwardParams& p, int64_t begin, int64_t end) {
  BackwardTile<A> w;
  with_scratch([&](Scratch& scratch) { lay_out(w, scratch, p.forward); },
               [&] {
                 for (int64_t i = begin; i < end; ++i) {
                   backward_group(p, i / p.forward.H, i % p.forward.H, w);
                 }
               });
}

void gated_rela_backward(const GatedRelaBackwardParams& p, int64_t begin, int64_t end) {
  if (p.forward.dtype == DType::kDouble) {
    backward_range<double>(p, begin, end);
  } else {
    backward_range<float>(p, begin, end);
  }
}
