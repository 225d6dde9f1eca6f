// gated_rela forward where a block's warps share a unit, see wide_tile.cuh:
//   num_t = S_t^T R phi(q_t),  den_t = phi(q_t).z_t + eps n_t,  o = num / den
//   y = SiLU(g) (o + a),  a = SiLU(conv(v)),  S_t = sum R phi(k_s) v_s^T,  z_t = sum phi(k_s)
// Rows are read once from memory and written once; shared memory hands the turned keys and queries,
// the values and the warps' parts of the normaliser from the lanes that own them to the others.
//
// A float32 sum that has grown large rounds every further item away. So where sequences are long
// ("apart"), the registers follow S_t from the total before a chunk for the items of that chunk
// alone; then a second pass over its keys and values, from the cache, sums them from zero, and this
// sum joins the total in memory.
//
// Where B*H is too small to fill the device, sequences are cut into segments: a first launch
// (kSums) sums each segment alone, and the second starts from the sums of the segments before.
#pragma once
#include "gated_rela.h"
#include "wide_tile.cuh"

namespace recgrela::cuda {

struct WideForwardArgs {
  GatedRelaParams p;
  int64_t segments;             // of a sequence
  float *part_kv, *part_k_sum;  // [B*H, segments, D, D] by WideTile::own_part, [B*H, segments, D]
  float* total;                 // like part_kv: the sum of all chunks before
  bool apart;
};

template <class S, int D, bool kSums>
struct WideForward {
  using Tile = WideTile<D>;
  // Items that share one barrier, read ahead while the items before are worked on.
  static constexpr int T = 2;
  static constexpr int rows = T * D;
  static constexpr int exchange = 4 * rows + T * Tile::warps;
  static constexpr int64_t bytes =
      int64_t(sizeof(float)) * (2 * exchange + WideConvolution<S, D>::floats + D);

  const WideForwardArgs& args;
  const GatedRelaParams& p;
  const Tile tile;
  const Unit u;
  const int64_t slot;  // of part_kv and total
  const bool odd;      // channel
  float* const memory;
  int buffer = 0;
  WideSum<Tile> sum;
  float z = 0.0f;  // of this chunk where sums are apart
  float& z_base;   // of what comes before: in shared memory, a register less
  Rotation<2> rotation;
  WideConvolution<S, D> conv;

  RECGRELA_DEVICE WideForward(const WideForwardArgs& a, float* shared, int thread, int64_t task)
      : args(a),
        p(a.p),
        tile(thread),
        u(unit_of(p, task / a.segments, task % a.segments, a.segments)),
        slot(task),
        odd(tile.channel % 2),
        memory(shared),
        z_base(shared[2 * exchange + WideConvolution<S, D>::floats + tile.channel]),
        rotation(p.inv_freq + u.h * (D / 2) + tile.channel / 2) {
    conv.taps = memory + 2 * exchange + tile.channel;
  }

  RECGRELA_DEVICE float* keys() const { return memory + buffer * exchange; }
  RECGRELA_DEVICE float* total() const {
    return (kSums ? args.part_kv : args.total) + slot * D * D;
  }
  // S and z before the segment: the initial state and the segments before this one.
  RECGRELA_DEVICE void start() {
    sum.clear();
    z_base = 0.0f;
    if (kSums) return sum.store(tile, total());
    if (p.conv_weight) {
      conv.load(p, u, tile.channel);
      conv.start(p, u, tile.channel, u.begin);
    }
    if (p.initial.kv) {
      sum.add_state(
          tile, static_cast<const float*>(p.initial.kv) + u.b * p.initial.kv_stride + u.h * D * D);
      z_base += static_cast<const float*>(
          p.initial.k_sum)[u.b * p.initial.k_sum_stride + u.h * D + tile.channel];
    }
    for (int64_t s = slot - slot % args.segments; s < slot; ++s) {
      sum.add(tile, args.part_kv + s * D * D);
      z_base += args.part_k_sum[s * D + tile.channel];
    }
    if (args.apart) sum.store(tile, total());
  }
  RECGRELA_DEVICE void save(int64_t chunk) {
    const int64_t at = (first_chunk(p, u.span, u.b) + chunk) * p.H + u.h;
    sum.store_saved(tile, static_cast<float*>(p.saved_kv) + at * D * D);
    static_cast<float*>(p.saved_k_sum)[at * D + tile.channel] = z + z_base;
  }

