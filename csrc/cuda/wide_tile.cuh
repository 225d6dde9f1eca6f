// How the warps of a block share out one sequence's head ("unit") where its running sum is too
// large for the registers of one warp. A block works on one unit alone, with a thread a channel, so
// every
// __syncthreads is a barrier of the unit.
//
// Warp w owns the columns 32 w .. 32 w + 31 of the running sum S [D, D]. Its lane (a, b), number
// 4 a + b, holds the R rows R a .. and the 8 columns 32 w + 8 b .. of it in registers, and of every
// row the channel 32 w + 8 b + a: it loads, maps, turns and stores that one alone.
//
//   D    warps  R   S per lane
//   64     2     8    8 x 8
//   128    4    16   16 x 8
//
// S^T c is complete inside a warp; S d is summed over the warps, through shared memory.
#pragma once
#include "warp_tile.cuh"

namespace recgrela::cuda {

template <int D_>
struct WideTile {
  static constexpr int D = D_, warps = D / 32, threads = D, R = D / 8, C = 8;

  int thread, lane, warp, row, column, channel;

  RECGRELA_DEVICE explicit WideTile(int number)
      : thread(number),
        lane(number % kWarp),
        warp(number / kWarp),
        row(lane / 4 * R),
        column(warp * 32 + lane % 4 * C),
        channel(column + lane / 4) {}

  // Element [i, 4 half ..] of this lane's part of a [D, D] in memory, and of one that no lane but
  // this reads: there neighbouring lanes are neighbours.
  RECGRELA_DEVICE int part(int i, int half) const { return (row + i) * D + column + 4 * half; }
  RECGRELA_DEVICE int own_part(int i, int half) const {
    return ((2 * i + half) * threads + thread) * 4;
  }
};

// This lane's part of a running sum.
template <class Tile>
struct WideSum {
  float at[Tile::R][Tile::C];

  RECGRELA_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
      for (int m = 0; m < Tile::C; ++m) at[i][m] = 0.0f;
    }
  }
  // Every four elements and where they are in memory.
  template <class F>
  RECGRELA_DEVICE void each_quad(F&& f) {
#pragma unroll
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) f(at[i] + 4 * half, i, half);
      if (i % 2 == 1) __syncwarp();
    }
  }
  RECGRELA_DEVICE void load(const Tile& tile, const float* own) {
    each_quad([&](float* to, int i, int half) {
      const Quad quad = load_quad(own + tile.own_part(i, half));
#pragma unroll
      for (int m = 0; m < 4; ++m) to[m] = quad.at[m];
    });
  }
  RECGRELA_DEVICE void add(const Tile& tile, const float* own) {
    each_quad([&](float* to, int i, int half) {
      const Quad quad = load_quad(own + tile.own_part(i, half));
#pragma unroll
      for (int m = 0; m < 4; ++m) to[m] += quad.at[m];
    });
  }
  // This sum joins the one in memory, and becomes it.
  RECGRELA_DEVICE void join(const Tile& tile, float* own) {
    each_quad([&](float* to, int i, int half) {
      const Quad quad = load_quad(own + tile.own_part(i, half));
#pragma unroll
      for (int m = 0; m < 4; ++m) to[m] += quad.at[m];
      store_shared<4>(to, own + tile.own_part(i, half));
    });
  }
  RECGRELA_DEVICE void store(const Tile& tile, float* own) {
    each_quad(
        [&](float* from, int i, int half) { store_shared<4>(from, own + tile.own_part(i, half)); });
  }
  // The same of a [D, D] as a state holds it: a user's at any address, a saved one at one that
  // allows whole quads.
  RECGRELA_DEVICE void add_state(const Tile& tile, const float* state) {
    each_quad([&](float* to, int i, int half) {
#pragma unroll
      for (int m = 0; m < 4; ++m) to[m] += state[tile.part(i, half) + m];
    });
  }
  RECGRELA_DEVICE void store_state(const Tile& tile, float* state, bool sound) {
    each_quad([&](float* from, int i, int half) {
#pragma unroll
      for (int m = 0; m < 4; ++m) state[tile.part(i, half) + m] = sound ? from[m] : NAN;
    });
  }
  RECGRELA_DEVICE void load_saved(const Tile& tile, const float* saved) {
    each_quad([&](float* to, int i, int half) {
      const Quad quad = load_quad(saved + tile.part(i, half));
#pragma unroll
      for (int m = 0; m < 4; ++m) to[m] = quad.at[m];
    });
  }
  RECGRELA_DEVICE void store_saved(const Tile& tile, float* saved) {
    each_quad(
        [&](float* from, int i, int half) { store_shared<4>(from, saved + tile.part(i, half)); });
  }
  // S += a b^T,  columns = S^T c,  rows = S d, as far as a lane's part goes; all four are rows in
  // shared memory.
  template <bool kColumns, bool kRows>
  RECGRELA_DEVICE void scan_item(const Tile& tile, const float* a, const float* b, const float* c,
                                 const float* d, float (&columns)[Tile::C],
                                 float (&rows)[Tile::R]) {
    float value[Tile::C], weight[Tile::C];
    load_columns(b + tile.column, value);
    if (kRows) load_columns(d + tile.column, weight);
#pragma unroll
    for (int m = 0; m < Tile::C; ++m) columns[m] = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::R; i += 4) {
      const Quad key = load_quad(a + tile.row + i);
      const Quad query = kColumns ? load_quad(c + tile.row + i) : Quad{};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        rows[i + n] = 0.0f;
#pragma unroll
        for (int m = 0; m < Tile::C; ++m) {
          at[i + n][m] += key.at[n] * value[m];
          if (kColumns) columns[m] += query.at[n] * at[i + n][m];
          if (kRows) rows[i + n] += at[i + n][m] * weight[m];
        }
      }
    }
  }
  RECGRELA_DEVICE void add_item(const Tile& tile, const float* a, const float* b) {
    float columns[Tile::C], rows[Tile::R];
    scan_item<false, false>(tile, a, b, a, b, columns, rows);
  }
  RECGRELA_DEVICE static void load_columns(const float* from, float (&to)[Tile::C]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Quad quad = load_quad(from + 4 * half);
#pragma unroll
      for (int m = 0; m < 4; ++m) to[4 * half + m] = quad.at[m];
    }
  }
};

