// gated_rela backward, for head dims whose running sums fit into a warp's registers: one reverse
// sweep over the chunks of a sequence, from the states the forward saved at each chunk's start.
//
// Forward:  num_t = S_t^T R phi(q_t),  den_t = phi(q_t).z_t + eps n_t,  o = num / den
//           y = SiLU(g) (o + a),  a = SiLU(pre),  pre = conv(v)
// With dO = SiLU(g) dy, dnum = dO / den, dden = -(dO.o) / den, and the sums over s >= t
//           T_t = sum R phi(q_s) dnum_s^T,   y_t = sum dden_s phi(q_s):
//           dphi(q_t) = R^T (S_t dnum_t) + dden_t z_t     dphi(k_t) = R^T (T_t v_t) + y_t
//           dv_t = T_t^T R phi(k_t) + transposed conv of dpre,   dpre = dO SiLU'(pre)
//
// A warp takes kTile items of its units at a time into shared memory and goes over them four times,
// one scan each: num; S dnum; T v; T^T R phi(k). S at the tile's start comes from the saved state
// and the keys and values in between, T stays in shared memory. Rows are read and written once,
// keys and values of a chunk's first tiles again, from the cache.
#pragma once
#include "conv_gradient.cuh"
#include "gated_rela.h"
#include "warp_tile.cuh"

namespace recgrela::cuda {

constexpr int kBackwardWarps = 1;  // per block
constexpr int kTile = 16;          // divides kChunk

struct BackwardArgs {
  GatedRelaBackwardParams p;
  int64_t groups, segments;
  float *part_kv, *part_k_sum;  // of T and y: [B*H, segments, D, D], [B*H, segments, D]
  float* dparams;               // [segments, B, H*D, W + 1]: of the convolution, its bias last
  bool aligned, has_base;
};

// One warp's shared memory: rows of kTile items, dden, S at the tile's start, T and its base.
template <int D>
struct BackwardTile : WarpTile<D, 2> {
  using Base = WarpTile<D, 2>;
  static constexpr int array = kTile * Base::rows;
  static constexpr int states = Base::units * Base::state;
  static constexpr int64_t warp_floats(bool has_base) {
    return 5 * array + kTile * Base::units + (has_base ? 3 : 2) * states;
  }
  using Base::Base;
};

template <class S, int D, bool kSums>
struct Backward {
  using Tile = BackwardTile<D>;
  // T: items that share a barrier and are read ahead together; at D 32 two of them spill.
  static constexpr int E = 2, T = D == 32 ? 1 : D < 32 && kTwoBytes<S> ? 4 : 2, R = Tile::R;

  const BackwardArgs& args;
  const GatedRelaBackwardParams& p;
  const GatedRelaParams& f;
  const Tile tile;
  const Unit u;
  const int64_t segment;
  float *keys, *queries, *values, *dnums, *dpres, *ddens, *S_start, *T_sum, *T_base;
  Rotation<E> rotation;
  Convolution<S, E> conv;
  float z_start[E], y[E], y_base[E], later[3][E];  // later: dpre of the three items behind
  float dweight[4][E], dbias[E];
  bool base_used;

  RECGRELA_DEVICE Backward(const BackwardArgs& a, float* memory, int lane, int64_t task)
      : args(a),
        p(a.p),
        f(a.p.forward),
        tile(lane),
        u(unit_of(f, task / a.segments * Tile::units + tile.unit, task % a.segments, a.segments)),
        segment(task % a.segments),
        rotation(f.inv_freq + u.h * (D / 2) + tile.channel / 2) {
    keys = memory;
    queries = keys + Tile::array;
    values = queries + Tile::array;
    dnums = values + Tile::array;
    dpres = dnums + Tile::array;
    memory = dpres + Tile::array;
    S_start = memory + tile.unit * Tile::state;
    T_sum = S_start + Tile::states;
    T_base = args.has_base ? T_sum + Tile::states : nullptr;
    memory += (args.has_base ? 3 : 2) * Tile::states;
    ddens = memory + tile.unit * kTile;
  }

