// What the kernels of both rooms take: plain pointers and sizes, no torch, no CUDA header. cpu and
// cuda add what only theirs need (cpu/kernels.h, cuda/params.h).
//
// Layouts (strides in elements, the last dimension contiguous):
//   rows       q, k, v, gate, out and their gradients: [B, L, H, D], or [T, H, D] when packed
//   inv_freq   [H, D/2] float64         conv_weight [H*D, W], conv_bias [H*D]
//   states     kv [H, D, D] (key dim first), k_sum [H, D], conv [W-1, H*D]: contiguous inside one
//              user, any stride between users
//   saved_*    the states at the start of every chunk of kChunk items: [chunks, H, D, D] and
//              [chunks, H, D]
// conv_weight, conv_bias, states and saved states are double for double rows and float otherwise.
#pragma once
#include <cstdint>

namespace recgrela {

constexpr int kChunk = 64;  // items between saved states: CHUNK of recgrela_ext/ops/gated_rela.py

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, item_stride = 0, head_stride = 0;
};

struct States {
  void *kv = nullptr, *k_sum = nullptr, *conv = nullptr;
  int64_t kv_stride = 0, k_sum_stride = 0, conv_stride = 0;
  const int64_t* position = nullptr;  // [B], nullptr: every sequence starts at 0
};

struct SequenceParams {
  DType dtype;
  int64_t B, L, H, D, W;
  int64_t items;  // T when packed, else 0
  double eps;
  Rows q, k, v, gate, out;       // gate.data nullptr: no gate
  const double* inv_freq;        // [H, D/2]
  const void* conv_weight;       // nullptr: no rank augmentation, W is 1
  const void* conv_bias;         // nullptr: zero
  const int64_t* lengths;        // [B] or nullptr
  const int64_t* cu_seqlens;     // [B+1] or nullptr
  States initial, final;         // kv nullptr: none
  void *saved_kv, *saved_k_sum;  // nullptr in inference
};

struct GradientParams {
  Rows grad_out, dq, dk, dv, dgate;
  States grad_final, grad_initial;
  void *dweight, *dbias;  // [H*D, W], [H*D]; dbias nullptr: not wanted
};

struct GatedRelaStepParams {
  DType dtype;
  int64_t B, H, D, W;
  double eps;
  Rows q, k, v, gate, out;  // item_stride unused
  const double* inv_freq;
  const void *conv_weight, *conv_bias;
  States state;
  const bool* active;  // [B] or nullptr: all
};

// How many saved states a call may need in all.
inline int64_t count_chunks(int64_t B, int64_t L, int64_t items, bool packed) {
  return packed ? items / kChunk + B : B * ((L + kChunk - 1) / kChunk);
}

}  // namespace recgrela
