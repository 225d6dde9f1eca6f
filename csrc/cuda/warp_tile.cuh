// How a warp shares out the sequences of heads ("units") it works on, for the head dims with fast
// kernels. A warp owns whole units and no two warps share anything, so __syncwarp is the only
// barrier.
//
// A unit has LU lanes. Lane l owns the E channels E*l .. E*l + E-1 of every row: it loads, maps,
// turns and stores those alone. Of the running sum S [D, D] it owns R rows of 4 columns, in
// registers: all rows where E is 4, one half of them where E is 2 (row group l % 2).
//
//   D    E  LU  units/warp  S per lane
//   8    4   2      16        8 x 4
//   16   4   4       8       16 x 4
//   32   2  16       2       16 x 4
//   64   2  32       1       32 x 4
#pragma once
#include "unit.cuh"

namespace recgrela::cuda {

template <int D_, int E_>
struct WarpTile {
  static constexpr int D = D_, E = E_;
  static constexpr int LU = D / E, units = kWarp / LU;
  static constexpr int row_groups = 4 / E, R = D / row_groups;
  // One item's rows of all units in shared memory; every 32 floats are four banks further on, so
  // that row groups and units meet different banks.
  static constexpr int rows = units * D + 4 * (units * D / 32);
  static constexpr int state = D * D + 16;  // one unit's [D, D] in shared memory

  int unit, l, group, column, channel;  // column: the first of this lane's 4

  RECGRELA_DEVICE explicit WarpTile(int lane)
      : unit(lane / LU),
        l(lane % LU),
        group(l % row_groups),
        column(l / row_groups * 4),
        channel(l * E) {}

  // Where this lane's channels, its row group and its columns are in a shared row.
  RECGRELA_DEVICE int own() const { return at(channel); }
  RECGRELA_DEVICE int rows_begin() const { return at(group * R); }
  RECGRELA_DEVICE int columns() const { return at(column); }
  RECGRELA_DEVICE int at(int d) const {
    const int c = unit * D + d;
    return c + 4 * (c / 32);
  }
  // The first element of this lane's part of a [D, D] in global or shared memory, and of its part
  // of the transposed one.
  RECGRELA_DEVICE int part() const { return group * R * D + column; }
  RECGRELA_DEVICE int transposed_part() const { return column * D + group * R; }
};

struct Quad {
  float at[4];
};

RECGRELA_DEVICE Quad load_quad(const float* from) {
  const Pack<float, 4> pack = *reinterpret_cast<const Pack<float, 4>*>(from);
  return {{pack.at[0], pack.at[1], pack.at[2], pack.at[3]}};
}

template <int E>
RECGRELA_DEVICE void store_shared(const float* values, float* to) {
  Pack<float, E> pack;
#pragma unroll
  for (int e = 0; e < E; ++e) pack.at[e] = values[e];
  *reinterpret_cast<Pack<float, E>*>(to) = pack;
}

// One item of a scan:  S += a b^T,  sum = S^T c.  a and c: this lane's row group in shared memory;
// b: its four columns.
template <class Tile, bool kOutput = true>
RECGRELA_DEVICE Quad scan_item(float (&S)[Tile::R][4], const float* a, const float* c, Quad b) {
  Quad sum = {};
#pragma unroll
  for (int i = 0; i < Tile::R; i += 4) {
    const Quad key = load_quad(a + i);
    const Quad query = kOutput ? load_quad(c + i) : Quad{};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        S[i + n][m] += key.at[n] * b.at[m];
        if (kOutput) sum.at[m] += query.at[n] * S[i + n][m];
      }
    }
  }
  return sum;
}

// base^T c, base [D, D] in shared memory.
template <class Tile>
RECGRELA_DEVICE void add_base(Quad& sum, const float* base, const float* c) {
#pragma unroll 1
  for (int i = 0; i < Tile::R; i += 4) {
    const Quad query = load_quad(c + i);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Quad row = load_quad(base + (i + n) * Tile::D);
#pragma unroll
      for (int m = 0; m < 4; ++m) sum.at[m] += query.at[n] * row.at[m];
    }
  }
}

