// The scan of a selective state space model for quality_peers.py, forward and backward, one channel
// at a time: what a channel keeps over a window fits in the first cache, so no state is stored.
// Compiled by selective_scan.py, which says what the arrays are.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int N = STATE;

struct Row {
  float at[N];
};

struct Sizes {
  int64_t batch, length, inner;
};

// decay_t = exp(step_t a), h_t = decay_t h_{t-1} + step_t u_t b_t
inline void advance(float step, float u, const float* a, const float* b, float* decay, float* h) {
#pragma GCC ivdep
  for (int n = 0; n < N; ++n) {
    decay[n] = std::exp(step * a[n]);
    h[n] = decay[n] * h[n] + step * u * b[n];
  }
}

}  // namespace

extern "C" void selective_scan(Sizes sizes, const float* u, const float* step, const float* a,
                               const float* b, const float* c, float* y) {
  const auto [batch, length, inner] = sizes;
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t i = 0; i < inner; ++i) {
      Row h{}, decay;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t row = s * length + t, at = row * inner + i;
        advance(step[at], u[at], a + i * N, b + row * N, decay.at, h.at);
        float sum = 0;
        for (int n = 0; n < N; ++n) sum += h.at[n] * c[row * N + n];
        y[at] = sum;
      }
    }
  }
}

// d_u and d_step are overwritten; d_a, d_b and d_c are added to.
extern "C" void selective_scan_backward(Sizes sizes, const float* u, const float* step,
                                        const float* a, const float* b, const float* c,
                                        const float* grad, float* d_u, float* d_step, float* d_a,
                                        float* d_b, float* d_c) {
  const auto [batch, length, inner] = sizes;
  std::vector<Row> states(length + 1), decays(length);
  states[0] = Row{};
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t i = 0; i < inner; ++i) {
      const float* mine = a + i * N;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t row = s * length + t, at = row * inner + i;
        states[t + 1] = states[t];
        advance(step[at], u[at], mine, b + row * N, decays[t].at, states[t + 1].at);
      }
      Row d_h{}, sum{};
      for (int64_t t = length - 1; t >= 0; --t) {
        const int64_t row = s * length + t, at = row * inner + i;
        const float g = grad[at], size = step[at], in = step[at] * u[at];
        const float *now = states[t + 1].at, *before = states[t].at, *decay = decays[t].at;
        const float *b_t = b + row * N, *c_t = c + row * N;
        float *to_b = d_b + row * N, *to_c = d_c + row * N;
        float inflow = 0, power = 0;
#pragma GCC ivdep
        for (int n = 0; n < N; ++n) {
          const float d = d_h.at[n] + g * c_t[n];
          to_c[n] += g * now[n];
          to_b[n] += d * in;
          inflow += d * b_t[n];
          d_h.at[n] = d * decay[n];
          const float p = d_h.at[n] * before[n];  // d loss / d (step a)
          power += p * mine[n];
          sum.at[n] += p * size;
        }
        d_u[at] = inflow * size;
        d_step[at] = inflow * u[at] + power;
      }
      for (int n = 0; n < N; ++n) d_a[i * N + n] += sum.at[n];
    }
  }
}