  // The outputs of `count` items from t1 on, a multiple of kChunk; S and z move on.
  RECGRELA_DEVICE void scan_chunk(int64_t t1, int count) {
    const float eps = float(p.eps), first = float(u.position + t1 + 1);
    WideAhead<S, T> next_q, next_k, next_v, next_gate;
    const auto read_ahead = [&](int i) {
      next_k.load(p.k, u, tile.channel, t1 + i, count - i);
      next_v.load(p.v, u, tile.channel, t1 + i, count - i);
      next_q.load(p.q, u, tile.channel, t1 + i, count - i);
      if (p.gate.data) next_gate.load(p.gate, u, tile.channel, t1 + i, count - i);
    };
    read_ahead(0);
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += T, buffer ^= 1) {
      float *key = keys(), *query = key + rows, *value = query + rows;
      float *gate = value + rows, *dens = gate + rows;
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool there = i0 + j < count;
        const float phi_k = next_k.phi(j, there), phi_q = next_q.phi(j, there);
        z += phi_k;
        const float den = sum_over_warp(phi_q * (z + z_base));
        if (tile.lane == 0) dens[j * Tile::warps + tile.warp] = den;
        rotation.move_to(t1 + i0 + j, u.position);
        key[j * D + tile.channel] = turn_pair(phi_k, rotation.c[0], rotation.s[0], odd);
        query[j * D + tile.channel] = turn_pair(phi_q, rotation.c[0], rotation.s[0], odd);
        value[j * D + tile.channel] = next_v.value(j, there);
        if (p.gate.data) gate[j * D + tile.channel] = silu<S>(next_gate.value(j, there));
      }
      if (i0 + T < count) read_ahead(i0 + T);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && i0 + j < count; ++j) {
        float columns[Tile::C], unused[Tile::R];
        sum.template scan_item<true, false>(tile, key + j * D, value + j * D, query + j * D,
                                            nullptr, columns, unused);
        const float den = sum_of_warps<Tile>(dens + j * Tile::warps, 1);
        const float scale = 1.0f / (den + eps * (first + float(i0 + j)));
        float y = sum_columns(tile, columns) * scale;
        if (p.conv_weight) {
          const float v = value[j * D + tile.channel];
          y += silu<S>(conv.at(v));
          conv.advance(v);
        }
        if (p.gate.data) y *= gate[j * D + tile.channel];
        narrow(y, row_at<S>(p.out, u.span, t1 + i0 + j, u.h) + tile.channel);
      }
    }
  }
  // The chunk's items are summed from zero and join the total.
  RECGRELA_DEVICE void sum_chunk(int64_t t1, int count) {
    WideAhead<S, T> next_k, next_v;
    const auto read_ahead = [&](int i) {
      next_k.load(p.k, u, tile.channel, t1 + i, count - i);
      next_v.load(p.v, u, tile.channel, t1 + i, count - i);
    };
    sum.clear();
    read_ahead(0);
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += T, buffer ^= 1) {
      float *key = keys(), *value = key + 2 * rows;
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool there = i0 + j < count;
        const float phi_k = next_k.phi(j, there);
        if (kSums) z += phi_k;
        rotation.move_to(t1 + i0 + j, u.position);
        key[j * D + tile.channel] = turn_pair(phi_k, rotation.c[0], rotation.s[0], odd);
        value[j * D + tile.channel] = next_v.value(j, there);
      }
      if (i0 + T < count) read_ahead(i0 + T);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && i0 + j < count; ++j) sum.add_item(tile, key + j * D, value + j * D);
    }
    sum.join(tile, total());
    z_base += z;
    z = 0.0f;
  }
  RECGRELA_DEVICE void sweep() {
#pragma unroll 1
    for (int64_t t1 = u.begin; t1 < u.end; t1 += kChunk) {
      const int count = u.end - t1 < kChunk ? int(u.end - t1) : kChunk;
      if (!kSums) {
        if (p.saved_kv) save(t1 / kChunk);
        scan_chunk(t1, count);
      }
      if (kSums || args.apart) sum_chunk(t1, count);
    }
  }
  RECGRELA_DEVICE void finish() {
    if (kSums) {
      args.part_k_sum[slot * D + tile.channel] = z_base;
      return;
    }
    if (!u.last) return;
    if (p.final.kv) {
      sum.store_state(tile, static_cast<float*>(p.final.kv) + u.b * p.final.kv_stride + u.h * D * D,
                      u.span.sound);
      static_cast<float*>(p.final.k_sum)[u.b * p.final.k_sum_stride + u.h * D + tile.channel] =
          u.span.sound ? z + z_base : NAN;
      store_last_values<S, 1>(p, u, tile.channel);
    }
    if (!u.span.sound) fill_rows<S, 1>(p.out, u, tile.channel, 0, u.span.length, NAN);
    if (p.lengths) fill_rows<S, 1>(p.out, u, tile.channel, u.span.length, p.L, 0.0f);
  }
};

template <class S, int D, bool kSums>
__global__ void __launch_bounds__(WideTile<D>::threads, 1)
    wide_forward_kernel(const __grid_constant__ WideForwardArgs args) {
  WideForward<S, D, kSums> work(args, reinterpret_cast<float*>(shared_memory()), int(threadIdx.x),
                                int64_t(blockIdx.x));
  work.start();
  work.sweep();
  work.finish();
}

inline bool sums_apart(const GatedRelaParams& p, int64_t segments) {
  const int64_t longest = p.cu_seqlens ? p.items : p.L;
  return longest > kRecentItems || p.initial.kv != nullptr || segments > 1;
}

template <int D>
int64_t wide_forward_scratch(const GatedRelaParams& p) {
  const int64_t segments = wide_segments<WideTile<D>>(p), units = p.B * p.H * segments;
  const int64_t parts = segments > 1 ? units * (D * D + D) : 0;
  return int64_t(sizeof(float)) * (parts + (sums_apart(p, segments) ? units * D * D : 0));
}

template <class S, int D>
int run_wide_forward(const GatedRelaParams& p, Stream stream) {
  using Work = WideForward<S, D, false>;
  WideForwardArgs args{};
  args.p = p;
  args.segments = wide_segments<WideTile<D>>(p);
  args.apart = sums_apart(p, args.segments);
  const int64_t blocks = p.B * p.H * args.segments;
  args.total = static_cast<float*>(p.scratch);
  if (args.segments > 1) {
    args.part_kv = args.total + blocks * D * D;
    args.part_k_sum = args.part_kv + blocks * D * D;
    const int error = launch(wide_forward_kernel<S, D, true>, blocks, D, Work::bytes, stream, args);
    if (error != 0) return error;
  }
  return launch(wide_forward_kernel<S, D, false>, blocks, D, Work::bytes, stream, args);
}

template <int D>
int run_wide_forward(const GatedRelaParams& p, Stream stream) {
  if (p.dtype == DType::kFloat) return run_wide_forward<float, D>(p, stream);
  if (p.dtype == DType::kBFloat16) return run_wide_forward<BFloat16, D>(p, stream);
  return run_wide_forward<Half, D>(p, stream);
}

}  // namespace recgrela::cuda
