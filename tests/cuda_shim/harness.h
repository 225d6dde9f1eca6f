// Runs the kernels on one problem in a storage dtype and compares with reference.h. Buffers are
// exactly as large as the kernels may touch, and full of a canary elsewhere.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "cuda/params.h"
#include "cuda_runtime.h"
#include "reference.h"

namespace harness {

using namespace recgrela::cuda;
using reference::Values;

enum class Layout { kWhole, kPadded, kPacked };

struct Case {
  std::string name;
  DType dtype = DType::kFloat;
  int64_t H = 2, D = 16, W = 4;
  Layout layout = Layout::kWhole;
  std::vector<int64_t> lengths = {3, 3};  // kWhole: all equal
  bool gate = true, conv = true, bias = true, initial = false, final = false, grad_final = false;
  int64_t position = 0;  // of the initial state
  int64_t gap = 0;       // elements between rows and between sequences
};

inline const char* name_of(DType dtype) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[int(dtype)];
}
inline int64_t size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : (dtype == DType::kFloat ? 4 : 2);
}

// Bits of the significand, which say what a unit in the last place is.
inline int digits_of(DType dtype) {
  const int digits[] = {23, 52, 7, 10};
  return digits[int(dtype)];
}

inline void encode(double x, DType dtype, unsigned char* to) {
  const float narrow = float(x);
  uint16_t bits = 0;
  if (dtype == DType::kDouble) {
    std::memcpy(to, &x, 8);
  } else if (dtype == DType::kFloat) {
    std::memcpy(to, &narrow, 4);
  } else {
    bits = dtype == DType::kHalf ? shim::float_to_half(narrow) : shim::float_to_bfloat16(narrow);
    std::memcpy(to, &bits, 2);
  }
}
inline double decode(DType dtype, const unsigned char* from) {
  double x = 0;
  float narrow = 0;
  uint16_t bits = 0;
  if (dtype == DType::kDouble) {
    std::memcpy(&x, from, 8);
    return x;
  }
  if (dtype == DType::kFloat) {
    std::memcpy(&narrow, from, 4);
    return narrow;
  }
  std::memcpy(&bits, from, 2);
  if (dtype == DType::kHalf) return shim::half_to_float(bits);
  const uint32_t wide = uint32_t(bits) << 16;
  std::memcpy(&narrow, &wide, 4);
  return narrow;
}
inline double rounded(double x, DType dtype) {
  unsigned char memory[8];
  encode(x, dtype, memory);
  return decode(dtype, memory);
}

constexpr double kCanary = -77.0;

// A dense array of the accumulation dtype.
struct Dense {
  DType dtype = DType::kFloat;
  std::vector<unsigned char> memory;
  Dense() = default;
  Dense(DType t, int64_t count, double fill) : dtype(t), memory(count * size_of(t)) {
    for (int64_t i = 0; i < count; ++i) encode(fill, t, memory.data() + i * size_of(t));
  }
  Dense(DType t, const Values& values) : Dense(t, int64_t(values.size()), 0.0) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      encode(values[i], t, memory.data() + i * size_of(t));
    }
  }
  Values values() const {
    Values all(memory.size() / size_of(dtype));
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i] = decode(dtype, memory.data() + i * size_of(dtype));
    }
    return all;
  }
  void* data() { return memory.empty() ? nullptr : memory.data(); }
};

// Rows [B, L, H, D] or [T, H, D] with `gap` elements between rows and sequences.
struct RowBuffer {
  DType dtype = DType::kFloat;
  int64_t L = 0, H = 0, D = 0, gap = 0, items = 0;
  std::vector<unsigned char> memory;

  int64_t item_stride() const { return H * D + gap; }
  int64_t offset(int64_t row, int64_t h, int64_t d) const {
    return row / L * (L * item_stride() + gap) + row % L * item_stride() + h * D + d;
  }
  RowBuffer() = default;
  RowBuffer(DType t, int64_t rows, int64_t length, int64_t heads, int64_t dim, int64_t between,
            double fill)
      : dtype(t), L(length > 0 ? length : 1), H(heads), D(dim), gap(between), items(rows) {
    const int64_t count = rows > 0 ? offset(rows - 1, H - 1, D - 1) + 1 : 0;
    memory.resize(count * size_of(t));
    for (int64_t i = 0; i < count; ++i) encode(kCanary, t, memory.data() + i * size_of(t));
    for_each([&](int64_t, unsigned char* at) { encode(fill, dtype, at); });
  }
  template <class F>
  void for_each(F&& f) {
    for (int64_t i = 0; i < items * H * D; ++i) {
      f(i, memory.data() + offset(i / (H * D), i / D % H, i % D) * size_of(dtype));
    }
  }
  void set(const Values& values) {
    for_each([&](int64_t i, unsigned char* at) { encode(values[i], dtype, at); });
  }
  Values values() {
    Values all(items * H * D);
    for_each([&](int64_t i, unsigned char* at) { all[i] = decode(dtype, at); });
    return all;
  }
  bool gaps_untouched() {
    std::vector<unsigned char> copy = memory;
    for_each([&](int64_t, unsigned char* at) { encode(kCanary, dtype, at); });
    std::swap(copy, memory);
    for (std::size_t i = 0; i < copy.size(); i += size_of(dtype)) {
      if (decode(dtype, copy.data() + i) != kCanary) return false;
    }
    return true;
  }
  Rows rows(bool packed) {
    Rows r;
    r.data = memory.empty() ? nullptr : memory.data();
    r.batch_stride = packed ? 0 : L * item_stride() + gap;
    r.item_stride = item_stride();
    r.head_stride = D;
    return r;
  }
};

