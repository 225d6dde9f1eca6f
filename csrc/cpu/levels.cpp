// Run-time choice of the instruction-set level, and the tables every level shares.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace recgrela {
namespace {

struct Level {
  const Kernels* kernels;
  bool runs_here;
};

// Slowest first. What is asked of the processor is what the level's code uses, nothing more.
const Level* levels(int* count) {
#if defined(__x86_64__)
  static const Level all[] = {
      {&kBaselineKernels, true},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")},
  };
#else
  static const Level all[] = {{&kBaselineKernels, true}};
#endif
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Kernels& choose() {
  int count;
  const Level* all = levels(&count);
  const char* wanted = std::getenv("RECGRELA_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') {
    while (!all[count - 1].runs_here) --count;
    return *all[count - 1].kernels;
  }
  for (int i = 0; i < count; ++i) {
    if (all[i].runs_here && std::strcmp(all[i].kernels->level, wanted) == 0) return *all[i].kernels;
  }
  throw std::invalid_argument(std::string("RECGRELA_CPU_LEVEL must be one of ") +
                              available_levels() + " on this machine, got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* available_levels() {
  static const std::string names = [] {
    int count;
    const Level* all = levels(&count);
    std::string text;
    for (int i = 0; i < count; ++i) {
      if (!all[i].runs_here) continue;
      if (!text.empty()) text += ',';
      text += all[i].kernels->level;
    }
    return text;
  }();
  return names.c_str();
}

// Row j is the complex product of rows j/2 and j - j/2: two library calls per frequency instead of
// 2 kChunk. The angle is then off by j units in the last place, which only double rows can see.
void fill_step_rotation(double* table, const double* inv_freq, int64_t H, int64_t D, DType dtype) {
  const int64_t pairs = D / 2;
  for (int64_t h = 0; h < H; ++h) {
    double* rows = table + h * (kChunk + 1) * D;
    for (int64_t i = 0; i < pairs; ++i) {
      rows[i] = 1.0;
      rows[pairs + i] = 0.0;
      rows[D + i] = std::cos(inv_freq[h * pairs + i]);
      rows[D + pairs + i] = std::sin(inv_freq[h * pairs + i]);
    }
    for (int64_t j = 2; j <= kChunk; ++j) {
      for (int64_t i = 0; i < pairs && dtype == DType::kDouble; ++i) {
        const double phase = static_cast<double>(j) * inv_freq[h * pairs + i];
        rows[j * D + i] = std::cos(phase);
        rows[j * D + pairs + i] = std::sin(phase);
      }
      if (dtype == DType::kDouble) continue;
      const double* a = rows + j / 2 * D;
      const double* b = rows + (j - j / 2) * D;
      double* to = rows + j * D;
      for (int64_t i = 0; i < pairs; ++i) {
        to[i] = a[i] * b[i] - a[pairs + i] * b[pairs + i];
        to[pairs + i] = a[pairs + i] * b[i] + a[i] * b[pairs + i];
      }
    }
  }
}

namespace {

template <class A>
void join_all(const GatedRelaParams& p) {
  const int64_t size = (p.D + 1) * p.D;
  for (int64_t pair = 0; pair < p.B * p.H; ++pair) {
    A* sums = static_cast<A*>(p.segment_sums) + pair * p.segments * size;
    const int64_t b = pair / p.H, h = pair % p.H;
    const int64_t items =
        p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : (p.lengths ? p.lengths[b] : p.L);
    for (int64_t i = 0; i < size; ++i) sums[i] = A(0);
    if (p.initial.kv) {
      const A* kv = static_cast<const A*>(p.initial.kv) + b * p.initial.kv_stride;
      const A* k_sum = static_cast<const A*>(p.initial.k_sum) + b * p.initial.k_sum_stride;
      std::memcpy(sums, kv + h * p.D * p.D, std::size_t(p.D * p.D) * sizeof(A));
      std::memcpy(sums + p.D * p.D, k_sum + h * p.D, std::size_t(p.D) * sizeof(A));
    }
    for (int64_t s = 1; s * kSegment < items; ++s) {
      for (int64_t i = 0; i < size; ++i) sums[s * size + i] += sums[(s - 1) * size + i];
    }
  }
}

}  // namespace

void join_segments(const GatedRelaParams& p) {
  p.dtype == DType::kDouble ? join_all<double>(p) : join_all<float>(p);
}

// A packed sequence starts at chunk cu_seqlens[b] / kChunk + b: slots never overlap, and nobody has
// to know the lengths to size the buffer.
int64_t first_chunk(const GatedRelaParams& p, int64_t b) {
  if (p.cu_seqlens) return p.cu_seqlens[b] / kChunk + b;
  return b * ((p.L + kChunk - 1) / kChunk);
}

}  // namespace recgrela

// For Python's build_info(): the level in use and those this machine can run.
extern "C" __attribute__((visibility("default"))) const char* recgrela_cpu_level() {
  return recgrela::kernels().level;
}
extern "C" __attribute__((visibility("default"))) const char* recgrela_cpu_levels() {
  return recgrela::available_levels();
}
