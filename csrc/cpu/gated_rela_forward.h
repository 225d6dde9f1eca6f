// gated_rela forward: y = SiLU(gate) * (num / den + SiLU(conv(v))). Included by every level file.

// The last W - 1 values of the history, items of the initial state included.
template <class A>
void store_last_values(const GatedRelaParams& p, const Span& span, int64_t b, int64_t h,
                       Tile<A>& tile) {
  load_past_values(tile, p, span, b, span.length, h);
  for (int64_t r = 0; r < p.W - 1; ++r) {
    A* to = static_cast<A*>(p.final.conv) + b * p.final.conv_stride + r * p.H * p.D + h * p.D;
    for (int64_t d = 0; d < p.D; ++d) to[d] = tile.values[r * tile.Dp + d];
  }
}

template <class A>
void forward_one(const GatedRelaParams& p, int64_t b, int64_t h, Tile<A>& tile, A* gate) {
  const Span span = span_of(p, b);
  const int64_t D = p.D, Dp = tile.Dp;
  const int64_t position = p.initial.position ? p.initial.position[b] : 0;
  RunningState<A>& state = tile.state;
  clear(state, Dp);
  if (p.initial.kv) {
    load_state(state.kv_base, state.k_sum_base, p.initial, b, h, D, Dp);
    state.has_base = true;
  }
  load_conv(tile, p, h);

  int64_t chunk = p.saved_kv ? first_chunk(p, b) : 0;
  for (int64_t t0 = 0; t0 < span.length; t0 += kChunk, ++chunk) {
    const int n = int(span.length - t0 < kChunk ? span.length - t0 : kChunk);
    if (p.saved_kv) {
      A* kv = static_cast<A*>(p.saved_kv) + (chunk * p.H + h) * D * D;
      A* k_sum = static_cast<A*>(p.saved_k_sum) + (chunk * p.H + h) * D;
      for (int64_t i = 0; i < D; ++i) {
        for (int64_t j = 0; j < D; ++j) {
          kv[i * D + j] = state.kv_base[i * Dp + j] + state.kv[i * Dp + j];
        }
        k_sum[i] = state.k_sum_base[i] + state.k_sum[i];
      }
    }
    stage(tile, p, span, b, h, t0, n);
    scan<A, false>(tile.rot_k, tile.values + (p.W - 1) * Dp, tile.rot_q, state.kv,
                   state.has_base ? state.kv_base : nullptr, tile.num, n, D);
    normalise(tile, position + t0 + 1, p.eps);
    moved_on(state, n, Dp);
    divide(tile);
    if (p.conv_weight) {
      convolve(tile);
      add_silu(tile.num, tile.augmented, n * Dp);
    }
    if (p.gate.data) {
      load_rows(gate, Dp, p.gate, p.dtype, span, t0, n, h, D);
      scale_by_silu(tile.num, gate, n * Dp);
    }
    store_rows(tile.num, Dp, p.out, p.dtype, span, t0, n, h, D);
  }
  if (p.lengths) zero_rows<A>(p.out, p.dtype, span, span.length, p.L, h, D);
  if (p.final.kv) {
    store_sum(state, p.final, b, h, D, Dp);
    store_last_values(p, span, b, h, tile);
  }
}

template <class A>
void forward_range(const GatedRelaParams& p, int64_t begin, int64_t end) {
  Tile<A> tile;
  A* gate;
  with_scratch(
      [&](Scratch& scratch) {
        lay_out(tile, scratch, p);
        gate = scratch.take<A>(kChunk * tile.Dp);
      },
      [&] {
        for (int64_t i = begin; i < end; ++i) forward_one(p, i / p.H, i % p.H, tile, gate);
      });
}

void gated_rela(const GatedRelaParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kDouble) {
    forward_range<double>(p, begin, end);
  } else {
    forward_range<float>(p, begin, end);
  }
}
