// gated_rela for every even head dim and dtype, float64 included: correct, not fast. One block a
// unit, one item after the other, the running sums [D, D] in scratch memory. The formulas are those
// of forward.cuh and backward.cuh.
#pragma once
#include "unit.cuh"

namespace recgrela::cuda {

constexpr int kGenericThreads = 128;

struct GenericArgs {
  GatedRelaBackwardParams p;
  void* scratch;
};

// Scratch, in elements: by unit, a sum of two parts and the convolution's gradients; backward also,
// by item, dnum, dpre and dden.
template <class A>
struct GenericScratch {
  A *S, *S_base, *dparams;  // dparams: [B, H*D, W + 1] in all
  A *dnum, *dpre, *dden;    // [items, D], [items, D], [items]

  static int64_t unit_size(const GatedRelaParams& p, bool backward) {
    return 2 * p.D * p.D + (backward ? p.D * (p.W + 1) : 0);
  }
  static int64_t item_size(const GatedRelaParams& p) { return 2 * p.D + 1; }
  static int64_t rows(const GatedRelaParams& p) {
    return (p.cu_seqlens ? p.items : p.B * p.L) * p.H;
  }
  RECGRELA_DEVICE GenericScratch(const GatedRelaParams& p, const Unit& u, void* memory,
                                 bool backward) {
    const int64_t units = p.B * p.H, D = p.D;
    A* at = static_cast<A*>(memory);
    S = at + u.index * 2 * D * D;
    S_base = S + D * D;
    if (!backward) return;
    at += units * 2 * D * D;
    dparams = at + u.index * D * (p.W + 1);
    at += units * D * (p.W + 1);
    const int64_t all = p.cu_seqlens ? p.items : p.B * p.L;
    const int64_t first = (p.cu_seqlens ? u.span.start : u.b * p.L) + u.h * all;
    dnum = at + first * D;
    dpre = at + all * p.H * D + first * D;
    dden = at + 2 * all * p.H * D + first;
  }
};

// Shared memory of a block: rows of D, and what sums are formed with.
template <class A>
struct GenericRows {
  A *phi_q, *phi_k, *rot_q, *rot_k, *v, *dnum, *drot, *z, *z_base, *warps;
  static constexpr int count = 9;
  static int64_t bytes(int64_t D) {
    return (count * D + kGenericThreads / kWarp) * int64_t(sizeof(A));
  }
  RECGRELA_DEVICE explicit GenericRows(int64_t D) {
    phi_q = reinterpret_cast<A*>(shared_memory());
    phi_k = phi_q + D;
    rot_q = phi_k + D;
    rot_k = rot_q + D;
    v = rot_k + D;
    dnum = v + D;
    drot = dnum + D;
    z = drot + D;
    z_base = z + D;
    warps = z_base + D;
  }
};

#define RECGRELA_EACH(d, count) \
  for (int64_t d = int64_t(threadIdx.x); d < (count); d += kGenericThreads)

// The block's sum, the same in every thread; also a barrier, before and after.
template <class A>
RECGRELA_DEVICE A sum_over_block(A x, A* warps) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  A sum = A(0);
  for (int w = 0; w < kGenericThreads / kWarp; ++w) sum += warps[w];
  return sum;
}

template <class A>
RECGRELA_DEVICE void rotation_at(double inv_freq, int64_t position, A* c, A* s) {
  if constexpr (std::is_same_v<A, double>) {
    sincos_radians(double(position) * inv_freq, s, c);
  } else {
    rotation_of(uint64_t(position) * turns_of(inv_freq), c, s);
  }
}

template <class S>
struct Generic {
  using A = Accumulate<S>;
  const GatedRelaParams& p;
  const Unit u;
  GenericRows<A> rows;
  GenericScratch<A> scratch;
  const int64_t D;

  RECGRELA_DEVICE Generic(const GatedRelaParams& params, int64_t index, void* memory, bool backward)
      : p(params),
        u(unit_of(params, index, 0, 1)),
        rows(params.D),
        scratch(params, u, memory, backward),
        D(params.D) {}

  RECGRELA_DEVICE A load(const Rows& from, int64_t t, int64_t d) const {
    return widen(row_at<const S>(from, u.span, t, u.h)[d]);
  }
  RECGRELA_DEVICE void store(A x, const Rows& to, int64_t t, int64_t d) const {
    narrow(x, row_at<S>(to, u.span, t, u.h) + d);
  }

