// The torch-free CPU kernels on many shapes: head dimensions with and without whole vectors, widths
// of the convolution beyond a chunk, lengths around chunk borders, empty sequences, padded and
// packed rows. Every result is compared with the recurrences in double precision; buffers end where
// the last row does, rows lie apart with NaN between them, and one user's NaN must not change a bit
// of another's results. Meant for the sanitizers; exits with 77 where the machine lacks the level.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

namespace {

using namespace recgrela;
using Values = std::vector<double>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kEps = 1e-6;
int failures = 0, checks = 0;

struct Shape {
  int64_t H, D, W;  // W 0: no convolution
  std::vector<int64_t> lengths;
  bool packed, gate, state;

  int64_t B() const { return int64_t(lengths.size()); }
  int64_t past() const { return W > 0 ? W - 1 : 0; }
  int64_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  int64_t gap() const { return 3; }  // elements between rows
  int64_t stride() const { return H * D + gap(); }
  int64_t first_row(int64_t b) const {
    int64_t row = 0;
    for (int64_t i = 0; packed && i < b; ++i) row += lengths[i];
    return packed ? row : b * longest();
  }
  int64_t rows() const { return packed ? first_row(B()) : B() * longest(); }
  int64_t size() const { return std::max<int64_t>(rows() * stride() - gap(), 0); }
  int64_t at(int64_t b, int64_t t, int64_t h) const {
    return (first_row(b) + t) * stride() + h * D;
  }
  std::string text() const {
    std::string s = "D " + std::to_string(D) + " W " + std::to_string(W) + " lengths";
    for (int64_t n : lengths) s += " " + std::to_string(n);
    return s + (packed ? " packed" : " padded") + (gate ? " gate" : "") + (state ? " state" : "");
  }
};

// Rows [rows, H, D] and everything else in double; NaN outside the rows.
struct Problem {
  Values q, k, v, gate, dy, weight, bias, inv_freq;
  Values kv, k_sum, conv, dkv, dk_sum, dconv;  // the initial state; gradients of the final one
  std::vector<int64_t> position;
};
struct Results {
  Values out, dq, dk, dv, dgate;                             // rows
  Values kv, k_sum, conv, dkv, dk_sum, dconv, weight, bias;  // final state and gradients
  double dq_term = 0;                                        // the larger of dq's two terms
};

Problem make(const Shape& s, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  const auto fill = [&](int64_t count, float scale = 1) {
    Values x(count);
    for (double& e : x) e = normal(generator) * scale;
    return x;
  };
  const auto rows = [&] {
    Values x(s.size(), kNaN);
    for (int64_t b = 0; b < s.B(); ++b)
      for (int64_t t = 0; t < s.lengths[b]; ++t)
        for (int64_t i = 0; i < s.H * s.D; ++i) x[s.at(b, t, 0) + i] = normal(generator);
    return x;
  };
  const int64_t C = s.H * s.D;
  Problem p;
  for (Values* x : {&p.q, &p.k, &p.v, &p.gate, &p.dy}) *x = rows();
  p.weight = fill(C * s.W, 0.5f), p.bias = fill(s.W ? C : 0);
  for (int64_t i = 0; i < C / 2; ++i) p.inv_freq.push_back(std::pow(1e4, -2.0 * i / C));
  p.kv = fill(s.B() * C * s.D), p.k_sum = fill(s.B() * C), p.conv = fill(s.B() * s.past() * C);
  p.dkv = fill(s.B() * C * s.D), p.dk_sum = fill(s.B() * C), p.dconv = fill(s.B() * s.past() * C);
  for (double& x : p.k_sum) x = std::abs(x) + 5;
  for (int64_t b = 0; b < s.B(); ++b) p.position.push_back(s.state ? 7 * b + 12 : 0);
  if (!s.state) {
    for (Values* x : {&p.kv, &p.k_sum, &p.conv}) std::fill(x->begin(), x->end(), 0.0);
  }
  return p;
}

double phi(double x) { return x > 0 ? x + 1 : std::exp(x); }
double phi_slope(double x) { return x > 0 ? 1 : std::exp(x); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double silu_slope(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

Values mapped(const Values& x, int64_t from, int64_t D) {
  Values y(D);
  for (int64_t d = 0; d < D; ++d) y[d] = phi(x[from + d]);
  return y;
}
Values turned(const Values& x, const double* inv_freq, double position) {
  Values y(x.size());
  for (size_t i = 0; i < x.size() / 2; ++i) {
    const double c = std::cos(position * inv_freq[i]), s = std::sin(position * inv_freq[i]);
    y[2 * i] = x[2 * i] * c - x[2 * i + 1] * s;
    y[2 * i + 1] = x[2 * i] * s + x[2 * i + 1] * c;
  }
  return y;
}

// The recurrences of one sequence and head, item by item, added to `r`.
void solve(const Shape& s, const Problem& p, int64_t b, int64_t h, Results& r) {
  const int64_t D = s.D, C = s.H * D, n = s.lengths[b], W = s.W, past = s.past();
  const double* f = &p.inv_freq[h * D / 2];
  const int64_t square = (b * s.H + h) * D * D, vector = (b * s.H + h) * D;
  Values S(p.kv.begin() + square, p.kv.begin() + square + D * D);
  Values z(p.k_sum.begin() + vector, p.k_sum.begin() + vector + D);
  const auto value = [&](int64_t t, int64_t d) {  // t < 0: from the state
    return t >= 0 ? p.v[s.at(b, t, h) + d] : p.conv[(b * past + past + t) * C + h * D + d];
  };
  Values dnum(n * D), dden(n), dpre(n * D), dvalues((past + n) * D);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t at = s.at(b, t, h);
    const double position = double(p.position[b] + t);
    const Values q = mapped(p.q, at, D), k = mapped(p.k, at, D);
    const Values rq = turned(q, f, position), rk = turned(k, f, position);
    double den = kEps * (position + 1);
    for (int64_t i = 0; i < D; ++i) {
      z[i] += k[i];
      den += q[i] * z[i];
      for (int64_t d = 0; d < D; ++d) S[i * D + d] += rk[i] * p.v[at + d];
    }
    for (int64_t d = 0; d < D; ++d) {
      double o = 0, pre = W ? p.bias[h * D + d] : 0;
      for (int64_t i = 0; i < D; ++i) o += S[i * D + d] * rq[i] / den;
      for (int64_t j = 0; j < W; ++j) pre += p.weight[(h * D + d) * W + j] * value(t - past + j, d);
      const double sum = o + (W ? silu(pre) : 0), g = p.gate[at + d];
      const double dO = p.dy[at + d] * (s.gate ? silu(g) : 1);
      r.out[at + d] = sum * (s.gate ? silu(g) : 1);
      if (s.gate) r.dgate[at + d] = p.dy[at + d] * sum * silu_slope(g);
      dnum[t * D + d] = dO / den;
      dden[t] -= dO * o / den;
      dpre[t * D + d] = W ? dO * silu_slope(pre) : 0;
    }
    Values back(D);
    for (int64_t i = 0; i < D; ++i)
      for (int64_t d = 0; d < D; ++d) back[i] += S[i * D + d] * dnum[t * D + d];
    back = turned(back, f, -position);
    for (int64_t i = 0; i < D; ++i) {
      const double slope = phi_slope(p.q[at + i]);
      r.dq[at + i] = (back[i] + dden[t] * z[i]) * slope;
      r.dq_term = std::max(r.dq_term, std::abs(back[i] * slope));
    }
  }
  std::copy(S.begin(), S.end(), r.kv.begin() + square);
  std::copy(z.begin(), z.end(), r.k_sum.begin() + vector);
  for (int64_t m = 0; m < past; ++m)
    for (int64_t d = 0; d < D; ++d) {
      r.conv[(b * past + m) * C + h * D + d] = value(n - past + m, d);
      dvalues[(n + m) * D + d] = p.dconv[(b * past + m) * C + h * D + d];
    }

  Values T(p.dkv.begin() + square, p.dkv.begin() + square + D * D);
  Values y(p.dk_sum.begin() + vector, p.dk_sum.begin() + vector + D);
  for (int64_t t = n - 1; t >= 0; --t) {
    const int64_t at = s.at(b, t, h);
    const double position = double(p.position[b] + t);
    const Values q = mapped(p.q, at, D), k = mapped(p.k, at, D);
    const Values rq = turned(q, f, position), rk = turned(k, f, position);
    Values back(D);
    for (int64_t i = 0; i < D; ++i) {
      y[i] += dden[t] * q[i];
      for (int64_t d = 0; d < D; ++d) {
        T[i * D + d] += rq[i] * dnum[t * D + d];
        back[i] += T[i * D + d] * p.v[at + d];
        dvalues[(past + t) * D + d] += T[i * D + d] * rk[i];
      }
    }
    back = turned(back, f, -position);
    for (int64_t i = 0; i < D; ++i) r.dk[at + i] = (back[i] + y[i]) * phi_slope(p.k[at + i]);
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t j = 0; j < W; ++j) {
        dvalues[(t + j) * D + d] += p.weight[(h * D + d) * W + j] * dpre[t * D + d];
        r.weight[(h * D + d) * W + j] += dpre[t * D + d] * value(t - past + j, d);
      }
      if (W) r.bias[h * D + d] += dpre[t * D + d];
    }
  }
  std::copy(T.begin(), T.end(), r.dkv.begin() + square);
  std::copy(y.begin(), y.end(), r.dk_sum.begin() + vector);
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t m = 0; m < past; ++m) r.dconv[(b * past + m) * C + h * D + d] = dvalues[m * D + d];
    for (int64_t t = 0; t < n; ++t) r.dv[s.at(b, t, h) + d] = dvalues[(past + t) * D + d];
  }
}

