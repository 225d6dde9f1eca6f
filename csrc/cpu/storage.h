// bfloat16 and float16 in memory, and their conversion. Included by every level file.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

RECGRELA_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
RECGRELA_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

RECGRELA_INLINE float widen(float x) { return x; }
RECGRELA_INLINE double widen(double x) { return x; }
RECGRELA_INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
RECGRELA_INLINE float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  uint32_t bits = magnitude + (112u << 23);
  bits = exponent == 0x0f800000u ? bits + (112u << 23) : bits;  // infinity, NaN
  const uint32_t subnormal =
      float_to_bits(bits_to_float(magnitude + (113u << 23)) - bits_to_float(113u << 23));
  return bits_to_float((exponent == 0 ? subnormal : bits) | sign);
}

RECGRELA_INLINE void narrow(float x, float* out) { *out = x; }
RECGRELA_INLINE void narrow(double x, double* out) { *out = x; }
RECGRELA_INLINE void narrow(float x, BFloat16* out) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x == x ? rounded : 0x7fc0u);
}
RECGRELA_INLINE void narrow(float x, Half* out) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a subnormal half's last bit with the float's.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = uint16_t(half | sign);
}

// Calls f with a null pointer of the storage type, which tells the generic lambda its type.
template <class A, class F>
RECGRELA_INLINE void with_storage(DType dtype, F&& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (dtype == DType::kHalf) {
    f(static_cast<Half*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}