  // The running sums at zero, the base at `state` where there is one.
  RECGRELA_DEVICE void start(const States& state) {
    const A* kv = static_cast<const A*>(state.kv);
    const A* k_sum = static_cast<const A*>(state.k_sum);
    if (kv) {
      kv += u.b * state.kv_stride + u.h * D * D;
      k_sum += u.b * state.k_sum_stride + u.h * D;
    }
    RECGRELA_EACH(i, D * D) {
      scratch.S[i] = A(0);
      scratch.S_base[i] = kv ? kv[i] : A(0);
    }
    RECGRELA_EACH(d, D) {
      rows.z[d] = A(0);
      rows.z_base[d] = k_sum ? k_sum[d] : A(0);
    }
    __syncthreads();
  }
  // See forward.cuh: the recent items' sums join the rest from time to time.
  RECGRELA_DEVICE void settle() {
    __syncthreads();
    RECGRELA_EACH(i, D * D) {
      scratch.S_base[i] += scratch.S[i];
      scratch.S[i] = A(0);
    }
    RECGRELA_EACH(d, D) {
      rows.z_base[d] += rows.z[d];
      rows.z[d] = A(0);
    }
    __syncthreads();
  }
  RECGRELA_DEVICE void store_sum(const States& to, bool sound) {
    __syncthreads();
    A* kv = static_cast<A*>(to.kv) + u.b * to.kv_stride + u.h * D * D;
    A* k_sum = static_cast<A*>(to.k_sum) + u.b * to.k_sum_stride + u.h * D;
    RECGRELA_EACH(i, D * D) kv[i] = sound ? scratch.S[i] + scratch.S_base[i] : A(NAN);
    RECGRELA_EACH(d, D) k_sum[d] = sound ? rows.z[d] + rows.z_base[d] : A(NAN);
  }

  // phi of q and k, plain and turned; v.
  RECGRELA_DEVICE void stage(int64_t t) {
    RECGRELA_EACH(d, D) {
      rows.phi_q[d] = feature_map<S>(load(p.q, t, d));
      rows.phi_k[d] = feature_map<S>(load(p.k, t, d));
      rows.v[d] = load(p.v, t, d);
    }
    __syncthreads();
    RECGRELA_EACH(i, D / 2) {
      A c, s;
      rotation_at(p.inv_freq[u.h * (D / 2) + i], u.position + t, &c, &s);
      turn(rows.phi_q + 2 * i, rows.rot_q + 2 * i, c, s);
      turn(rows.phi_k + 2 * i, rows.rot_k + 2 * i, c, s);
    }
    __syncthreads();
  }
  static RECGRELA_DEVICE void turn(const A* x, A* to, A c, A s) {
    const A even = x[0], odd = x[1];
    to[0] = even * c - odd * s;
    to[1] = even * s + odd * c;
  }

  // S += rot_k v^T; the numerator of column j. z and the denominator.
  RECGRELA_DEVICE A column_forward(int64_t j) {
    A num = A(0);
    for (int64_t i = 0; i < D; ++i) {
      A& sum = scratch.S[i * D + j];
      sum += rows.rot_k[i] * rows.v[j];
      num += rows.rot_q[i] * (sum + scratch.S_base[i * D + j]);
    }
    return num;
  }
  RECGRELA_DEVICE A denominator(int64_t t) {
    A den = A(0);
    RECGRELA_EACH(d, D) {
      rows.z[d] += rows.phi_k[d];
      den += rows.phi_q[d] * (rows.z[d] + rows.z_base[d]);
    }
    return sum_over_block(den, rows.warps) + A(p.eps * double(u.position + t + 1));
  }

  RECGRELA_DEVICE const A* weight(int64_t j) const {
    return static_cast<const A*>(p.conv_weight) + (u.h * D + j) * p.W;
  }
  RECGRELA_DEVICE A pre_activation(int64_t t, int64_t j) const {
    const A* bias = static_cast<const A*>(p.conv_bias);
    A sum = bias ? bias[u.h * D + j] : A(0);
    for (int64_t tap = 0; tap < p.W; ++tap) {
      A value;
      value_at<S, 1>(p, u, t - (p.W - 1) + tap, j, &value);
      sum += weight(j)[tap] * value;
    }
    return sum;
  }

