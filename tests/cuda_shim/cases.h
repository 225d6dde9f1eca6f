// The problems the kernels are run on: dtypes, head dims, lengths, layouts, parts left out.
#pragma once
#include <utility>

#include "harness.h"

namespace harness {

inline std::string text_of(const Case& c) {
  std::string text = std::string(name_of(c.dtype)) + " H" + std::to_string(c.H) + " D" +
                     std::to_string(c.D) + " W" + std::to_string(c.conv ? c.W : 0) +
                     (c.layout == Layout::kWhole    ? " whole"
                      : c.layout == Layout::kPadded ? " padded"
                                                    : " packed");
  for (int64_t n : c.lengths) text += " " + std::to_string(n);
  if (!c.gate) text += " no-gate";
  if (!c.bias) text += " no-bias";
  if (c.initial) text += " initial@" + std::to_string(c.position);
  if (c.final) text += " final";
  if (c.grad_final) text += " grad-final";
  if (c.gap) text += " gap" + std::to_string(c.gap);
  return text;
}

// Two-byte rows of head dim 64 and 128. The short list holds one of every kind.
inline std::vector<Case> tensor_core_cases(bool all) {
  std::vector<Case> list;
  const auto add = [&](bool always, DType dtype, int64_t D, Layout layout,
                       std::vector<int64_t> lengths, bool states, int64_t gap) {
    Case c;
    c.dtype = dtype;
    c.D = D;
    c.H = 1;
    c.layout = layout;
    c.lengths = std::move(lengths);
    c.initial = c.final = c.grad_final = states;
    c.position = 1000003;
    c.gap = gap;
    if (all || always) list.push_back(c);
  };
  using L = Layout;
  constexpr DType bf = DType::kBFloat16, half = DType::kHalf;
  add(true, bf, 64, L::kPacked, {33, 0, 2, 65}, true, 0);
  add(true, half, 64, L::kPadded, {3, 40, 0}, false, 8);
  add(true, bf, 128, L::kPadded, {35, 0, 1}, true, 1);  // not aligned
  add(true, half, 128, L::kWhole, {34}, false, 0);
  add(true, bf, 64, L::kPacked, {3, 600}, true, 0);  // segments
  for (int64_t length : {1, 2, 63, 64, 65, 200}) {
    for (int64_t D : {64, 128}) {
      if (D == 128 && length == 200) continue;
      add(false, bf, D, L::kWhole, {length}, length == 1, 0);  // see above
      add(false, half, D, L::kWhole, {length}, length == 1, 0);
    }
  }
  for (int64_t D : {64, 128}) {
    add(false, half, D, L::kPacked, {4, 0, 0, 11, 1, 67}, true, 0);
    add(false, half, D, L::kPadded, {5, 0, 66}, true, 1);
    add(false, half, D, L::kPacked, {3, 600}, true, 8);
  }
  for (int64_t W : {1, 2, 3}) {
    add(false, bf, 64, L::kPacked, {4, 0, 35}, true, 0);
    if (all) list.back().W = W, list.back().bias = false;
  }
  for (bool conv : {false, true}) {
    add(false, bf, 64, L::kWhole, {36, 36}, false, 0);
    if (all) list.back().conv = conv, list.back().gate = false;
  }
  if (all) list.back().H = 3;
  return list;
}

inline std::vector<Case> cases(bool all) {
  std::vector<Case> list;
  const auto add = [&](Case c) {
    c.name = text_of(c);
    list.push_back(c);
  };
  for (int64_t D : {2, 6, 8, 16, 32, 64, 128}) {
    for (DType dtype : {DType::kFloat, DType::kBFloat16, DType::kHalf, DType::kDouble}) {
      Case c;
      c.dtype = dtype;
      c.D = D;
      c.H = D >= 64 ? 1 : 3;  // 3: a warp's units belong to several sequences
      c.lengths = {5, 0, 9};
      c.layout = Layout::kPadded;
      c.final = c.initial = c.grad_final = D % 16 == 0;
      c.position = 1000003;
      if (all || dtype == DType::kFloat || D == 6 || D == 16) add(c);
    }
  }
  for (int64_t L : {1, 2, 63, 64, 65, 130}) {
    for (int64_t D : {8, 16, 32, 64, 128}) {
      Case c;
      c.D = D;
      c.H = 1;
      c.lengths = {L};
      c.final = true;
      c.initial = L <= 2;  // with so few keys out is all but v, dq and dk rounding alone
      if (all || L == 65 || (L == 130 && D == 16)) add(c);
    }
  }
  for (int64_t W : {1, 2, 4, 7}) {
    for (int64_t D : {6, 16, 32, 64, 128}) {
      Case c;
      c.D = D;
      c.H = D >= 64 ? 1 : 2;
      c.W = W;
      c.layout = Layout::kPacked;
      c.lengths = {4, 0, 0, 11, 1, 67};
      c.final = c.initial = c.grad_final = true;
      c.bias = W != 2;
      if (all || (D < 32 && W != 2) || (D == 64 && W == 2) || (D == 128 && W == 4)) add(c);
    }
  }
  for (int64_t gap : {0, 1, 8}) {
    Case c;
    c.gap = gap;
    c.gate = gap != 0;
    c.conv = gap == 1;
    c.lengths = {13, 13};
    add(c);
    c.dtype = DType::kBFloat16;
    for (int64_t D : {32, 64, 128}) {
      c.D = D;
      if (all || (D == 128 && gap == 1)) add(c);
    }
  }
  Case plain;  // padding without a gate, whose gradient has no memory then
  plain.gate = false;
  plain.layout = Layout::kPadded;
  plain.lengths = {3, 5};
  for (int64_t D : {10, 16, 64}) {
    plain.D = D;
    if (all || D == 16) add(plain);
  }
  Case many;  // more parts of the convolution's gradients than threads that sum them
  many.H = 1;
  many.layout = Layout::kPacked;
  many.lengths.assign(40, 3);
  add(many);
  for (int64_t D : {8, 16, 64, 128, 10}) {  // long sums and, but for D 10, segments of a sequence
    Case c;
    c.D = D;
    c.H = 1;
    c.layout = Layout::kPacked;
    c.lengths = {3, 600};
    c.final = c.initial = c.grad_final = true;
    if (all || D == 16 || D == 128) add(c);
  }
  for (int64_t D : {64, 128}) {  // long sums of one segment; several chunks of a short sequence
    Case c;
    c.D = D;
    c.H = 2;
    c.lengths = {300};
    if (all) add(c);
    c.H = 1;
    c.lengths = {131};
    c.gate = c.bias = false;
    if (all || D == 64) add(c);
    c.initial = true;
    c.layout = Layout::kPadded;
    c.lengths = {69, 130};
    if (all) add(c);
  }
  for (const Case& c : tensor_core_cases(all)) add(c);
  return list;
}

}  // namespace harness
