// What the tensor-core kernels of the forward and the backward share. A block owns one unit (one
// sequence's head, or a segment of it) and goes over it kStep items at a time, in two phases:
//
//   element phase   a warp owns kStep / warps items, a lane E channels of their rows: phi,
//   rotation,
//                   normaliser. The turned rows go to shared memory in two bfloat16 parts.
//   matrix phase    a warp owns 16 value columns of everything that has them: of num, of the
//   running
//                   sum S, which stays in registers as the fragments of S^T, of out.
//
// The fragment of S^T a product leaves behind is the fragment of S the next one needs, so S goes
// through no memory.
#pragma once
#include "mma.cuh"
#include "warp_tile.cuh"

namespace recgrela::cuda {

constexpr int kStep = 32;  // items at a time; divides kChunk

template <class S_, int D_>
struct MmaTile {
  using S = S_;
  static constexpr int D = D_, E = D / kWarp;
  static constexpr int warps = D / 16, threads = warps * kWarp;
  static constexpr int own_items = kStep / warps;  // of a warp, in the element phase
  static constexpr int row_tiles = kStep / 16, key_tiles = D / 8;
  static constexpr bool exact_values = std::is_same_v<S, BFloat16>;  // or in two parts

  int thread, warp, lane, channel;  // channel: the first of the lane's, in the element phase
  int column;                       // the first of the warp's, in the matrix phase
  LaneOfC c;

  RECGRELA_DEVICE MmaTile()
      : thread(int(threadIdx.x)),
        warp(thread / kWarp),
        lane(thread % kWarp),
        channel(lane * E),
        column(warp * 16),
        c(lane) {}
};

// Shared memory, handed out from its start.
struct Arena {
  unsigned char* next;
  template <class T>
  RECGRELA_DEVICE T* take(int bytes) {
    T* at = reinterpret_cast<T*>(next);
    next += bytes;
    return at;
  }
};

// How each pair turns from one item to the next, kept in shared memory for all warps.
struct Turn {
  uint64_t phase;
  float c, s;
};
template <class Tile>
RECGRELA_DEVICE void fill_turns(const Tile& tile, const double* inv_freq, Turn* turns) {
  if (tile.thread >= Tile::D / 2) return;
  Turn turn;
  turn.phase = turns_of(inv_freq[tile.thread]);
  rotation_of(turn.phase, &turn.c, &turn.s);
  turns[tile.thread] = turn;
}
template <class Tile>
RECGRELA_DEVICE Rotation<Tile::E> rotation_at(const Tile& tile, const Turn* turns,
                                              int64_t position) {
  Rotation<Tile::E> rotation;
#pragma unroll
  for (int i = 0; i < Tile::E / 2; ++i) {
    const Turn turn = turns[tile.channel / 2 + i];
    rotation.step[i] = turn.phase;
    rotation.step_c[i] = turn.c;
    rotation.step_s[i] = turn.s;
  }
  rotation.set(position);
  return rotation;
}

// Rows [t0, t0 + count) of a unit on their way to shared memory, zeros for those before the
// sequence and from `end` on. An unaligned row is copied at once, element by element.
template <class Tile, class Matrix>
RECGRELA_DEVICE void fetch(const Tile& tile, const Rows& rows, const Unit& u, int64_t t0, int count,
                           int64_t end, bool aligned, const Matrix& to) {
  using S = typename Tile::S;
  constexpr int per_row = Tile::D / 8;
#pragma unroll 1
  for (int i = tile.thread; i < count * per_row; i += Tile::threads) {
    const int row = i / per_row, column = i % per_row * 8;
    const int64_t t = t0 + row;
    const bool there = t >= 0 && t < end;
    const S* from = row_at<const S>(rows, u.span, there ? t : u.begin, u.h) + column;
    uint16_t* target = to.element(row, column);
    if (aligned) {
      copy_async(target, from, there);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) target[e] = there ? from[e].bits : 0;
  }
}

// Rows [from, to) of a unit, all set to `value`.
template <class Tile>
RECGRELA_DEVICE void fill(const Tile& tile, const Rows& rows, const Unit& u, int64_t from,
                          int64_t to, float value) {
  using S = typename Tile::S;
  if (rows.data == nullptr) return;
  for (int64_t i = tile.thread; i < (to - from) * Tile::D; i += Tile::threads) {
    narrow(value, row_at<S>(rows, u.span, from + i / Tile::D, u.h) + i % Tile::D);
  }
}

// Rows of a lane's channels as they lie in shared memory.
template <class Tile, class Matrix>
RECGRELA_DEVICE Raw<typename Tile::S, Tile::E> own_row(const Tile& tile, const Matrix& rows,
                                                       int i) {
  using S = typename Tile::S;
  return load_raw<S, Tile::E>(reinterpret_cast<const S*>(rows.element(i, tile.channel)), true);
}

// A lane's channels of a row, in two parts.
template <class Tile, class Matrix>
RECGRELA_DEVICE void store_split(const Tile& tile, const float* x, int i, const Matrix& high,
                                 const Matrix& low) {
  Pack<uint32_t, Tile::E / 2> h, l;
#pragma unroll
  for (int e = 0; e < Tile::E / 2; ++e) {
    const Split s = split(x[2 * e], x[2 * e + 1]);
    h.at[e] = s.high;
    l.at[e] = s.low;
  }
  *reinterpret_cast<Pack<uint32_t, Tile::E / 2>*>(high.element(i, tile.channel)) = h;
  *reinterpret_cast<Pack<uint32_t, Tile::E / 2>*>(low.element(i, tile.channel)) = l;
}

// Sums over the lanes of N values a lane; lane l gets that of value l % N.
template <int N>
RECGRELA_DEVICE float sum_over_lanes(float (&x)[N], int lane) {
#pragma unroll
  for (int half = N / 2; half >= 1; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? x[half + i] : x[i], give = upper ? x[i] : x[half + i];
      x[i] = keep + __shfl_xor_sync(0xffffffffu, give, half);
    }
  }
#pragma unroll
  for (int lanes = N; lanes < kWarp; lanes *= 2) {
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], lanes);
  }
  return x[0];
}

