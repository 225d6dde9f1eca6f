// gated_rela backward: one reverse sweep over the chunks of a sequence, from the states the forward
// saved at each chunk's start. Included by every level file.
//
// Forward:  num_t = S_t^T R phi(q_t),  den_t = phi(q_t).z_t + eps n_t,  o = num / den
//           y = SiLU(g) (o + a),  a = SiLU(pre),  pre = conv(v)
// With dO = SiLU(g) dy, dnum = dO / den, dden = -(dO.o) / den, and the sums over s >= t
//           T_t = sum R phi(q_s) dnum_s^T,   y_t = sum dden_s phi(q_s):
//           dphi(q_t) = R^T (S_t dnum_t) + dden_t z_t     dphi(k_t) = R^T (T_t v_t) + y_t
//           dv_t = T_t^T R phi(k_t) + transposed conv of dpre,   dpre = dO SiLU'(pre)
// S_t dnum_t and T_t v_t are scans over the transposed states, so no loop sums across lanes. T is
// kept in both forms from chunk to chunk.

// Memory of one thread.
template <class A>
struct BackwardRows {
  Chunk<A> chunk;
  A *gate, *dy, *out;         // [kChunk, Dp]: copies of rows that cannot be used in place
  A *dnum, *drot, *dvalues;   // [kChunk, Dp]
  A* dpre;                    // [kChunk + W-1, Dp]: behind row n-1 the rows of the later chunk
  A* dden;                    // [kChunk]
  RunningState<A> later;      // T and y
  A *later_t, *later_base_t;  // [Dp, Dp]: T transposed
  A* start_t;                 // [Dp, Dp]: S at the chunk's start, transposed
  A* z;                       // [Dp]
  A *dweight, *dbias;         // [W, Dp], [Dp]
};

template <class A>
void lay_out(BackwardRows<A>& w, Scratch& scratch, const GatedRelaParams& p) {
  lay_out(w.chunk, scratch, p, true);
  const int64_t Dp = w.chunk.Dp;
  for (A** rows : {&w.gate, &w.dy, &w.out, &w.dnum, &w.drot, &w.dvalues}) {
    *rows = scratch.take<A>(kChunk * Dp);
  }
  w.dpre = scratch.take<A>((kChunk + p.W - 1) * Dp);
  w.dden = scratch.take<A>(kChunk);
  lay_out(w.later, scratch, Dp);
  for (A** square : {&w.later_t, &w.later_base_t, &w.start_t}) *square = scratch.take<A>(Dp * Dp);
  w.z = scratch.take<A>(Dp);
  w.dweight = scratch.take<A>(p.W * Dp);
  w.dbias = scratch.take<A>(Dp);
}

// The transpose of from [D, D], rows `stride` apart, into rows of Dp.
template <class A>
void transpose(const A* from, int64_t stride, A* to, int64_t D, int64_t Dp) {
  constexpr int64_t kBlock = 8;  // of both, so that every line is used while it is in the cache
  for (int64_t i0 = 0; i0 < D; i0 += kBlock) {
    const int64_t end = i0 + kBlock < D ? i0 + kBlock : D;
    for (int64_t j = 0; j < D; ++j) {
      for (int64_t i = i0; i < end; ++i) to[j * Dp + i] = from[i * stride + j];
    }
  }
}

