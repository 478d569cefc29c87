// A block in registers -> its maximum, and its codes under a convention's divider and a rounding.
#pragma once

#include "fp4gemm/philox.hpp"
#include "fp4gemm/quick_scales.hpp"

namespace fp4gemm {

struct EncodedBlock {
  uint2 codes;
  uint8_t scale;
};

// Block amax without NaN; the sign bit marks a block that holds NaN or Inf.
template <class Element> __device__ __noinline__ float amax_without_nan(typename Element::Block x) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) amax = fmaxf(amax, fabsf(Element::value(x, i)));
  return amax;
}

template <class Element> __device__ __forceinline__ float flagged_amax(typename Element::Block const& x) {
  float const amax = Element::amax(x);
  return is_finite(amax) ? amax : -amax_without_nan<Element>(x);
}

__device__ __forceinline__ bool is_flagged(float amax) { return __float_as_uint(amax) >> 31 != 0; }

// A rounding has eight(half, value), codes of values below kQuickLimit, given times kUnit, value(0) in the lowest nibble, and
// one(i, v), the code of any value. i and 8 * half count in the block. kSigned: else eight knows magnitudes alone.
struct NearestEven {
  static constexpr float kUnit = 1.0f;
  static constexpr bool kHardware = true;  // cvt.rn does the same
  static constexpr bool kSigned = false;
  template <class Magnitude> __device__ __forceinline__ static uint32_t eight(int, Magnitude const& magnitude) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 7; i >= 0; --i) word = word * 16 + magnitude_code(magnitude(i), magic_of(i));
    return word;
  }
  __device__ static uint32_t one(int, float v) { return to_e2m1(v); }
};

struct Stochastic {
  static constexpr float kUnit = kPlaceUnit;
  static constexpr bool kHardware = false;
  static constexpr bool kSigned = true;
  PhiloxBlock noise;

  template <class Value> __device__ __forceinline__ uint32_t eight(int half, Value const& value) const {
    return stochastic_eight(value, noise.w[2 * half], noise.w[2 * half + 1]);
  }
  __device__ uint32_t one(int i, float v) const {
    uint32_t const code = stochastic_code(fabsf(v), noise.w[i / 4] >> (i % 4 * 8) & 0xFF);
    return v != v ? 7 : code | (__float_as_uint(v) >> 31) << 3;
  }
};

template <bool kStochastic> struct RoundingOf {
  using Type = NearestEven;
};
template <> struct RoundingOf<true> {
  using Type = Stochastic;
};

template <class Element, class Divider, class Rounding>
__device__ __forceinline__ uint32_t encode_half(typename Element::Block const& x, int half, Divider const& divider,
                                                Rounding const& rounding) {
  auto const in_units = times(divider, Rounding::kUnit);
  auto const value = [&](int i) { return Element::value(x, 8 * half + i); };
  if constexpr (Rounding::kSigned) {
    return rounding.eight(half, [&](int i) { return in_units.quotient(value(i)); });
  } else {
    return rounding.eight(half, [&](int i) { return in_units.quotient(fabsf(value(i))); }) | Element::signs(x, half);
  }
}

// For blocks with NaN or Inf and for those beyond the largest code (their scale underflowed, saturated or was given).
template <class Element, class Divider, class Rounding>
__device__ __noinline__ uint2 encode_any(typename Element::Block x, Divider divider, Rounding rounding) {
  uint32_t word[2] = {};
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float const value = Element::value(x, i);
    word[i / 8] |= rounding.one(i, copysignf(divider.quotient(fabsf(value)), value)) << (4 * (i % 8));
  }
  return {word[0], word[1]};
}

// The codes of a block: by the quick way if no value is NaN, Inf or beyond the largest code.
template <class Element, class Convention, class Rounding = NearestEven>
__device__ __forceinline__ uint2 encode_block(typename Element::Block const& x, float amax,
                                              typename Convention::Outer const& outer, uint8_t scale,
                                              Rounding const& rounding = {}) {
  if constexpr (kHasE2m1 && Rounding::kHardware) {  // which knows NaN, Inf and saturation: there is no other way
    auto const divider = Convention::divider(outer, scale);
    auto const eight = [&](int half) {
      return to_e2m1_eight([&](int i) { return divider.quotient(Element::value(x, 8 * half + i)); });
    };
    return {eight(0), eight(1)};
  } else {
    using Quick = QuickScales<Convention>;
    float2 const line = Quick::line(Convention::level(outer));  // once for all blocks of a line
    auto const divider = Quick::divider(line, scale);
    // As bits: those of NaN and of what is flagged, whose sign is set, are larger.
    if (__float_as_uint(divider.quotient(amax)) < __float_as_uint(kQuickLimit) && Quick::ok(line, amax))
      return {encode_half<Element>(x, 0, divider, rounding), encode_half<Element>(x, 1, divider, rounding)};
    return encode_any<Element>(x, Convention::divider(outer, scale), rounding);
  }
}

}  // namespace fp4gemm
