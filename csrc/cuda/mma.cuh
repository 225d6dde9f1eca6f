// Warp-wide matrix products on tensor cores, the loads that feed them, and asynchronous copies to
// shared memory, each with a host twin in tests/cuda_shim/tensor_core.cpp. They need sm_80.
//
// Products are of bfloat16 with sums in float32. A float32 operand goes in as two bfloat16 parts,
// high and low, 16 bits of significand together: x y = x.hi y.hi + x.lo y.hi + x.hi y.lo. One part
// alone costs 0.8 to 1.6 units in the last place of a bfloat16 row (benchmarks/NOTES.md). bfloat16
// keeps float32's range, which float16 rows need as well: phi has no upper bound.
#pragma once
#include "common.cuh"

namespace recgrela::cuda {

// mma.sync m16n8k16, lane 4 g + t:
//   A [16, 16]  register i: row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next
//   B [16, 8]   register i: rows 2 t + 8 i and the next, column g
//   C [16, 8]   register i: row g + 8 (i / 2), column 2 t + i % 2
// The registers of A, transposed, are those of B for its two halves of eight rows: {0, 2}, {1, 3}.
using FragmentA = uint32_t[4];
using FragmentC = float[4];

#ifdef RECGRELA_CUDA_SHIM
inline uint32_t pack_bfloat16(float low, float high) {
  return shim::float_to_bfloat16(low) | uint32_t(shim::float_to_bfloat16(high)) << 16;
}
inline void mma(FragmentC& c, const FragmentA& a, uint32_t b0, uint32_t b1) {
  shim::mma_m16n8k16(c, a, b0, b1);
}
inline void load_matrices(FragmentA& to, const uint16_t* row) { shim::ldmatrix(to, row, false); }
inline void load_transposed(FragmentA& to, const uint16_t* row) { shim::ldmatrix(to, row, true); }
inline void copy_async(uint16_t* to, const void* from, bool there) {
  shim::copy_async(to, from, there ? 16 : 0);
}
inline void wait_for_copies() { shim::wait_for_copies(); }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Never run: see has_tensor_cores().
RECGRELA_DEVICE uint32_t pack_bfloat16(float, float) { return 0; }
RECGRELA_DEVICE void mma(FragmentC&, const FragmentA&, uint32_t, uint32_t) {}
RECGRELA_DEVICE void load_matrices(FragmentA&, const uint16_t*) {}
RECGRELA_DEVICE void load_transposed(FragmentA&, const uint16_t*) {}
RECGRELA_DEVICE void copy_async(uint16_t*, const void*, bool) {}
RECGRELA_DEVICE void wait_for_copies() {}
#else
RECGRELA_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
RECGRELA_DEVICE void mma(FragmentC& c, const FragmentA& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
RECGRELA_DEVICE uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}
// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets elements
// 2 t and 2 t + 1 of row g of each, or of column g of the transposed ones.
RECGRELA_DEVICE void load_matrices(FragmentA& to, const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
RECGRELA_DEVICE void load_transposed(FragmentA& to, const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// 16 bytes from global to shared memory, or 16 zeros where nothing is there.
RECGRELA_DEVICE void copy_async(uint16_t* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}
RECGRELA_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

// Two float32 numbers in two parts, each two to a word.
struct Split {
  uint32_t high, low;
};

RECGRELA_DEVICE Split split(float x, float y) {
  Split s;
  s.high = pack_bfloat16(x, y);
  s.low = pack_bfloat16(x - float_of(s.high << 16), y - float_of(s.high & 0xffff0000u));
  return s;
}

// A [rows, columns] matrix of bfloat16 in shared memory, or the two parts of a float32 one. Eight
// elements between rows let eight of them meet all banks; rows that are read one at a time need
// none.
template <int Columns, int Gap = 8>
struct SharedMatrix {
  static constexpr int pitch = Columns + Gap;
  static constexpr int bytes(int rows) { return rows * pitch * 2; }
  uint16_t* at;

  RECGRELA_DEVICE uint16_t* element(int row, int column) const { return at + row * pitch + column; }
  // A fragment of A whose first element is (row, column).
  RECGRELA_DEVICE void load_a(FragmentA& to, int row, int column, int lane) const {
    load_matrices(to, element(row + lane % 16, column + lane / 16 * 8));
  }
  // The fragment of A that is the transpose of [16, 16] from (row, column) on.
  RECGRELA_DEVICE void load_a_transposed(FragmentA& to, int row, int column, int lane) const {
    load_transposed(to, element(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
};

// What a lane's part of a fragment of C is: rows g and g + 8, columns 2 t and 2 t + 1.
struct LaneOfC {
  int g, t;
  RECGRELA_DEVICE explicit LaneOfC(int lane) : g(lane / 4), t(lane % 4) {}
};

// Whether the kernels of this file's instructions were compiled for the current device, by a rule
// that is the same for every call on it. In mma_probe.cu.
bool has_tensor_cores();

}  // namespace recgrela::cuda
