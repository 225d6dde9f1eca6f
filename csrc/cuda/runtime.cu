// The calls to the CUDA runtime that are no launches.
#include "common.cuh"

namespace recgrela::cuda {

#ifdef RECGRELA_CUDA_SHIM
const char* error_text(int) { return "none: the shim knows no errors"; }
int copy_to_host(int64_t* to, const int64_t* from, int64_t count, Stream) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  return 0;
}
#else
const char* error_text(int error) {
  if (error == int(cudaErrorInsufficientDriver)) {
    return "the NVIDIA driver is too old for the CUDA runtime this library was built with; update "
           "the driver, or install with an older CUDA toolkit";
  }
  if (error == int(cudaErrorNoKernelImageForDevice)) {
    return "the library holds no code for this GPU; install again with TORCH_CUDA_ARCH_LIST set to "
           "its compute capability";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int copy_to_host(int64_t* to, const int64_t* from, int64_t count, Stream stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemcpyAsync(to, from, size_t(count) * sizeof(int64_t),
                                            cudaMemcpyDeviceToHost, cuda_stream);
  return int(error != cudaSuccess ? error : cudaStreamSynchronize(cuda_stream));
}
#endif

}  // namespace recgrela::cuda