// The same with base transposed: sum_m += base[m] . c, base at this lane's columns and row group.
template <class Tile>
RECGRELA_DEVICE void add_transposed_base(Quad& sum, const float* base, const float* c) {
#pragma unroll 1
  for (int i = 0; i < Tile::R; i += 4) {
    const Quad query = load_quad(c + i);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const Quad row = load_quad(base + m * Tile::D + i);
#pragma unroll
      for (int n = 0; n < 4; ++n) sum.at[m] += query.at[n] * row.at[n];
    }
  }
}

// From four columns, one part per row group, to this lane's channels.
template <class Tile>
RECGRELA_DEVICE void gather_columns(const Quad& sum, int group, float* own) {
  if constexpr (Tile::row_groups == 1) {
#pragma unroll
    for (int e = 0; e < 4; ++e) own[e] = sum.at[e];
  } else {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float keep = group == 0 ? sum.at[e] : sum.at[2 + e];
      const float give = group == 0 ? sum.at[2 + e] : sum.at[e];
      own[e] = keep + __shfl_xor_sync(0xffffffffu, give, 1);
    }
  }
}

template <class Tile>
RECGRELA_DEVICE float sum_over_unit(float x) {
#pragma unroll
  for (int lanes = 1; lanes < Tile::LU; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

RECGRELA_DEVICE int64_t max_over_warp(int64_t x) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// The rotation of E/2 pairs, item after item. Every kAnchor items it is formed anew from the
// fixed-point phase; in between it moves by one step, forward or back.
constexpr int kAnchor = 8;

template <int E>
struct Rotation {
  static constexpr int pairs = E / 2;
  uint64_t step[pairs];
  float c[pairs], s[pairs], step_c[pairs], step_s[pairs];

  Rotation() = default;
  RECGRELA_DEVICE explicit Rotation(const double* inv_freq) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      step[i] = turns_of(inv_freq[i]);
      rotation_of(step[i], &step_c[i], &step_s[i]);
    }
  }
  RECGRELA_DEVICE void set(int64_t position) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) rotation_of(uint64_t(position) * step[i], &c[i], &s[i]);
  }
  RECGRELA_DEVICE void advance() {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const float cosine = c[i] * step_c[i] - s[i] * step_s[i];
      s[i] = s[i] * step_c[i] + c[i] * step_s[i];
      c[i] = cosine;
    }
  }
  RECGRELA_DEVICE void go_back() {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const float cosine = c[i] * step_c[i] + s[i] * step_s[i];
      s[i] = s[i] * step_c[i] - c[i] * step_s[i];
      c[i] = cosine;
    }
  }
  // Item t of the sequence, the one before it being t - 1 unless t is a multiple of kAnchor.
  RECGRELA_DEVICE void move_to(int64_t t, int64_t start) {
    if (t % kAnchor == 0) {
      set(start + t);
    } else {
      advance();
    }
  }
  // The same from t + 1 on, or from nowhere where t + 1 is a multiple of kAnchor.
  RECGRELA_DEVICE void move_back_to(int64_t t, int64_t start) {
    if ((t + 1) % kAnchor == 0) {
      set(start + t);
    } else {
      go_back();
    }
  }
  RECGRELA_DEVICE void turn(const float* x, float* to) const {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      to[2 * i] = x[2 * i] * c[i] - x[2 * i + 1] * s[i];
      to[2 * i + 1] = x[2 * i] * s[i] + x[2 * i + 1] * c[i];
    }
  }
  RECGRELA_DEVICE void turn_back(const float* x, float* to) const {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      to[2 * i] = x[2 * i] * c[i] + x[2 * i + 1] * s[i];
      to[2 * i + 1] = x[2 * i + 1] * c[i] - x[2 * i] * s[i];
    }
  }
};

