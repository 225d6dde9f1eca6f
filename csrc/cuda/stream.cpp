#include "stream.h"

#include <cstdlib>
#include <cstring>
#include <vector>

// Torch's own function, by way of libtorch: NULL where torch was built without CUDA, and then no
// CUDA tensor reaches an operator.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

// Whether the torch in this process has CUDA streams, for the tests.
extern "C" __attribute__((visibility("default"))) int recgrela_has_cuda_streams() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

namespace recgrela::cuda {

Stream current_stream(const Tensor& on) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("recgrela_ext: torch was built without CUDA");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream) != 0) {
    throw std::runtime_error("recgrela_ext: torch does not tell its current CUDA stream");
  }
  return stream;
}

void check_launch(const char* op, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + error_text(error));
}

void check_width(const char* op, const Dims& d) {
  const int64_t most = d.acc == ScalarType::Double ? 1024 : 2048;
  RECGRELA_CHECK(d.D <= most, op, ": q must have a last dimension of at most ", most,
                 " on CUDA, got ", d.D);
}

void check_values(const SequenceArgs& a, const Dims& d, Stream stream) {
  const char* wish = std::getenv("RECGRELA_CHECK");
  if (wish == nullptr || std::strcmp(wish, "1") != 0) return;
  const auto read = [&](const Tensor& x) {
    std::vector<int64_t> values(x.numel());
    check_launch(a.op, copy_to_host(values.data(), integers(x), x.numel(), stream));
    return values;
  };
  if (a.lengths) check_lengths(a.op, read(*a.lengths).data(), d.B, d.L);
  if (a.cu_seqlens) check_cu_seqlens(a.op, read(*a.cu_seqlens).data(), d.B, d.packed_items);
}

}  // namespace recgrela::cuda