// From num, dy and the gate of kItems items to dgate, dpre, dnum, and dots, whose sums are dO . o.
template <class A, int kN, int kW, bool kConv, bool kGate, int kItems>
RECGRELA_INLINE void differentiate_items(const BackwardRows<A>& w, const Source<A>& gate,
                                         const Source<A>& dy, const Sink<A>& dgate, int t) {
  using P = Pack<A, kItems>;
  constexpr int64_t L = kLanes<A>;
  const Chunk<A>& c = w.chunk;
  const int64_t nv = kN ? kN : c.Dp / L, D = kN ? kN * L : c.D;
  const Source<A> num{c.num, nv * L};
  const Sink<A> dpre{w.dpre, nv * L}, dnum{w.dnum, nv * L}, dots{c.dots, L};
  const P den = spread<A, kItems>(c.den, t), scale = spread<A, kItems>(c.scale, t);
  prefetch_rows<false, kItems>(dy, t + c.ahead, D);
  if (kGate) prefetch_rows<false, kItems>(gate, t + c.ahead, D);
  if (kGate) prefetch_rows<true, kItems>(dgate, t + c.ahead, D);
  P dot{};
  for (int64_t m = 0; m < nv; ++m) {
    const P o = divided(load_pack<A, kItems>(num, t, m), den, scale);
    P d_o = load_pack<A, kItems>(dy, t, m), sum = o;
    SiluAndSlope<P> a{};
    if (kConv) {
      a = silu_and_slope<A>(convolved<A, kW, kItems>(c, nv, t, m));
      sum = sum + a.value;
    }
    if (kGate) {
      const SiluAndSlope<P> g = silu_and_slope<A>(load_pack<A, kItems>(gate, t, m));
      store_pack<A, kItems>(d_o * sum * g.slope, dgate, t, m);
      d_o = d_o * g.value;
    }
    if (kConv) store_pack<A, kItems>(d_o * a.slope, dpre, t, m);
    store_pack<A, kItems>(d_o * scale, dnum, t, m);
    dot = dot + d_o * o;
  }
  store_pack<A, kItems>(dot, dots, t, 0);
}

// From num, dy and the gate to dgate, dpre, dnum and dden.
template <class A, int kN, int kW, bool kConv, bool kGate>
RECGRELA_NOINLINE void differentiate_rows(const BackwardRows<A> w, const Source<A> gate,
                                          const Source<A> dy, const Sink<A> dgate) {
  const Chunk<A>& c = w.chunk;
  in_groups(c.n, [&](int t, auto count) RECGRELA_INLINE_LAMBDA {
    differentiate_items<A, kN, kW, kConv, kGate, count.value>(w, gate, dy, dgate, t);
  });
  sum_each(c.dots, w.dden, c.n);
  for (int t = 0; t < c.n; t += kLanes<A>) {  // whole vectors: all three hold kChunk numbers
    store_vector(-load_vector(w.dden + t) * load_vector(c.scale + t), w.dden + t);
  }
}

template <class A, int kN>
void differentiate_rows(BackwardRows<A>& w, const GatedRelaParams& p, const Source<A>& gate,
                        const Source<A>& dy, const Sink<A>& dgate) {
  const bool has_gate = p.gate.data != nullptr;
  if (p.conv_weight == nullptr) {
    return has_gate ? differentiate_rows<A, kN, 0, false, true>(w, gate, dy, dgate)
                    : differentiate_rows<A, kN, 0, false, false>(w, gate, dy, dgate);
  }
  if (p.W == 4 && has_gate) return differentiate_rows<A, kN, 4, true, true>(w, gate, dy, dgate);
  if (has_gate) return differentiate_rows<A, kN, 0, true, true>(w, gate, dy, dgate);
  differentiate_rows<A, kN, 0, true, false>(w, gate, dy, dgate);
}

// dq from drot = S_t dnum_t; z moves on from the chunk's start.
template <class A, int kN>
RECGRELA_NOINLINE void finish_queries(const BackwardRows<A> w, const Sink<A> dq) {
  constexpr int64_t L = kLanes<A>;
  const Chunk<A>& c = w.chunk;
  const int64_t nv = kN ? kN : c.Dp / L;
  for (int64_t m = 0; m < nv; ++m) {
    Vec<A> z = load_vector(w.z + m * L);
    for (int t = 0; t < c.n; ++t) {
      const int64_t at = (t * nv + m) * L;
      prefetch_row<true>(dq.row(t + c.ahead) + m * L, L);
      z += load_vector(c.phi_k + at);
      const Vec<A> turned =
          rotated<true, A>(load_vector(w.drot + at), load_vector(c.rotation.cosines + at),
                           load_vector(c.rotation.sines + at));
      const Vec<A> slope = slope_of<A>(load_vector(c.phi_q + at));
      store_vector((turned + z * w.dden[t]) * slope, dq.row(t) + m * L);
    }
  }
}