// The causal convolution of this lane's channels, of at most four taps, on a window in registers.
template <class S, int E>
struct Convolution {
  float weight[4][E], bias[E], window[3][E];

  RECGRELA_DEVICE void load(const GatedRelaParams& p, const Unit& u, int channel) {
    const float* w = static_cast<const float*>(p.conv_weight) + (u.h * p.D + channel) * p.W;
    const float* b = static_cast<const float*>(p.conv_bias);
#pragma unroll
    for (int e = 0; e < E; ++e) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t tap = p.W - 4 + j;
        weight[j][e] = tap >= 0 ? w[e * p.W + tap] : 0.0f;
      }
      bias[e] = b ? b[u.h * p.D + channel + e] : 0.0f;
    }
  }
  RECGRELA_DEVICE void start(const GatedRelaParams& p, const Unit& u, int channel, int64_t t) {
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      if (u.real && u.span.sound && t - 3 + r < u.span.length) {
        value_at<S, E>(p, u, t - 3 + r, channel, window[r]);
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) window[r][e] = 0.0f;
      }
    }
  }
  // The pre-activation at the item whose value is v; the window moves on.
  RECGRELA_DEVICE void next(const float* v, float* pre) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      pre[e] = bias[e] + weight[0][e] * window[0][e] + weight[1][e] * window[1][e] +
               weight[2][e] * window[2][e] + weight[3][e] * v[e];
      window[0][e] = window[1][e];
      window[1][e] = window[2][e];
      window[2][e] = v[e];
    }
  }
};

// This lane's channels of one item's row, and of the items after it.
template <class S>
struct Cursor {
  S* at;
  int64_t stride;

  RECGRELA_DEVICE Cursor(const Rows& rows, const Unit& u, int channel, int64_t t)
      : at(rows.data ? row_at<S>(rows, u.span, t, u.h) + channel : nullptr),
        stride(rows.item_stride) {}
  RECGRELA_DEVICE S* item(int j) const { return at + j * stride; }
  RECGRELA_DEVICE void advance(int items) { at += items * stride; }
};

// Rows read ahead of their use: T items of this lane's channels, of which `left` are there.
template <class S, int T, int E>
struct Ahead {
  Raw<S, E> at[T];

  RECGRELA_DEVICE void load(const Cursor<S>& rows, int left, bool aligned) {
#pragma unroll
    for (int j = 0; j < T; ++j) {
      if (j < left) at[j] = load_raw<S, E>(rows.item(j), aligned);
    }
  }
};

// A row that is there, and zeros for one behind the segment's end.
template <class S, int E>
RECGRELA_DEVICE void widen_row(const Raw<S, E>& raw, bool there, float* to) {
#pragma unroll
  for (int e = 0; e < E; ++e) to[e] = there ? raw.at(e) : 0.0f;
}

// phi of a row that is there, 0 of one behind the segment's end.
template <class S, int E>
RECGRELA_DEVICE void map_row(const Raw<S, E>& raw, bool there, float* phi) {
#pragma unroll
  for (int e = 0; e < E; ++e) phi[e] = there ? feature_map<S>(raw.at(e)) : 0.0f;
}

// How many segments a sequence is cut into: a rule of the shape alone.
inline int64_t segments_of(const GatedRelaParams& p, int64_t units, int64_t unit_warps = 1) {
  constexpr int64_t kWantedWarps = 768, kLeastItems = 256, kMost = 64;
  const int64_t warps = (p.B * p.H + units - 1) / units * unit_warps;
  const int64_t longest = p.cu_seqlens ? p.items : p.L;
  const int64_t wanted = warps > 0 ? kWantedWarps / warps : 1;
  const int64_t possible = longest / kLeastItems;
  const int64_t segments = wanted < possible ? wanted : possible;
  return segments < 1 ? 1 : (segments > kMost ? kMost : segments);
}

}  // namespace recgrela::cuda
