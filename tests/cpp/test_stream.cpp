// Streaming through the torch-free CPU kernels, one event after the other.
//
//   test_stream [events]      drift of float states against double ones; 20,000 events by default
//
// The same events go through gated_rela_step in float and in double. At every power of ten the
// largest difference of outputs and of states is printed, relative to the largest value; it must
// stay below what the library promises up to a million events, and finite beyond. encoder_step runs
// over buffers without a spare byte. Small counts are for valgrind and the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

namespace {

using namespace recgrela;

constexpr int64_t B = 3, H = 2, D = 16, W = 4, C = H * D, kEvents = 64;
constexpr double kLimit = 2e-3;  // float against double, outputs and states, up to a million events
int failures = 0;

void expect(bool holds, const std::string& what, double value) {
  std::printf("%s %s (%.3g)\n", holds ? "ok  " : "FAIL", what.c_str(), value);
  failures += !holds;
}

std::vector<double> random(size_t count, unsigned seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<double> x(count);
  for (double& e : x) e = scale * normal(generator);
  return x;
}

template <class A>
std::vector<A> as(const std::vector<double>& x) {
  return std::vector<A>(x.begin(), x.end());
}

// One stream of events for B users; the rows repeat after kEvents.
template <class A>
struct Stream {
  std::vector<A> q, k, v, gate, weight, bias, out, kv, k_sum, conv;
  std::vector<double> inv_freq;
  std::vector<int64_t> position;

  Stream()
      : q(as<A>(random(kEvents * B * C, 1))),
        k(as<A>(random(kEvents * B * C, 2))),
        v(as<A>(random(kEvents * B * C, 3))),
        gate(as<A>(random(kEvents * B * C, 4))),
        weight(as<A>(random(C * W, 5, 0.5))),
        bias(as<A>(random(C, 6))),
        out(B * C),
        kv(B * C * D),
        k_sum(B * C),
        conv(B * (W - 1) * C),
        position(B) {
    for (int64_t i = 0; i < C / 2; ++i) inv_freq.push_back(std::pow(1e4, -2.0 * i / C));
  }

  // `threads`: each works on items of its own.
  void step(int64_t event, int threads = 1) {
    const auto rows = [&](std::vector<A>& x, int64_t at) {
      return Rows{x.data() + at * B * C, C, 0, D};
    };
    const int64_t at = event % kEvents;
    GatedRelaStepParams p{};
    p.dtype = sizeof(A) == 8 ? DType::kDouble : DType::kFloat;
    p.B = B, p.H = H, p.D = D, p.W = W, p.eps = 1e-6;
    p.q = rows(q, at), p.k = rows(k, at), p.v = rows(v, at), p.gate = rows(gate, at);
    p.out = rows(out, 0), p.inv_freq = inv_freq.data();
    p.conv_weight = weight.data(), p.conv_bias = bias.data();
    p.state = States{kv.data(), k_sum.data(), conv.data(), C * D, C, (W - 1) * C, position.data()};
    if (threads == 1) {
      kernels().gated_rela_step(p, 0, B * H);
    } else {
      std::vector<std::thread> pool;
      for (int64_t i = 0; i < B * H; ++i)
        pool.emplace_back([&p, i] { kernels().gated_rela_step(p, i, i + 1); });
      for (std::thread& thread : pool) thread.join();
    }
    for (int64_t& n : position) ++n;
  }
};

template <class X, class Y>
double distance(const std::vector<X>& x, const std::vector<Y>& y) {
  double largest = 0, off = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    largest = std::max(largest, std::abs(double(y[i])));
    off = std::max(off, std::abs(double(x[i]) - double(y[i])));
    if (!std::isfinite(double(x[i]))) return HUGE_VAL;
  }
  return off / largest;
}

void drift(int64_t events) {
  Stream<float> narrow;
  Stream<double> wide;
  int64_t next = 100;
  for (int64_t t = 0; t < events; ++t) {
    narrow.step(t), wide.step(t);
    if (t + 1 != next && t + 1 != events) continue;
    const bool promised = t + 1 <= 1000000;
    const std::string when = " after " + std::to_string(t + 1) + " events";
    const double off[] = {distance(narrow.out, wide.out), distance(narrow.kv, wide.kv),
                          distance(narrow.k_sum, wide.k_sum)};
    const char* names[] = {"out", "kv", "k_sum"};
    for (int i = 0; i < 3; ++i)
      expect(promised ? off[i] < kLimit : off[i] < 1, names[i] + when, off[i]);
    next *= 10;
  }
}

void threads() {
  Stream<float> one, many;
  for (int64_t t = 0; t < 40; ++t) one.step(t), many.step(t, 2);
  expect(
      one.out == many.out && one.kv == many.kv && one.k_sum == many.k_sum && one.conv == many.conv,
      "same bits from several threads", 0);
}

// encoder_step, every buffer as large as it must be; every third user but the first is passed by.
template <class A>
void encoder(bool gate, int64_t conv_width, int64_t users) {
  constexpr int64_t D = 10, C = H * D;  // no whole vectors
  const int64_t layers = 2, M = 42, past = std::max<int64_t>(conv_width - 1, 0);
  int64_t size = 2 * C + gate * (C * C + C) + C * C + C + 2 * C * C + 2 * C;
  size += conv_width ? C * conv_width + C : 0;
  size += C * C + C + 2 * C + C * M + M + M * C + C;
  const int64_t row = layers * (C * D + C + past * C);
  auto weights = as<A>(random(layers * size + 2 * C, 7, 0.1));
  auto x = as<A>(random(users * C, 8));
  std::vector<A> out(users * C), state(users * row);
  std::vector<double> inv_freq(C / 2, 0.3);
  std::vector<int64_t> position(users);
  const std::unique_ptr<bool[]> active(new bool[users]);
  for (int64_t u = 0; u < users; ++u) active[u] = u % 3 != 1;
  EncoderStepParams p{};
  p.is_double = sizeof(A) == 8, p.has_gate = gate, p.has_final_norm = true;
  p.B = users, p.num_layers = layers, p.H = H, p.D = D, p.W = conv_width, p.mlp_width = M;
  p.eps = p.layer_norm_eps = 1e-6;
  p.x = x.data(), p.out = out.data(), p.x_stride = C;
  p.weights = weights.data(), p.inv_freq = inv_freq.data();
  p.state = state.data(), p.state_stride = row;
  p.position = position.data(), p.active = active.get();
  for (int64_t t = 0; t < 20; ++t) {
    kernels().encoder_step(p, 0, users);
    for (int64_t& n : position) ++n;
  }
  bool good = true;
  for (int64_t i = 0; i < users * C; ++i) {
    const bool on = active[i / C];
    good = good && (on ? std::isfinite(out[i]) && out[i] != 0 : out[i] == 0);
  }
  for (int64_t u = 1; u < users; u += 3) {
    for (int64_t i = 0; i < row; ++i) good = good && state[u * row + i] == 0;
  }
  expect(good, "encoder_step, " + std::string(gate ? "gate" : "no gate"), double(conv_width));
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_level()) return kSkipped;
  drift(argc > 1 ? std::atoll(argv[1]) : 20000);
  threads();
  for (bool gate : {false, true}) {
    for (int64_t width : {0, 1, 4}) {
      for (int64_t users : {3, 33}) {
        encoder<float>(gate, width, users), encoder<double>(gate, width, users);
      }
    }
  }
  std::printf("%d failed\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