  template <class Row>
  RECGRELA_DEVICE Row* item(Row* rows, int j) const {
    return rows + j * Tile::rows;
  }
  RECGRELA_DEVICE void own_row(const float* rows, int j, float* to) const {
    const Pack<float, E> pack =
        *reinterpret_cast<const Pack<float, E>*>(item(rows, j) + tile.own());
    to[0] = pack.at[0];
    to[1] = pack.at[1];
  }
  RECGRELA_DEVICE S* row(const Rows& rows, int64_t t) const {
    return row_at<S>(rows, u.span, t, u.h) + tile.channel;
  }
  // T and y start with the gradient of the final state and the sums of the segments behind.
  RECGRELA_DEVICE void start() {
#pragma unroll 1
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        T_sum[tile.part() + n * D + m] = 0.0f;
        if (args.has_base) T_base[tile.part() + n * D + m] = 0.0f;
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      y[e] = y_base[e] = dbias[e] = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) dweight[j][e] = 0.0f;
#pragma unroll
      for (int r = 0; r < 3; ++r) later[r][e] = 0.0f;
    }
    base_used = false;
    if (f.conv_weight) conv.load(f, u, tile.channel);
    if (!kSums && u.real && p.grad_final.kv) {
      add_to_base(
          static_cast<const float*>(p.grad_final.kv) + u.b * p.grad_final.kv_stride + u.h * D * D,
          static_cast<const float*>(p.grad_final.k_sum) + u.b * p.grad_final.k_sum_stride +
              u.h * D);
    }
    for (int64_t s = segment + 1; !kSums && u.real && s < args.segments; ++s) {
      const int64_t at = u.index * args.segments + s;
      add_to_base(args.part_kv + at * D * D, args.part_k_sum + at * D);
    }
    if (!kSums && f.conv_weight && u.real && u.span.sound) {
#pragma unroll 1
      for (int r = 2; r >= 0; --r) {
        float behind[E];
#pragma unroll
        for (int e = 0; e < E; ++e) behind[e] = dpre_of<S>(p, u, tile.channel + e, u.end + r);
        push_later(behind);
      }
    }
  }
  RECGRELA_DEVICE void add_to_base(const float* kv, const float* k_sum) {
#pragma unroll 1
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        T_base[tile.part() + n * D + m] += kv[tile.part() + n * D + m];
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) y_base[e] += k_sum[tile.channel + e];
    base_used = true;
  }
  RECGRELA_DEVICE void settle() {
#pragma unroll 1
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int at = tile.part() + n * D + m;
        T_base[at] += T_sum[at];
        T_sum[at] = 0.0f;
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      y_base[e] += y[e];
      y[e] = 0.0f;
    }
    base_used = true;
  }

  // S and z at item t1, chunk the items' first: the saved state and the items in between.
  RECGRELA_DEVICE void restore(float (&sum)[R][4], int64_t chunk, int64_t t1) {
    const bool there = chunk < u.end;
    const int64_t slot = there ? first_chunk(f, u.span, u.b) + chunk / kChunk : 0;
    const float* kv = static_cast<const float*>(f.saved_kv) + (slot * f.H + u.h) * D * D;
    const float* k_sum = static_cast<const float*>(f.saved_k_sum) + (slot * f.H + u.h) * D;
#pragma unroll
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[n][m] = there ? kv[tile.part() + n * D + m] : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < E; ++e) z_start[e] = there ? k_sum[tile.channel + e] : 0.0f;
    if (chunk == t1) return keep_start(sum);
    Cursor<S> k(f.k, u, tile.channel, chunk), v(f.v, u, tile.channel, chunk);
    Ahead<S, T, E> next_k, next_v;
    const auto read_ahead = [&](int64_t t0) {
      next_k.load(k, left(t0), args.aligned);
      next_v.load(v, left(t0), args.aligned);
      k.advance(T);
      v.advance(T);
    };
    read_ahead(chunk);