// Results with NaN wherever nothing may be written, and 0 on padding.
Results blank(const Shape& s) {
  Results r;
  const int64_t C = s.H * s.D;
  for (Values* x : {&r.out, &r.dq, &r.dk, &r.dv, &r.dgate}) {
    x->assign(s.size(), kNaN);
    for (int64_t row = 0; row < s.rows(); ++row)
      for (int64_t i = 0; i < C; ++i) (*x)[row * s.stride() + i] = 0;
  }
  r.kv.assign(s.B() * C * s.D, 0), r.k_sum.assign(s.B() * C, 0);
  r.conv.assign(s.B() * s.past() * C, 0);
  r.dkv = r.kv, r.dk_sum = r.k_sum, r.dconv = r.conv;
  r.weight.assign(C * s.W, 0), r.bias.assign(s.W ? C : 0, 0);
  return r;
}

struct Truncated {  // bfloat16
  uint16_t bits = 0;
  Truncated() = default;
  explicit Truncated(double x) {
    const float f = float(x);
    uint32_t word;
    std::memcpy(&word, &f, sizeof(f));
    bits = uint16_t(word >> 16);
  }
  explicit operator double() const {
    const uint32_t word = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &word, sizeof(f));
    return f;
  }
};

template <class To>
std::vector<To> as(const Values& x) {
  std::vector<To> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = To(x[i]);
  return y;
}
template <class From>
Values wide(const std::vector<From>& x) {
  Values y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = double(x[i]);
  return y;
}

