// gated_rela and its gradients for one batch in double precision, written down as the formulas
// stand: no chunks, no kernel's tricks. Arrays are plain: rows [items, H, D], kv [B, H, D, D], ...
//   num_t = sum_{s<=t} (R_t phi(q_t) . R_s phi(k_s)) v_s,  den_t = sum phi(q_t).phi(k_s) + eps n_t
//   y_t = SiLU(g_t) (num_t / den_t + SiLU(bias + sum_j w_j v_{t-W+1+j}))
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

using Values = std::vector<double>;

struct Sequence {
  int64_t first, length;  // rows
};

struct Problem {
  int64_t B, H, D, W, items;
  double eps;
  std::vector<Sequence> sequences;
  bool gated, augmented;
  Values q, k, v, gate, inv_freq, weight, bias;  // bias empty: none
  Values kv, k_sum, conv;                        // empty: none
  std::vector<int64_t> position;
};

struct Result {
  Values out, kv, k_sum, conv;
};

// What the loss depends on, and what the gradients are of.
struct Gradients {
  Values q, k, v, gate, weight, bias, kv, k_sum, conv;
};

inline double phi(double x) { return x > 0 ? x + 1 : std::exp(x); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double silu(double x) { return x * sigmoid(x); }
inline double silu_slope(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

// One unit, a sequence's head.
struct Unit {
  const Problem& p;
  int64_t b, h;
  int64_t n() const { return p.sequences[b].length; }
  int64_t row(int64_t t) const { return ((p.sequences[b].first + t) * p.H + h) * p.D; }
  int64_t state() const { return (b * p.H + h) * p.D; }
  int64_t position(int64_t t) const { return (p.position.empty() ? 0 : p.position[b]) + t; }
  int64_t window(int64_t r) const { return (b * (p.W - 1) + r) * p.H * p.D + h * p.D; }

  Values features(const Values& x, int64_t t) const {
    Values f(p.D);
    for (int64_t d = 0; d < p.D; ++d) f[d] = phi(x[row(t) + d]);
    return f;
  }
  Values turned(const Values& f, int64_t t, double direction = 1) const {
    Values r(p.D);
    for (int64_t i = 0; i < p.D / 2; ++i) {
      const double phase = double(position(t)) * p.inv_freq[h * p.D / 2 + i];
      const double c = std::cos(phase), s = direction * std::sin(phase);
      r[2 * i] = f[2 * i] * c - f[2 * i + 1] * s;
      r[2 * i + 1] = f[2 * i] * s + f[2 * i + 1] * c;
    }
    return r;
  }
  double value(int64_t t, int64_t d) const {
    if (t >= 0) return p.v[row(t) + d];
    const int64_t r = p.W - 1 + t;
    return p.conv.empty() || r < 0 ? 0.0 : p.conv[window(r) + d];
  }
  double pre(int64_t t, int64_t d) const {
    double sum = p.bias.empty() ? 0.0 : p.bias[h * p.D + d];
    for (int64_t j = 0; j < p.W; ++j) {
      sum += p.weight[(h * p.D + d) * p.W + j] * value(t - p.W + 1 + j, d);
    }
    return sum;
  }
};

// Per item: o, the denominator, and the sums up to it.
struct Trace {
  std::vector<Values> o, S, z;
  Values den;
};

inline Trace trace(const Unit& u) {
  const Problem& p = u.p;
  const int64_t D = p.D;
  Values S(D * D, 0.0), z(D, 0.0);
  if (!p.kv.empty()) {
    for (int64_t i = 0; i < D * D; ++i) S[i] = p.kv[u.state() * D + i];
    for (int64_t i = 0; i < D; ++i) z[i] = p.k_sum[u.state() + i];
  }
  Trace all;
  for (int64_t t = 0; t < u.n(); ++t) {
    const Values fq = u.features(p.q, t), fk = u.features(p.k, t);
    const Values rq = u.turned(fq, t), rk = u.turned(fk, t);
    double den = p.eps * double(u.position(t) + 1);
    Values o(D, 0.0);
    for (int64_t i = 0; i < D; ++i) {
      z[i] += fk[i];
      den += fq[i] * z[i];
      for (int64_t j = 0; j < D; ++j) {
        S[i * D + j] += rk[i] * p.v[u.row(t) + j];
        o[j] += rq[i] * S[i * D + j];
      }
    }
    for (double& x : o) x /= den;
    all.o.push_back(o);
    all.den.push_back(den);
    all.S.push_back(S);
    all.z.push_back(z);
  }
  all.S.push_back(S);  // after the last item, also of an empty sequence
  all.z.push_back(z);
  return all;
}

inline Result forward(const Problem& p) {
  const int64_t D = p.D, C = p.H * D;
  Result r{Values(p.items * C, 0.0), Values(p.B * C * D), Values(p.B * C),
           Values(p.B * (p.W - 1) * C)};
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t h = 0; h < p.H; ++h) {
      const Unit u{p, b, h};
      const Trace all = trace(u);
      for (int64_t t = 0; t < u.n(); ++t) {
        for (int64_t d = 0; d < D; ++d) {
          double y = all.o[t][d];
          if (p.augmented) y += silu(u.pre(t, d));
          if (p.gated) y *= silu(p.gate[u.row(t) + d]);
          r.out[u.row(t) + d] = y;
        }
      }
      for (int64_t i = 0; i < D * D; ++i) r.kv[u.state() * D + i] = all.S.back()[i];
      for (int64_t i = 0; i < D; ++i) r.k_sum[u.state() + i] = all.z.back()[i];
      for (int64_t w = 0; w < p.W - 1; ++w) {
        for (int64_t d = 0; d < D; ++d) {
          r.conv[u.window(w) + d] = u.value(u.n() - (p.W - 1) + w, d);
        }
      }
    }
  }
  return r;
}

