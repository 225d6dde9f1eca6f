// gated_rela forward on tensor cores, for two-byte rows. Of kStep items at a time, with S the sum
// of all before them:
//   num = tril(Q K^T) V + Q S,   o = num / den,   y = SiLU(g) (o + a),   S += K^T V
// Q and K are R phi(.), formed in float32; den comes from phi and its prefix sums, which are
// float32 throughout. Every other operand that is not a row as it came is two bfloat16 parts.
//
// A step has three barriers: its rows have come; they are mapped; their scores are there. The next
// step's rows are on their way from the second one on. As in forward.cuh, a first launch (kSums)
// sums segments where there are too few units.
#pragma once
#include "gated_rela.h"
#include "mma_tile.cuh"

namespace recgrela::cuda {

constexpr int kPast = 3;  // items before the step that the convolution reads

struct MmaForwardArgs {
  GatedRelaParams p;
  int64_t segments;
  float *part_kv, *part_k_sum;  // [B*H, segments, D, D], [B*H, segments, D]
  bool aligned, aligned_pairs;  // rows in accesses of 16 and of 4 bytes
};

template <class S, int D, bool kSums>
struct MmaForward {
  using Tile = MmaTile<S, D>;
  using RawMatrix = SharedMatrix<D, 0>;
  using Matrix = SharedMatrix<D>;
  using Square = SharedMatrix<kStep>;
  static constexpr int E = Tile::E, own_items = Tile::own_items;

  const MmaForwardArgs& args;
  const GatedRelaParams& p;
  const Tile tile;
  const int64_t segment;
  const Unit u;
  RawMatrix raw_q, raw_k;
  Matrix raw_v, q_high, q_low, k_high, k_low, v_high, v_low;
  Square score_high, score_low;
  float *totals, *z, *scales, *conv;  // [warps, D], [D], [kStep], [5, D]: four taps and the bias
  Turn* turns;                        // [D / 2]
  RunningFragments<Tile> sum;

  static constexpr int shared_bytes() {
    return RawMatrix::bytes(2 * kStep) +
           Matrix::bytes(4 * kStep + 2 * (kStep + kPast) + (Tile::exact_values ? 0 : 2 * kStep)) +
           Square::bytes(2 * kStep) + (Tile::warps * D + D + kStep + 5 * D) * int(sizeof(float)) +
           D / 2 * int(sizeof(Turn));
  }

  RECGRELA_DEVICE explicit MmaForward(const MmaForwardArgs& a)
      : args(a),
        p(a.p),
        segment(int64_t(blockIdx.x) % a.segments),
        u(unit_of(p, int64_t(blockIdx.x) / a.segments, segment, a.segments)) {
    Arena arena{shared_memory()};
    turns = arena.take<Turn>(D / 2 * int(sizeof(Turn)));
    raw_q = {arena.take<uint16_t>(RawMatrix::bytes(kStep))};
    raw_k = {arena.take<uint16_t>(RawMatrix::bytes(kStep))};
    const auto rows = [&](int count) { return Matrix{arena.take<uint16_t>(Matrix::bytes(count))}; };
    q_high = rows(kStep);
    q_low = rows(kStep);
    k_high = rows(kStep);
    k_low = rows(kStep);
    raw_v = rows(2 * (kStep + kPast));
    if (!Tile::exact_values) {
      v_high = rows(kStep);
      v_low = rows(kStep);
    }
    score_high = {arena.take<uint16_t>(Square::bytes(kStep))};
    score_low = {arena.take<uint16_t>(Square::bytes(kStep))};
    const auto floats = [&](int count) { return arena.take<float>(count * int(sizeof(float))); };
    totals = floats(Tile::warps * D);
    z = floats(D);
    scales = floats(kStep);
    conv = floats(5 * D);
  }

  // What comes before the segment, and the convolution.
  RECGRELA_DEVICE void start() {
    sum.clear();
    fill_turns(tile, p.inv_freq + u.h * (D / 2), turns);
    const int d = tile.thread;  // of z and of the convolution
    if (d < D) z[d] = 0.0f;
    if (!kSums && p.initial.kv) {
      const float* kv = static_cast<const float*>(p.initial.kv);
      const float* k_sum = static_cast<const float*>(p.initial.k_sum);
      sum.add(tile, kv + u.b * p.initial.kv_stride + u.h * D * D);
      if (d < D) z[d] += k_sum[u.b * p.initial.k_sum_stride + u.h * D + d];
    }
    for (int64_t s = 0; !kSums && s < segment; ++s) {
      const int64_t at = u.index * args.segments + s;
      sum.add(tile, args.part_kv + at * D * D);
      if (d < D) z[d] += args.part_k_sum[at * D + d];
    }
    if (kSums || p.conv_weight == nullptr || d >= D) return;
    const float* weight = static_cast<const float*>(p.conv_weight) + (u.h * D + d) * p.W;
    const float* bias = static_cast<const float*>(p.conv_bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t tap = p.W - 4 + j;
      conv[j * D + d] = tap >= 0 ? weight[tap] : 0.0f;
    }
    conv[4 * D + d] = bias ? bias[u.h * D + d] : 0.0f;
  }

