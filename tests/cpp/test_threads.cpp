// The kernels whose work items the operators share over threads, but for those of test_shapes and
// test_stream: the same work by one thread and by several, few rows and many, every bit compared.
// Each thread gets a range of items, as from torch's loop; the phases of an operator follow each
// other as in its .cpp. Meant for ThreadSanitizer; exits with 77 where the machine lacks the level.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

namespace {

using namespace recgrela;

int failures = 0;

template <class Kernel, class Params>
void spread(int threads, Kernel kernel, const Params& p, int64_t count) {
  if (threads == 1) return kernel(p, 0, count);
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
    if (begin < end) pool.emplace_back([kernel, &p, begin, end] { kernel(p, begin, end); });
  }
  for (std::thread& thread : pool) thread.join();
}

template <class A>
std::vector<A> random(int64_t count, unsigned seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<A> x(count);
  for (A& e : x) e = A(scale * normal(generator));
  return x;
}

std::vector<int64_t> below(int64_t limit, int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<int64_t> x(count);
  for (int64_t& e : x) e = int64_t(generator() % uint64_t(limit));
  return x;
}

// NaN: what no thread wrote shows.
template <class A>
std::vector<A> unwritten(int64_t count) {
  return std::vector<A>(count, std::numeric_limits<A>::quiet_NaN());
}

// What a run gave, as bytes.
struct Outcome {
  std::string bytes;
  bool written = true;

  template <class A>
  void add(const std::vector<A>& x) {
    bytes.append(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(A));
    if constexpr (std::is_floating_point_v<A>) {
      for (A e : x) written = written && !std::isnan(e);
    }
  }
};

// `run(threads)`, whose bits must not depend on the threads.
template <class Run>
void check(const std::string& what, Run run) {
  const Outcome one = run(1);
  for (int threads : {2, 5}) {
    const Outcome many = run(threads);
    const bool same = one.written && many.written && !one.bytes.empty() && one.bytes == many.bytes;
    std::printf("%s %s, %d threads\n", same ? "ok  " : "FAIL", what.c_str(), threads);
    failures += !same;
  }
}

template <class A>
Outcome encoder(int threads, int64_t users, bool gate, int64_t conv_width) {
  constexpr int64_t H = 2, D = 10, C = H * D, M = 42, layers = 2;
  const int64_t past = std::max<int64_t>(conv_width - 1, 0);
  int64_t size = 2 * C + gate * (C * C + C) + C * C + C + 2 * C * C + 2 * C;
  size += conv_width ? C * conv_width + C : 0;
  size += C * C + C + 2 * C + C * M + M + M * C + C;
  const int64_t row = layers * (C * D + C + past * C);
  const auto weights = random<A>(layers * size + 2 * C, 1, 0.1), x = random<A>(users * C, 2);
  auto state = random<A>(users * row, 3);
  for (A& e : state) e = std::abs(e) + 1;
  std::vector<A> out;
  const std::vector<double> inv_freq(C / 2, 0.3);
  std::vector<int64_t> position(users, 7);
  const std::unique_ptr<bool[]> active(new bool[users]);
  for (int64_t u = 0; u < users; ++u) active[u] = u % 3 != 1;
  EncoderStepParams p{};
  p.is_double = sizeof(A) == 8, p.has_gate = gate, p.has_final_norm = true;
  p.B = users, p.num_layers = layers, p.H = H, p.D = D, p.W = conv_width, p.mlp_width = M;
  p.eps = p.layer_norm_eps = 1e-6;
  p.x = x.data(), p.x_stride = C;
  p.weights = weights.data(), p.inv_freq = inv_freq.data();
  p.state = state.data(), p.state_stride = row;
  p.position = position.data(), p.active = active.get();
  Outcome found;
  for (int t = 0; t < 3; ++t) {
    out = unwritten<A>(users * C);
    p.out = out.data();
    spread(threads, kernels().encoder_step, p, users);
    found.add(out);
    for (int64_t& n : position) ++n;
  }
  found.add(state);
  return found;
}

// lists: of all users, 1, of each its own, 2, or none; with lists of its own there is one part.
template <class A>
Outcome topk(int threads, int64_t users, int64_t parts, int lists) {
  constexpr int64_t items = 700, width = 9, k = 11, seen = 6;
  const auto hidden = random<A>(users * width, 1), table = random<A>(items * width, 2);
  auto seen_items = below(items, users * seen, 3);
  for (int64_t u = 0; u < users; ++u)
    std::sort(seen_items.begin() + u * seen, seen_items.begin() + (u + 1) * seen);
  std::vector<int64_t> candidates;
  for (int64_t u = 0; u < (lists == 2 ? users : lists); ++u)
    for (int64_t i = 0; i < items / 2; ++i) candidates.push_back(2 * i + u % 2);
  std::vector<A> scores(parts * users * k, -std::numeric_limits<A>::infinity());
  std::vector<int64_t> best(parts * users * k, 0);
  TopKParams p{};
  p.table_type = sizeof(A) == 8 ? DType::kDouble : DType::kFloat;
  p.users = users, p.width = width, p.k = k, p.parts = parts;
  p.hidden = hidden.data(), p.table = table.data(), p.table_stride = width;
  p.num_items = lists ? items / 2 : items;
  p.candidates = lists ? candidates.data() : nullptr;
  p.candidates_stride = lists == 2 ? items / 2 : 0;
  p.seen = seen_items.data(), p.num_seen = seen;
  p.scores = scores.data(), p.items = best.data();
  spread(threads, kernels().topk_scores, p, (users + kGroupUsers - 1) / kGroupUsers * parts);
  Outcome found;
  found.add(scores), found.add(best);
  return found;
}

