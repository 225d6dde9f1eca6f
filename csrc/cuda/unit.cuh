// One sequence's head, the unit of work of every kernel, and its rows.
#pragma once
#include "common.cuh"

namespace recgrela::cuda {

// What a lane works on: unit (b, h) and its items [begin, end), one segment of the sequence.
struct Unit {
  int64_t index, b, h, begin, end, position;
  Span span;
  bool real, last;  // last: this segment ends the sequence
};

// Segments are whole chunks, as long as each other but for the last.
RECGRELA_DEVICE Unit unit_of(const GatedRelaParams& p, int64_t index, int64_t segment,
                             int64_t segments) {
  Unit u{};
  u.real = index < p.B * p.H;
  u.index = u.real ? index : 0;
  u.b = u.index / p.H;
  u.h = u.index % p.H;
  u.last = segment == segments - 1;
  if (!u.real) return u;
  u.span = span_of(p, u.b);
  u.position = position_of(p, u.b);
  if (!u.span.sound) return u;
  const int64_t chunks = (u.span.length + kChunk - 1) / kChunk;
  const int64_t share = (chunks + segments - 1) / segments * kChunk;
  u.begin = segment * share;  // a whole chunk even where it is behind the sequence's end
  const int64_t end = u.last ? u.span.length : clamp(u.begin + share, 0, u.span.length);
  u.end = end > u.begin ? end : u.begin;
  return u;
}

// v of the channels from `channel` on, t items into the sequence; items before it are the state's.
template <class S, int E>
RECGRELA_DEVICE void value_at(const GatedRelaParams& p, const Unit& u, int64_t t, int64_t channel,
                              Accumulate<S>* to) {
  using A = Accumulate<S>;
  if (t >= 0) {
    const S* from = row_at<const S>(p.v, u.span, t, u.h) + channel;
#pragma unroll
    for (int e = 0; e < E; ++e) to[e] = widen(from[e]);
    return;
  }
  const int64_t row = p.W - 1 + t;
  if (p.initial.conv == nullptr || row < 0) {
#pragma unroll
    for (int e = 0; e < E; ++e) to[e] = A(0);
    return;
  }
  const A* from = static_cast<const A*>(p.initial.conv) + u.b * p.initial.conv_stride +
                  row * p.H * p.D + u.h * p.D + channel;
#pragma unroll
  for (int e = 0; e < E; ++e) to[e] = from[e];
}

// The last W - 1 values of the history, for the final state.
template <class S, int E>
RECGRELA_DEVICE void store_last_values(const GatedRelaParams& p, const Unit& u, int channel) {
  for (int64_t r = 0; r < p.W - 1; ++r) {
    float* to = static_cast<float*>(p.final.conv) + u.b * p.final.conv_stride + r * p.H * p.D +
                u.h * p.D + channel;
    value_at<S, E>(p, u, u.span.length - (p.W - 1) + r, channel, to);
    for (int e = 0; e < E && !u.span.sound; ++e) to[e] = NAN;
  }
}

// Rows [from, to) of this lane's channels, all set to `value`.
template <class S, int E>
RECGRELA_DEVICE void fill_rows(const Rows& rows, const Unit& u, int64_t channel, int64_t from,
                               int64_t to, Accumulate<S> value) {
  if (rows.data == nullptr || !u.real) return;
  for (int64_t t = from; t < to; ++t) {
    S* row = row_at<S>(rows, u.span, t, u.h) + channel;
#pragma unroll
    for (int e = 0; e < E; ++e) narrow(value, row + e);
  }
}

}  // namespace recgrela::cuda
