// Runs a model compiled by AOTInductor without Python: reads B, L, item_seq [B, L] and
// item_seq_len [B] as whole numbers from the standard input, writes hidden [B, hidden_size] one
// user a line. Usage: run_pt2 path/to/librecgrela.so path/to/model.pt2
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <iostream>

namespace {

at::Tensor read_numbers(at::IntArrayRef shape) {
  at::Tensor numbers = at::empty(shape, at::kLong);
  int64_t* at = numbers.data_ptr<int64_t>();
  for (int64_t i = 0; i < numbers.numel(); ++i) std::cin >> at[i];
  return numbers;
}

int run(const char* model) {
  int64_t B = 0, L = 0;
  std::cin >> B >> L;
  if (!std::cin || B < 1 || L < 1) {
    std::fprintf(stderr, "the input must begin with B and L\n");
    return 2;
  }
  const at::Tensor item_seq = read_numbers({B, L}), item_seq_len = read_numbers({B});
  if (!std::cin) {
    std::fprintf(stderr, "the input must hold B * L + B numbers more\n");
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader loader(model);
  const at::Tensor hidden = loader.run({item_seq, item_seq_len}).at(0).contiguous();
  const float* value = hidden.data_ptr<float>();
  for (int64_t b = 0; b < hidden.size(0); ++b) {
    for (int64_t c = 0; c < hidden.size(1); ++c) std::printf("%.9g ", *value++);
    std::printf("\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s librecgrela.so model.pt2\n", argv[0]);
    return 2;
  }
  // The operators must be there before the model that calls them.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    return run(argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