#pragma unroll 1
    for (int64_t t0 = chunk; t0 < t1; t0 += T) {
      const int slot0 = int(t0 - chunk) % (2 * T);  // two buffers, one barrier
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool here = t0 + j < u.end;
        float phi[E], turned[E], value[E];
        map_row<S, E>(next_k.at[j], here, phi);
        widen_row<S, E>(next_v.at[j], here, value);
        rotation.move_to(t0 + j, u.position);
        rotation.turn(phi, turned);
#pragma unroll
        for (int e = 0; e < E; ++e) z_start[e] += phi[e];
        store_shared<E>(turned, item(keys, slot0 + j) + tile.own());
        store_shared<E>(value, item(values, slot0 + j) + tile.own());
      }
      if (t0 + T < t1) read_ahead(t0 + T);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const float* key = item(keys, slot0 + j) + tile.rows_begin();
        scan_item<Tile, false>(sum, key, key, load_quad(item(values, slot0 + j) + tile.columns()));
      }
    }
    keep_start(sum);
  }
  RECGRELA_DEVICE void keep_start(const float (&sum)[R][4]) const {
#pragma unroll
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) S_start[tile.part() + n * D + m] = sum[n][m];
    }
    __syncwarp();
  }

  // How many items from t0 on are there, T at most.
  RECGRELA_DEVICE int left(int64_t t0) const {
    const int64_t count = u.end - t0;
    return count < T ? int(count) : T;
  }

  // Scan 1, forward in time: num, and from dy the gate's gradient, dnum, dden and dpre.
  RECGRELA_DEVICE void scan_outputs(float (&sum)[R][4], int64_t t1) {
    if (f.conv_weight) conv.start(f, u, tile.channel, t1);
    float z[E] = {z_start[0], z_start[1]};
    float tile_dweight[4][E] = {}, tile_dbias[E] = {};
    const float eps = float(f.eps), first = float(u.position + t1 + 1);
    Cursor<S> q(f.q, u, tile.channel, t1), k(f.k, u, tile.channel, t1), v(f.v, u, tile.channel, t1);
    Cursor<S> gate(f.gate, u, tile.channel, t1), dy(p.grad_out, u, tile.channel, t1);
    Ahead<S, T, E> next_q, next_k, next_v, next_gate, next_dy;
    const auto read_ahead = [&](int64_t t0) {
      next_q.load(q, left(t0), args.aligned);
      next_k.load(k, left(t0), args.aligned);
      next_v.load(v, left(t0), args.aligned);
      next_dy.load(dy, left(t0), args.aligned);
      q.advance(T);
      k.advance(T);
      v.advance(T);
      dy.advance(T);
      if (f.gate.data == nullptr) return;
      next_gate.load(gate, left(t0), args.aligned);
      gate.advance(T);
    };
    read_ahead(t1);
#pragma unroll 1
    for (int i0 = 0; i0 < kTile; i0 += T) {
      const int64_t t0 = t1 + i0;
      float scale[T];
      const Ahead<S, T, E> now_gate = next_gate, now_dy = next_dy;
#pragma unroll
      for (int j = 0; j < T; ++j) {
        const bool there = t0 + j < u.end;
        float phi_q[E], phi_k[E], turned[E], value[E];
        map_row<S, E>(next_q.at[j], there, phi_q);
        map_row<S, E>(next_k.at[j], there, phi_k);
        float den = 0.0f;
#pragma unroll
        for (int e = 0; e < E; ++e) {
          z[e] += phi_k[e];
          den += phi_q[e] * z[e];
        }
        scale[j] = 1.0f / (sum_over_unit<Tile>(den) + eps * (first + float(i0 + j)));
        widen_row<S, E>(next_v.at[j], there, value);
        rotation.move_to(t0 + j, u.position);
        rotation.turn(phi_k, turned);
        store_shared<E>(turned, item(keys, i0 + j) + tile.own());
        rotation.turn(phi_q, turned);
        store_shared<E>(turned, item(queries, i0 + j) + tile.own());
        store_shared<E>(value, item(values, i0 + j) + tile.own());
      }
      if (i0 + T < kTile) {
        read_ahead(t0 + T);
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < T; ++j) {
        Quad num = scan_item<Tile>(sum, item(keys, i0 + j) + tile.rows_begin(),
                                   item(queries, i0 + j) + tile.rows_begin(),
                                   load_quad(item(values, i0 + j) + tile.columns()));
        float o[E];
        gather_columns<Tile>(num, tile.group, o);
#pragma unroll
        for (int e = 0; e < E; ++e) o[e] *= scale[j];
        differentiate(i0 + j, t0 + j, scale[j], o, now_gate.at[j], now_dy.at[j], tile_dweight,
                      tile_dbias);
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
#pragma unroll
      for (int j = 0; j < 4; ++j) dweight[j][e] += tile_dweight[j][e];
      dbias[e] += tile_dbias[e];
    }
    __syncwarp();
  }
  RECGRELA_DEVICE void differentiate(int j, int64_t t, float scale, const float* o,
                                     const Raw<S, E>& raw_gate, const Raw<S, E>& raw_dy,
                                     float (&tile_dweight)[4][E], float (&tile_dbias)[E]) {
    const bool there = t < u.end;
    float dnum[E], dpre[E] = {}, dgate[E], dot = 0.0f;
    float v[E], pre[E] = {}, window[3][E];
    own_row(values, j, v);
    if (f.conv_weight) {
#pragma unroll
      for (int r = 0; r < 3; ++r) {
#pragma unroll
        for (int e = 0; e < E; ++e) window[r][e] = conv.window[r][e];
      }
      conv.next(v, pre);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      float d_o = there ? raw_dy.at(e) : 0.0f, a = 0.0f, slope = 0.0f;
      if (f.conv_weight) silu_with_slope<S>(pre[e], &a, &slope);
      if (f.gate.data) {
        float value, gate_slope;
        silu_with_slope<S>(there ? raw_gate.at(e) : 0.0f, &value, &gate_slope);
        dgate[e] = d_o * (o[e] + a) * gate_slope;
        d_o *= value;
      }
      if (there) dpre[e] = d_o * slope;
      dnum[e] = there ? d_o * scale : 0.0f;
      dot += there ? d_o * o[e] : 0.0f;
    }
    const float dden = -sum_over_unit<Tile>(dot) * (there ? scale : 0.0f);
    store_shared<E>(dnum, item(dnums, j) + tile.own());
    store_shared<E>(dpre, item(dpres, j) + tile.own());
    if (tile.l == 0) ddens[j] = dden;
    if (kSums || !there) return;
    if (f.gate.data) store_pack<S, E>(dgate, row(p.dgate, t), args.aligned);
    if (f.conv_weight == nullptr) return;
#pragma unroll
    for (int e = 0; e < E; ++e) {
#pragma unroll
      for (int r = 0; r < 3; ++r) tile_dweight[r][e] += dpre[e] * window[r][e];
      tile_dweight[3][e] += dpre[e] * v[e];
      tile_dbias[e] += dpre[e];
    }
  }
  RECGRELA_DEVICE float* dparams_at(int e) const {
    const int64_t part = segment * f.B + u.b;
    return args.dparams + ((part * f.H + u.h) * D + tile.channel + e) * (f.W + 1);
  }

  // Scan 2, forward in time: S dnum, on S transposed, and with it dq.
  RECGRELA_DEVICE void scan_queries(int64_t t1) {
    float sum[R][4];
    load_transposed(S_start, sum);
    float z[E] = {z_start[0], z_start[1]};
#pragma unroll 1
    for (int j = 0; j < kTile; ++j) {
      const Quad part = scan_item<Tile>(sum, item(values, j) + tile.rows_begin(),
                                        item(dnums, j) + tile.rows_begin(),
                                        load_quad(item(keys, j) + tile.columns()));
      float turned[E], dphi[E], key[E], query[E], phi_k[E], phi_q[E];
      gather_columns<Tile>(part, tile.group, turned);
      rotation.move_to(t1 + j, u.position);
      own_row(keys, j, key);
      own_row(queries, j, query);
      rotation.turn_back(key, phi_k);
      rotation.turn_back(query, phi_q);
      rotation.turn_back(turned, dphi);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        z[e] += phi_k[e];
        dphi[e] = (dphi[e] + ddens[j] * z[e]) * slope_of(phi_q[e]);
      }
      if (t1 + j < u.end) store_pack<S, E>(dphi, row(p.dq, t1 + j), args.aligned);
    }
  }
  RECGRELA_DEVICE void load_transposed(const float* from, float (&sum)[R][4]) const {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < R; n += 4) {
        const Quad quad = load_quad(from + tile.transposed_part() + m * D + n);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n + i][m] = quad.at[i];
      }
    }
  }

  // Scan 3, backward in time: T v, on T transposed, and with it dk. y moves on.
  RECGRELA_DEVICE void scan_keys(int64_t t1) {
    float sum[R][4];
    if (!kSums) load_transposed(T_sum, sum);
#pragma unroll 1
    for (int j = kTile - 1; j >= 0; --j) {
      const int64_t t = t1 + j;
      rotation.move_back_to(t, u.position);
      float query[E], phi_q[E];
      own_row(queries, j, query);
      rotation.turn_back(query, phi_q);
#pragma unroll
      for (int e = 0; e < E; ++e) y[e] += ddens[j] * phi_q[e];
      if (kSums) continue;
      const float* value = item(values, j) + tile.rows_begin();
      Quad part = scan_item<Tile>(sum, item(dnums, j) + tile.rows_begin(), value,
                                  load_quad(item(queries, j) + tile.columns()));
      if (base_used) add_transposed_base<Tile>(part, T_base + tile.transposed_part(), value);
      float turned[E], dphi[E], key[E], phi_k[E];
      gather_columns<Tile>(part, tile.group, turned);
      own_row(keys, j, key);
      rotation.turn_back(key, phi_k);
      rotation.turn_back(turned, dphi);
#pragma unroll
      for (int e = 0; e < E; ++e) dphi[e] = (dphi[e] + y_base[e] + y[e]) * slope_of(phi_k[e]);
      if (t < u.end) store_pack<S, E>(dphi, row(p.dk, t), args.aligned);
    }
    __syncwarp();
  }

  // Scan 4, backward in time: T^T R phi(k), and with it dv. T moves on.
  RECGRELA_DEVICE void scan_values(int64_t t1) {
    float sum[R][4];
#pragma unroll
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[n][m] = T_sum[tile.part() + n * D + m];
    }