template <class A>
Outcome dropout(int threads, int64_t numel, bool gelu, bool backward) {
  const auto first = random<A>(numel, 1), second = random<A>(numel, 2);
  auto out = unwritten<A>(numel);
  ActivationDropoutParams p{};
  p.dtype = sizeof(A) == 8 ? DType::kDouble : DType::kFloat;
  p.gelu = gelu, p.numel = numel, p.seed = 5;
  p.dropped = uint32_t(1) << 30, p.scale = 4.0 / 3;
  p.first = first.data(), p.second = backward && !gelu ? nullptr : second.data();
  p.out = out.data();
  const auto kernel =
      backward ? kernels().activation_dropout_backward : kernels().activation_dropout;
  spread(threads, kernel, p, (numel + kDropoutBlock - 1) / kDropoutBlock);
  Outcome found;
  found.add(out);
  return found;
}

// Scores and then the gradients of classes, chunk by chunk; as in softmax_loss.cpp more threads
// have larger chunks. Every third row has no target.
enum class Bias { kNone, kListed, kByRecency };

template <class A>
Outcome softmax(int threads, int64_t T, int64_t classes, int64_t masked, Bias bias) {
  constexpr int64_t width = 21, group = 2 * kLossTile, kGrain = 48;
  constexpr int64_t lanes = 64 / int64_t(sizeof(A)), stride = (width + lanes - 1) / lanes * lanes;
  const auto hidden = random<A>(T * width, 1);
  auto table = random<A>(classes * stride, 2);
  for (int64_t i = 0; i < classes * stride; ++i) table[i] = i % stride < width ? table[i] : A(0);
  std::vector<int64_t> rows, targets;
  for (int64_t t = 0; t < T; ++t) {
    if (t % 3 == 1) continue;
    rows.push_back(t);
    targets.push_back(t % classes == masked ? 0 : t % classes);
  }
  const int64_t count = int64_t(rows.size());
  std::vector<int64_t> offsets;
  for (int64_t t = 0; t <= T; ++t) offsets.push_back(2 * t);
  const auto items = below(classes, 2 * T, 3);
  const auto values = random<A>(2 * T + 5, 4);
  const int64_t chunk = std::min(threads * group, (count + kLossTile - 1) / kLossTile * kLossTile);
  auto scores = unwritten<A>(chunk * classes);
  std::vector<A> scaled(chunk * stride), grad_hidden(T * width), grad_bias(2 * T);
  auto grad_classes = unwritten<A>(classes * stride);
  auto losses = unwritten<double>(count);
  SoftmaxLossParams p{};
  p.is_double = sizeof(A) == 8, p.gradients = true;
  p.width = width, p.class_stride = stride, p.classes = classes, p.masked = masked;
  p.num_rows = count, p.group_rows = group;
  p.rows = rows.data(), p.targets = targets.data();
  p.hidden = hidden.data(), p.class_rows = table.data();
  p.scores = scores.data(), p.scaled = scaled.data(), p.losses = losses.data();
  p.grad_hidden = grad_hidden.data(), p.grad_classes = grad_classes.data();
  if (bias == Bias::kListed) {
    p.bias_offsets = offsets.data(), p.bias_items = items.data();
    p.bias_values = values.data(), p.grad_bias = grad_bias.data();
  }
  const Kernels& level = kernels();
  const int64_t tile = level.loss_tile_rows(p);
  // One log of T places, rows in windows of 50 of it.
  const std::vector<int64_t> up_to{1, 2, 4, 20};
  std::vector<int64_t> begins, ends;
  std::vector<int32_t> of_class, next(T, INT32_MAX), last, latest(classes, -1);
  for (int64_t t = 0; t < T; ++t) {
    begins.push_back(t / 50 * 50), ends.push_back(t + 1);
    int32_t& before = latest[items[t]];
    of_class.push_back(items[t] == masked ? -1 : int32_t(items[t]));
    last.push_back(before);
    if (before >= 0) next[before] = int32_t(t);
    before = int32_t(t);
  }
  std::vector<double> bucket_gradients((count + tile - 1) / tile * 5);
  if (bias == Bias::kByRecency) {
    p.span_begin = begins.data(), p.span_end = ends.data(), p.up_to = up_to.data();
    p.place_class = of_class.data(), p.next_place = next.data(), p.last_place = last.data();
    p.buckets = 5, p.bias_values = values.data(), p.bucket_gradients = bucket_gradients.data();
  }
  const auto class_blocks = [](const SoftmaxLossParams& q, int64_t begin, int64_t end) {
    kernels().softmax_class_gradients(q, begin * kGrain, std::min(end * kGrain, q.classes));
  };
  for (p.chunk_begin = 0; p.chunk_begin < count; p.chunk_begin += chunk) {
    p.chunk_end = std::min(p.chunk_begin + chunk, count);
    spread(threads, level.softmax_loss, p, (p.chunk_end - p.chunk_begin + tile - 1) / tile);
    spread(threads, class_blocks, p, (classes + kGrain - 1) / kGrain);
  }
  Outcome found;
  found.add(losses), found.add(grad_hidden), found.add(grad_classes), found.add(grad_bias);
  found.add(bucket_gradients);
  return found;
}