// Work items [0, count), each thread a few of its own: what two of them touch, a sanitizer sees.
template <class Kernel, class Params>
void spread(Kernel kernel, const Params& p, int64_t count) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < kThreads; ++i) {
    const int64_t begin = count * i / kThreads, end = count * (i + 1) / kThreads;
    if (begin < end) pool.emplace_back([kernel, &p, begin, end] { kernel(p, begin, end); });
  }
  for (std::thread& thread : pool) thread.join();
}

// Forward and backward by the kernels; rows stored as S, everything else as A. `segments`: the
// forward in two passes.
template <class S, class A>
Results run(const Shape& s, const Problem& problem, bool segments = false) {
  const int64_t B = s.B(), H = s.H, D = s.D, C = H * D, L = s.packed ? 0 : s.longest();
  const int64_t groups = std::min<int64_t>(B, 2), W = s.past() + 1;
  auto q = as<S>(problem.q), k = as<S>(problem.k), v = as<S>(problem.v);
  auto gate = as<S>(problem.gate), dy = as<S>(problem.dy);
  auto weight = as<A>(problem.weight), bias = as<A>(problem.bias);
  auto kv = as<A>(problem.kv), k_sum = as<A>(problem.k_sum), conv = as<A>(problem.conv);
  auto gkv = as<A>(problem.dkv), gk_sum = as<A>(problem.dk_sum), gconv = as<A>(problem.dconv);
  const Values none(s.size(), kNaN);
  auto out = as<S>(none), dq = out, dk = out, dv = out, dgate = out;
  auto fkv = kv, fk_sum = k_sum, fconv = conv, dkv = kv, dk_sum = k_sum, dconv = conv;
  std::vector<A> dweight(groups * C * W, A(kNaN)), dbias(groups * C, A(kNaN));
  std::vector<int64_t> starts{0};
  for (int64_t n : s.lengths) starts.push_back(starts.back() + n);
  const int64_t chunks = count_chunks(B, L, s.rows(), s.packed);
  std::vector<A> saved_kv(chunks * C * D, A(kNaN)), saved_k_sum(chunks * C, A(kNaN));
  Values steps(H * (kChunk + 1) * D);

  GatedRelaParams p{};
  p.dtype = sizeof(S) == 8 ? DType::kDouble : sizeof(S) == 4 ? DType::kFloat : DType::kBFloat16;
  fill_step_rotation(steps.data(), problem.inv_freq.data(), H, D, p.dtype);
  const auto rows = [&](std::vector<S>& x) {
    return Rows{x.data(), s.packed ? 0 : L * s.stride(), s.stride(), D};
  };
  const auto states = [&](std::vector<A>& x, std::vector<A>& y, std::vector<A>& z) {
    return States{x.data(), y.data(), z.data(), C * D, C, s.past() * C, problem.position.data()};
  };
  p.B = B, p.L = L, p.H = H, p.D = D, p.W = W, p.eps = kEps;
  p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out);
  if (s.gate) p.gate = rows(gate);
  p.inv_freq = problem.inv_freq.data(), p.step_rotation = steps.data();
  if (s.W) p.conv_weight = weight.data(), p.conv_bias = bias.data();
  if (s.packed) p.cu_seqlens = starts.data();
  if (!s.packed) p.lengths = s.lengths.data();
  if (s.state) p.initial = states(kv, k_sum, conv);
  p.final = states(fkv, fk_sum, fconv);
  p.saved_kv = saved_kv.data(), p.saved_k_sum = saved_k_sum.data();
  std::vector<A> sums;
  if (segments) {
    p.segments = (s.longest() + kSegment - 1) / kSegment;
    sums.assign(B * H * p.segments * (D + 1) * D, A(kNaN));
    p.segment_sums = sums.data();
    spread(kernels().segment_sums, p, B * H * p.segments);
    join_segments(p);
  }
  spread(kernels().gated_rela, p, B * H * (segments ? p.segments : 1));

  GatedRelaBackwardParams g{};
  g.forward = p;
  g.grad_out = rows(dy), g.dq = rows(dq), g.dk = rows(dk), g.dv = rows(dv);
  if (s.gate) g.dgate = rows(dgate);
  g.grad_final = states(gkv, gk_sum, gconv), g.grad_initial = states(dkv, dk_sum, dconv);
  g.dweight_partial = dweight.data(), g.dbias_partial = dbias.data(), g.groups = groups;
  spread(kernels().gated_rela_backward, g, groups * H);

  Results r{wide(out),   wide(dq),        wide(dk),           wide(dv),  wide(dgate),
            wide(fkv),   wide(fk_sum),    wide(fconv),        wide(dkv), wide(dk_sum),
            wide(dconv), Values(C * s.W), Values(s.W ? C : 0)};
  for (int64_t group = 0; s.W && group < groups; ++group) {
    for (int64_t i = 0; i < C * W; ++i) r.weight[i] += double(dweight[group * C * W + i]);
    for (int64_t i = 0; i < C; ++i) r.bias[i] += double(dbias[group * C + i]);
  }
  if (!s.gate) r.dgate = blank(s).dgate;
  return r;
}

