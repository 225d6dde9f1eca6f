// The torch-free CPU kernels against a direct double-precision evaluation of the formulas:
//   o_t = Σ_{s≤t} (R_t φ(q_t) · R_s φ(k_s)) v_s / (Σ_{s≤t} φ(q_t) · φ(k_s) + ε n_t)
//   y_t = SiLU(g_t) (o_t + SiLU(b + Σ_j w_j v_{t-W+1+j}))
// Runs the level named by RECGRELA_CPU_LEVEL; exits with 77 where the machine lacks it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

namespace {

using namespace recgrela;

constexpr int64_t B = 3, L = 70, H = 2, D = 8, W = 4;  // L crosses a chunk
constexpr int64_t kLengths[B] = {70, 5, 0};
constexpr double kEps = 1e-6;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

int failures = 0;

void expect(bool holds, const std::string& what, double value) {
  std::printf("%s %s (%.3g)\n", holds ? "ok  " : "FAIL", what.c_str(), value);
  failures += !holds;
}

using Values = std::vector<double>;

int64_t at(int64_t b, int64_t t, int64_t h, int64_t d) { return ((b * L + t) * H + h) * D + d; }

struct Problem {
  Values q, k, v, gate;  // [B, L, H, D], NaN on the padding
  Values weight, bias;   // [H*D, W], [H*D]
  Values inv_freq;       // [H, D/2]
  Values grad_out;       // [B, L, H, D]
};

Problem random_problem() {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  // Values that float holds exactly, so that both precisions see the same problem.
  const auto fill = [&](int64_t count) {
    Values values(count);
    for (double& x : values) x = static_cast<float>(normal(generator));
    return values;
  };
  const int64_t rows = B * L * H * D;
  Problem p{fill(rows),      fill(rows),  fill(rows), fill(rows),
            fill(H * D * W), fill(H * D), {},         fill(rows)};
  for (int64_t i = 0; i < H * D / 2; ++i) p.inv_freq.push_back(std::pow(1e4, -2.0 * i / (H * D)));
  for (Values* rows_of : {&p.q, &p.k, &p.v, &p.gate}) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = at(b, kLengths[b], 0, 0); i < at(b + 1, 0, 0, 0); ++i) (*rows_of)[i] = kNaN;
  }
  return p;
}

double phi(double x) { return x > 0 ? x + 1 : std::exp(x); }
double silu(double x) { return x / (1 + std::exp(-x)); }

// Row t of sequence b and head h after φ, rotated by its position when `turn` is set.
Values features(const Problem& p, const Values& x, int64_t b, int64_t t, int64_t h, bool turn) {
  Values row(D);
  for (int64_t d = 0; d < D; ++d) row[d] = phi(x[at(b, t, h, d)]);
  for (int64_t i = 0; turn && i < D / 2; ++i) {
    const double phase = t * p.inv_freq[h * D / 2 + i];
    const double even = row[2 * i], odd = row[2 * i + 1];
    row[2 * i] = even * std::cos(phase) - odd * std::sin(phase);
    row[2 * i + 1] = even * std::sin(phase) + odd * std::cos(phase);
  }
  return row;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

// `bare`: the attention alone, without rank augmentation and gate.
Values expected_output(const Problem& p, bool bare = false) {
  Values out(B * L * H * D, 0.0);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t t = 0; t < kLengths[b]; ++t) {
        const Values turned_q = features(p, p.q, b, t, h, true);
        const Values plain_q = features(p, p.q, b, t, h, false);
        Values numerator(D, 0.0);
        double denominator = kEps * (t + 1);
        for (int64_t s = 0; s <= t; ++s) {
          const double score = dot(turned_q, features(p, p.k, b, s, h, true));
          for (int64_t d = 0; d < D; ++d) numerator[d] += score * p.v[at(b, s, h, d)];
          denominator += dot(plain_q, features(p, p.k, b, s, h, false));
        }
        for (int64_t d = 0; d < D; ++d) {
          const double attention = numerator[d] / denominator;
          if (bare) {
            out[at(b, t, h, d)] = attention;
            continue;
          }
          double conv = p.bias[h * D + d];
          for (int64_t j = 0; j < W; ++j) {
            const int64_t s = t - W + 1 + j;
            if (s >= 0) conv += p.weight[(h * D + d) * W + j] * p.v[at(b, s, h, d)];
          }
          const double gate = silu(p.gate[at(b, t, h, d)]);
          out[at(b, t, h, d)] = gate * (attention + silu(conv));
        }
      }
    }
  }
  return out;
}

