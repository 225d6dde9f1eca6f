// Stands in for CUDA's own header when the kernels' source is compiled with g++: a block's threads
// are fibers on one CPU thread. A test double, never shipped; nothing it measures says anything
// about a GPU.
//
// What it demands of a kernel: every thread of a block reaches every barrier, every lane of a warp
// every warp collective, in any order of threads. A barrier that never fills is an error.
// Shared memory is full of NaN when a block starts.
#pragma once
#ifndef RECGRELA_CUDA_SHIM
#error "compile with -DRECGRELA_CUDA_SHIM"
#endif
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace shim {

struct Index {
  unsigned x = 0;
};
extern Index thread_index, block_index, block_size, grid_size;

// In which order threads run between barriers, and blocks one after another. Reversed, and shuffled
// by an odd seed, a warp runs as far as it gets before the next one does.
enum class Order { kForward, kReverse, kShuffled };
void set_order(Order order, unsigned seed);

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);
unsigned char* shared_memory();

void block_barrier();
void warp_barrier();
// What every lane of the warp deposits, to be read until its next but one collective.
struct Deposit {
  uint64_t at[3];
};
const Deposit* gather(const Deposit& deposit);
// Deposits `value` for the other lanes of the warp and returns what lane `source` deposited.
uint64_t exchange(uint64_t value, unsigned source);

// Twins of mma.sync.m16n8k16 (bfloat16, float32 sums), ldmatrix.x4 and cp.async of 16 bytes, in
// tensor_core.cpp. A copy is made when it is waited for.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void ldmatrix(uint32_t (&to)[4], const uint16_t* row, bool transposed);
void copy_async(void* to, const void* from, int bytes);
void wait_for_copies();
// Whether the kernels that need tensor cores run; a test can ask for the others.
extern bool tensor_cores;

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

template <class T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

void need_full_mask(unsigned mask);

}  // namespace shim

#define threadIdx ::shim::thread_index
#define blockIdx ::shim::block_index
#define blockDim ::shim::block_size
#define gridDim ::shim::grid_size

inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  shim::need_full_mask(mask);
  shim::warp_barrier();
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  shim::need_full_mask(mask);
  return shim::shuffle(value, (shim::thread_index.x % 32) ^ unsigned(lanes));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  shim::need_full_mask(mask);
  return shim::shuffle(value, unsigned(lane) % 32);
}
