// Whether the tensor-core kernels run on the current device.
#include "mma.cuh"

#ifndef RECGRELA_CUDA_SHIM
#include <atomic>
#endif

namespace recgrela::cuda {

#ifdef RECGRELA_CUDA_SHIM
bool has_tensor_cores() { return shim::tensor_cores; }
#else
namespace {

__global__ void probe() {}

// The architecture the code that runs here was compiled for, not the device's own: code for 7.5
// holds no such kernels, whatever device it runs on.
bool ask() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error != cudaSuccess) cudaGetLastError();  // the launch will say it
  return error == cudaSuccess && attributes.ptxVersion >= 80;
}

}  // namespace

bool has_tensor_cores() {
  constexpr int kMost = 64;
  static std::atomic<signed char> answers[kMost];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device >= kMost) return ask();
  signed char answer = answers[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = ask() ? 1 : -1;
    answers[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}
#endif

}  // namespace recgrela::cuda