  // Two buffers take turns: values are in use until the next step's are there.
  RECGRELA_DEVICE Matrix values_of(int buffer) const {
    return {raw_v.element(buffer * (kStep + kPast), 0)};
  }
  // Asks for the step's rows.
  RECGRELA_DEVICE void request(int64_t t0, int buffer) const {
    fetch(tile, p.k, u, t0, kStep, u.end, args.aligned, raw_k);
    fetch(tile, p.v, u, t0 - kPast, kStep + kPast, u.end, args.aligned, values_of(buffer));
    if (!kSums) fetch(tile, p.q, u, t0, kStep, u.end, args.aligned, raw_q);
  }

  RECGRELA_DEVICE void save_states(int64_t t0) const {
    if (kSums || p.saved_kv == nullptr || t0 % kChunk != 0) return;
    const int64_t at = (first_chunk(p, u.span, u.b) + t0 / kChunk) * p.H + u.h;
    sum.store(tile, static_cast<float*>(p.saved_kv) + at * D * D, true);
    if (tile.thread < D) {
      static_cast<float*>(p.saved_k_sum)[at * D + tile.thread] = z[tile.thread];
    }
  }

  // phi and rotation of the warp's items. den: the lane's part of phi(q).(sum of phi(k)), the sum
  // from the warp's first item on.
  RECGRELA_DEVICE void map_items(int64_t t0, int buffer, float (&phi_q)[own_items][E],
                                 float (&den)[own_items]) {
    float local[E] = {};
    const int first = tile.warp * own_items;
    Rotation<E> rotation = rotation_at(tile, turns, u.position + t0 + first);
#pragma unroll
    for (int j = 0; j < own_items; ++j) {
      const int i = first + j;
      const bool there = t0 + i < u.end;
      float phi_k[E], turned[E];
      if (j > 0) rotation.advance();
      map_row<S, E>(own_row(tile, raw_k, i), there, phi_k);
      rotation.turn(phi_k, turned);
      store_split(tile, turned, i, k_high, k_low);
#pragma unroll
      for (int e = 0; e < E; ++e) local[e] += phi_k[e];
      if (!Tile::exact_values) {
        float value[E];
        widen_row<S, E>(own_row(tile, values_of(buffer), i + kPast), there, value);
        store_split(tile, value, i, v_high, v_low);
      }
      if (kSums) continue;
      map_row<S, E>(own_row(tile, raw_q, i), there, phi_q[j]);
      rotation.turn(phi_q[j], turned);
      store_split(tile, turned, i, q_high, q_low);
      den[j] = 0.0f;
#pragma unroll
      for (int e = 0; e < E; ++e) den[j] += phi_q[j][e] * local[e];
    }
#pragma unroll
    for (int e = 0; e < E; ++e) totals[tile.warp * D + tile.channel + e] = local[e];
  }

  // 1 / den of the warp's items.
  RECGRELA_DEVICE void normalise(int64_t t0, const float (&phi_q)[own_items][E],
                                 float (&den)[own_items]) const {
    float before[E];
#pragma unroll
    for (int e = 0; e < E; ++e) before[e] = z[tile.channel + e];
#pragma unroll 1
    for (int w = 0; w < tile.warp; ++w) {
#pragma unroll
      for (int e = 0; e < E; ++e) before[e] += totals[w * D + tile.channel + e];
    }
#pragma unroll
    for (int j = 0; j < own_items; ++j) {
#pragma unroll
      for (int e = 0; e < E; ++e) den[j] += phi_q[j][e] * before[e];
    }
    const float whole = sum_over_lanes(den, tile.lane);
    if (tile.lane >= own_items) return;
    const int i = tile.warp * own_items + tile.lane;
    scales[i] = 1.0f / (whole + float(p.eps) * float(u.position + t0 + i + 1));
  }
  RECGRELA_DEVICE void move_normaliser() const {
    if (tile.thread >= D) return;
    float step = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::warps; ++w) step += totals[w * D + tile.thread];
    z[tile.thread] += step;
  }

