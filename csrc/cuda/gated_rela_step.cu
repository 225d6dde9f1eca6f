// gated_rela for one item per sequence, the state updated in place:
//   kv += R phi(k) v^T,  k_sum += phi(k),  o = kv^T R phi(q) / (phi(q).k_sum + eps n)
//   y = SiLU(g) (o + SiLU(conv)), the conv window drops its oldest row and takes v
// A warp a unit (b, h). The state is the traffic: D*D floats in and out, by quads of columns where
// head dim and addresses allow it.
#include "common.cuh"

namespace recgrela::cuda {
namespace {

constexpr int kStepWarps = 4;  // per block; one where rows are so wide that four take too much
constexpr int64_t kWide = 512;

struct StepArgs {
  GatedRelaStepParams p;
};

// Rows of one unit in shared memory.
template <class A>
struct StepRows {
  A *rot_q, *rot_k, *v, *num;
  static int64_t bytes(int64_t D) { return 4 * D * int64_t(sizeof(A)); }
  RECGRELA_DEVICE StepRows(int64_t D, int warp) {
    rot_q = reinterpret_cast<A*>(shared_memory()) + warp * 4 * D;
    rot_k = rot_q + D;
    v = rot_k + D;
    num = v + D;
  }
};

template <class A>
RECGRELA_DEVICE A sum_over_warp(A x) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

template <class S>
struct Step {
  using A = Accumulate<S>;
  const GatedRelaStepParams& p;
  const int64_t b, h, D, position;
  const int lane;
  StepRows<A> rows;

  RECGRELA_DEVICE const S* row(const Rows& from) const {
    return static_cast<const S*>(from.data) + b * from.batch_stride + h * from.head_stride;
  }

  // phi of q and k, turned, and v, into shared memory; the denominator, and k_sum moves on.
  RECGRELA_DEVICE A stage() const {
    A* k_sum = static_cast<A*>(p.state.k_sum) + b * p.state.k_sum_stride + h * D;
    A den = A(0);
    for (int64_t i = lane; i < D / 2; i += kWarp) {
      A c, s;
      if constexpr (std::is_same_v<S, double>) {
        sincos_radians(double(position) * p.inv_freq[h * (D / 2) + i], &s, &c);
      } else {
        rotation_of(uint64_t(position) * turns_of(p.inv_freq[h * (D / 2) + i]), &c, &s);
      }
      A phi_q[2], phi_k[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t d = 2 * i + e;
        phi_q[e] = feature_map<S>(widen(row(p.q)[d]));
        phi_k[e] = feature_map<S>(widen(row(p.k)[d]));
        rows.v[d] = widen(row(p.v)[d]);
        k_sum[d] += phi_k[e];
        den += phi_q[e] * k_sum[d];
      }
      turn(phi_q, c, s, rows.rot_q + 2 * i);
      turn(phi_k, c, s, rows.rot_k + 2 * i);
    }
    return sum_over_warp(den) + A(p.eps * double(position + 1));
  }
  static RECGRELA_DEVICE void turn(const A* x, A c, A s, A* to) {
    to[0] = x[0] * c - x[1] * s;
    to[1] = x[0] * s + x[1] * c;
  }

  RECGRELA_DEVICE A* kv() const {
    return static_cast<A*>(p.state.kv) + b * p.state.kv_stride + h * D * D;
  }
  // A lane a column: any head dim.
  RECGRELA_DEVICE void columns() const {
    for (int64_t j = lane; j < D; j += kWarp) {
      A num = A(0);
      for (int64_t i = 0; i < D; ++i) {
        A& sum = kv()[i * D + j];
        sum += rows.rot_k[i] * rows.v[j];
        num += rows.rot_q[i] * sum;
      }
      rows.num[j] = num;
    }
  }
  // A lane four columns of every kRows-th row.
  template <int kD>
  RECGRELA_DEVICE void quads() const {
    constexpr int kQuads = kD / 4, kRows = kWarp / kQuads, kAtOnce = kD < 64 ? kD / kRows : 8;
    const int column = lane % kQuads * 4;
    float num[4] = {}, v[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) v[m] = rows.v[column + m];
    for (int i0 = lane / kQuads; i0 < kD; i0 += kRows * kAtOnce) {
      Pack<float, 4> quad[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        quad[n] = *reinterpret_cast<Pack<float, 4>*>(kv() + (i0 + n * kRows) * kD + column);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = i0 + n * kRows;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          quad[n].at[m] += rows.rot_k[i] * v[m];
          num[m] += rows.rot_q[i] * quad[n].at[m];
        }
        *reinterpret_cast<Pack<float, 4>*>(kv() + i * kD + column) = quad[n];
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int lanes = kQuads; lanes < kWarp; lanes *= 2) {
        num[m] += __shfl_xor_sync(0xffffffffu, num[m], lanes);
      }
      if (lane < kQuads) rows.num[column + m] = num[m];
    }
  }