template <class Visit>
void each(const Results& x, const Results& y, Visit&& visit) {
  visit("out", x.out, y.out), visit("dq", x.dq, y.dq), visit("dk", x.dk, y.dk);
  visit("dv", x.dv, y.dv), visit("dgate", x.dgate, y.dgate), visit("kv", x.kv, y.kv);
  visit("k_sum", x.k_sum, y.k_sum), visit("conv", x.conv, y.conv), visit("dkv", x.dkv, y.dkv);
  visit("dk_sum", x.dk_sum, y.dk_sum), visit("dconv", x.dconv, y.dconv);
  visit("dweight", x.weight, y.weight), visit("dbias", x.bias, y.bias);
}

void fail(const std::string& what, double value) {
  std::printf("FAIL %s (%.3g)\n", what.c_str(), value);
  ++failures;
}

// NaN where nothing is written, exact zeros on padding, and elsewhere `limit` of the largest value.
// Of one item alone the output is its value, whatever q: dq's terms cancel but for eps, and what is
// left is rounded as they are.
void compare(const std::string& what, const Results& got, const Results& wanted, double limit) {
  each(got, wanted, [&](const char* name, const Values& x, const Values& y) {
    double worst = 0, scale = 1e-30;
    for (size_t i = 0; i < x.size(); ++i) {
      if (std::isnan(y[i]) && std::isnan(x[i])) continue;
      const double error = std::abs(x[i] - y[i]);
      worst = std::isnan(error) || (y[i] == 0 && x[i] != 0 && limit == 0) ? HUGE_VAL
                                                                          : std::max(worst, error);
      scale = std::max(scale, std::abs(y[i]));
    }
    if (name[0] == 'd' && name[1] == 'q' && scale < 1e-3 * wanted.dq_term) scale = wanted.dq_term;
    ++checks;
    if (!(worst / scale <= limit)) fail(what + ", " + name, worst / scale);
  });
}

