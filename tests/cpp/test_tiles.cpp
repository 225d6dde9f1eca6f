// The kernels of softmax_loss and feed_forward (without dropout) against a direct double-precision
// evaluation, in buffers without a spare element. Runs the level named by RECGRELA_CPU_LEVEL; exits
// with 77 where the machine lacks it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

namespace {

using namespace recgrela;

int failures = 0;

void expect(const char* what, double error, double limit) {
  const bool holds = error <= limit;
  std::printf("%s %s (%.3g)\n", holds ? "ok  " : "FAIL", what, error);
  failures += !holds;
}

template <typename T>
std::vector<T> random(int64_t count, double scale) {
  static std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  std::vector<T> x(count);
  for (T& value : x) value = T(float(scale * normal(generator)));
  return x;
}

template <typename T>
double worst(const std::vector<T>& x, const std::vector<double>& exact) {
  double error = 0, largest = 1e-300;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double e = std::abs(x[i] - exact[i]);
    error = std::isnan(e) ? HUGE_VAL : std::fmax(error, e);
    largest = std::fmax(largest, std::abs(exact[i]));
  }
  return error / largest;
}

double share(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double slope(double x) {
  return share(x) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * std::acos(-1.0));
}

// Chunks of `chunk` rows; one class may be masked; with a bias, which also names rows of the table
// before and behind the classes.
template <typename T>
void test_loss(int64_t rows, int64_t classes, int64_t width, int64_t masked, int64_t chunk,
               double limit, bool biased = false) {
  const auto hidden = random<T>((rows + 1) * width, 1.0), table = random<T>(classes * width, 0.5);
  std::vector<int64_t> index(rows), wanted(rows);
  for (int64_t i = 0; i < rows; ++i) {
    index[i] = i + (i >= rows / 2);  // the row in the middle has no target
    wanted[i] = (7 * i) % classes;
    if (wanted[i] == masked) wanted[i] = (masked + 1) % classes;
  }
  std::vector<T> scores(chunk * classes), scaled(chunk * width), grad_hidden(hidden.size()),
      grad_classes(table.size(), T(NAN));
  std::vector<double> losses(rows);
  const int64_t first_class = biased ? 1 : 0;
  std::vector<int64_t> offsets(rows + 2), items;
  for (int64_t t = 0; t <= rows; ++t) {
    for (int64_t k = 0; biased && k < t % 4; ++k) items.push_back((5 * t + 3 * k) % (classes + 2));
    if (biased && t % 3 == 0) items.push_back((5 * t) % (classes + 2));  // twice
    offsets[t + 1] = int64_t(items.size());
  }
  auto values = random<T>(int64_t(items.size()), 2.0);
  std::vector<T> grad_bias(items.size(), T(NAN));
  SoftmaxLossParams p{};
  p.is_double = sizeof(T) == sizeof(double);
  p.gradients = true;
  p.first_class = first_class;
  if (biased) {
    p.bias_offsets = offsets.data();
    p.bias_items = items.data();
    p.bias_values = values.data();
    p.grad_bias = grad_bias.data();
  }
  p.width = p.class_stride = width;
  p.classes = classes;
  p.masked = masked;
  p.num_rows = rows;
  p.group_rows = 64;
  p.rows = index.data();
  p.targets = wanted.data();
  p.hidden = hidden.data();
  p.class_rows = table.data();
  p.scores = scores.data();
  p.scaled = scaled.data();
  p.losses = losses.data();
  p.grad_hidden = grad_hidden.data();
  p.grad_classes = grad_classes.data();
  const Kernels& level = kernels();
  const int64_t tile = level.loss_tile_rows(p);
  for (p.chunk_begin = 0; p.chunk_begin < rows; p.chunk_begin += chunk) {
    p.chunk_end = std::min(p.chunk_begin + chunk, rows);
    const int64_t tiles = (p.chunk_end - p.chunk_begin + tile - 1) / tile;
    for (int64_t t = tiles - 1; t >= 0; --t) level.softmax_loss(p, t, t + 1);
    level.softmax_class_gradients(p, classes / 3, classes);
    level.softmax_class_gradients(p, 0, classes / 3);
  }
  std::vector<double> exact_losses(rows), by_hidden(hidden.size()), by_class(table.size());
  std::vector<double> by_bias(items.size());
  for (int64_t i = 0; i < rows; ++i) {
    const T* h = hidden.data() + index[i] * width;
    std::vector<double> s(classes);
    double sum = 0;
    const int64_t begin = offsets[index[i]], end = offsets[index[i] + 1];
    const auto class_of = [&](int64_t k) {
      const int64_t j = items[k] - first_class;
      return j < 0 || j >= classes || j == masked ? -1 : j;
    };
    for (int64_t k = begin; k < end; ++k) {
      if (class_of(k) >= 0) s[class_of(k)] += values[k];
    }
    for (int64_t j = 0; j < classes; ++j) {
      for (int64_t c = 0; c < width; ++c) s[j] += double(h[c]) * table[j * width + c];
      if (j != masked) sum += std::exp(s[j]);
    }
    exact_losses[i] = std::log(sum) - s[wanted[i]];
    for (int64_t j = 0; j < classes; ++j) {
      if (j == masked) continue;
      const double g = (std::exp(s[j]) / sum - (j == wanted[i])) / double(rows);
      for (int64_t c = 0; c < width; ++c) {
        by_hidden[index[i] * width + c] += g * table[j * width + c];
        by_class[j * width + c] += g * h[c];
      }
      for (int64_t k = begin; k < end; ++k) by_bias[k] += class_of(k) == j ? g : 0;
    }
  }
  for (int64_t k = offsets[rows / 2]; k < offsets[rows / 2 + 1]; ++k) grad_bias[k] = T(0);
  expect("losses", worst(losses, exact_losses), limit);
  expect("gradient of hidden", worst(grad_hidden, by_hidden), limit);
  expect("gradient of classes", worst(grad_classes, by_class), limit);
  if (biased) expect("gradient of the bias", worst(grad_bias, by_bias), limit);
}