  // num = Q S of the warp's columns.
  RECGRELA_DEVICE void read_state(FragmentC (&num)[Tile::row_tiles][2]) const {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      Split b0[2], b1[2];
      sum.fragment_b(step, 0, b0[0], b1[0]);
      sum.fragment_b(step, 1, b0[1], b1[1]);
#pragma unroll
      for (int m = 0; m < Tile::row_tiles; ++m) {
        FragmentA a_high, a_low;
        q_high.load_a(a_high, 16 * m, 16 * step, tile.lane);
        q_low.load_a(a_low, 16 * m, 16 * step, tile.lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_split(num[m][half], a_high, a_low, b0[half].high, b1[half].high, b0[half].low,
                    b1[half].low);
        }
      }
    }
  }
  RECGRELA_DEVICE void load_values(int buffer, ValueFragments<Tile>& high,
                                   ValueFragments<Tile>& low) const {
    if constexpr (Tile::exact_values) {
      high.load(tile, values_of(buffer), kPast);
    } else {
      high.load(tile, v_high, 0);
      low.load(tile, v_low, 0);
    }
  }
  // num += scores V.
  RECGRELA_DEVICE void read_step(int buffer, FragmentC (&num)[Tile::row_tiles][2]) const {
    ValueFragments<Tile> high, low;
    load_values(buffer, high, low);
#pragma unroll
    for (int m = 0; m < Tile::row_tiles; ++m) {
#pragma unroll
      for (int i = 0; i <= m; ++i) {
        FragmentA a_high, a_low;
        score_high.load_a(a_high, 16 * m, 16 * i, tile.lane);
        score_low.load_a(a_low, 16 * m, 16 * i, tile.lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma(num[m][half], a_low, high.at[i][half], high.at[i][half + 2]);
          if constexpr (!Tile::exact_values) {
            mma(num[m][half], a_high, low.at[i][half], low.at[i][half + 2]);
          }
          mma(num[m][half], a_high, high.at[i][half], high.at[i][half + 2]);
        }
      }
    }
  }

  // The step's gates in the layout of num, on their way while the products are formed.
  using Gates = uint32_t[Tile::row_tiles][2][2];
  RECGRELA_DEVICE int item_of(int m, int r) const { return 16 * m + tile.c.g + 8 * r; }
  RECGRELA_DEVICE int channel_of(int half) const { return tile.column + 8 * half + 2 * tile.c.t; }
  RECGRELA_DEVICE void load_gates(int64_t t0, Gates& gates) const {
#pragma unroll
    for (int m = 0; m < Tile::row_tiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t t = t0 + item_of(m, r);
        if (t >= u.end) continue;
        const S* row = row_at<const S>(p.gate, u.span, t, u.h);
        gates[m][0][r] = load_pair(row + channel_of(0), args.aligned_pairs);
        gates[m][1][r] = load_pair(row + channel_of(1), args.aligned_pairs);
      }
    }
  }

  // The convolution's pre-activations of two channels at item t, the i-th of the step.
  RECGRELA_DEVICE void convolve(int64_t t, int i, int channel, const Matrix& values,
                                float (&pre)[2]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) pre[e] = conv[4 * D + channel + e];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value[2];
      if (t < kPast && t - kPast + j < 0) {
        value_at<S, 2>(p, u, t - kPast + j, channel, value);
      } else {
        const auto pair = *reinterpret_cast<const uint32_t*>(values.element(i + j, channel));
        value[0] = element_of<S>(pair, 0);
        value[1] = element_of<S>(pair, 1);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) pre[e] += conv[j * D + channel + e] * value[e];
    }
  }
  RECGRELA_DEVICE void store_outputs(int64_t t0, const Matrix& values, const Gates& gates,
                                     const FragmentC (&num)[Tile::row_tiles][2]) const {
    const bool augment = p.conv_weight != nullptr, gated = p.gate.data != nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < Tile::row_tiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = item_of(m, r), channel = channel_of(half);
          float y[2], pre[2];
          if (t0 + i >= u.end) continue;
          if (augment) convolve(t0 + i, i, channel, values, pre);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            y[e] = num[m][half][2 * r + e] * scales[i];
            if (augment) y[e] += silu<S>(pre[e]);
            if (gated) y[e] *= silu<S>(element_of<S>(gates[m][half][r], e));
          }
          S* to = row_at<S>(p.out, u.span, t0 + i, u.h) + channel;
          store_pack<S, 2>(y, to, args.aligned_pairs);
          keep_order();
        }
      }
    }
  }

  RECGRELA_DEVICE void step(int64_t t0, int buffer) {
    float phi_q[own_items][E], den[own_items];
    wait_for_copies();
    __syncthreads();
    save_states(t0);
    map_items(t0, buffer, phi_q, den);
    __syncthreads();
    if (t0 + kStep < u.end) request(t0 + kStep, buffer ^ 1);
    FragmentC num[Tile::row_tiles][2] = {};
    Gates gates;
    if (!kSums) {
      normalise(t0, phi_q, den);
      causal_scores(tile, q_high, q_low, k_high, k_low, score_high, score_low);
      read_state(num);
      if (p.gate.data) load_gates(t0, gates);
      __syncthreads();
    }
    if (!kSums) {
      read_step(buffer, num);
      store_outputs(t0, values_of(buffer), gates, num);
    }
    ValueFragments<Tile> high, low;
    load_values(buffer, high, low);
    accumulate<Tile, Tile::exact_values>(tile, sum, high, low, k_high, k_low);
    move_normaliser();
  }

  RECGRELA_DEVICE void finish_sums() const {
    const int64_t at = u.index * args.segments + segment;
    sum.store(tile, args.part_kv + at * D * D, true);
    if (tile.thread < D) args.part_k_sum[at * D + tile.thread] = z[tile.thread];
  }
  RECGRELA_DEVICE void finish() const {
    if (!u.last) return;
    const bool sound = u.span.sound;
    if (!sound) fill(tile, p.out, u, 0, u.span.length, NAN);
    if (p.lengths) fill(tile, p.out, u, u.span.length, p.L, 0.0f);
    if (p.final.kv == nullptr) return;
    const States& to = p.final;
    sum.store(tile, static_cast<float*>(to.kv) + u.b * to.kv_stride + u.h * D * D, sound);
    const int d = tile.thread;
    if (d >= D) return;
    static_cast<float*>(to.k_sum)[u.b * to.k_sum_stride + u.h * D + d] = sound ? z[d] : NAN;
    for (int64_t r = 0; r < p.W - 1; ++r) {
      float value = NAN;
      if (sound) value_at<S, 1>(p, u, u.span.length - (p.W - 1) + r, d, &value);
      static_cast<float*>(to.conv)[u.b * to.conv_stride + r * p.H * D + u.h * D + d] = value;
    }
  }
};

