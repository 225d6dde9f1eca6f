// gated_rela backward where a block's warps share a unit, see wide_tile.cuh: one reverse sweep over
// the chunks of a sequence, from the states the forward saved at each chunk's start.
//
// Forward:  num_t = S_t^T R phi(q_t),  den_t = phi(q_t).z_t + eps n_t,  o = num / den
//           y = SiLU(g) (o + a),  a = SiLU(pre),  pre = conv(v)
// With dO = SiLU(g) dy, dnum = dO / den, dden = -(dO.o) / den, and the sums over s >= t
//           T_t = sum R phi(q_s) dnum_s^T,   y_t = sum dden_s phi(q_s):
//           dphi(q_t) = R^T (S_t dnum_t) + dden_t z_t     dphi(k_t) = R^T (T_t v_t) + y_t
//           dv_t = T_t^T R phi(k_t) + transposed conv of dpre,   dpre = dO SiLU'(pre)
//
// A chunk is gone over twice: forward in time with S in registers, for num and S dO and so dq and
// dgate; then backward in time with T, for T v and T^T R phi(k) and so dk and dv. In between, dnum
// and dpre of the chunk are in shared memory and T is in memory. Rows of q, k and v are read again
// from the cache. Where sequences are long ("apart"), a third pass sums the chunk's part of T from
// zero, as in forward_wide.cuh.
#pragma once
#include "conv_gradient.cuh"
#include "gated_rela.h"
#include "wide_tile.cuh"

namespace recgrela::cuda {

struct WideBackwardArgs {
  GatedRelaBackwardParams p;
  int64_t segments;
  float *part_kv, *part_k_sum;  // of T and y: [B*H, segments, D, D] by WideTile::own_part, and D
  float* total;                 // like part_kv: T at the end of the chunk
  float* dparams;               // [segments, B, H*D, W + 1]: of the convolution, its bias last
  bool apart;
};

template <class S, int D, bool kSums>
struct WideBackward {
  using Tile = WideTile<D>;
  // Items between two barriers, read ahead while the items before are worked on. One where S takes
  // 128 registers: with two, sm_120 spills.
  static constexpr int T = D == 128 ? 1 : 2, rows = T * D;
  static constexpr int64_t bytes =
      int64_t(sizeof(float)) *
      ((6 + Tile::warps) * rows + (2 * kChunk + 3 + 12) * D + 2 * kChunk * Tile::warps);

  const WideBackwardArgs& args;
  const GatedRelaBackwardParams& p;
  const GatedRelaParams& f;
  const Tile tile;
  const Unit u;
  const int64_t slot;  // of part_kv and total
  const bool odd;      // channel
  // Shared memory. Of T items: keys, queries, values; parts [T, warps, D] of S d; and what a lane
  // keeps for itself: cosines, sines, z. Of a chunk: dnums (dO until dnum is known), dpres and
  // those of the three items behind it, and den and dden [kChunk, warps] in parts. The gradients of
  // the convolution's taps and bias.
  float *keys, *queries, *values, *cosines, *sines, *zs, *parts, *dnums, *dpres, *dtaps, *dens,
      *ddens;
  WideSum<Tile> sum;
  Rotation<2> rotation;
  WideConvolution<S, D> conv;
  float &y, &y_base;  // of this chunk and of what comes behind: in shared memory, to save registers

  RECGRELA_DEVICE WideBackward(const WideBackwardArgs& a, float* memory, int thread, int64_t task)
      : args(a),
        p(a.p),
        f(a.p.forward),
        tile(thread),
        u(unit_of(f, task / a.segments, task % a.segments, a.segments)),
        slot(task),
        odd(tile.channel % 2),
        rotation(f.inv_freq + u.h * (D / 2) + tile.channel / 2),
        y(memory[tile.channel]),
        y_base(memory[D + tile.channel]) {
    keys = memory + 2 * D;
    queries = keys + rows;
    values = queries + rows;
    cosines = values + rows;
    sines = cosines + rows;
    zs = sines + rows;
    parts = zs + rows;
    dnums = parts + Tile::warps * rows;
    dpres = dnums + kChunk * D;
    dtaps = dpres + (kChunk + 3) * D;
    dens = dtaps + 5 * D;
    ddens = dens + kChunk * Tile::warps;
    conv.taps = ddens + kChunk * Tile::warps + tile.channel;
  }

