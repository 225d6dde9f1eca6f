// gated_rela forward, for head dims whose running sum fits into a warp's registers:
//   num_t = S_t^T R phi(q_t),  den_t = phi(q_t).z_t + eps n_t,  o = num / den
//   y = SiLU(g) (o + a),  a = SiLU(conv(v)),  S_t = sum R phi(k_s) v_s^T,  z_t = sum phi(k_s)
// Every row is read once and written once, straight from and to global memory; shared memory only
// hands the turned keys and queries from the lanes that own them to the lanes of their unit.
//
// A float32 sum that has grown large rounds every further item away. So the sums of the last
// kRecentItems items stay apart, in registers, and those of all items before, the base, in shared
// memory; sequences of at most kRecentItems items without an initial state have no base.
//
// Where B*H is too small to fill the device, sequences are cut into segments: a first launch
// (kSums) sums each segment alone, and the second starts from the sums of the segments before.
#pragma once
#include "gated_rela.h"
#include "warp_tile.cuh"

namespace recgrela::cuda {

constexpr int kForwardWarps = 2;  // per block

struct ForwardArgs {
  GatedRelaParams p;
  int64_t groups, segments;     // of units; of a sequence
  float *part_kv, *part_k_sum;  // [B*H, segments, D, D], [B*H, segments, D]
  bool aligned, has_base;
};

template <class S, int D>
struct ForwardTile : WarpTile<D, (D <= 16 ? 4 : 2)> {
  using Base = WarpTile<D, (D <= 16 ? 4 : 2)>;
  // Items that share one barrier, read ahead while the items before are worked on.
  static constexpr int T = D == 32 ? 4 : 2;
  static constexpr int exchanged = Base::row_groups == 1 ? 2 : 3;  // keys, queries, and values
  static constexpr int exchange = T * exchanged * Base::rows;
  static constexpr int64_t warp_bytes(bool has_base) {
    return int64_t(sizeof(float)) * (2 * exchange + (has_base ? Base::units * Base::state : 0));
  }
  using Base::Base;
};

template <class Tile>
struct RunningSum {
  float S[Tile::R][4], z[Tile::E], z_base[Tile::E];
  float* base;  // this lane's part of its unit's base, nullptr without one
  bool used;    // the base holds something

  RECGRELA_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        S[i][m] = 0.0f;
        if (base) base[i * Tile::D + m] = 0.0f;
      }
    }
#pragma unroll
    for (int e = 0; e < Tile::E; ++e) z[e] = z_base[e] = 0.0f;
    used = false;
  }
  // base += a stored sum; from and k_sum are this lane's parts.
  RECGRELA_DEVICE void add(const float* from, const float* k_sum) {
#pragma unroll 1
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) base[i * Tile::D + m] += from[i * Tile::D + m];
    }
#pragma unroll
    for (int e = 0; e < Tile::E; ++e) z_base[e] += k_sum[e];
    used = true;
  }
  // The recent sums join the base.
  RECGRELA_DEVICE void settle() {
#pragma unroll
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        base[i * Tile::D + m] += S[i][m];
        S[i][m] = 0.0f;
      }
      keep_order();
    }
#pragma unroll
    for (int e = 0; e < Tile::E; ++e) {
      z_base[e] += z[e];
      z[e] = 0.0f;
    }
    used = true;
  }
  RECGRELA_DEVICE void store(float* to, float* k_sum, bool fill, float value) const {
#pragma unroll
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float sum = S[i][m] + (base ? base[i * Tile::D + m] : 0.0f);
        to[i * Tile::D + m] = fill ? value : sum;
      }
      keep_order();
    }
#pragma unroll
    for (int e = 0; e < Tile::E; ++e) k_sum[e] = fill ? value : z[e] + z_base[e];
  }
};

// What comes before the segment: the initial state and the segments before this one.
template <class Tile>
RECGRELA_DEVICE void start_sum(const ForwardArgs& args, const Tile& tile, const Unit& u,
                               int64_t segment, bool sums, RunningSum<Tile>& sum) {
  const GatedRelaParams& p = args.p;
  constexpr int D = Tile::D;
  sum.clear();
  if (sums || !args.has_base) return;
  if (p.initial.kv && u.real) {
    sum.add(static_cast<const float*>(p.initial.kv) + u.b * p.initial.kv_stride + u.h * D * D +
                tile.part(),
            static_cast<const float*>(p.initial.k_sum) + u.b * p.initial.k_sum_stride + u.h * D +
                tile.channel);
  }
  for (int64_t s = 0; s < segment && u.real; ++s) {
    const int64_t at = u.index * args.segments + s;
    sum.add(args.part_kv + at * D * D + tile.part(), args.part_k_sum + at * D + tile.channel);
  }
}