// A problem and the kernel's own buffers in one precision.
template <typename T>
struct Run {
  std::vector<T> q, k, v, gate, weight, bias, out;
  std::vector<T> kv, k_sum, conv, saved_kv, saved_k_sum;
  Values inv_freq, step_rotation;
  GatedRelaParams params{};

  explicit Run(const Problem& p)
      : q(p.q.begin(), p.q.end()),
        k(p.k.begin(), p.k.end()),
        v(p.v.begin(), p.v.end()),
        gate(p.gate.begin(), p.gate.end()),
        weight(p.weight.begin(), p.weight.end()),
        bias(p.bias.begin(), p.bias.end()),
        out(B * L * H * D, T(kNaN)),
        kv(B * H * D * D),
        k_sum(B * H * D),
        conv(B * (W - 1) * H * D),
        inv_freq(p.inv_freq),
        step_rotation(H * (kChunk + 1) * D) {
    const int64_t chunks = count_chunks(B, L, 0, false);
    saved_kv.assign(chunks * H * D * D, T(kNaN));
    saved_k_sum.assign(chunks * H * D, T(kNaN));
    params.dtype = sizeof(T) == sizeof(double) ? DType::kDouble : DType::kFloat;
    fill_step_rotation(step_rotation.data(), inv_freq.data(), H, D, params.dtype);
    params.B = B, params.L = L, params.H = H, params.D = D, params.W = W;
    params.eps = kEps;
    params.q = rows(q), params.k = rows(k), params.v = rows(v), params.gate = rows(gate);
    params.out = rows(out);
    params.inv_freq = inv_freq.data();
    params.step_rotation = step_rotation.data();
    params.conv_weight = weight.data();
    params.conv_bias = bias.data();
    params.lengths = kLengths;
    params.final = states();
    params.saved_kv = saved_kv.data();
    params.saved_k_sum = saved_k_sum.data();
  }

  Rows rows(std::vector<T>& values) { return {values.data(), L * H * D, H * D, D}; }
  States states() {
    return {kv.data(), k_sum.data(), conv.data(), H * D * D, H * D, (W - 1) * H * D, nullptr};
  }
};

// Largest difference over the largest expected value.
template <typename T>
double distance(const std::vector<T>& got, const Values& expected) {
  double worst = 0, scale = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(static_cast<double>(got[i]) - expected[i]);
    worst = std::isnan(difference) ? HUGE_VAL : std::max(worst, difference);
    scale = std::max(scale, std::abs(expected[i]));
  }
  return worst / scale;
}

template <typename T>
double largest_on_padding(const std::vector<T>& values) {
  double worst = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = at(b, kLengths[b], 0, 0); i < at(b + 1, 0, 0, 0); ++i) {
      worst = values[i] == 0 ? worst : HUGE_VAL;
    }
  }
  return worst;
}

template <typename T>
void test_forward(const Problem& p, const char* type, double limit) {
  Run<T> run(p);
  kernels().gated_rela(run.params, 0, B * H);
  const double error = distance(run.out, expected_output(p));
  expect(error <= limit, std::string("forward, ") + type, error);
  const double padding = largest_on_padding(run.out);
  expect(padding == 0, std::string("zero on the padding, ") + type, padding);
}

template <typename T>
void test_bare(const Problem& p, const char* type, double limit) {
  Run<T> run(p);
  run.params.gate = {};
  run.params.conv_weight = run.params.conv_bias = nullptr;
  run.params.W = 1;
  kernels().gated_rela(run.params, 0, B * H);
  const double error = distance(run.out, expected_output(p, true));
  expect(error <= limit, std::string("without gate and convolution, ") + type, error);
}