// out [N, columns] = x [N, depth] w^T + bias
template <typename X, typename T>
std::vector<double> linear(const std::vector<X>& x, const std::vector<T>& w,
                           const std::vector<T>& bias, int64_t rows) {
  const int64_t columns = int64_t(bias.size()), depth = int64_t(w.size()) / columns;
  std::vector<double> out(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    out[i] = bias[i % columns];
    for (int64_t k = 0; k < depth; ++k) {
      out[i] += double(x[i / columns * depth + k]) * w[i % columns * depth + k];
    }
  }
  return out;
}

template <typename T>
void test_feed_forward(int64_t rows, int64_t C, int64_t M, double limit) {
  const auto x = random<T>(rows * C, 1.0), residual = random<T>(rows * C, 1.0);
  const auto grad = random<T>(rows * C, 1.0), b1 = random<T>(M, 0.3), b2 = random<T>(C, 0.3);
  const auto w1 = random<T>(M * C, 0.2), w2 = random<T>(C * M, 0.1);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  std::vector<T> first(M * C), second(M * C), out(rows * C), pre(rows * M), grad_x(rows * C);
  std::vector<T> partial(tiles * (2 * M * C + M + C), T(NAN));
  FeedForwardParams p{};
  p.is_double = sizeof(T) == sizeof(double);
  p.rows = rows;
  p.width = C;
  p.inner = M;
  p.scale = 1.0;
  p.x = x.data();
  p.residual = residual.data();
  p.first_weight = w1.data();
  p.second_weight = w2.data();
  p.first_bias = b1.data();
  p.second_bias = b2.data();
  p.first_panels = first.data();
  p.second_panels = second.data();
  p.grad_out = grad.data();
  p.out = out.data();
  p.pre = pre.data();
  p.partial = partial.data();
  p.group_tiles = 1;
  const Kernels& level = kernels();
  level.feed_forward_pack(p, false, first.data(), second.data());
  for (int64_t t = tiles - 1; t >= 0; --t) level.feed_forward(p, t, t + 1);
  level.feed_forward_pack(p, true, first.data(), second.data());
  p.out = grad_x.data();
  level.feed_forward_backward(p, 0, tiles);
  for (int64_t g = 1; g < tiles; ++g) {
    const int64_t part = 2 * M * C + M + C;
    for (int64_t i = 0; i < part; ++i) partial[i] += partial[g * part + i];
  }
  const std::vector<double> inner = linear(x, w1, b1, rows);
  std::vector<double> active(inner), by_x(rows * C), sums(2 * M * C + M + C);
  for (double& a : active) a *= share(a);
  std::vector<double> exact = linear(active, w2, b2, rows);
  for (int64_t i = 0; i < rows * C; ++i) exact[i] += residual[i];
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t m = 0; m < M; ++m) {
      double g = 0;
      for (int64_t c = 0; c < C; ++c) {
        g += double(grad[i * C + c]) * w2[c * M + m];
        sums[M * C + m * C + c] += grad[i * C + c] * active[i * M + m];
      }
      g *= slope(inner[i * M + m]);
      sums[2 * M * C + m] += g;
      for (int64_t c = 0; c < C; ++c) {
        by_x[i * C + c] += g * w1[m * C + c];
        sums[m * C + c] += g * x[i * C + c];
      }
    }
    for (int64_t c = 0; c < C; ++c) sums[2 * M * C + M + c] += grad[i * C + c];
  }
  expect("pre", worst(pre, inner), limit);
  expect("out", worst(out, exact), limit);
  expect("gradient of x", worst(grad_x, by_x), limit);
  expect("gradients of the weights", worst(partial, sums), limit);
}

template <typename T>
void test(double limit) {
  test_loss<T>(1, 5, 16, -1, 32, limit);
  test_loss<T>(100, 67, 48, 5, 64, limit);
  test_loss<T>(200, 130, 64, -1, 128, limit);
  test_loss<T>(1, 5, 16, -1, 32, limit, true);
  test_loss<T>(100, 67, 48, 5, 64, limit, true);
  test_loss<T>(200, 130, 64, -1, 128, limit, true);
  test_feed_forward<T>(1, 16, 16, limit);
  test_feed_forward<T>(70, 48, 80, limit);
  test_feed_forward<T>(150, 64, 256, limit);
}

}  // namespace

int main() {
  if (!has_level()) return kSkipped;
  test<double>(1e-13);
  test<float>(3e-6);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