template <class S, class Tile>
RECGRELA_DEVICE void finish_forward(const ForwardArgs& args, const Tile& tile, const Unit& u,
                                    const RunningSum<Tile>& sum) {
  const GatedRelaParams& p = args.p;
  constexpr int D = Tile::D, E = Tile::E;
  if (!u.real || !u.last) return;
  if (p.final.kv) {
    sum.store(
        static_cast<float*>(p.final.kv) + u.b * p.final.kv_stride + u.h * D * D + tile.part(),
        static_cast<float*>(p.final.k_sum) + u.b * p.final.k_sum_stride + u.h * D + tile.channel,
        !u.span.sound, NAN);
    store_last_values<S, E>(p, u, tile.channel);
  }
  if (!u.span.sound) fill_rows<S, E>(p.out, u, tile.channel, 0, u.span.length, NAN);
  if (p.lengths) fill_rows<S, E>(p.out, u, tile.channel, u.span.length, p.L, 0.0f);
}

template <class S, int D, bool kSums>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
  using Tile = ForwardTile<S, D>;
  constexpr int T = Tile::T, E = Tile::E;
  const GatedRelaParams& p = args.p;
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t task = int64_t(blockIdx.x) * kForwardWarps + warp;
  if (task >= args.groups * args.segments) return;  // a whole warp, which shares no barrier
  const Tile tile(int(threadIdx.x) % kWarp);
  const int64_t segment = task % args.segments;
  const Unit u = unit_of(p, task / args.segments * Tile::units + tile.unit, segment, args.segments);
  const int items = int(u.end - u.begin), longest = int(max_over_warp(items));

  float* memory = reinterpret_cast<float*>(shared_memory()) +
                  warp * (Tile::warp_bytes(args.has_base) / int64_t(sizeof(float)));
  RunningSum<Tile> sum;
  sum.base =
      args.has_base ? memory + 2 * Tile::exchange + tile.unit * Tile::state + tile.part() : nullptr;
  start_sum(args, tile, u, segment, kSums, sum);
  Rotation<E> rotation(p.inv_freq + u.h * (D / 2) + tile.channel / 2);
  Convolution<S, E> conv;
  const bool augment = !kSums && p.conv_weight != nullptr;
  if (augment) {
    conv.load(p, u, tile.channel);
    conv.start(p, u, tile.channel, u.begin);
  }
  const int64_t position = u.position + u.begin;
  const float eps = float(p.eps), first = float(position + 1);
  const bool aligned = args.aligned, gated = p.gate.data != nullptr;
  float *saved_kv = nullptr, *saved_k_sum = nullptr;
  if (!kSums && p.saved_kv && items > 0) {
    const int64_t at = (first_chunk(p, u.span, u.b) + u.begin / kChunk) * p.H + u.h;
    saved_kv = static_cast<float*>(p.saved_kv) + at * D * D + tile.part();
    saved_k_sum = static_cast<float*>(p.saved_k_sum) + at * D + tile.channel;
  }

  Cursor<S> q(p.q, u, tile.channel, u.begin), k(p.k, u, tile.channel, u.begin);
  Cursor<S> v(p.v, u, tile.channel, u.begin), gate(p.gate, u, tile.channel, u.begin);
  Cursor<S> out(p.out, u, tile.channel, u.begin);
  Ahead<S, T, E> next_q, next_k, next_v, next_gate;
  const auto read_ahead = [&](int left) {
    next_k.load(k, left, aligned);
    next_v.load(v, left, aligned);
    k.advance(T);
    v.advance(T);
    if (kSums) return;
    next_q.load(q, left, aligned);
    q.advance(T);
    if (!gated) return;
    next_gate.load(gate, left, aligned);
    gate.advance(T);
  };
  read_ahead(items);
  int buffer = 0;