// Three calls, the later ones from the state the call before left: the whole's outputs and state.
template <typename T>
void test_continued(const Problem& p, const char* type, double limit) {
  Run<T> whole(p), parts(p);
  kernels().gated_rela(whole.params, 0, B * H);
  const int64_t bounds[] = {0, 2, 66, L};
  for (int part = 0; part < 3; ++part) {
    const int64_t start = bounds[part], end = bounds[part + 1];
    int64_t position[B], lengths[B];
    for (int64_t b = 0; b < B; ++b) {
      position[b] = std::min(start, kLengths[b]);
      lengths[b] = std::min(end, kLengths[b]) - position[b];
    }
    const auto from = [&](std::vector<T>& values) {
      Rows rows = parts.rows(values);
      rows.data = values.data() + start * H * D;
      return rows;
    };
    std::vector<T> kv = parts.kv, k_sum = parts.k_sum, conv = parts.conv;
    GatedRelaParams params = parts.params;
    params.L = end - start;
    params.lengths = lengths;
    params.q = from(parts.q), params.k = from(parts.k), params.v = from(parts.v);
    params.gate = from(parts.gate), params.out = from(parts.out);
    params.saved_kv = params.saved_k_sum = nullptr;
    params.initial = params.final;
    params.initial.kv = kv.data(), params.initial.k_sum = k_sum.data();
    params.initial.conv = conv.data(), params.initial.position = position;
    kernels().gated_rela(params, 0, B * H);
  }
  const auto compare = [&](const char* name, const std::vector<T>& got, const std::vector<T>& all) {
    const double error = distance(got, Values(all.begin(), all.end()));
    expect(error <= limit, std::string("continued, ") + name + ", " + type, error);
  };
  compare("output", parts.out, whole.out);
  compare("kv state", parts.kv, whole.kv);
  compare("k_sum state", parts.k_sum, whole.k_sum);
  compare("conv state", parts.conv, whole.conv);
}

// The same sequences end to end, [T, H, D] with cu_seqlens: the same bits, and nothing written
// outside [begin, end).
template <typename T>
void test_packed(const Problem& p, const char* type) {
  Run<T> padded(p), packed(p);
  kernels().gated_rela(padded.params, 0, B * H);
  int64_t starts[B + 1] = {};
  for (int64_t b = 0; b < B; ++b) starts[b + 1] = starts[b] + kLengths[b];
  for (std::vector<T>* rows : {&packed.q, &packed.k, &packed.v, &packed.gate}) {
    for (int64_t b = 1; b < B; ++b) {
      const auto from = rows->begin() + at(b, 0, 0, 0);
      std::copy(from, from + kLengths[b] * H * D, rows->begin() + starts[b] * H * D);
    }
  }
  packed.params.L = 0;
  packed.params.lengths = nullptr;
  packed.params.cu_seqlens = starts;
  packed.params.saved_kv = packed.params.saved_k_sum = nullptr;
  for (int64_t item = B * H - 1; item >= 0; --item) {
    kernels().gated_rela(packed.params, item, item + 1);
  }
  int64_t different = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < kLengths[b] * H * D; ++i) {
      different += packed.out[starts[b] * H * D + i] != padded.out[at(b, 0, 0, 0) + i];
    }
  }
  for (size_t i = starts[B] * H * D; i < packed.out.size(); ++i) {
    different += !std::isnan(packed.out[i]);
  }
  expect(different == 0, std::string("packed, ") + type, static_cast<double>(different));
}

// Item by item from an empty state: the same outputs, and the forward's final state.
template <typename T>
void test_step(const Problem& p, const char* type, double limit) {
  Run<T> whole(p), stepped(p);
  kernels().gated_rela(whole.params, 0, B * H);
  std::fill(stepped.out.begin(), stepped.out.end(), T(0));
  for (int64_t t = 0; t < L; ++t) {
    int64_t position[B];
    bool active[B];
    for (int64_t b = 0; b < B; ++b) position[b] = t, active[b] = t < kLengths[b];
    const auto item = [&](std::vector<T>& values) {
      return Rows{values.data() + t * H * D, L * H * D, 0, D};
    };
    GatedRelaStepParams step{};
    step.dtype = stepped.params.dtype;
    step.B = B, step.H = H, step.D = D, step.W = W;
    step.eps = kEps;
    step.q = item(stepped.q), step.k = item(stepped.k), step.v = item(stepped.v);
    step.gate = item(stepped.gate), step.out = item(stepped.out);
    step.inv_freq = stepped.inv_freq.data();
    step.conv_weight = stepped.weight.data(), step.conv_bias = stepped.bias.data();
    step.state = stepped.states();
    step.state.position = position;
    step.active = active;
    kernels().gated_rela_step(step, 0, B * H);
  }
  const double error = distance(stepped.out, Values(whole.out.begin(), whole.out.end()));
  expect(error <= limit, std::string("step, output, ") + type, error);
  const double kv = distance(stepped.kv, Values(whole.kv.begin(), whole.kv.end()));
  expect(kv <= limit, std::string("step, kv state, ") + type, kv);
  const double conv = distance(stepped.conv, Values(whole.conv.begin(), whole.conv.end()));
  expect(conv == 0, std::string("step, conv state, ") + type, conv);
}