template <class S, class A>
void test_shape(const Shape& s, const char* type, double limit) {
  std::mt19937 generator(unsigned(s.D * 100 + s.W));
  Problem p = make(s, generator);
  for (Values* x : {&p.q, &p.k, &p.v, &p.gate, &p.dy}) *x = wide(as<S>(*x));
  Results wanted = blank(s);
  for (int64_t b = 0; b < s.B(); ++b)
    for (int64_t h = 0; h < s.H; ++h) solve(s, p, b, h, wanted);
  const std::string what = s.text() + ", " + type;
  const Results clean = run<S, A>(s, p);
  compare(what, clean, wanted, limit);
  if (s.longest() > kSegment) compare(what + ", segments", run<S, A>(s, p, true), clean, 0);

  // A user whose every number is NaN: the other users' bits stay. The groups' weight gradients are
  // sums over users.
  const int64_t bad = int64_t(std::max_element(s.lengths.begin(), s.lengths.end()) -
                              s.lengths.begin()),
                C = s.H * s.D;
  const auto spoil = [&](Values& x, double with, int64_t size) {
    std::fill(x.begin() + bad * size, x.begin() + (bad + 1) * size, with);
  };
  const auto spoil_rows = [&](Values& x, double with) {
    for (int64_t t = 0; t < s.lengths[bad]; ++t)
      for (int64_t i = 0; i < C; ++i) x[s.at(bad, t, 0) + i] = with;
  };
  for (Values* x : {&p.q, &p.k, &p.v, &p.gate, &p.dy}) spoil_rows(*x, kNaN);
  for (Values* x : {&p.kv, &p.dkv}) spoil(*x, kNaN, C * s.D);
  for (Values* x : {&p.k_sum, &p.dk_sum}) spoil(*x, kNaN, C);
  for (Values* x : {&p.conv, &p.dconv}) spoil(*x, kNaN, s.past() * C);
  Results x = run<S, A>(s, p), y = clean;
  for (Results* r : {&x, &y}) {
    for (Values* e : {&r->out, &r->dq, &r->dk, &r->dv, &r->dgate}) spoil_rows(*e, 0);
    for (Values* e : {&r->kv, &r->dkv}) spoil(*e, 0, C * s.D);
    for (Values* e : {&r->k_sum, &r->dk_sum}) spoil(*e, 0, C);
    for (Values* e : {&r->conv, &r->dconv}) spoil(*e, 0, s.past() * C);
    r->weight.clear(), r->bias.clear();
  }
  compare(what + ", beside NaN", x, y, 0);
}

