// gated_rela forward: y = SiLU(gate) * (num / den + SiLU(conv(v))). Included by every level file.

// y of kItems items from num.
template <class A, int kN, int kW, bool kConv, bool kGate, int kItems>
RECGRELA_INLINE void finish_items(const Chunk<A>& c, const Source<A>& gate, const Sink<A>& out,
                                  int t) {
  constexpr int64_t L = kLanes<A>;
  const int64_t nv = kN ? kN : c.Dp / L, D = kN ? kN * L : c.D;
  const Source<A> num{c.num, nv * L};
  const auto den = spread<A, kItems>(c.den, t), scale = spread<A, kItems>(c.scale, t);
  if (kGate) prefetch_rows<false, kItems>(gate, t + c.ahead, D);
  prefetch_rows<true, kItems>(out, t + c.ahead, D);
  for (int64_t m = 0; m < nv; ++m) {
    auto y = divided(load_pack<A, kItems>(num, t, m), den, scale);
    if (kConv) y = y + silu<A>(convolved<A, kW, kItems>(c, nv, t, m));
    if (kGate) y = y * silu<A>(load_pack<A, kItems>(gate, t, m));
    store_pack<A, kItems>(y, out, t, m);
  }
}

// y of a chunk from num.
template <class A, int kN, int kW, bool kConv, bool kGate>
RECGRELA_NOINLINE void finish_chunk(const Chunk<A> c, const Source<A> gate, const Sink<A> out) {
  in_groups(c.n, [&](int t, auto count) RECGRELA_INLINE_LAMBDA {
    finish_items<A, kN, kW, kConv, kGate, count.value>(c, gate, out, t);
  });
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
  set_rotation(c.rotation, t0 / kChunk, position - t0, n);
  read_values(c, p, span, b, h, t0);
  map_keys<A, kN, kTail, false>(c, q, k, position + 1, p.eps);
  scan<false>(rows_of(c.rot_k, c), values_of(c), rows_of(c.rot_q, c), c.state.kv,
              c.state.has_base ? c.state.kv_base : nullptr, c.num, n, D, Dp);
  moved_on(c.state, n, Dp);
  Source<A> gate{};
  if (p.gate.data) gate = read_rows(w.gate, Dp, p.gate, p.dtype, span, t0, n, h, D);
  const Sink<A> out = open_rows(w.out, Dp, p.out, p.dtype, span, t0, h, D);
  finish_chunk<A, kN>(c, p, gate, out);
  finish_rows(w.out, out, Dp, p.out, p.dtype, span, t0, n, h, D);
}

// Items [t0, end) of one sequence and head, whose sums so far the state holds; t0 is the start of a
// segment.
template <class A, int kN, bool kTail>
void forward_items(ForwardRows<A>& w, const GatedRelaParams& p, const Span& span, int64_t b,
                   int64_t h, int64_t t0, int64_t end) {
  Chunk<A>& c = w.chunk;
  const int64_t D = p.D, start = p.initial.position ? p.initial.position[b] : 0;
  const int64_t slot = p.saved_kv ? first_chunk(p, b) : 0, first = t0;
  for (; t0 < end; t0 += kChunk) {
    const int64_t chunk = t0 / kChunk;
    c.n = int(end - t0 < kChunk ? end - t0 : kChunk);
    if (t0 > first && t0 % kSegment == 0) next_segment(c.state, c.Dp);
    if (p.saved_kv) {
      const int64_t at = (slot + chunk) * p.H + h;
      store_sum(c.state, static_cast<A*>(p.saved_kv) + at * D * D,
                static_cast<A*>(p.saved_k_sum) + at * D, D, c.Dp);
    }
    turn_chunk<false>(c.rotation, chunk, start + t0);
    forward_chunk<A, kN, kTail>(w, p, span, b, h, t0, start + t0);
  }
}

// What follows the last item.
template <class A>
void finish_sequence(Chunk<A>& c, const GatedRelaParams& p, const Span& span, int64_t b,
                     int64_t h) {
  if (p.lengths) zero_rows<A>(p.out, p.dtype, span, span.length, p.L, h, p.D);
  if (p.final.kv) {
    store_state(c.state, p.final, b, h, p.D, c.Dp);
    store_last_values(c, p, span, b, h);
  }
}

template <class A, int kN, bool kTail>
void forward_one(ForwardRows<A>& w, const GatedRelaParams& p, int64_t b, int64_t h) {
  Chunk<A>& c = w.chunk;
  const Span span = span_of(p, b);
  load_head(c, p, h);
  clear(c.state, c.Dp, span.length > kSegment);
  if (p.initial.kv) load_state(c.state, p.initial, b, h, c.D, c.Dp);
  forward_items<A, kN, kTail>(w, p, span, b, h, 0, span.length);
  finish_sequence(c, p, span, b, h);
}

