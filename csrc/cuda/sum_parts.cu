// The last step of the backward: the convolution's gradients, summed over parts.
#include "common.cuh"
#include "gated_rela.h"

namespace recgrela::cuda {
namespace {

constexpr int kColumns = 32, kLanes = 32;

template <class A>
struct SumArgs {
  const A* from;  // [parts, channels, W + 1]
  A *dweight, *dbias;
  int64_t parts, count, W;
};

// A block sums 32 columns; each of its 32 rows of threads takes every 32nd part. In double: the
// sums are over all items of a batch.
template <class A>
__global__ void __launch_bounds__(kColumns* kLanes)
    sum_kernel(const __grid_constant__ SumArgs<A> args) {
  double* sums = reinterpret_cast<double*>(shared_memory());
  const int lane = int(threadIdx.x) % kColumns, first = int(threadIdx.x) / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  double sum = 0.0;
  if (column < args.count) {
#pragma unroll 8
    for (int64_t part = first; part < args.parts; part += kLanes) {
      sum += double(args.from[part * args.count + column]);
    }
  }
  sums[first * kColumns + lane] = sum;
  __syncthreads();
  if (first != 0 || column >= args.count) return;  // no barrier behind this one
  for (int i = 1; i < kLanes; ++i) sum += sums[i * kColumns + lane];
  const int64_t channel = column / (args.W + 1), tap = column % (args.W + 1);
  if (tap < args.W) {
    args.dweight[channel * args.W + tap] = A(sum);
  } else if (args.dbias) {
    args.dbias[channel] = A(sum);
  }
}

}  // namespace

template <class A>
int launch_sum_parts(const A* from, int64_t parts, const GatedRelaBackwardParams& p,
                     Stream stream) {
  const GatedRelaParams& f = p.forward;
  const SumArgs<A> args{from,  static_cast<A*>(p.dweight), static_cast<A*>(p.dbias),
                        parts, f.H * f.D * (f.W + 1),      f.W};
  const int64_t blocks = (args.count + kColumns - 1) / kColumns;
  return launch(sum_kernel<A>, blocks, kColumns * kLanes,
                kColumns * kLanes * int64_t(sizeof(double)), stream, args);
}
template int launch_sum_parts(const float*, int64_t, const GatedRelaBackwardParams&, Stream);
template int launch_sum_parts(const double*, int64_t, const GatedRelaBackwardParams&, Stream);

}  // namespace recgrela::cuda