void test_all(const Shape& s) {
  test_shape<double, double>(s, "double", 1e-11);
  test_shape<float, float>(s, "float", 2e-5);
  test_shape<Truncated, float>(s, "bfloat16", 5e-3);
}

// Shapes nobody chose: head dims to 130, widths over a chunk, lengths around everything.
void test_random(int64_t count, unsigned seed) {
  test_all({1, 2, 4, {kSegment + 1}, false, true, false});  // few of the others have segments
  std::mt19937 generator(seed);
  const auto below = [&](int64_t n) { return int64_t(generator() % uint32_t(n)); };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t border[] = {0, 1, 2, 63, 64, 65, 127, 129, 192, kSegment - 1, kSegment + 1};
    Shape s{1 + below(3),
            2 * (1 + below(below(8) ? 18 : 65)),
            below(below(8) ? 6 : 80),
            {},
            false,
            false,
            false};
    s.packed = below(2), s.gate = below(2), s.state = below(2);
    const int64_t longest = s.D > 40 ? 9 : below(20) ? 9 : 11;  // long ones are slow
    for (int64_t b = 1 + below(4); b > 0; --b)
      s.lengths.push_back(below(2) ? border[below(longest)] : below(200));
    test_all(s);
  }
  std::printf("%lld random shapes\n", static_cast<long long>(count));
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_level()) return kSkipped;
  if (argc > 3 && std::string(argv[1]) == "random") {
    test_random(std::atoll(argv[2]), unsigned(std::atoi(argv[3])));
    std::printf("%d of %d checks failed\n", failures, checks);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  bool flip = false;
  for (int64_t D : {2, 4, 6, 8, 10, 16, 24, 32, 34, 64, 72}) {
    for (int64_t W : {0, 1, 4, 7, 70}) {
      flip = !flip;
      test_all({2, D, W, {65, 0, 128, 3}, flip, !flip || W == 4, D % 4 == 2 || W == 70});
    }
  }
  for (bool packed : {false, true}) {
    test_all({2, 2, 4, {kSegment + 1, 0, 5}, packed, true, packed});
    test_all({1, 6, 70, {2, 2 * kSegment + 64}, packed, false, !packed});
    test_all({2, 8, 4, {0, 0, 0}, packed, true, packed});
    test_all({1, 16, 4, {63, 64, 256, 257, 385}, packed, true, true});
  }
  std::printf("%d of %d checks failed\n", failures, checks);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