// Gradients of sum(dy * out) + sum(dfinal * final state); dfinal empty: out alone.
inline Gradients backward(const Problem& p, const Values& dy, const Result& dfinal) {
  const int64_t D = p.D, C = p.H * D, past = p.W - 1;
  Gradients g{Values(p.items * C, 0.0), Values(p.items * C, 0.0), Values(p.items * C, 0.0),
              Values(p.items * C, 0.0), Values(C * p.W, 0.0),     Values(C, 0.0),
              Values(p.B * C * D, 0.0), Values(p.B * C, 0.0),     Values(p.B * past * C, 0.0)};
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t h = 0; h < p.H; ++h) {
      const Unit u{p, b, h};
      const Trace all = trace(u);
      const int64_t n = u.n();
      Values T(D * D, 0.0), y(D, 0.0);
      const auto add_value = [&](int64_t t, int64_t d, double x) {
        if (t >= 0) {
          g.v[u.row(t) + d] += x;
        } else if (past + t >= 0) {
          g.conv[u.window(past + t) + d] += x;
        }
      };
      if (!dfinal.kv.empty()) {
        for (int64_t i = 0; i < D * D; ++i) T[i] = dfinal.kv[u.state() * D + i];
        for (int64_t i = 0; i < D; ++i) y[i] = dfinal.k_sum[u.state() + i];
        for (int64_t w = 0; w < past; ++w) {
          for (int64_t d = 0; d < D; ++d) {
            add_value(n - past + w, d, dfinal.conv[u.window(w) + d]);
          }
        }
      }
      for (int64_t t = n - 1; t >= 0; --t) {
        const Values fq = u.features(p.q, t), fk = u.features(p.k, t);
        const Values rq = u.turned(fq, t), rk = u.turned(fk, t);
        Values dnum(D), drq(D, 0.0), drk(D, 0.0);
        double dden = 0;
        for (int64_t d = 0; d < D; ++d) {
          const int64_t at = u.row(t) + d;
          double d_o = dy[at];
          const double pre = p.augmented ? u.pre(t, d) : 0.0;
          if (p.gated) {
            const double sum = all.o[t][d] + (p.augmented ? silu(pre) : 0.0);
            g.gate[at] = d_o * sum * silu_slope(p.gate[at]);
            d_o *= silu(p.gate[at]);
          }
          if (p.augmented) {
            const double dpre = d_o * silu_slope(pre);
            g.bias[h * D + d] += dpre;
            for (int64_t j = 0; j < p.W; ++j) {
              const int64_t s = t - past + j, w = (h * D + d) * p.W + j;
              g.weight[w] += dpre * u.value(s, d);
              add_value(s, d, dpre * p.weight[w]);
            }
          }
          dnum[d] = d_o / all.den[t];
          dden -= d_o * all.o[t][d] / all.den[t];
        }
        for (int64_t i = 0; i < D; ++i) {
          y[i] += dden * fq[i];
          for (int64_t j = 0; j < D; ++j) {
            T[i * D + j] += rq[i] * dnum[j];
            drq[i] += all.S[t][i * D + j] * dnum[j];
            drk[i] += T[i * D + j] * p.v[u.row(t) + j];
            g.v[u.row(t) + j] += T[i * D + j] * rk[i];
          }
        }
        const Values back_q = u.turned(drq, t, -1), back_k = u.turned(drk, t, -1);
        for (int64_t d = 0; d < D; ++d) {
          const int64_t at = u.row(t) + d;
          g.q[at] = (back_q[d] + dden * all.z[t][d]) * (p.q[at] > 0 ? 1.0 : fq[d]);
          g.k[at] = (back_k[d] + y[d]) * (p.k[at] > 0 ? 1.0 : fk[d]);
        }
      }
      for (int64_t i = 0; i < D * D; ++i) g.kv[u.state() * D + i] = T[i];
      for (int64_t i = 0; i < D; ++i) g.k_sum[u.state() + i] = y[i];
    }
  }
  return g;
}

}  // namespace reference