// Two neighbouring elements in one word.
template <class S>
RECGRELA_DEVICE uint32_t load_pair(const S* from, bool aligned) {
  return load_raw<S, 2>(from, aligned).words.at[0];
}
template <class S>
RECGRELA_DEVICE float element_of(uint32_t pair, int e) {
  return Raw<S, 2>{{{pair}}}.at(e);
}

// S^T, or T^T, in the fragments of the warp's 16 columns.
template <class Tile>
struct RunningFragments {
  FragmentC at[Tile::key_tiles];  // tile n: keys 8 n .. 8 n + 7

  RECGRELA_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < Tile::key_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[n][i] = 0.0f;
    }
  }
  // Where register i of tile n is in a [D, D] whose rows are keys.
  static RECGRELA_DEVICE int place(const Tile& tile, int n, int i) {
    const int key = 8 * n + 2 * tile.c.t + i % 2, value = tile.column + tile.c.g + i / 2 * 8;
    return key * Tile::D + value;
  }
  RECGRELA_DEVICE void add(const Tile& tile, const float* from) {
#pragma unroll
    for (int n = 0; n < Tile::key_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[n][i] += from[place(tile, n, i)];
      keep_order();
    }
  }
  RECGRELA_DEVICE void store(const Tile& tile, float* to, bool sound) const {
#pragma unroll
    for (int n = 0; n < Tile::key_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[place(tile, n, i)] = sound ? at[n][i] : NAN;
      keep_order();
    }
  }
  // Two parts of the fragment of B of keys 16 step .. 16 step + 15, columns 8 half .. 8 half + 7.
  RECGRELA_DEVICE void fragment_b(int step, int half, Split& b0, Split& b1) const {
    b0 = split(at[2 * step][2 * half], at[2 * step][2 * half + 1]);
    b1 = split(at[2 * step + 1][2 * half], at[2 * step + 1][2 * half + 1]);
  }
};

// c += (a.high + a.low) (b.high + b.low), but for low times low.
RECGRELA_DEVICE void mma_split(FragmentC& c, const FragmentA& a_high, const FragmentA& a_low,
                               uint32_t b0_high, uint32_t b1_high, uint32_t b0_low,
                               uint32_t b1_low) {
  mma(c, a_low, b0_high, b1_high);
  mma(c, a_high, b0_low, b1_low);
  mma(c, a_high, b0_high, b1_high);
}