  RECGRELA_DEVICE float& own(float* from, int j) const { return from[j * D + tile.channel]; }
  RECGRELA_DEVICE S* row(const Rows& r, int64_t t) const {
    return row_at<S>(r, u.span, t, u.h) + tile.channel;
  }
  RECGRELA_DEVICE float* total() const {
    return (kSums ? args.part_kv : args.total) + slot * D * D;
  }
  RECGRELA_DEVICE int64_t segment() const { return slot % args.segments; }

  // T and y start with the gradient of the final state and the sums of the segments behind.
  RECGRELA_DEVICE void start() {
    sum.clear();
    y = y_base = 0.0f;
    if (f.conv_weight) {
      conv.load(f, u, tile.channel);
#pragma unroll
      for (int j = 0; j < 5; ++j) own(dtaps, j) = 0.0f;
    }
    if (!kSums && p.grad_final.kv) {
      sum.add_state(tile, static_cast<const float*>(p.grad_final.kv) +
                              u.b * p.grad_final.kv_stride + u.h * D * D);
      y_base += static_cast<const float*>(
          p.grad_final.k_sum)[u.b * p.grad_final.k_sum_stride + u.h * D + tile.channel];
    }
    for (int64_t s = segment() + 1; !kSums && s < args.segments; ++s) {
      const int64_t at = slot - segment() + s;
      sum.add(tile, args.part_kv + at * D * D);
      y_base += args.part_k_sum[at * D + tile.channel];
    }
    sum.store(tile, total());
    if (!kSums && f.conv_weight && u.end > u.begin) {
      const int count = int((u.end - u.begin - 1) % kChunk) + 1;
#pragma unroll 1
      for (int r = 0; r < 3; ++r) {
        own(dpres, count + r) = dpre_of<S>(p, u, tile.channel, u.end + r);
      }
    }
  }

