// Block scales and dividers by less arithmetic than convention.hpp's, with the same results.
#pragma once

#include "fp4gemm/convention.hpp"

namespace fp4gemm {

// e4m3 of v, saturating, in the low byte of a word that is 0 elsewhere, and back: without instructions that make it so.
__device__ __forceinline__ uint16_t to_e4m3_pair(float v) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
  return pair;
}
__device__ __forceinline__ float from_e4m3_pair(uint16_t pair) {
  return half_to_float(static_cast<uint16_t>(e4m3x2_to_half2(pair)));
}

__device__ __forceinline__ float approximate_reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// A convention's arithmetic for the common case, from two numbers that a line's blocks share. A line for which it would not
// be exact has NaN for them, or is not ok, and its blocks, as those with NaN or Inf, take the slow path.
template <class Convention> struct QuickScales {
  using Outer = typename Convention::Outer;
  __device__ static float2 line(float level) { return {level, level}; }
  // Nor for a block next to nothing, whose values times a power of two would not be exact.
  __device__ static bool ok(float2 line, float amax) {
    return line.x >= 0x1p-90f && line.x <= 0x1p90f && (amax >= 0x1p-120f || amax == 0.0f);
  }
  __device__ static uint8_t scale(float2 line, float amax) {
    return Convention::block_scale(Outer{line.x, 0.0f}, amax);
  }
  __device__ static auto divider(float2 line, uint8_t scale) { return Convention::divider(Outer{line.x, 0.0f}, scale); }
  // The line of values that are given `factor`, a power of two, times too large.
  __device__ static float2 of_larger(float2 line, float factor) { return {line.x * factor, line.y * factor}; }
};

struct QuickTeScales {
  // Quotients and remainders of S and block scales then are far from the ends of the exponents.
  __device__ static bool in_range(float encode) { return encode >= 0x1p-90f && encode <= 0x1p90f; }
  __device__ static bool ok(float2, float) { return true; }
  __device__ static float not_a_number() { return __uint_as_float(0x7FC00000u); }
  // Of NaN it is NaN, and so is then the divider.
  __device__ static uint16_t scale(float2 line, float amax) { return to_e4m3_pair(__fmul_rn(amax, line.x)); }
};

template <int kLargest> struct QuickScales<TePerTokenOf<kLargest>> : QuickTeScales {
  __device__ static float2 line(float encode) {
    return in_range(encode) ? float2{__fmul_rn(encode, kSixth), encode} : float2{not_a_number(), not_a_number()};
  }
  // S / scale rounded as division rounds: the reciprocal of a number of four bits is the nearest one after a Newton step,
  // and then a quotient is after one.
  __device__ static MultiplyBy divider(float2 line, uint16_t scale) {
    float const s = from_e4m3_pair(scale), near = approximate_reciprocal(s);
    float const reciprocal = __fmaf_rn(near, __fmaf_rn(-s, near, 1.0f), near);
    float const quotient = __fmul_rn(line.y, reciprocal);
    float const c = __fmaf_rn(__fmaf_rn(-s, quotient, line.y), reciprocal, quotient);
    return {s == 0.0f ? 0.0f : c};
  }
  __device__ static float2 of_larger(float2 line, float factor) { return {line.x / factor, line.y / factor}; }
};

template <int kLargest> struct QuickScales<TeOf<kLargest>> : QuickTeScales {
  __device__ static float2 line(float encode) {
    return in_range(encode) ? float2{__fmul_rn(encode, kSixth), __fdiv_rn(1.0f, encode)}
                            : float2{not_a_number(), not_a_number()};
  }
  // A scale of 0 gives Inf, and the slow path.
  __device__ static MultiplyBy divider(float2 line, uint16_t scale) {
    return {__fdiv_rn(1.0f, __fmul_rn(from_e4m3_pair(scale), line.y))};
  }
  __device__ static float2 of_larger(float2 line, float factor) { return {line.x / factor, line.y * factor}; }
};

}  // namespace fp4gemm