#pragma unroll 1
    for (int j = kTile - 1; j >= 0; --j) {
      const float* key = item(keys, j) + tile.rows_begin();
      Quad part = scan_item<Tile, !kSums>(sum, item(queries, j) + tile.rows_begin(), key,
                                          load_quad(item(dnums, j) + tile.columns()));
      if (kSums) continue;
      if (base_used) add_base<Tile>(part, T_base + tile.part(), key);
      float dv[E];
      gather_columns<Tile>(part, tile.group, dv);
      const int64_t t = t1 + j;
      if (t >= u.end) continue;
      if (f.conv_weight) add_conv(j, dv);
#pragma unroll
      for (int e = 0; e < E; ++e) dv[e] += grad_final_conv_of(p, u, tile.channel + e, t);
      store_pack<S, E>(dv, row(p.dv, t), args.aligned);
    }
#pragma unroll
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) T_sum[tile.part() + n * D + m] = sum[n][m];
    }
    __syncwarp();
  }
  // pre_t = bias + sum_j weight_j v_{t-W+1+j}, so v_t feeds pre_{t+W-1-j} through weight_j.
  RECGRELA_DEVICE void add_conv(int j, float* dv) {
    float dpre[E];
    own_row(dpres, j, dpre);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      dv[e] += conv.weight[3][e] * dpre[e] + conv.weight[2][e] * later[0][e] +
               conv.weight[1][e] * later[1][e] + conv.weight[0][e] * later[2][e];
    }
    push_later(dpre);
  }
  RECGRELA_DEVICE void push_later(const float* dpre) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      later[2][e] = later[1][e];
      later[1][e] = later[0][e];
      later[0][e] = dpre[e];
    }
  }
  RECGRELA_DEVICE void sweep() {
    const int64_t items = max_over_warp(u.end - u.begin);
    const int64_t tiles = (items + kTile - 1) / kTile;
    for (int64_t i = tiles - 1; i >= 0; --i) {
      const int64_t done = (tiles - 1 - i) * kTile;
      if (done != 0 && done % kRecentItems == 0 && args.has_base) settle();
      const int64_t t1 = u.begin + i * kTile, chunk = t1 - t1 % kChunk;
      float sum[R][4];
      restore(sum, chunk, t1);
      scan_outputs(sum, t1);
      if (!kSums) scan_queries(t1);
      scan_keys(t1);
      scan_values(t1);
    }
  }

  RECGRELA_DEVICE void finish_sums() const {
    if (!u.real) return;
    const int64_t at = u.index * args.segments + segment;
#pragma unroll 1
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int part = tile.part() + n * D + m;
        args.part_kv[at * D * D + part] = T_sum[part] + (args.has_base ? T_base[part] : 0.0f);
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      args.part_k_sum[at * D + tile.channel + e] = y[e] + y_base[e];
    }
  }
  RECGRELA_DEVICE void finish() const {
    if (!u.real) return;
    const bool sound = u.span.sound;
    if (f.conv_weight) store_dweight(sound);
    if (u.last) {
      fill_behind(p.dq);
      fill_behind(p.dk);
      fill_behind(p.dv);
      fill_behind(p.dgate);
    }
    if (p.grad_initial.kv && segment == 0) store_grad_initial(sound);
  }
  RECGRELA_DEVICE void fill_behind(const Rows& rows) const {
    if (!u.span.sound) fill_rows<S, E>(rows, u, tile.channel, 0, u.span.length, NAN);
    if (f.lengths) fill_rows<S, E>(rows, u, tile.channel, u.span.length, f.L, 0.0f);
  }
  RECGRELA_DEVICE void store_dweight(bool sound) const {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float taps[4] = {dweight[0][e], dweight[1][e], dweight[2][e], dweight[3][e]};
      store_conv_part(f, taps, dbias[e], sound, dparams_at(e));
    }
  }
  RECGRELA_DEVICE void store_grad_initial(bool sound) const {
    float* kv =
        static_cast<float*>(p.grad_initial.kv) + u.b * p.grad_initial.kv_stride + u.h * D * D;
    float* k_sum = static_cast<float*>(p.grad_initial.k_sum) + u.b * p.grad_initial.k_sum_stride +
                   u.h * D + tile.channel;
#pragma unroll 1
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int at = tile.part() + n * D + m;
        kv[at] = sound ? T_sum[at] + (args.has_base ? T_base[at] : 0.0f) : NAN;
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) k_sum[e] = sound ? y[e] + y_base[e] : NAN;
#pragma unroll 1
    for (int e = 0; e < E; ++e) store_grad_initial_conv<S>(p, u, tile.channel + e);
  }
};

