// The CUDA kernels' interface: plain pointers and sizes, no torch, no CUDA header. Every pointer is
// a device pointer.
//
// Layouts (strides in elements, the last dimension contiguous):
//   rows       q, k, v, gate, out and their gradients: [B, L, H, D], or [T, H, D] when packed
//   inv_freq   [H, D/2] float64         conv_weight [H*D, W], conv_bias [H*D]
//   states     kv [H, D, D] (key dim first), k_sum [H, D], conv [W-1, H*D]: contiguous inside one
//              user, any stride between users
//   saved_*    the states at the start of every chunk of kChunk items: [chunks, H, D, D], [.., H,
//   D]
// conv_weight, conv_bias, states and saved states are double for double rows and float otherwise.
#pragma once
#include <cstdint>

namespace recgrela::cuda {

constexpr int kChunk = 64;         // items between saved states: CHUNK of ops/gated_rela.py
constexpr int kRecentItems = 256;  // items whose sums stay apart from the rest, see forward.cuh

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

struct GatedRelaParams {
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
  void* scratch;                 // forward_scratch_bytes() or backward_scratch_bytes(), see below
};

struct GatedRelaBackwardParams {
  GatedRelaParams forward;  // out is not read
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

// Launchers: on `stream` (a cudaStream_t), on the current device, without synchronising. 0, or a
// cudaError_t. Scratch memory holds nothing between calls.
using Stream = void*;
int launch_gated_rela(const GatedRelaParams& p, Stream stream);
int launch_gated_rela_backward(const GatedRelaBackwardParams& p, Stream stream);
int launch_gated_rela_step(const GatedRelaStepParams& p, Stream stream);
int64_t forward_scratch_bytes(const GatedRelaParams& p);
int64_t backward_scratch_bytes(const GatedRelaParams& p);

const char* error_text(int error);
// Waits for the stream and copies `count` integers to the host, for RECGRELA_CHECK=1 alone.
int copy_to_host(int64_t* to, const int64_t* from, int64_t count, Stream stream);

}  // namespace recgrela::cuda
