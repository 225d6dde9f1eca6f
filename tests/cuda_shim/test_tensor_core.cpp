// The twins of the matrix instructions against plain matrix products. Which element a lane holds is
// taken from the PTX ISA's formulas (groupID = lane >> 2, threadID_in_group = lane % 4), not from
// the kernels and not from the twins.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr int kLanes = 32;

float rounded(float x) {
  const uint32_t bits = uint32_t(shim::float_to_bfloat16(x)) << 16;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
uint32_t packed(float low, float high) {
  return shim::float_to_bfloat16(low) | uint32_t(shim::float_to_bfloat16(high)) << 16;
}

// Largest difference of one warp's C + A B.
double product_error() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  float A[16][16], B[16][8], C[16][8];
  for (auto& row : A) {
    for (float& x : row) x = rounded(normal(generator));
  }
  for (auto& row : B) {
    for (float& x : row) x = rounded(normal(generator));
  }
  for (auto& row : C) {
    for (float& x : row) x = normal(generator);
  }
  double worst = 0;
  shim::run(1, kLanes, 0, [&] {
    const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane % 4;
    float a[8], b[4], c[4];
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[i] = A[row][column];
    }
    for (int i = 0; i < 4; ++i) b[i] = B[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group];
    for (int i = 0; i < 4; ++i) c[i] = C[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    const uint32_t words[4] = {packed(a[0], a[1]), packed(a[2], a[3]), packed(a[4], a[5]),
                               packed(a[6], a[7])};
    shim::mma_m16n8k16(c, words, packed(b[0], b[1]), packed(b[2], b[3]));
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      double sum = C[row][column];
      for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * double(B[k][column]);
      worst = std::fmax(worst, std::fabs(sum - double(c[i])));
    }
  });
  return worst;
}

// How many elements of four 8 x 8 matrices are not where they belong: element number 64 m + 8 r +
// c.
int misplaced(bool transposed) {
  alignas(16) uint16_t memory[4][8][8];
  for (int i = 0; i < 256; ++i) memory[i / 64][i / 8 % 8][i % 8] = uint16_t(i);
  int wrong = 0;
  shim::run(1, kLanes, 0, [&] {
    const int lane = int(threadIdx.x);
    uint32_t words[4];
    shim::ldmatrix(words, memory[lane / 8][lane % 8], transposed);  // lane l: row l % 8 of l / 8
    for (int m = 0; m < 4; ++m) {
      for (int e = 0; e < 2; ++e) {
        const int first = lane / 4, second = lane % 4 * 2 + e;
        const int row = transposed ? second : first, column = transposed ? first : second;
        wrong += uint16_t(words[m] >> (16 * e)) != 64 * m + 8 * row + column;
      }
    }
  });
  return wrong;
}

// A copy is not there before it has been waited for, and whole afterwards; nothing from zero bytes.
bool copies_wait() {
  alignas(16) uint16_t from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  alignas(16) uint16_t to[16] = {};
  bool early = false;
  shim::run(1, kLanes, 0, [&] {
    if (threadIdx.x != 0) return;
    shim::copy_async(to, from, 16);
    shim::copy_async(to + 8, nullptr, 0);
    early = to[0] == 1;
    from[7] = 9;  // still on its way
    shim::wait_for_copies();
  });
  return !early && to[0] == 1 && to[7] == 9 && to[8] == 0 && to[15] == 0;
}

}  // namespace

// Whether everything above holds; called by main in test_cuda.cpp.
bool tensor_core_twins_hold() {
  return product_error() < 1e-6 && misplaced(false) == 0 && misplaced(true) == 0 && copies_wait();
}
