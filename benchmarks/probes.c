// What this machine can do, measured beside the operators: multiply-adds in registers and a STREAM
// triad. One call is one thread's work; the caller starts as many as it measures.
#include <stddef.h>

typedef float vec __attribute__((vector_size(32)));

// 12 independent chains hide the latency of a multiply-add: 12 * 8 * 2 operations a round.
float fma_loop(long rounds) {
  vec acc[12], scale = {0}, shift = {0};
  scale += 0.999f;
  shift += 0.001f;
  for (int i = 0; i < 12; ++i) acc[i] = shift * (float)i;
  for (long r = 0; r < rounds; ++r)
    for (int i = 0; i < 12; ++i) acc[i] = acc[i] * scale + shift;
  vec sum = {0};
  for (int i = 0; i < 12; ++i) sum += acc[i];
  return sum[0] + sum[7];
}

void triad(float *restrict a, const float *restrict b, const float *restrict c, size_t n) {
  for (size_t i = 0; i < n; ++i) a[i] = b[i] + 3.0f * c[i];
}