#pragma unroll 1
  for (int i0 = 0; i0 < longest; i0 += T, buffer ^= 1) {
    if (i0 != 0 && i0 % kRecentItems == 0 && args.has_base) sum.settle();
    if (!kSums && saved_kv && i0 % kChunk == 0 && i0 < items) {
      sum.store(saved_kv, saved_k_sum, false, 0.0f);
      saved_kv += p.H * D * D;
      saved_k_sum += p.H * D;
    }
    float* keys = memory + buffer * Tile::exchange;
    float* queries = keys + T * Tile::rows;
    float* values = queries + T * Tile::rows;
    float scale[T];
    const Ahead<S, T, E> now_v = next_v, now_gate = next_gate;
#pragma unroll
    for (int j = 0; j < T; ++j) {
      const bool there = i0 + j < items;
      float phi_k[E], phi_q[E], turned[E];
      map_row<S, E>(next_k.at[j], there, phi_k);
#pragma unroll
      for (int e = 0; e < E; ++e) sum.z[e] += phi_k[e];
      if (!kSums) {
        float den = 0.0f;
        map_row<S, E>(next_q.at[j], there, phi_q);
#pragma unroll
        for (int e = 0; e < E; ++e) den += phi_q[e] * (sum.z[e] + sum.z_base[e]);
        den = sum_over_unit<Tile>(den) + eps * (first + float(i0 + j));
        scale[j] = 1.0f / den;
      }
      rotation.move_to(i0 + j, position);
      rotation.turn(phi_k, turned);
      store_shared<E>(turned, keys + j * Tile::rows + tile.own());
      if (!kSums) {
        rotation.turn(phi_q, turned);
        store_shared<E>(turned, queries + j * Tile::rows + tile.own());
      }
      if (Tile::row_groups > 1) {
        float value[E];
        widen_row<S, E>(now_v.at[j], there, value);
        store_shared<E>(value, values + j * Tile::rows + tile.own());
      }
    }
    if (i0 + T < longest) read_ahead(items - i0 - T);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < T; ++j) {
      const bool there = i0 + j < items;
      const float* key = keys + j * Tile::rows + tile.rows_begin();
      const float* query = queries + j * Tile::rows + tile.rows_begin();
      float value[E];
      widen_row<S, E>(now_v.at[j], there, value);
      Quad columns;
      if constexpr (Tile::row_groups > 1) {
        columns = load_quad(values + j * Tile::rows + tile.columns());
      } else {
        columns = {{value[0], value[1], value[2], value[3]}};
      }
      Quad num = scan_item<Tile, !kSums>(sum.S, key, query, columns);
      if (kSums) continue;
      if (sum.used) add_base<Tile>(num, sum.base, query);
      float y[E], pre[E];
      gather_columns<Tile>(num, tile.group, y);
      if (augment) conv.next(value, pre);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        y[e] *= scale[j];
        if (augment) y[e] += silu<S>(pre[e]);
        if (gated) y[e] *= silu<S>(now_gate.at[j].at(e));
      }
      if (there) store_pack<S, E>(y, out.item(j), aligned);
    }
    out.advance(T);
  }
  if (kSums) {
    if (!u.real) return;
    const int64_t at = u.index * args.segments + segment;
    sum.store(args.part_kv + at * D * D + tile.part(), args.part_k_sum + at * D + tile.channel,
              false, 0.0f);
    return;
  }
  finish_forward<S>(args, tile, u, sum);
}

template <int D>
int64_t forward_scratch(const GatedRelaParams& p) {
  using Tile = ForwardTile<float, D>;
  const int64_t segments = segments_of(p, Tile::units);
  return segments > 1 ? p.B * p.H * segments * (D * D + D) * int64_t(sizeof(float)) : 0;
}

template <class S, int D>
int run_forward(const GatedRelaParams& p, Stream stream) {
  using Tile = ForwardTile<S, D>;
  ForwardArgs args{};
  args.p = p;
  args.groups = (p.B * p.H + Tile::units - 1) / Tile::units;
  args.segments = segments_of(p, Tile::units);
  args.aligned = aligned_rows<S, Tile::E>({&p.q, &p.k, &p.v, &p.gate, &p.out});
  const int64_t longest = p.cu_seqlens ? p.items : p.L;
  args.has_base = longest > kRecentItems || p.initial.kv != nullptr || args.segments > 1;
  args.part_kv = static_cast<float*>(p.scratch);
  args.part_k_sum = args.part_kv ? args.part_kv + p.B * p.H * args.segments * D * D : nullptr;
  const int64_t blocks = (args.groups * args.segments + kForwardWarps - 1) / kForwardWarps;
  const int64_t bytes = kForwardWarps * Tile::warp_bytes(args.has_base);
  if (args.segments > 1) {
    const int error =
        launch(forward_kernel<S, D, true>, blocks, kForwardWarps * kWarp, bytes, stream, args);
    if (error != 0) return error;
  }
  return launch(forward_kernel<S, D, false>, blocks, kForwardWarps * kWarp, bytes, stream, args);
}

template <int D>
int run_forward(const GatedRelaParams& p, Stream stream) {
  if (p.dtype == DType::kFloat) return run_forward<float, D>(p, stream);
  if (p.dtype == DType::kBFloat16) return run_forward<BFloat16, D>(p, stream);
  return run_forward<Half, D>(p, stream);
}

}  // namespace recgrela::cuda