// One step of a sum over lanes that leaves each with its share: of 2 N values this lane keeps the
// upper half where `upper`, and the lane `lanes` away the other one.
template <int N>
RECGRELA_DEVICE void sum_halves(float* values, bool upper, int lanes) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float keep = upper ? values[i + N] : values[i];
    const float give = upper ? values[i] : values[i + N];
    values[i] = keep + __shfl_xor_sync(0xffffffffu, give, lanes);
  }
}

// From the lanes' parts of S^T c to this lane's channel.
template <class Tile>
RECGRELA_DEVICE float sum_columns(const Tile& tile, float (&columns)[Tile::C]) {
  sum_halves<4>(columns, tile.lane & 16, 16);
  sum_halves<2>(columns, tile.lane & 8, 8);
  sum_halves<1>(columns, tile.lane & 4, 4);
  return columns[0];
}

// From the lanes' parts of S d to this warp's part of it, a row [D] in shared memory.
template <class Tile>
RECGRELA_DEVICE void sum_rows(const Tile& tile, float (&rows)[Tile::R], float* to) {
  sum_halves<Tile::R / 2>(rows, tile.lane & 2, 2);
  sum_halves<Tile::R / 4>(rows, tile.lane & 1, 1);
  store_shared<Tile::R / 4>(rows, to + tile.lane * (Tile::R / 4));
}

RECGRELA_DEVICE float sum_over_warp(float x) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The sum of what the warps left, `stride` floats apart.
template <class Tile>
RECGRELA_DEVICE float sum_of_warps(const float* from, int stride) {
  float sum = from[0];
#pragma unroll
  for (int w = 1; w < Tile::warps; ++w) sum += from[w * stride];
  return sum;
}

// The rotation of a pair of channels whose lanes are four apart.
RECGRELA_DEVICE float turn_pair(float x, float c, float s, bool odd) {
  const float partner = __shfl_xor_sync(0xffffffffu, x, 4);
  return x * c + partner * (odd ? s : -s);
}
RECGRELA_DEVICE float turn_pair_back(float x, float c, float s, bool odd) {
  return turn_pair(x, c, -s, odd);
}

// The causal convolution of this lane's channel, of at most four taps. Taps and bias lie in shared
// memory, five rows that no other lane reads, to leave the registers to S.
template <class S, int D>
struct WideConvolution {
  static constexpr int floats = 5 * D;
  float* taps;  // those of this lane, D floats apart; the bias last
  float window[3];

  RECGRELA_DEVICE void load(const GatedRelaParams& p, const Unit& u, int channel) const {
    const float* weight = static_cast<const float*>(p.conv_weight) + (u.h * D + channel) * p.W;
    const float* bias = static_cast<const float*>(p.conv_bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t tap = p.W - 4 + j;
      taps[j * D] = tap >= 0 ? weight[tap] : 0.0f;
    }
    taps[4 * D] = bias ? bias[u.h * D + channel] : 0.0f;
  }
  RECGRELA_DEVICE void start(const GatedRelaParams& p, const Unit& u, int channel, int64_t t) {
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      window[r] = 0.0f;
      if (t - 3 + r < u.span.length) value_at<S, 1>(p, u, t - 3 + r, channel, &window[r]);
    }
  }
  // The pre-activation at the item whose value is v, before the window moves on.
  RECGRELA_DEVICE float at(float v) const {
    return taps[4 * D] + taps[0] * window[0] + taps[D] * window[1] + taps[2 * D] * window[2] +
           taps[3 * D] * v;
  }
  RECGRELA_DEVICE void advance(float v) {
    window[0] = window[1];
    window[1] = window[2];
    window[2] = v;
  }
};

// One channel of T rows, read ahead of their use, of which `left` are there.
template <class S, int T>
struct WideAhead {
  S at[T];

  RECGRELA_DEVICE void load(const Rows& rows, const Unit& u, int channel, int64_t t, int left) {
    const S* from = row_at<const S>(rows, u.span, t, u.h) + channel;
#pragma unroll
    for (int j = 0; j < T; ++j) {
      if (j < left) at[j] = from[j * rows.item_stride];
    }
  }
  // Items t, t - 1 ..
  RECGRELA_DEVICE void load_back(const Rows& rows, const Unit& u, int channel, int64_t t,
                                 int left) {
    const S* from = row_at<const S>(rows, u.span, t, u.h) + channel;
#pragma unroll
    for (int j = 0; j < T; ++j) {
      if (j < left) at[j] = from[-j * rows.item_stride];
    }
  }
  RECGRELA_DEVICE float value(int j, bool there) const { return there ? widen(at[j]) : 0.0f; }
  RECGRELA_DEVICE float phi(int j, bool there) const {
    return there ? feature_map<S>(widen(at[j])) : 0.0f;
  }
};

// Warps by the unit, for segments_of().
template <class Tile>
inline int64_t wide_segments(const GatedRelaParams& p) {
  return segments_of(p, 1, Tile::warps);
}

}  // namespace recgrela::cuda
