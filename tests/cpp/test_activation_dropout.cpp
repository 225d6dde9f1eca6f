// activation_dropout's kernels against a direct double-precision evaluation, with the mask's hash
// written out once more. Runs the level named by RECGRELA_CPU_LEVEL; exits with 77 where the
// machine lacks it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

namespace {

using namespace recgrela;

constexpr int64_t kCount = 2 * kDropoutBlock + 77;  // two whole blocks and a part
constexpr uint64_t kSeed = 0xfedcba9876543210u;
constexpr double kP = 0.25;

int failures = 0;

void expect(const char* what, double error, double limit) {
  const bool holds = error <= limit;
  std::printf("%s %s (%.3g)\n", holds ? "ok  " : "FAIL", what, error);
  failures += !holds;
}

uint64_t splitmix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double factor(int64_t i) {
  const uint64_t key = splitmix64(splitmix64(kSeed) + uint64_t(i / kDropoutBlock));
  uint32_t w = uint32_t(key) + uint32_t(i % kDropoutBlock) * 0x9e3779b9u;
  w = (w ^ (w >> 16)) * 0x7feb352du;
  w = (w ^ (w >> 15) ^ uint32_t(key >> 32)) * 0x846ca68bu;
  return (w ^ 0x80000000u) < uint32_t(1) << 30 ? 0.0 : 1.0 / (1.0 - kP);
}

double share(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double slope(double x) {
  return share(x) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * std::acos(-1.0));
}

// The largest error of [first, ...) run as blocks in reverse order, each on its own.
template <typename T, class Expected>
void check(const char* what, void (*kernel)(const ActivationDropoutParams&, int64_t, int64_t),
           const std::vector<T>& first, const std::vector<T>* second, bool gelu, double limit,
           Expected expected) {
  std::vector<T> out(kCount + 1, std::numeric_limits<T>::quiet_NaN());
  ActivationDropoutParams p{};
  p.dtype = sizeof(T) == sizeof(double) ? DType::kDouble : DType::kFloat;
  p.gelu = gelu;
  p.numel = kCount;
  p.seed = kSeed;
  p.dropped = uint32_t(1) << 30;
  p.scale = 1.0 / (1.0 - kP);
  p.first = first.data();
  p.second = second == nullptr ? nullptr : second->data();
  p.out = out.data();
  for (int64_t block = 2; block >= 0; --block) kernel(p, block, block + 1);
  double worst = std::isnan(out[kCount]) ? 0 : HUGE_VAL;  // written behind the end
  for (int64_t i = 0; i < kCount; ++i) {
    const double error = std::abs(out[i] - expected(i));
    worst = std::isnan(error) ? HUGE_VAL : std::fmax(worst, error);
  }
  expect(what, worst, limit);
}

template <typename T>
void test(double limit) {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  std::vector<T> x(kCount), y(kCount);
  for (T& value : x) value = T(float(2 * normal(generator)));
  for (T& value : y) value = T(float(normal(generator)));
  const auto forward = kernels().activation_dropout;
  const auto backward = kernels().activation_dropout_backward;
  const auto a = [&](int64_t i) { return double(x[i]); };
  const auto b = [&](int64_t i) { return double(y[i]); };
  check<T>("dropout", forward, x, nullptr, false, limit,
           [&](int64_t i) { return a(i) * factor(i); });
  check<T>("gelu and residual", forward, x, &y, true, limit,
           [&](int64_t i) { return b(i) + a(i) * share(a(i)) * factor(i); });
  check<T>("gradient of dropout", backward, y, nullptr, false, limit,
           [&](int64_t i) { return b(i) * factor(i); });
  check<T>("gradient of gelu", backward, y, &x, true, limit,
           [&](int64_t i) { return b(i) * factor(i) * slope(a(i)); });
}

}  // namespace

int main() {
  if (!has_level()) return kSkipped;
  test<double>(1e-14);
  test<float>(2e-6);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