// The sums of the items before a segment, [D + 1, D].
template <class A>
A* sums_before(const GatedRelaParams& p, int64_t sequence, int64_t segment) {
  return static_cast<A*>(p.segment_sums) + (sequence * p.segments + segment) * (p.D + 1) * p.D;
}

// One segment of forward_one, with the same bits.
template <class A, int kN, bool kTail>
void forward_segment(ForwardRows<A>& w, const GatedRelaParams& p, int64_t b, int64_t h,
                     int64_t segment) {
  Chunk<A>& c = w.chunk;
  const Span span = span_of(p, b);
  const int64_t t0 = segment * kSegment;
  if (t0 >= span.length && t0 > 0) return;
  const int64_t end = span.length - t0 < kSegment ? span.length : t0 + kSegment;
  load_head(c, p, h);
  clear(c.state, c.Dp);
  if (segment > 0 || p.initial.kv) {
    const A* before = sums_before<A>(p, b * p.H + h, segment);
    start_from(c.state, before, before + c.D * c.D, c.D, c.Dp);
  }
  forward_items<A, kN, kTail>(w, p, span, b, h, t0, end);
  if (end == span.length) finish_sequence(c, p, span, b, h);
}

// The sums of one segment's items alone, to where those before the next segment will stand.
template <class A, int kN, bool kTail>
void sum_segment(ForwardRows<A>& w, const GatedRelaParams& p, int64_t b, int64_t h,
                 int64_t segment) {
  Chunk<A>& c = w.chunk;
  const Span span = span_of(p, b);
  const int64_t D = c.D, Dp = c.Dp, t0 = segment * kSegment, end = t0 + kSegment;
  if (segment + 1 == p.segments || end >= span.length) return;
  const int64_t start = p.initial.position ? p.initial.position[b] : 0;
  load_head(c, p, h);
  clear(c.state, Dp, true);
  c.state.has_base = segment > 0 || p.initial.kv;
  c.n = kChunk;
  for (int64_t t = t0; t < end; t += kChunk) {
    const Source<A> k = read_rows(c.k, Dp, p.k, p.dtype, span, t, c.n, h, D);
    turn_chunk<false>(c.rotation, t / kChunk, start + t);
    set_rotation(c.rotation, t / kChunk, start, c.n);
    read_values(c, p, span, b, h, t);
    map_keys<A, kN, kTail, false>(c, k, k, start + t + 1, p.eps);
    scan<false, false>(rows_of(c.rot_k, c), values_of(c), rows_of(c.rot_k, c), c.state.kv, nullptr,
                       c.num, c.n, D, Dp);
    moved_on(c.state, c.n, Dp);
  }
  finish_segment(c.state, Dp);
  A* to = sums_before<A>(p, b * p.H + h, segment + 1);
  for (int64_t i = 0; i < D; ++i) copy_row(c.state.kv_own + i * Dp, to + i * D, D);
  copy_row(c.state.k_sum_own, to + D * D, D);
}

template <class A, class Body>
void with_forward_rows(const GatedRelaParams& p, Body&& body) {
  ForwardRows<A> w;
  const auto layout = [&](Scratch& scratch) {
    lay_out(w.chunk, scratch, p, false);
    w.gate = scratch.take<A>(kChunk * w.chunk.Dp);
    w.out = scratch.take<A>(kChunk * w.chunk.Dp);
  };
  with_scratch(layout, [&] {
    prepare(w.chunk);
    with_width<A>(p.D, [&](auto vectors, auto tail) { body(w, vectors, tail); });
  });
}

template <class A>
void forward_range(const GatedRelaParams& p, int64_t begin, int64_t end) {
  with_forward_rows<A>(p, [&](ForwardRows<A>& w, auto vectors, auto tail) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.segments == 0) {
        forward_one<A, vectors.value, tail.value>(w, p, i / p.H, i % p.H);
      } else {
        const int64_t pair = i / p.segments;
        forward_segment<A, vectors.value, tail.value>(w, p, pair / p.H, pair % p.H, i % p.segments);
      }
    }
  });
}

template <class A>
void sum_range(const GatedRelaParams& p, int64_t begin, int64_t end) {
  with_forward_rows<A>(p, [&](ForwardRows<A>& w, auto vectors, auto tail) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / p.segments;
      sum_segment<A, vectors.value, tail.value>(w, p, pair / p.H, pair % p.H, i % p.segments);
    }
  });
}

void segment_sums(const GatedRelaParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    sum_range<double>(p, begin, end);
  } else {
    sum_range<float>(p, begin, end);
  }
}

void gated_rela(const GatedRelaParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    forward_range<double>(p, begin, end);
  } else {
    forward_range<float>(p, begin, end);
  }
}