  // The chunk of `count` items from t1 on, forward in time: num and S dO.
  RECGRELA_DEVICE void scan_outputs(int64_t t1, int count) {
    const int64_t at = (first_chunk(f, u.span, u.b) + t1 / kChunk) * f.H + u.h;
    sum.load_saved(tile, static_cast<const float*>(f.saved_kv) + at * D * D);
    float z = static_cast<const float*>(f.saved_k_sum)[at * D + tile.channel];
    float dweight[5] = {};
    if (f.conv_weight) conv.start(f, u, tile.channel, t1);
    WideAhead<S, T> next_q, next_k, next_v, next_gate, next_dy;
    const auto read_ahead = [&](int i) {
      next_q.load(f.q, u, tile.channel, t1 + i, count - i);
      next_k.load(f.k, u, tile.channel, t1 + i, count - i);
      next_v.load(f.v, u, tile.channel, t1 + i, count - i);
      next_dy.load(p.grad_out, u, tile.channel, t1 + i, count - i);
      if (f.gate.data) next_gate.load(f.gate, u, tile.channel, t1 + i, count - i);
    };
    read_ahead(0);
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += T) {
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool there = i0 + j < count;
        if (!there) break;
        const float phi_q = next_q.phi(j, there), phi_k = next_k.phi(j, there);
        z += phi_k;
        const float den = sum_over_warp(phi_q * z);
        if (tile.lane == 0) dens[(i0 + j) * Tile::warps + tile.warp] = den;
        rotation.move_to(t1 + i0 + j, u.position);
        const float c = rotation.c[0], s = rotation.s[0];
        own(cosines, j) = c;
        own(sines, j) = s;
        own(zs, j) = z;
        own(keys, j) = turn_pair(phi_k, c, s, odd);
        own(queries, j) = turn_pair(phi_q, c, s, odd);
        own(values, j) = next_v.value(j, there);
        float gate = 1.0f, slope = 0.0f;
        const float dy = next_dy.value(j, there);
        if (f.gate.data) silu_with_slope<S>(next_gate.value(j, there), &gate, &slope);
        own(dnums, i0 + j) = dy * gate;
        own(dpres, i0 + j) = dy * slope;  // what the gate's gradient needs, until dpre is known
      }
      if (i0 + T < count) read_ahead(i0 + T);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && i0 + j < count; ++j) {
        float columns[Tile::C], sums[Tile::R];
        sum.template scan_item<true, !kSums>(tile, keys + j * D, values + j * D, queries + j * D,
                                             dnums + (i0 + j) * D, columns, sums);
        if (!kSums) sum_rows(tile, sums, parts + (j * Tile::warps + tile.warp) * D);
        differentiate(t1, i0 + j, own(values, j), sum_columns(tile, columns), dweight);
      }
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && i0 + j < count; ++j) finish_query(t1, i0 + j, j);
    }
    if (!kSums && f.conv_weight) {
#pragma unroll
      for (int j = 0; j < 5; ++j) own(dtaps, j) += dweight[j];
    }
  }
  RECGRELA_DEVICE float scale_of(int64_t t1, int i) const {
    const float eps = float(f.eps), first = float(u.position + t1 + 1);
    return 1.0f / (sum_of_warps<Tile>(dens + i * Tile::warps, 1) + eps * (first + float(i)));
  }
  // Of item t1 + i: dgate, dden and dpre, and what it adds to the convolution's gradients.
  RECGRELA_DEVICE void differentiate(int64_t t1, int i, float value, float num,
                                     float (&dweight)[5]) {
    const float scale = scale_of(t1, i), o = num * scale, d_o = own(dnums, i);
    const float dot = sum_over_warp(d_o * o);
    if (tile.lane == 0) ddens[i * Tile::warps + tile.warp] = -dot * scale;
    if (kSums) return;
    float a = 0.0f;
    const float dgate = own(dpres, i);
    if (f.conv_weight) {
      float slope;
      silu_with_slope<S>(conv.at(value), &a, &slope);
      const float dpre = d_o * slope;
      own(dpres, i) = dpre;
#pragma unroll
      for (int r = 0; r < 3; ++r) dweight[r] += dpre * conv.window[r];
      dweight[3] += dpre * value;
      dweight[4] += dpre;
      conv.advance(value);
    }
    if (f.gate.data) narrow(dgate * (o + a), row(p.dgate, t1 + i));
  }
  // Of item t1 + i, the group's j-th: dnum and dq.
  RECGRELA_DEVICE void finish_query(int64_t t1, int i, int j) {
    const float scale = scale_of(t1, i);
    own(dnums, i) *= scale;
    if (kSums) return;
    const float c = own(cosines, j), s = own(sines, j);
    const float phi = turn_pair_back(own(queries, j), c, s, odd);
    const float sum_of_row = sum_of_warps<Tile>(parts + j * Tile::warps * D + tile.channel, D);
    const float dden = sum_of_warps<Tile>(ddens + i * Tile::warps, 1);
    const float dphi = turn_pair_back(sum_of_row * scale, c, s, odd) + dden * own(zs, j);
    narrow(dphi * slope_of(phi), row(p.dq, t1 + i));
  }

  // The same chunk backward in time: T v and T^T R phi(k). T and y move on.
  RECGRELA_DEVICE void scan_keys(int64_t t1, int count) {
    sum.load(tile, total());
    WideAhead<S, T> next_q, next_k, next_v;
    const auto read_ahead = [&](int i) {  // items i, i - 1 ..
      next_q.load_back(f.q, u, tile.channel, t1 + i, i + 1);
      next_k.load_back(f.k, u, tile.channel, t1 + i, i + 1);
      next_v.load_back(f.v, u, tile.channel, t1 + i, i + 1);
    };
    read_ahead(count - 1);
#pragma unroll 1
    for (int i0 = count - 1; i0 >= 0; i0 -= T) {
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool there = j <= i0;
        if (!there) break;
        turn_to(t1 + i0 - j, i0 - j == count - 1);
        const float c = rotation.c[0], s = rotation.s[0];
        own(cosines, j) = c;
        own(sines, j) = s;
        own(keys, j) = turn_pair(next_k.phi(j, there), c, s, odd);
        own(queries, j) = turn_pair(next_q.phi(j, there), c, s, odd);
        own(values, j) = next_v.value(j, there);
      }
      if (i0 - T >= 0) read_ahead(i0 - T);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && j <= i0; ++j) {
        const int i = i0 - j;
        float columns[Tile::C], sums[Tile::R];
        sum.template scan_item<true, true>(tile, queries + j * D, dnums + i * D, keys + j * D,
                                           values + j * D, columns, sums);
        sum_rows(tile, sums, parts + (j * Tile::warps + tile.warp) * D);
        finish_value(t1 + i, i, sum_columns(tile, columns));
      }
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && j <= i0; ++j) finish_key(t1, i0 - j, j);
    }
  }
  // Item t, the one before it in this pass being t + 1 unless it is the pass's first.
  RECGRELA_DEVICE void turn_to(int64_t t, bool first) {
    if (first) {
      rotation.set(u.position + t);
    } else {
      rotation.move_back_to(t, u.position);
    }
  }
  RECGRELA_DEVICE void finish_value(int64_t t, int i, float dv) {
    if (f.conv_weight) {
#pragma unroll
      for (int r = 0; r < 4; ++r) dv += conv.taps[(3 - r) * D] * own(dpres, i + r);
    }
    narrow(dv + grad_final_conv_of(p, u, tile.channel, t), row(p.dv, t));
  }
  RECGRELA_DEVICE void finish_key(int64_t t1, int i, int j) {
    const float c = own(cosines, j), s = own(sines, j);
    y +=
        sum_of_warps<Tile>(ddens + i * Tile::warps, 1) * turn_pair_back(own(queries, j), c, s, odd);
    const float phi = turn_pair_back(own(keys, j), c, s, odd);
    const float sum_of_row = sum_of_warps<Tile>(parts + j * Tile::warps * D + tile.channel, D);
    const float dphi = turn_pair_back(sum_of_row, c, s, odd) + (y_base + y);
    narrow(dphi * slope_of(phi), row(p.dk, t1 + i));
  }

  // The chunk's part of T, summed from zero, joins the total.
  RECGRELA_DEVICE void sum_chunk(int64_t t1, int count) {
    WideAhead<S, T> next_q;
    sum.clear();
    next_q.load(f.q, u, tile.channel, t1, count);
    float* buffer = keys;  // or queries
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += T) {
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool there = i0 + j < count;
        if (!there) break;
        const float phi = next_q.phi(j, there);
        if (kSums) y += sum_of_warps<Tile>(ddens + (i0 + j) * Tile::warps, 1) * phi;
        rotation.move_to(t1 + i0 + j, u.position);
        own(buffer, j) = turn_pair(phi, rotation.c[0], rotation.s[0], odd);
      }
      if (i0 + T < count) next_q.load(f.q, u, tile.channel, t1 + i0 + T, count - i0 - T);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < T && i0 + j < count; ++j) {
        sum.add_item(tile, buffer + j * D, dnums + (i0 + j) * D);
      }
      buffer = buffer == keys ? queries : keys;
    }
    sum.join(tile, total());
    __syncthreads();  // dnums and the buffers are the next chunk's
  }

  RECGRELA_DEVICE void sweep() {
    const int64_t chunks = (u.end - u.begin + kChunk - 1) / kChunk;
#pragma unroll 1
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t t1 = u.begin + n * kChunk;
      const int count = u.end - t1 < kChunk ? int(u.end - t1) : kChunk;
      scan_outputs(t1, count);
      if (!kSums) {
        scan_keys(t1, count);
        if (!args.apart) sum.store(tile, total());
        if (f.conv_weight) keep_first_dpres();
      }
      if (kSums || args.apart) sum_chunk(t1, count);
      y_base += y;
      y = 0.0f;
    }
  }

  // They are behind the chunk before, which is whole.
  RECGRELA_DEVICE void keep_first_dpres() const {
#pragma unroll
    for (int r = 0; r < 3; ++r) own(dpres, kChunk + r) = own(dpres, r);
  }

  RECGRELA_DEVICE void finish() {
    if (kSums) {
      args.part_k_sum[slot * D + tile.channel] = y_base;
      return;
    }
    if (f.conv_weight) store_conv_gradient();
    if (u.last) {
      fill_behind(p.dq);
      fill_behind(p.dk);
      fill_behind(p.dv);
      fill_behind(p.dgate);
    }
    if (!p.grad_initial.kv || segment() != 0) return;
    sum.load(tile, total());
    sum.store_state(
        tile, static_cast<float*>(p.grad_initial.kv) + u.b * p.grad_initial.kv_stride + u.h * D * D,
        u.span.sound);
    static_cast<float*>(
        p.grad_initial.k_sum)[u.b * p.grad_initial.k_sum_stride + u.h * D + tile.channel] =
        u.span.sound ? y_base : NAN;
    store_grad_initial_conv<S>(p, u, tile.channel);
  }
  RECGRELA_DEVICE void store_conv_gradient() const {
    float dweight[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) dweight[j] = own(dtaps, j);
    const int64_t part = segment() * f.B + u.b;
    store_conv_part(f, dweight, own(dtaps, 4), u.span.sound,
                    args.dparams + ((part * f.H + u.h) * D + tile.channel) * (f.W + 1));
  }
  RECGRELA_DEVICE void fill_behind(const Rows& r) const {
    if (!u.span.sound) fill_rows<S, 1>(r, u, tile.channel, 0, u.span.length, NAN);
    if (f.lengths) fill_rows<S, 1>(r, u, tile.channel, u.span.length, f.L, 0.0f);
  }
};