struct Random {
  std::mt19937 generator;
  std::normal_distribution<double> normal;
  explicit Random(unsigned seed) : generator(seed) {}
  Values values(int64_t count, DType dtype, double scale = 1.0) {
    Values all(count);
    for (double& x : all) x = rounded(scale * normal(generator), dtype);
    return all;
  }
};

inline reference::Problem random_problem(const Case& c, unsigned seed) {
  const DType acc = c.dtype == DType::kDouble ? DType::kDouble : DType::kFloat;
  Random random(seed);
  reference::Problem p{};
  p.B = int64_t(c.lengths.size());
  p.H = c.H;
  p.D = c.D;
  p.W = c.conv ? c.W : 1;
  p.eps = 0.05;  // of a size that every limit here can tell
  int64_t longest = 0, total = 0;
  for (int64_t n : c.lengths) {
    longest = n > longest ? n : longest;
    total += n;
  }
  if (c.layout == Layout::kPadded) longest += 2;
  p.items = c.layout == Layout::kPacked ? total : p.B * longest;
  int64_t first = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    p.sequences.push_back({c.layout == Layout::kPacked ? first : b * longest, c.lengths[b]});
    first += c.lengths[b];
  }
  const int64_t C = p.H * p.D, rows = p.items * C;
  p.gated = c.gate;
  p.augmented = c.conv;
  p.q = random.values(rows, c.dtype);
  p.k = random.values(rows, c.dtype);
  p.v = random.values(rows, c.dtype);
  p.gate = random.values(rows, c.dtype);
  for (int64_t i = 0; i < C / 2; ++i) p.inv_freq.push_back(std::pow(1e4, -2.0 * double(i) / C));
  if (c.conv) p.weight = random.values(C * c.W, acc, 0.5);
  if (c.conv && c.bias) p.bias = random.values(C, acc, 0.5);
  if (c.initial) {
    p.kv = random.values(p.B * C * p.D, acc, 3.0);
    p.k_sum = random.values(p.B * C, acc, 3.0);
    for (double& x : p.k_sum) x = rounded(std::fabs(x) + 3.0, acc);
    p.conv = random.values(p.B * (p.W - 1) * C, acc);
    for (int64_t b = 0; b < p.B; ++b) p.position.push_back(c.position + 7 * b);
  }
  return p;
}

// What padding holds must never matter.
inline Values poisoned(const reference::Problem& p, const Values& rows) {
  Values all(rows.size(), std::numeric_limits<double>::quiet_NaN());
  for (const reference::Sequence& s : p.sequences) {
    const int64_t begin = s.first * p.H * p.D, end = (s.first + s.length) * p.H * p.D;
    for (int64_t i = begin; i < end; ++i) all[i] = rows[i];
  }
  return all;
}

struct Run {
  const Case& c;
  const reference::Problem& p;
  DType acc;
  int64_t L;
  RowBuffer q, k, v, gate, out, grad_out, dq, dk, dv, dgate;
  Dense weight, bias, kv, k_sum, conv, final_kv, final_k_sum, final_conv, saved_kv, saved_k_sum;
  Dense dweight, dbias, dkv, dk_sum, dconv, gkv, gk_sum, gconv;
  std::vector<int64_t> lengths, cu_seqlens;
  std::vector<unsigned char> scratch;
  GatedRelaParams params{};

  Run(const Case& test, const reference::Problem& problem) : c(test), p(problem) {
    acc = c.dtype == DType::kDouble ? DType::kDouble : DType::kFloat;
    L = c.layout == Layout::kPacked ? 0 : p.items / p.B;
    cu_seqlens.push_back(0);
    for (const reference::Sequence& s : p.sequences) {
      lengths.push_back(s.length);
      cu_seqlens.push_back(cu_seqlens.back() + s.length);
    }
    fill_params();
  }
  RowBuffer rows(double fill) const {
    return RowBuffer(c.dtype, p.items, c.layout == Layout::kPacked ? p.items : L, p.H, p.D, c.gap,
                     fill);
  }
  RowBuffer rows(const Values& values) const {
    RowBuffer buffer = rows(0.0);
    buffer.set(poisoned(p, values));
    return buffer;
  }
  bool packed() const { return c.layout == Layout::kPacked; }