template <class S, int D, bool kSums>
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    backward_kernel(const __grid_constant__ BackwardArgs args) {
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t task = int64_t(blockIdx.x) * kBackwardWarps + warp;
  if (task >= args.groups * args.segments) return;  // a whole warp, which shares no barrier
  float* memory = reinterpret_cast<float*>(shared_memory()) +
                  warp * BackwardTile<D>::warp_floats(args.has_base);
  Backward<S, D, kSums> warp_work(args, memory, int(threadIdx.x) % kWarp, task);
  warp_work.start();
  warp_work.sweep();
  if constexpr (kSums) {
    warp_work.finish_sums();
  } else {
    warp_work.finish();
  }
}

template <int D>
int64_t backward_scratch(const GatedRelaParams& p) {
  const int64_t segments = segments_of(p, BackwardTile<D>::units);
  const int64_t parts = segments > 1 ? p.B * p.H * segments * (D * D + D) : 0;
  return int64_t(sizeof(float)) * (parts + segments * p.B * p.H * D * (p.W + 1));
}

template <class S, int D>
int run_backward(const GatedRelaBackwardParams& p, Stream stream) {
  using Tile = BackwardTile<D>;
  const GatedRelaParams& f = p.forward;
  BackwardArgs args{};
  args.p = p;
  args.groups = (f.B * f.H + Tile::units - 1) / Tile::units;
  args.segments = segments_of(f, Tile::units);
  args.aligned =
      aligned_rows<S, 2>({&f.q, &f.k, &f.v, &f.gate, &p.grad_out, &p.dq, &p.dk, &p.dv, &p.dgate});
  const int64_t longest = f.cu_seqlens ? f.items : f.L;
  args.has_base = longest > kRecentItems || p.grad_final.kv != nullptr || args.segments > 1;
  float* scratch = static_cast<float*>(f.scratch);
  args.dparams = scratch;
  args.part_kv = scratch + args.segments * f.B * f.H * D * (f.W + 1);
  args.part_k_sum = args.part_kv + f.B * f.H * args.segments * D * D;
  const int64_t blocks = (args.groups * args.segments + kBackwardWarps - 1) / kBackwardWarps;
  const int64_t bytes = kBackwardWarps * Tile::warp_floats(args.has_base) * int64_t(sizeof(float));
  int error = 0;
  if (error == 0 && args.segments > 1) {
    error =
        launch(backward_kernel<S, D, true>, blocks, kBackwardWarps * kWarp, bytes, stream, args);
  }
  if (error == 0) {
    error =
        launch(backward_kernel<S, D, false>, blocks, kBackwardWarps * kWarp, bytes, stream, args);
  }
  if (error == 0 && f.conv_weight) {
    error = launch_sum_parts<float>(args.dparams, args.segments * f.B, p, stream);
  }
  return error;
}

template <int D>
int run_backward(const GatedRelaBackwardParams& p, Stream stream) {
  if (p.forward.dtype == DType::kFloat) return run_backward<float, D>(p, stream);
  if (p.forward.dtype == DType::kBFloat16) return run_backward<BFloat16, D>(p, stream);
  return run_backward<Half, D>(p, stream);
}

}  // namespace recgrela::cuda