  RECGRELA_DEVICE void forward() {
    start(p.initial);
    const int64_t saved = u.span.sound ? first_chunk(p, u.span, u.b) : 0;
    for (int64_t t = 0; t < u.end; ++t) {
      if (t != 0 && t % kRecentItems == 0) settle();
      if (p.saved_kv && t % kChunk == 0) save((saved + t / kChunk) * p.H + u.h);
      stage(t);
      const A den = denominator(t);
      RECGRELA_EACH(j, D) {
        A y = column_forward(j) / den;
        if (p.conv_weight) y += silu<S>(pre_activation(t, j));
        if (p.gate.data) y *= silu<S>(load(p.gate, t, j));
        store(y, p.out, t, j);
      }
      __syncthreads();
    }
    if (p.final.kv) finish_state();
    fill_behind(p.out);
  }
  RECGRELA_DEVICE void fill_behind(const Rows& to) const {
    RECGRELA_EACH(j, D) {
      if (!u.span.sound) fill_rows<S, 1>(to, u, j, 0, u.span.length, A(NAN));
      if (p.lengths) fill_rows<S, 1>(to, u, j, u.span.length, p.L, A(0));
    }
  }
  RECGRELA_DEVICE void save(int64_t at) {
    __syncthreads();
    A* kv = static_cast<A*>(p.saved_kv) + at * D * D;
    A* k_sum = static_cast<A*>(p.saved_k_sum) + at * D;
    RECGRELA_EACH(i, D * D) kv[i] = scratch.S[i] + scratch.S_base[i];
    RECGRELA_EACH(d, D) k_sum[d] = rows.z[d] + rows.z_base[d];
  }
  RECGRELA_DEVICE void finish_state() {
    store_sum(p.final, u.span.sound);
    for (int64_t r = 0; r < p.W - 1; ++r) {
      A* to = static_cast<A*>(p.final.conv) + u.b * p.final.conv_stride + r * p.H * D + u.h * D;
      RECGRELA_EACH(j, D) {
        value_at<S, 1>(p, u, u.span.length - (p.W - 1) + r, j, to + j);
        if (!u.span.sound) to[j] = A(NAN);
      }
    }
  }
};

// Backward, first forward in time for dq, dgate, dnum, dden and dpre, then back for dk and dv.
template <class S>
struct GenericBackward : Generic<S> {
  using Base = Generic<S>;
  using A = typename Base::A;
  using Base::D, Base::p, Base::rows, Base::scratch, Base::u;
  const GatedRelaBackwardParams& b;

  RECGRELA_DEVICE GenericBackward(const GatedRelaBackwardParams& params, int64_t index,
                                  void* memory)
      : Base(params.forward, index, memory, true), b(params) {}

  RECGRELA_DEVICE void forward_item(int64_t t) {
    this->stage(t);
    const A den = this->denominator(t);
    A dot = A(0);
    RECGRELA_EACH(j, D) {
      const A o = this->column_forward(j) / den;
      A d_o = this->load(b.grad_out, t, j), a = A(0), slope = A(0);
      if (p.conv_weight) silu_with_slope<S>(this->pre_activation(t, j), &a, &slope);
      if (p.gate.data) {
        A value, gate_slope;
        silu_with_slope<S>(this->load(p.gate, t, j), &value, &gate_slope);
        this->store(d_o * (o + a) * gate_slope, b.dgate, t, j);
        d_o *= value;
      }
      scratch.dpre[t * D + j] = d_o * slope;
      rows.dnum[j] = scratch.dnum[t * D + j] = d_o / den;
      dot += d_o * o;
      if (p.conv_weight) add_dparams(t, j, d_o * slope);
    }
    const A dden = -sum_over_block(dot, rows.warps) / den;
    if (threadIdx.x == 0) scratch.dden[t] = dden;
    RECGRELA_EACH(i, D) {
      A sum = A(0);
      for (int64_t j = 0; j < D; ++j) {
        sum += (scratch.S[i * D + j] + scratch.S_base[i * D + j]) * rows.dnum[j];
      }
      rows.drot[i] = sum;
    }
    __syncthreads();
    store_turned_back(t, rows.phi_q, b.dq, dden);
    __syncthreads();
  }
  // dphi = R^T drot + scale * (z + z_base), times the slope of phi.
  RECGRELA_DEVICE void store_turned_back(int64_t t, const A* phi, const Rows& to, A scale) {
    RECGRELA_EACH(i, D / 2) {
      A c, s, turned[2];
      rotation_at(p.inv_freq[u.h * (D / 2) + i], u.position + t, &c, &s);
      Base::turn(rows.drot + 2 * i, turned, c, -s);
      for (int64_t e = 0; e < 2; ++e) {
        const int64_t d = 2 * i + e;
        const A dphi = turned[e] + scale * (rows.z[d] + rows.z_base[d]);
        this->store(dphi * slope_of(phi[d]), to, t, d);
      }
    }
  }
  RECGRELA_DEVICE void add_dparams(int64_t t, int64_t j, A dpre) {
    A* to = scratch.dparams + j * (p.W + 1);
    for (int64_t tap = 0; tap < p.W; ++tap) {
      A value;
      value_at<S, 1>(p, u, t - (p.W - 1) + tap, j, &value);
      to[tap] += dpre * value;
    }
    to[p.W] += dpre;
  }