  void fill_params() {
    const int64_t C = p.H * p.D;
    q = rows(p.q);
    k = rows(p.k);
    v = rows(p.v);
    gate = rows(p.gate);
    out = rows(kCanary);
    weight = Dense(acc, p.weight);
    bias = Dense(acc, p.bias);
    kv = Dense(acc, p.kv);
    k_sum = Dense(acc, p.k_sum);
    conv = Dense(acc, p.conv);
    params.dtype = c.dtype;
    params.B = p.B;
    params.L = L;
    params.H = p.H;
    params.D = p.D;
    params.W = p.W;
    params.items = packed() ? p.items : 0;
    params.eps = p.eps;
    params.q = q.rows(packed());
    params.k = k.rows(packed());
    params.v = v.rows(packed());
    if (c.gate) params.gate = gate.rows(packed());
    params.out = out.rows(packed());
    params.inv_freq = p.inv_freq.data();
    params.conv_weight = weight.data();
    params.conv_bias = bias.data();
    if (c.layout == Layout::kPadded) params.lengths = lengths.data();
    if (packed()) params.cu_seqlens = cu_seqlens.data();
    if (c.initial) params.initial = states(kv, k_sum, conv, p.position.data());
    if (c.final) {
      final_kv = Dense(acc, p.B * C * p.D, kCanary);
      final_k_sum = Dense(acc, p.B * C, kCanary);
      final_conv = Dense(acc, p.B * (p.W - 1) * C, kCanary);
      params.final = states(final_kv, final_k_sum, final_conv, nullptr);
    }
  }
  States states(Dense& a, Dense& b, Dense& w, const int64_t* position) const {
    const int64_t C = p.H * p.D;
    return {a.data(), b.data(), w.data(), C * p.D, C, (p.W - 1) * C, position};
  }

  int forward(bool save) {
    if (save) {
      const int64_t chunks = packed() ? p.items / kChunk + p.B : p.B * ((L + kChunk - 1) / kChunk);
      saved_kv = Dense(acc, chunks * p.H * p.D * p.D, 0.0);
      saved_k_sum = Dense(acc, chunks * p.H * p.D, 0.0);
      params.saved_kv = saved_kv.data();
      params.saved_k_sum = saved_k_sum.data();
    }
    scratch.assign(forward_scratch_bytes(params), 0xff);  // NaN
    params.scratch = scratch.empty() ? nullptr : scratch.data();
    return launch_gated_rela(params, nullptr);
  }

  int backward(const Values& dy, const reference::Result& dfinal) {
    const int64_t C = p.H * p.D;
    GatedRelaBackwardParams b{};
    b.forward = params;
    grad_out = rows(dy);
    for (RowBuffer* r : {&dq, &dk, &dv, &dgate}) *r = rows(kCanary);
    b.grad_out = grad_out.rows(packed());
    b.dq = dq.rows(packed());
    b.dk = dk.rows(packed());
    b.dv = dv.rows(packed());
    if (c.gate) b.dgate = dgate.rows(packed());
    if (c.conv) {
      dweight = Dense(acc, C * p.W, kCanary);
      dbias = Dense(acc, C, kCanary);
      b.dweight = dweight.data();
      if (c.bias) b.dbias = dbias.data();
    }
    if (c.grad_final) {
      gkv = Dense(acc, dfinal.kv);
      gk_sum = Dense(acc, dfinal.k_sum);
      gconv = Dense(acc, dfinal.conv);
      b.grad_final = states(gkv, gk_sum, gconv, nullptr);
    }
    if (c.initial) {
      dkv = Dense(acc, p.B * C * p.D, kCanary);
      dk_sum = Dense(acc, p.B * C, kCanary);
      dconv = Dense(acc, p.B * (p.W - 1) * C, kCanary);
      b.grad_initial = states(dkv, dk_sum, dconv, nullptr);
    }
    scratch.assign(backward_scratch_bytes(params), 0xff);
    b.forward.scratch = scratch.empty() ? nullptr : scratch.data();
    return launch_gated_rela_backward(b, nullptr);
  }
};

// Largest error, in units in the last place of the scale; the scale is the largest reference value
// among `width` neighbours. NaN where a value is NaN.
inline double error_of(const Values& got, const Values& expected, int64_t width, int digits) {
  double worst = got.size() == expected.size() ? 0.0 : 1e300;
  for (std::size_t i = 0; i < expected.size() && i < got.size(); i += width) {
    double scale = 0, off = 0;
    for (std::size_t j = i; j < i + width; ++j) {
      scale = std::fmax(scale, std::fabs(expected[j]));
      const double difference = std::fabs(got[j] - expected[j]);
      off = difference >= off || difference != difference ? difference : off;
    }
    if (off == 0) continue;
    const double ulp = std::ldexp(1.0, std::ilogb(scale > 0 ? scale : 1e-30) - digits);
    const double error = off / ulp;
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

}  // namespace harness