// Saying one block a multiprocessor keeps ptxas from spilling at D 128; at D 64 it stays at 128
// registers, four blocks, by itself.
template <class S, int D, bool kSums>
__global__ void __launch_bounds__(MmaTile<S, D>::threads, D == 128 ? 1 : 0)
    mma_forward_kernel(const __grid_constant__ MmaForwardArgs args) {
  MmaForward<S, D, kSums> block(args);
  block.start();
  if (block.u.begin < block.u.end) block.request(block.u.begin, 0);
  int buffer = 0;
#pragma unroll 1
  for (int64_t t0 = block.u.begin; t0 < block.u.end; t0 += kStep, buffer ^= 1) {
    block.step(t0, buffer);
  }
  if constexpr (kSums) {
    block.finish_sums();
  } else {
    block.finish();
  }
}

template <int D>
int64_t mma_forward_scratch(const GatedRelaParams& p) {
  const int64_t segments = segments_of(p, 1);
  return segments > 1 ? p.B * p.H * segments * (D * D + D) * int64_t(sizeof(float)) : 0;
}

template <class S, int D>
int run_mma_forward(const GatedRelaParams& p, Stream stream) {
  MmaForwardArgs args{};
  args.p = p;
  args.segments = segments_of(p, 1);
  args.aligned = aligned_rows<S, 8>({&p.q, &p.k, &p.v});
  args.aligned_pairs = aligned_rows<S, 2>({&p.gate, &p.out});
  args.part_kv = static_cast<float*>(p.scratch);
  args.part_k_sum = args.part_kv ? args.part_kv + p.B * p.H * args.segments * D * D : nullptr;
  const int64_t blocks = p.B * p.H * args.segments;
  constexpr int threads = MmaTile<S, D>::threads;
  if (args.segments > 1) {
    const int error = launch(mma_forward_kernel<S, D, true>, blocks, threads,
                             MmaForward<S, D, true>::shared_bytes(), stream, args);
    if (error != 0) return error;
  }
  return launch(mma_forward_kernel<S, D, false>, blocks, threads,
                MmaForward<S, D, false>::shared_bytes(), stream, args);
}

template <int D>
int run_mma_forward(const GatedRelaParams& p, Stream stream) {
  if (p.dtype == DType::kBFloat16) return run_mma_forward<BFloat16, D>(p, stream);
  return run_mma_forward<Half, D>(p, stream);
}

}  // namespace recgrela::cuda
