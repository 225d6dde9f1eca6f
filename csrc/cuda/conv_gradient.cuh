// The convolution's gradient at the edges of a segment and of a sequence, a channel at a time:
//   a_t = SiLU(pre_t),  pre_t = bias + sum_j weight_j v_{t-W+1+j},  dpre = SiLU(g) dy SiLU'(pre)
// so v_t feeds pre_{t+W-1-j} through weight_j.
#pragma once
#include "unit.cuh"

namespace recgrela::cuda {

RECGRELA_DEVICE const float* conv_taps(const GatedRelaParams& f, const Unit& u, int channel) {
  return static_cast<const float*>(f.conv_weight) + (u.h * f.D + channel) * f.W;
}

// dpre of any item, from the rows; 0 behind the sequence's end.
template <class S>
RECGRELA_DEVICE float dpre_of(const GatedRelaBackwardParams& p, const Unit& u, int channel,
                              int64_t t) {
  const GatedRelaParams& f = p.forward;
  if (t >= u.span.length) return 0.0f;
  const float* bias = static_cast<const float*>(f.conv_bias);
  float pre = bias ? bias[u.h * f.D + channel] : 0.0f;
  for (int64_t tap = 0; tap < f.W; ++tap) {
    float value;
    value_at<S, 1>(f, u, t - (f.W - 1) + tap, channel, &value);
    pre += conv_taps(f, u, channel)[tap] * value;
  }
  float d_o = widen(row_at<const S>(p.grad_out, u.span, t, u.h)[channel]), a, slope;
  if (f.gate.data) d_o *= silu<S>(widen(row_at<const S>(f.gate, u.span, t, u.h)[channel]));
  silu_with_slope<S>(pre, &a, &slope);
  return d_o * slope;
}

// The final conv state holds the last W - 1 values, row r of which gets its gradient back.
RECGRELA_DEVICE float grad_final_conv(const GatedRelaBackwardParams& p, const Unit& u, int channel,
                                      int64_t r) {
  return static_cast<const float*>(
      p.grad_final.conv)[u.b * p.grad_final.conv_stride + r * p.forward.H * p.forward.D +
                         u.h * p.forward.D + channel];
}
// What of it goes to v of item t.
RECGRELA_DEVICE float grad_final_conv_of(const GatedRelaBackwardParams& p, const Unit& u,
                                         int channel, int64_t t) {
  const int64_t r = t - (u.span.length - (p.forward.W - 1));
  return p.grad_final.conv && r >= 0 ? grad_final_conv(p, u, channel, r) : 0.0f;
}

// One channel's part of the gradients of weight and bias, [W + 1]; `taps` are the last four.
RECGRELA_DEVICE void store_conv_part(const GatedRelaParams& f, const float (&taps)[4], float bias,
                                     bool sound, float* to) {
  for (int64_t tap = 0; tap < f.W; ++tap) {
    const int j = int(tap - (f.W - 4));
    float x = taps[3];
#pragma unroll
    for (int r = 0; r < 3; ++r) x = j == r ? taps[r] : x;
    to[tap] = sound ? x : NAN;
  }
  to[f.W] = sound ? bias : NAN;
}

// The gradient of the initial conv state, through the items that read it.
template <class S>
RECGRELA_DEVICE void store_grad_initial_conv(const GatedRelaBackwardParams& p, const Unit& u,
                                             int channel) {
  const GatedRelaParams& f = p.forward;
  for (int64_t r = 0; r < f.W - 1; ++r) {
    float sum = 0.0f;
    for (int64_t tap = 0; tap <= r && f.conv_weight && u.span.sound; ++tap) {
      sum += conv_taps(f, u, channel)[tap] * dpre_of<S>(p, u, channel, r - tap);
    }
    if (p.grad_final.conv && r >= u.span.length) {
      sum += grad_final_conv(p, u, channel, r - u.span.length);
    }
    static_cast<float*>(p.grad_initial.conv)[u.b * p.grad_initial.conv_stride + r * f.H * f.D +
                                             u.h * f.D + channel] = u.span.sound ? sum : NAN;
  }
}

}  // namespace recgrela::cuda