// dk from drot = T_t v_t; y moves on from the later items.
template <class A, int kN>
RECGRELA_NOINLINE void finish_keys(const BackwardRows<A> w, const Sink<A> dk) {
  constexpr int64_t L = kLanes<A>;
  const Chunk<A>& c = w.chunk;
  const int64_t nv = kN ? kN : c.Dp / L;
  for (int64_t m = 0; m < nv; ++m) {
    const Vec<A> base = load_vector(w.later.k_sum_base + m * L);
    Vec<A> y = load_vector(w.later.k_sum + m * L);
    for (int t = c.n - 1; t >= 0; --t) {
      const int64_t at = (t * nv + m) * L;
      prefetch_row<true>(dk.row(t + c.ahead) + m * L, L);
      y += load_vector(c.phi_q + at) * w.dden[t];
      const Vec<A> turned =
          rotated<true, A>(load_vector(w.drot + at), load_vector(c.rotation.cosines + at),
                           load_vector(c.rotation.sines + at));
      const Vec<A> slope = slope_of<A>(load_vector(c.phi_k + at));
      store_vector((turned + (y + base)) * slope, dk.row(t) + m * L);
    }
    store_vector(y, w.later.k_sum + m * L);
  }
}

// dv = dvalues and what goes through the convolution: pre_t = bias + sum_j weight_j v_{t-W+1+j}, so
// v_t feeds pre_{t+W-1-j} through weight_j.
template <class A, int kN, int kW>
RECGRELA_NOINLINE void backward_conv(const BackwardRows<A> w, const Sink<A> to) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const Chunk<A>& c = w.chunk;
  const int64_t nv = kN ? kN : c.Dp / L, W = kW ? kW : c.W;
  for (int64_t m = 0; m < nv; ++m) {
    const auto at = [&](int64_t row) { return (row * nv + m) * L; };
    if constexpr (kW > 0) {
      V weight[kW], dweight[kW], dbias = load_vector(w.dbias + m * L);
      for (int j = 0; j < kW; ++j) {
        weight[j] = load_vector(c.weight + at(j));
        dweight[j] = load_vector(w.dweight + at(j));
      }
      for (int t = 0; t < c.n; ++t) {
        V dv = load_vector(w.dvalues + at(t));
        const V dpre = load_vector(w.dpre + at(t));
        for (int j = 0; j < kW; ++j) {
          dv += weight[j] * load_vector(w.dpre + at(t + kW - 1 - j));
          dweight[j] += dpre * load_vector(c.values.row(t + j) + m * L);
        }
        dbias += dpre;
        store_vector(dv, to.row(t) + m * L);
      }
      for (int j = 0; j < kW; ++j) store_vector(dweight[j], w.dweight + at(j));
      store_vector(dbias, w.dbias + m * L);
    } else {
      for (int64_t j = 0; j < W; ++j) {
        const V weight = load_vector(c.weight + at(j));
        V dweight = load_vector(w.dweight + at(j));
        for (int t = 0; t < c.n; ++t) {
          store_vector(
              load_vector(w.dvalues + at(t)) + weight * load_vector(w.dpre + at(t + W - 1 - j)),
              w.dvalues + at(t));
          dweight += load_vector(w.dpre + at(t)) * load_vector(c.values.row(t + j) + m * L);
        }
        store_vector(dweight, w.dweight + at(j));
      }
      V dbias = load_vector(w.dbias + m * L);
      for (int t = 0; t < c.n; ++t) {
        dbias += load_vector(w.dpre + at(t));
        store_vector(load_vector(w.dvalues + at(t)), to.row(t) + m * L);
      }
      store_vector(dbias, w.dbias + m * L);
    }
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
void add_grad_final_conv(const BackwardRows<A>& w, const GatedRelaBackwardParams& p,
                         const Span& span, int64_t b, int64_t h, int64_t t0, const Sink<A>& dv) {
  const int64_t past = p.forward.W - 1;
  for (int64_t m = 0; m < past; ++m) {
    const int64_t t = span.length + m - past - t0;
    const A* from = grad_final_conv<A>(p, b, h, m);
    if (from == nullptr || t < 0 || t >= w.chunk.n) continue;
    for (int64_t d = 0; d < p.forward.D; ++d) dv.row(t)[d] += from[d];
  }
}

template <class A>
void store_grad_initial(BackwardRows<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                        int64_t b, int64_t h) {
  if (p.grad_initial.kv == nullptr) return;
  const GatedRelaParams& f = p.forward;
  const int64_t Dp = w.chunk.Dp;
  store_state(w.later, p.grad_initial, b, h, f.D, Dp);
  for (int64_t r = 0; r < f.W - 1; ++r) {
    A* to = static_cast<A*>(p.grad_initial.conv) + b * p.grad_initial.conv_stride + r * f.H * f.D +
            h * f.D;
    const A* from = r >= span.length ? grad_final_conv<A>(p, b, h, r - span.length) : nullptr;
    for (int64_t d = 0; d < f.D; ++d) {
      A sum = from ? from[d] : A(0);
      for (int64_t j = 0; j <= r && f.conv_weight; ++j) {
        sum += w.chunk.weight[j * Dp + d] * w.dpre[(r - j) * Dp + d];
      }
      to[d] = sum;
    }
  }
}

// S and z at the chunk's start, as the forward saved them. Columns behind D are made 0 again: a
// user's NaN times their 0 has left NaN there, which must not reach the next user.
template <class A>
void load_saved(BackwardRows<A>& w, const GatedRelaParams& p, int64_t slot, int64_t h) {
  const int64_t D = p.D, Dp = w.chunk.Dp;
  const A* kv = static_cast<const A*>(p.saved_kv) + (slot * p.H + h) * D * D;
  const A* k_sum = static_cast<const A*>(p.saved_k_sum) + (slot * p.H + h) * D;
  if (D < Dp) {
    clear(w.chunk.state.kv, Dp * Dp);
    clear(w.start_t, Dp * Dp);
    clear(w.chunk.state.k_sum, Dp);
    clear(w.z, Dp);
  }
  spread_rows(kv, w.chunk.state.kv, D, Dp);
  transpose(kv, D, w.start_t, D, Dp);
  __builtin_memcpy(w.chunk.state.k_sum, k_sum, std::size_t(D) * sizeof(A));
  __builtin_memcpy(w.z, k_sum, std::size_t(D) * sizeof(A));
}

// T and y of the later items move over this chunk's: dk and dvalues.
template <class A, int kN>
void backward_keys(BackwardRows<A>& w, const Sink<A>& dk) {
  const Chunk<A>& c = w.chunk;
  const int64_t n = c.n, D = c.D, Dp = c.Dp;
  const Source<A> dnum = rows_of(w.dnum, c), rot_q = rows_of(c.rot_q, c);
  const Source<A> rot_k = rows_of(c.rot_k, c), values = values_of(c);
  const bool has_base = w.later.has_base;
  scan<true>(dnum, rot_q, values, w.later_t, has_base ? w.later_base_t : nullptr, w.drot, n, D,
             Dp);  // T_t v_t
  scan<true>(rot_q, dnum, rot_k, w.later.kv, has_base ? w.later.kv_base : nullptr, w.dvalues, n, D,
             Dp);  // T_t^T R phi(k_t)
  finish_keys<A, kN>(w, dk);
  if (has_filled(w.later, c.n)) {
    join_base(w.later.kv_base, w.later.kv, Dp * Dp);
    join_base(w.later_base_t, w.later_t, Dp * Dp);
    join_base(w.later.k_sum_base, w.later.k_sum, Dp);
  }
}

template <class A, int kN, bool kTail>
void backward_chunk(BackwardRows<A>& w, const GatedRelaBackwardParams& p, const Span& span,
                    int64_t b, int64_t h, int64_t t0, int64_t position) {
  const GatedRelaParams& f = p.forward;
  Chunk<A>& c = w.chunk;
  const int64_t D = f.D, Dp = c.Dp;
  const int n = c.n;
  const auto read = [&](A* copy, const Rows& rows) {
    return read_rows(copy, Dp, rows, f.dtype, span, t0, n, h, D);
  };
  const auto write = [&](const Rows& rows, auto&& body) {
    const Sink<A> sink = open_rows(w.out, Dp, rows, f.dtype, span, t0, h, D);
    body(sink);
    finish_rows(w.out, sink, Dp, rows, f.dtype, span, t0, n, h, D);
  };
  load_saved(w, f, first_chunk(f, b) + t0 / kChunk, h);
  set_rotation(c.rotation, t0 / kChunk, position - t0, n);
  read_values(c, f, span, b, h, t0);
  map_keys<A, kN, kTail, true>(c, read(c.q, f.q), read(c.k, f.k), position + 1, f.eps);
  scan<false>(rows_of(c.rot_k, c), values_of(c), rows_of(c.rot_q, c), c.state.kv, nullptr, c.num, n,
              D, Dp);

  const Source<A> dy = read(w.dy, p.grad_out);
  if (f.gate.data) {
    const Source<A> gate = read(w.gate, f.gate);
    write(p.dgate, [&](const Sink<A>& dgate) { differentiate_rows<A, kN>(w, f, gate, dy, dgate); });
  } else {
    differentiate_rows<A, kN>(w, f, dy, dy, Sink<A>{});
  }
  // S_t dnum_t with S transposed: rows are value dims, lanes are keys.
  scan<false>(values_of(c), rows_of(c.rot_k, c), rows_of(w.dnum, c), w.start_t, nullptr, w.drot, n,
              D, Dp);
  write(p.dq, [&](const Sink<A>& dq) { finish_queries<A, kN>(w, dq); });
  write(p.dk, [&](const Sink<A>& dk) { backward_keys<A, kN>(w, dk); });
  if (f.conv_weight == nullptr) {
    return store_rows(w.dvalues, Dp, p.dv, f.dtype, span, t0, n, h, D);
  }
  write(p.dv, [&](const Sink<A>& dv) {
    f.W == 4 ? backward_conv<A, kN, 4>(w, dv) : backward_conv<A, kN, 0>(w, dv);
    add_grad_final_conv(w, p, span, b, h, t0, dv);
  });
}

template <class A, int kN, bool kTail>
void backward_one(BackwardRows<A>& w, const GatedRelaBackwardParams& p, int64_t b, int64_t h) {
  const GatedRelaParams& f = p.forward;
  Chunk<A>& c = w.chunk;
  const Span span = span_of(f, b);
  const int64_t Dp = c.Dp, past = f.W - 1;
  clear(w.later, Dp);
  clear(w.later_t, Dp * Dp);
  clear(w.later_base_t, Dp * Dp);
  clear(w.dpre, (kChunk + past) * Dp);
  if (p.grad_final.kv) {
    load_state(w.later, p.grad_final, b, h, f.D, Dp);
    transpose(w.later.kv_base, Dp, w.later_base_t, f.D, Dp);
  }

  const int64_t start = f.initial.position ? f.initial.position[b] : 0;
  const int64_t chunks = (span.length + kChunk - 1) / kChunk;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t t0 = chunk * kChunk;
    c.n = int(span.length - t0 < kChunk ? span.length - t0 : kChunk);
    const bool last = chunk == chunks - 1, kept = is_kept(c.rotation, chunk, start);
    if (last && !kept) start_rotation(c.rotation, start + t0);
    if (!last && !kept) turn_chunk<true>(c.rotation, chunk, start + t0);
    if (!last) {
      // The two ranges overlap where W - 1 > kChunk.
      __builtin_memmove(w.dpre + kChunk * Dp, w.dpre, std::size_t(past * Dp) * sizeof(A));
    }
    backward_chunk<A, kN, kTail>(w, p, span, b, h, t0, start + t0);
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
template <class A, int kN, bool kTail>
void backward_group(BackwardRows<A>& w, const GatedRelaBackwardParams& p, int64_t group,
                    int64_t h) {
  const GatedRelaParams& f = p.forward;
  const int64_t Dp = w.chunk.Dp;
  load_head(w.chunk, f, h);
  clear(w.dweight, f.W * Dp);
  clear(w.dbias, Dp);
  const int64_t end = f.B * (group + 1) / p.groups;
  for (int64_t b = f.B * group / p.groups; b < end; ++b) backward_one<A, kN, kTail>(w, p, b, h);
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
  BackwardRows<A> w;
  with_scratch([&](Scratch& scratch) { lay_out(w, scratch, p.forward); },
               [&] {
                 prepare(w.chunk);
                 with_width<A>(p.forward.D, [&](auto vectors, auto tail) {
                   for (int64_t i = begin; i < end; ++i) {
                     backward_group<A, vectors.value, tail.value>(w, p, i / p.forward.H,
                                                                  i % p.forward.H);
                   }
                 });
               });
}

void gated_rela_backward(const GatedRelaBackwardParams& p, int64_t begin, int64_t end) {
  if (p.forward.dtype == DType::kDouble) {
    backward_range<double>(p, begin, end);
  } else {
    backward_range<float>(p, begin, end);
  }
}