double loss(const Problem& p) {
  const Values out = expected_output(p);
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += out[i] * p.grad_out[i];
  return sum;
}

double numeric_gradient(Problem& p, Values& values, int64_t i) {
  const double saved = values[i], h = 1e-5;
  values[i] = saved + h;
  const double above = loss(p);
  values[i] = saved - h;
  const double below = loss(p);
  values[i] = saved;
  return (above - below) / (2 * h);
}

// Double precision, at some positions of both chunks, against central differences.
void test_backward(Problem p) {
  Run<double> run(p);
  kernels().gated_rela(run.params, 0, B * H);
  constexpr int64_t kGroups = B;
  const int64_t size = B * L * H * D;
  Values dq(size, kNaN), dk(size, kNaN), dv(size, kNaN), dgate(size, kNaN);
  Values dweight(kGroups * H * D * W, kNaN), dbias(kGroups * H * D, kNaN);
  Values grad_out = p.grad_out;

  GatedRelaBackwardParams backward{};
  backward.forward = run.params;
  backward.forward.final = {};
  backward.grad_out = run.rows(grad_out);
  backward.dq = run.rows(dq), backward.dk = run.rows(dk), backward.dv = run.rows(dv);
  backward.dgate = run.rows(dgate);
  backward.dweight_partial = dweight.data(), backward.dbias_partial = dbias.data();
  backward.groups = kGroups;
  kernels().gated_rela_backward(backward, 0, kGroups * H);

  const auto check = [&](const char* name, Values& values, const Values& got) {
    double worst = 0;
    for (int64_t i : {at(0, 0, 0, 0), at(0, 63, 1, 5), at(0, 64, 0, 2), at(0, 69, 1, 7),
                      at(1, 2, 1, 3), at(1, 4, 0, 6)}) {
      const double expected = numeric_gradient(p, values, i);
      const double error = std::abs(got[i] - expected) / (1 + std::abs(expected));
      worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
    }
    expect(worst <= 1e-7, std::string("backward, ") + name, worst);
    expect(largest_on_padding(got) == 0, std::string("zero on the padding, ") + name,
           largest_on_padding(got));
  };
  check("dq", p.q, dq);
  check("dk", p.k, dk);
  check("dv", p.v, dv);
  check("dgate", p.gate, dgate);

  const auto check_sum = [&](const char* name, Values& values, const Values& partial, int64_t i) {
    double sum = 0;
    for (int64_t g = 0; g < kGroups; ++g) sum += partial[g * values.size() + i];
    const double error = std::abs(sum - numeric_gradient(p, values, i)) / (1 + std::abs(sum));
    expect(error <= 1e-7, std::string("backward, ") + name, error);
  };
  check_sum("dweight", p.weight, dweight, 5);
  check_sum("dbias", p.bias, dbias, 11);
}

}  // namespace

int main() {
  if (!has_level()) return kSkipped;
  const Problem p = random_problem();
  test_forward<double>(p, "double", 1e-12);
  test_forward<float>(p, "float", 2e-5);
  test_bare<double>(p, "double", 1e-12);
  test_bare<float>(p, "float", 2e-5);
  test_continued<double>(p, "double", 1e-12);
  test_continued<float>(p, "float", 2e-5);
  test_packed<double>(p, "double");
  test_packed<float>(p, "float");
  test_step<double>(p, "double", 1e-12);
  test_step<float>(p, "float", 2e-5);
  test_backward(p);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
