// A C++ program, no Python in it, that loads librecgrela.so and calls an operator through the
// dispatcher. Usage: test_load path/to/librecgrela.so
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>
#include <exception>
#include <string>

namespace {

// recgrela::rela_forward for whole sequences without states.
at::Tensor rela(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& inv_freq, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("recgrela::rela_forward", "");
  const c10::IValue none;
  torch::jit::Stack stack{q, k, v, inv_freq, none, none, none, none, none, eps, false, false};
  op.callBoxed(stack);
  return stack.front().toTensor();
}

// The same without rotation, o_t = sum_{s<=t} (phi(q_t) . phi(k_s)) v_s / (sum + eps n_t), in ATen.
at::Tensor expected_rela(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         double eps) {
  const auto features = [](const at::Tensor& x) { return (at::elu(x) + 1).transpose(1, 2); };
  const at::Tensor scores = at::matmul(features(q), features(k).mT()).tril();  // [B, H, L, L]
  const at::Tensor counts = at::arange(1, q.size(1) + 1, q.options()).unsqueeze(1);
  const at::Tensor weights = scores / (scores.sum(-1, true) + eps * counts);
  return at::matmul(weights, v.transpose(1, 2)).transpose(1, 2);
}

bool output_agrees() {
  at::manual_seed(0);
  const auto options = at::TensorOptions(at::kDouble);
  const at::Tensor q = at::randn({2, 70, 2, 8}, options), k = at::randn_like(q);
  const at::Tensor v = at::randn_like(q);
  const at::Tensor out = rela(q, k, v, at::zeros({2, 4}, options), 1e-6);
  const double error = (out - expected_rela(q, k, v, 1e-6)).abs().max().item<double>();
  std::printf("largest difference %.3g\n", error);
  return error <= 1e-12;
}

bool wrong_argument_is_named() {
  const at::Tensor q = at::zeros({2, 3, 2, 8}), k = at::zeros({2, 3, 2, 4});
  try {
    rela(q, k, q, at::zeros({2, 4}, at::kDouble), 1e-6);
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
    return std::string(error.what()).find("k must") != std::string::npos;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s librecgrela.so\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const bool agrees = output_agrees(), named = wrong_argument_is_named();
  return agrees && named ? 0 : 1;
}