  // The pre-activation of channel d; the window moves on.
  RECGRELA_DEVICE A convolve(int64_t d) const {
    const A* bias = static_cast<const A*>(p.conv_bias);
    const A* weight = static_cast<const A*>(p.conv_weight) + (h * D + d) * p.W;
    const bool augment = p.conv_weight != nullptr;
    A pre = bias ? bias[h * D + d] : A(0);
    for (int64_t r = 0; r < p.W - 1; ++r) {
      A* at = static_cast<A*>(p.state.conv) + b * p.state.conv_stride + r * p.H * D + h * D + d;
      if (augment) pre += weight[r] * *at;
      *at = r + 2 < p.W ? at[p.H * D] : rows.v[d];
    }
    return augment ? pre + weight[p.W - 1] * rows.v[d] : pre;
  }
  RECGRELA_DEVICE void store(A den) const {
    S* out = static_cast<S*>(p.out.data) + b * p.out.batch_stride + h * p.out.head_stride;
    for (int64_t d = lane; d < D; d += kWarp) {
      const A pre = convolve(d);
      A y = rows.num[d] / den;
      if (p.conv_weight) y += silu<S>(pre);
      if (p.gate.data) y *= silu<S>(widen(row(p.gate)[d]));
      narrow(y, out + d);
    }
  }
};

// Naming the blocks a multiprocessor is to hold keeps ptxas from spilling for sm_120.
template <class S, int kD>
__global__ void __launch_bounds__(kStepWarps* kWarp, kD >= 32 ? 5 : 0)
    step_kernel(const __grid_constant__ StepArgs args) {
  const GatedRelaStepParams& p = args.p;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t unit = int64_t(blockIdx.x) * (p.D > kWide ? 1 : kStepWarps) + warp;
  if (unit >= p.B * p.H) return;  // a whole warp, which shares no barrier
  const int64_t b = unit / p.H, h = unit % p.H;
  if (p.active && !p.active[b]) {
    S* out = static_cast<S*>(p.out.data) + b * p.out.batch_stride + h * p.out.head_stride;
    for (int64_t d = lane; d < p.D; d += kWarp) narrow(Accumulate<S>(0), out + d);
    return;
  }
  const Step<S> step{p, b, h, p.D, p.state.position[b], lane, StepRows<Accumulate<S>>(p.D, warp)};
  const Accumulate<S> den = step.stage();
  __syncwarp();
  if constexpr (kD == 0) {
    step.columns();
  } else {
    step.template quads<kD>();
  }
  __syncwarp();
  step.store(den);
}

template <class S, int kD>
int run(const GatedRelaStepParams& p, Stream stream) {
  const int warps = p.D > kWide ? 1 : kStepWarps;
  const int64_t blocks = (p.B * p.H + warps - 1) / warps;
  return launch(step_kernel<S, kD>, blocks, warps * kWarp,
                warps * StepRows<Accumulate<S>>::bytes(p.D), stream, StepArgs{p});
}

template <class S>
int run(const GatedRelaStepParams& p, Stream stream) {
  const bool quads =
      reinterpret_cast<uintptr_t>(p.state.kv) % 16 == 0 && p.state.kv_stride % 4 == 0;
  if constexpr (!std::is_same_v<S, double>) {
    if (quads && p.D == 16) return run<S, 16>(p, stream);
    if (quads && p.D == 32) return run<S, 32>(p, stream);
    if (quads && p.D == 64) return run<S, 64>(p, stream);
  }
  return run<S, 0>(p, stream);
}

}  // namespace

int launch_gated_rela_step(const GatedRelaStepParams& p, Stream stream) {
  if (p.dtype == DType::kDouble) return run<double>(p, stream);
  if (p.dtype == DType::kFloat) return run<float>(p, stream);
  if (p.dtype == DType::kBFloat16) return run<BFloat16>(p, stream);
  return run<Half>(p, stream);
}

}  // namespace recgrela::cuda