  // The running sum is T now, and z is y.
  RECGRELA_DEVICE void backward_item(int64_t t) {
    this->stage(t);
    const A dden = scratch.dden[t];
    RECGRELA_EACH(d, D) {
      rows.z[d] += dden * rows.phi_q[d];
      rows.dnum[d] = scratch.dnum[t * D + d];
    }
    RECGRELA_EACH(j, D) {
      A dv = A(0);
      for (int64_t i = 0; i < D; ++i) {
        A& sum = scratch.S[i * D + j];
        sum += rows.rot_q[i] * scratch.dnum[t * D + j];
        dv += rows.rot_k[i] * (sum + scratch.S_base[i * D + j]);
      }
      for (int64_t tap = 0; tap < p.W && p.conv_weight; ++tap) {
        const int64_t behind = t + p.W - 1 - tap;
        if (behind < u.end) dv += this->weight(j)[tap] * scratch.dpre[behind * D + j];
      }
      const int64_t r = t - (u.end - (p.W - 1));
      if (b.grad_final.conv && r >= 0) dv += grad_final_conv(r, j);
      this->store(dv, b.dv, t, j);
    }
    __syncthreads();
    RECGRELA_EACH(i, D) {
      A sum = A(0);
      for (int64_t j = 0; j < D; ++j) {
        sum += (scratch.S[i * D + j] + scratch.S_base[i * D + j]) * rows.v[j];
      }
      rows.drot[i] = sum;
    }
    __syncthreads();
    store_turned_back(t, rows.phi_k, b.dk, A(1));
    __syncthreads();
  }
  RECGRELA_DEVICE A grad_final_conv(int64_t r, int64_t j) const {
    const A* from = static_cast<const A*>(b.grad_final.conv);
    return from[u.b * b.grad_final.conv_stride + r * p.H * D + u.h * D + j];
  }

  RECGRELA_DEVICE void run() {
    RECGRELA_EACH(i, D * (p.W + 1)) scratch.dparams[i] = u.span.sound ? A(0) : A(NAN);
    this->start(p.initial);
    for (int64_t t = 0; t < u.end; ++t) {
      if (t != 0 && t % kRecentItems == 0) this->settle();
      forward_item(t);
    }
    __syncthreads();
    this->start(b.grad_final);
    for (int64_t t = u.end - 1; t >= 0; --t) {
      const int64_t done = u.end - 1 - t;
      if (done != 0 && done % kRecentItems == 0) this->settle();
      backward_item(t);
    }
    if (b.grad_initial.kv) store_grad_initial();
    this->fill_behind(b.dq);
    this->fill_behind(b.dk);
    this->fill_behind(b.dv);
    this->fill_behind(b.dgate);
  }
  RECGRELA_DEVICE void store_grad_initial() {
    this->store_sum(b.grad_initial, u.span.sound);
    for (int64_t r = 0; r < p.W - 1; ++r) {
      A* to = static_cast<A*>(b.grad_initial.conv) + u.b * b.grad_initial.conv_stride +
              r * p.H * D + u.h * D;
      RECGRELA_EACH(j, D) {
        A sum = A(0);
        for (int64_t tap = 0; tap <= r && p.conv_weight; ++tap) {
          if (r - tap < u.end) sum += this->weight(j)[tap] * scratch.dpre[(r - tap) * D + j];
        }
        if (b.grad_final.conv && r >= u.end && u.span.sound) sum += grad_final_conv(r - u.end, j);
        to[j] = u.span.sound ? sum : A(NAN);
      }
    }
  }
};

template <class S>
__global__ void __launch_bounds__(kGenericThreads)
    generic_backward_kernel(const __grid_constant__ GenericArgs args) {
  GenericBackward<S> unit(args.p, int64_t(blockIdx.x), args.scratch);
  unit.run();
}

template <class S>
__global__ void __launch_bounds__(kGenericThreads)
    generic_forward_kernel(const __grid_constant__ GenericArgs args) {
  Generic<S> unit(args.p.forward, int64_t(blockIdx.x), args.scratch, false);
  unit.forward();
}

}  // namespace recgrela::cuda