template <class S, int D, bool kSums>
__global__ void __launch_bounds__(WideTile<D>::threads, 1)
    wide_backward_kernel(const __grid_constant__ WideBackwardArgs args) {
  WideBackward<S, D, kSums> work(args, reinterpret_cast<float*>(shared_memory()), int(threadIdx.x),
                                 int64_t(blockIdx.x));
  work.start();
  work.sweep();
  work.finish();
}

template <int D>
int64_t wide_backward_scratch(const GatedRelaParams& p) {
  const int64_t segments = wide_segments<WideTile<D>>(p), units = p.B * p.H * segments;
  const int64_t parts = segments > 1 ? units * (D * D + D) : 0;
  return int64_t(sizeof(float)) * (units * D * D + parts + units * D * (p.W + 1));
}

template <class S, int D>
int run_wide_backward(const GatedRelaBackwardParams& p, Stream stream) {
  using Work = WideBackward<S, D, false>;
  const GatedRelaParams& f = p.forward;
  WideBackwardArgs args{};
  args.p = p;
  args.segments = wide_segments<WideTile<D>>(f);
  const int64_t longest = f.cu_seqlens ? f.items : f.L;
  args.apart = longest > kRecentItems || p.grad_final.kv != nullptr || args.segments > 1;
  const int64_t blocks = f.B * f.H * args.segments;
  args.total = static_cast<float*>(f.scratch);
  args.dparams = args.total + blocks * D * D;
  args.part_kv = args.dparams + blocks * D * (f.W + 1);
  args.part_k_sum = args.part_kv + blocks * D * D;
  int error = 0;
  if (args.segments > 1) {
    error = launch(wide_backward_kernel<S, D, true>, blocks, D, Work::bytes, stream, args);
  }
  if (error == 0) {
    error = launch(wide_backward_kernel<S, D, false>, blocks, D, Work::bytes, stream, args);
  }
  if (error == 0 && f.conv_weight) {
    error = launch_sum_parts<float>(args.dparams, args.segments * f.B, p, stream);
  }
  return error;
}

template <int D>
int run_wide_backward(const GatedRelaBackwardParams& p, Stream stream) {
  if (p.forward.dtype == DType::kFloat) return run_wide_backward<float, D>(p, stream);
  if (p.forward.dtype == DType::kBFloat16) return run_wide_backward<BFloat16, D>(p, stream);
  return run_wide_backward<Half, D>(p, stream);
}

}  // namespace recgrela::cuda
