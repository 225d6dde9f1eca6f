// gated_rela forward: y = SiLU(gate) * (num / den + SiLU(conv(v))). Included by every level file.

// y of a chunk from num.
template <class A, int kN, int kW, bool kConv, bool kGate>
RECGRELA_NOINLINE void finish_chunk(const Chunk<A>& c, const Source<A>& gate, const Sink<A>& out) {
  constexpr int64_t L = kLanes<A>;
  const int64_t nv = kN ? kN : c.Dp / L;
  for (int t = 0; t < c.n; ++t) {
    const A scale = c.scale[t];
    if (kGate) prefetch_row<false>(gate.row(t + c.ahead), c.D);
    prefetch_row<true>(out.row(t + c.ahead), c.D);
    for (int64_t m = 0; m < nv; ++m) {
      Vec<A> y = load_vector(c.num + (t * nv + m) * L) * scale;
      if (kConv) y += silu<A>(convolved<A, kN, kW>(c, nv, t, m));
      if (kGate) y *= silu<A>(load_vector(gate.row(t) + m * L));
      store_vector(y, out.row(t) + m * L);
    }
  }
}

template <class A, int kN>
void finish_chunk(const Chunk<A>& c, const GatedRelaParams& p, const Source<A>& gate,
                  const Sink<A>& out) {
  const bool has_gate = p.gate.data != nullptr;
  if (p.conv_weight == nullptr) {
    return has_gate ? finish_chunk<A, kN, 0, false, true>(c, gate, out)
                    : finish_chunk<A, kN, 0, false, false>(c, gate, out);
  }
  if (c.W == 4 && has_gate) return finish_chunk<A, kN, 4, true, true>(c, gate, out);
  if (has_gate) return finish_chunk<A, kN, 0, true, true>(c, gate, out);
  finish_chunk<A, kN, 0, true, false>(c, gate, out);
}

// The last W - 1 values of the history, items of the initial state included.
template <class A>
void store_last_values(Chunk<A>& c, const GatedRelaParams& p, const Span& span, int64_t b,
                       int64_t h) {
  load_past_values(c, p, span, b, h, span.length);
  for (int64_t r = 0; r < p.W - 1; ++r) {
    A* to = static_cast<A*>(p.final.conv) + b * p.final.conv_stride + r * p.H * p.D + h * p.D;
    __builtin_memcpy(to, c.value_rows + r * c.Dp, std::size_t(p.D) * sizeof(A));
  }
}

// Memory of one thread.
template <class A>
struct ForwardRows {
  Chunk<A> chunk;
  A *gate, *out;  // [kChunk, Dp]: copies of rows that cannot be used in place
};

template <class A, int kN, bool kTail>
void forward_chunk(ForwardRows<A>& w, const GatedRelaParams& p, const Span& span, int64_t b,
                   int64_t h, int64_t t0, int64_t position) {
  Chunk<A>& c = w.chunk;
  const int64_t D = c.D, Dp = c.Dp;
  const int n = c.n;
  const Source<A> q = read_rows(c.q, Dp, p.q, p.dtype, span, t0, n, h, D);
  const Source<A> k = read_rows(c.k, Dp, p.k, p.dtype, span, t0, n, h, D);
  fill_rotation(c.rotation, n);
  read_values(c, p, span, b, h, t0);
  map_keys<A, kN, kTail, false>(c, q, k, position + 1, p.eps);
  scan<false>(rows_of(c.rot_k, c), values_of(c), rows_of(c.rot_q, c), c.state.kv, c.num, n, D, Dp);
  if (c.state.has_base) add_base(rows_of(c.rot_q, c), c.state.kv_base, c.num, n, D, Dp);
  moved_on(c.state, n, Dp);
  Source<A> gate{};
  if (p.gate.data) gate = read_rows(w.gate, Dp, p.gate, p.dtype, span, t0, n, h, D);
  const Sink<A> out = open_rows(w.out, Dp, p.out, p.dtype, span, t0, h, D);
  finish_chunk<A, kN>(c, p, gate, out);
  finish_rows(w.out, out, Dp, p.out, p.dtype, span, t0, n, h, D);
}

template <class A, int kN, bool kTail>
void forward_one(ForwardRows<A>& w, const GatedRelaParams& p, int64_t b, int64_t h) {
  Chunk<A>& c = w.chunk;
  const Span span = span_of(p, b);
  const int64_t D = p.D, start = p.initial.position ? p.initial.position[b] : 0;
  load_head(c, p, h);
  clear(c.state, c.Dp);
  if (p.initial.kv) load_state(c.state, p.initial, b, h, D, c.Dp);
  const int64_t slot = p.saved_kv ? first_chunk(p, b) : 0;
  for (int64_t t0 = 0; t0 < span.length; t0 += kChunk) {
    const int64_t chunk = t0 / kChunk;
    c.n = int(span.length - t0 < kChunk ? span.length - t0 : kChunk);
    if (p.saved_kv) {
      const int64_t at = (slot + chunk) * p.H + h;
      store_sum(c.state, static_cast<A*>(p.saved_kv) + at * D * D,
                static_cast<A*>(p.saved_k_sum) + at * D, D, c.Dp);
    }
    turn_chunk<false>(c.rotation, chunk, start + t0);
    forward_chunk<A, kN, kTail>(w, p, span, b, h, t0, start + t0);
  }
  if (p.lengths) zero_rows<A>(p.out, p.dtype, span, span.length, p.L, h, D);
  if (p.final.kv) {
    store_state(c.state, p.final, b, h, D, c.Dp);
    store_last_values(c, p, span, b, h);
  }
}

template <class A>
void forward_range(const GatedRelaParams& p, int64_t begin, int64_t end) {
  ForwardRows<A> w;
  const auto layout = [&](Scratch& scratch) {
    lay_out(w.chunk, scratch, p, false);
    w.gate = scratch.take<A>(kChunk * w.chunk.Dp);
    w.out = scratch.take<A>(kChunk * w.chunk.Dp);
  };
  with_scratch(layout, [&] {
    prepare(w.chunk);
    with_width<A>(p.D, [&](auto vectors, auto tail) {
      for (int64_t i = begin; i < end; ++i) {
        forward_one<A, vectors.value, tail.value>(w, p, i / p.H, i % p.H);
      }
    });
  });
}

void gated_rela(const GatedRelaParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    forward_range<double>(p, begin, end);
  } else {
    forward_range<float>(p, begin, end);
  }
}