// tril(Q K^T) of the step's items, in two parts, from those of Q and K. Tiles of 16 x 8 in turn.
template <class Tile, class Matrix, class Square>
RECGRELA_DEVICE void causal_scores(const Tile& tile, const Matrix& q_high, const Matrix& q_low,
                                   const Matrix& k_high, const Matrix& k_low, const Square& high,
                                   const Square& low) {
  // Of row tile m the 2 (m + 1) column tiles up to the diagonal: m (m + 1) tiles before it.
  constexpr int count = Tile::row_tiles * (Tile::row_tiles + 1);
#pragma unroll 1
  for (int i = tile.warp; i < count; i += Tile::warps) {
    int m = 0;
    while ((m + 1) * (m + 2) <= i) ++m;
    const int n = i - m * (m + 1);
    FragmentC sum = {};
#pragma unroll
    for (int k = 0; k < Tile::D; k += 32) {
      FragmentA b_high, b_low;  // of two steps
      load_matrices(b_high, k_high.element(8 * n + tile.lane % 8, k + tile.lane / 8 * 8));
      load_matrices(b_low, k_low.element(8 * n + tile.lane % 8, k + tile.lane / 8 * 8));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        FragmentA a_high, a_low;
        q_high.load_a(a_high, 16 * m, k + 16 * half, tile.lane);
        q_low.load_a(a_low, 16 * m, k + 16 * half, tile.lane);
        mma_split(sum, a_high, a_low, b_high[2 * half], b_high[2 * half + 1], b_low[2 * half],
                  b_low[2 * half + 1]);
      }
    }
    const int s = 8 * n + 2 * tile.c.t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = 16 * m + tile.c.g + 8 * half;
      const Split two = split(s <= t ? sum[2 * half] : 0.0f, s + 1 <= t ? sum[2 * half + 1] : 0.0f);
      *reinterpret_cast<uint32_t*>(high.element(t, s)) = two.high;
      *reinterpret_cast<uint32_t*>(low.element(t, s)) = two.low;
    }
  }
}

// The fragments of values [items, 16 columns] of the step, transposed: A of S^T = V^T K and, two
// registers of four, B of A V.
template <class Tile>
struct ValueFragments {
  FragmentA at[Tile::row_tiles];

  template <class Matrix>
  RECGRELA_DEVICE void load(const Tile& tile, const Matrix& rows, int first_row) {
#pragma unroll
    for (int i = 0; i < Tile::row_tiles; ++i) {
      rows.load_a_transposed(at[i], first_row + 16 * i, tile.column, tile.lane);
    }
  }
};

// sum += values^T keys, both [items, ...] of the step. The step's own sum is formed first: tensor
// cores cut off what does not fit under a large sum, an addition rounds to nearest.
template <class Tile, bool kExact, class Matrix>
RECGRELA_DEVICE void accumulate(const Tile& tile, RunningFragments<Tile>& sum,
                                const ValueFragments<Tile>& high, const ValueFragments<Tile>& low,
                                const Matrix& k_high, const Matrix& k_low) {
#pragma unroll
  for (int n = 0; n < Tile::key_tiles; n += 2) {
    FragmentC part[2] = {};
#pragma unroll
    for (int i = 0; i < Tile::row_tiles; ++i) {
      FragmentA b_high, b_low;  // of two tiles of keys
      const int row = 16 * i + tile.lane % 16, column = 8 * n + tile.lane / 16 * 8;
      load_transposed(b_high, k_high.element(row, column));
      load_transposed(b_low, k_low.element(row, column));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if constexpr (!kExact) mma(part[m], low.at[i], b_high[2 * m], b_high[2 * m + 1]);
        mma(part[m], high.at[i], b_low[2 * m], b_low[2 * m + 1]);
        mma(part[m], high.at[i], b_high[2 * m], b_high[2 * m + 1]);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.at[n + m][i] += part[m][i];
    }
  }
}

}  // namespace recgrela::cuda