template <class A>
Outcome feed_forward(int threads, int64_t rows, bool residual) {
  constexpr int64_t C = 16, M = 48, group_tiles = 2, part = 2 * M * C + M + C;
  const auto x = random<A>(rows * C, 1), w1 = random<A>(M * C, 2), b1 = random<A>(M, 3);
  const auto w2 = random<A>(C * M, 4), b2 = random<A>(C, 5), r = random<A>(rows * C, 6);
  const auto grad = random<A>(rows * C, 7);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t groups = (tiles + group_tiles - 1) / group_tiles;
  auto out = unwritten<A>(rows * C), grad_x = out, pre = unwritten<A>(rows * M);
  auto partial = unwritten<A>(groups * part);
  std::vector<A> first(M * C), second(M * C);
  FeedForwardParams p{};
  p.is_double = sizeof(A) == 8;
  p.rows = rows, p.width = C, p.inner = M, p.inner_seed = 8, p.outer_seed = 9;
  p.dropped = uint32_t(1) << 30, p.scale = 4.0 / 3;
  p.x = x.data(), p.residual = residual ? r.data() : nullptr;
  p.first_weight = w1.data(), p.first_bias = b1.data();
  p.second_weight = w2.data(), p.second_bias = b2.data();
  p.first_panels = first.data(), p.second_panels = second.data();
  p.out = out.data(), p.pre = pre.data();
  const Kernels& level = kernels();
  level.feed_forward_pack(p, false, first.data(), second.data());
  spread(threads, level.feed_forward, p, tiles);
  p.pre = nullptr;  // scratch of the thread's instead
  auto again = unwritten<A>(rows * C);
  p.out = again.data();
  spread(threads, level.feed_forward, p, tiles);
  p.grad_out = grad.data(), p.pre = pre.data(), p.out = grad_x.data();
  p.partial = partial.data(), p.group_tiles = group_tiles;
  level.feed_forward_pack(p, true, first.data(), second.data());
  spread(threads, level.feed_forward_backward, p, groups);
  Outcome found;
  found.add(out), found.add(again), found.add(pre), found.add(grad_x), found.add(partial);
  return found;
}

template <class A>
void test(const std::string& type) {
  for (int64_t users : {1, 3, 37}) {
    for (int64_t width : {0, 1, 4}) {
      check("encoder_step of " + std::to_string(users) + ", " + type,
            [=](int threads) { return encoder<A>(threads, users, width != 1, width); });
    }
  }
  for (int64_t users : {1, 5, 2 * kGroupUsers + 7}) {
    for (int lists : {0, 1, 2}) {
      check("topk_scores of " + std::to_string(users) + ", " + type,
            [=](int threads) { return topk<A>(threads, users, lists == 2 ? 1 : 4, lists); });
    }
  }
  for (int64_t numel : {int64_t(3), 2 * kDropoutBlock, 9 * kDropoutBlock + 77}) {
    for (int i : {0, 1, 2, 3}) {
      check("activation_dropout of " + std::to_string(numel) + ", " + type,
            [=](int threads) { return dropout<A>(threads, numel, i % 2, i / 2); });
    }
  }
  for (int64_t rows : {1, 40, 700}) {
    for (int64_t masked : {-1, 30}) {
      for (Bias bias : {Bias::kNone, Bias::kListed, Bias::kByRecency}) {
        check("softmax_loss of " + std::to_string(rows) + ", " + type,
              [=](int threads) { return softmax<A>(threads, rows, 150, masked, bias); });
      }
    }
  }
  for (int64_t rows : {1, 65, 650}) {
    check("feed_forward of " + std::to_string(rows) + ", " + type,
          [=](int threads) { return feed_forward<A>(threads, rows, rows != 65); });
  }
}

}  // namespace

int main() {
  if (!has_level()) return kSkipped;
  test<float>("float");
  test<double>("double");
  std::printf("%d failed\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
