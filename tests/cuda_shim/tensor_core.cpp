// The warp-wide matrix instructions' twins. Their layouts are written down as the PTX ISA's
// sections "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix" give them,
// element by element, and not as the kernels use them.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda_runtime.h"
#include "races.h"

namespace shim {

bool tensor_cores = true;

namespace {

constexpr int kLanes = 32;

float bfloat16(uint32_t word, int half) {
  const uint32_t bits = (half == 0 ? word : word >> 16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Which lane's which element a_i is A[row][column]; b_i and c_i likewise. An element's register is
// i / 2 where two share one.
struct Place {
  int lane, i;
};
Place place_in_a(int row, int column) {
  const int group = row % 8, thread = column % 8 / 2;
  const int i = (column >= 8 ? 4 : 0) + (row >= 8 ? 2 : 0) + column % 2;
  return {group * 4 + thread, i};
}
Place place_in_b(int row, int column) {
  const int thread = row % 8 / 2;
  return {column * 4 + thread, (row >= 8 ? 2 : 0) + row % 2};
}

}  // namespace

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto two = [](uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; };
  const Deposit* lanes = gather({{two(a[0], a[1]), two(a[2], a[3]), two(b0, b1)}});
  const auto word = [&](int lane, int r) {
    return uint32_t(lanes[lane].at[r / 2] >> (r % 2 == 0 ? 0 : 32));
  };
  const int lane = int(thread_index.x) % kLanes, group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = thread * 2 + (i & 1);
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const Place x = place_in_a(row, k), y = place_in_b(k, column);
      sum += double(bfloat16(word(x.lane, x.i / 2), x.i % 2)) *
             double(bfloat16(word(y.lane, 4 + y.i / 2), y.i % 2));
    }
    c[i] = float(sum);
  }
}

void ldmatrix(uint32_t (&to)[4], const uint16_t* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "cuda_shim: ldmatrix from an address that is no multiple of 16\n");
    std::abort();
  }
  Deposit own;
  std::memcpy(own.at, row, 16);
  races::access(row, 16, false);
  const Deposit* lanes = gather(own);
  const int lane = int(thread_index.x) % kLanes;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int r, int c) {
      return uint16_t(lanes[8 * matrix + r].at[c / 4] >> (c % 4 * 16));
    };
    const int r = lane / 4, c = lane % 4 * 2;
    const uint32_t low = transposed ? element(c, r) : element(r, c);
    const uint32_t high = transposed ? element(c + 1, r) : element(r, c + 1);
    to[matrix] = low | high << 16;
  }
}

}  // namespace shim
