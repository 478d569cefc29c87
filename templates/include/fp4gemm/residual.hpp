// Blocks with a companion: an activation's holds the error of the block in front of it, a weight's repeats it. The product of the
// two, over twice the columns, is then that of the weight and an activation with about twice the bits.
#pragma once

#include "fp4gemm/encode.hpp"
#include "fp4gemm/values.hpp"

namespace fp4gemm {

enum class Residual { kNone, kActivation, kWeight };

inline constexpr uint8_t kLeastScale = 0x01;  // 2^-9: what a pair has instead of 0

// x / d as IEEE rounds it where that is below kQuickLimit in magnitude, and else something that also has the code 7 or -7. r =
// 1 / d, rounded: one correction of x * r then gives the quotient (Markstein). fminf drops the NaN of an overflow. kSigned: x
// may be negative.
template <bool kSigned> struct BoundedDivide {
  float d, r, bound = 6.5f;
  __device__ float quotient(float x) const {
    float const q = __fmul_rn(x, r), corrected = __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
    return kSigned ? copysignf(fminf(fabsf(corrected), bound), x) : fminf(corrected, bound);
  }
};

template <bool kSigned>
__device__ __forceinline__ BoundedDivide<kSigned> times(BoundedDivide<kSigned> divider, float factor) {
  return {divider.d / factor, divider.r * factor, divider.bound * factor};
}

// What is left of a block in units of the scaled tensor: x * S less code * scale, which is exact. NaN leaves nothing.
template <class Element> __device__ __forceinline__ Fp32::Block error_of(typename Element::Block const& x, float encode,
                                                                         uint2 codes, uint8_t scale) {
  BlockValues const exact(scale);
  uint4 const low = exact.eight(codes.x), high = exact.eight(codes.y);
  uint32_t const words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  Fp32::Block d;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float const value = i % 2 ? Bf16::high(words[i / 2]) : Bf16::low(words[i / 2]);
    Fp32::set(d, i, __float_as_uint(__fadd_rn(__fmul_rn(Element::value(x, i), encode), -value)));
  }
  return d;
}

template <Residual kSide, class Element, class Rounding>
__device__ __forceinline__ EncodedBlock companion_of(EncodedBlock const& block, typename Element::Block const& x,
                                                     float amax, float encode, Rounding const& rounding) {
  if constexpr (kSide == Residual::kWeight) {
    return block;
  } else {
    Fp32::Block d = error_of<Element>(x, encode, block.codes, block.scale);
    if (is_flagged(amax)) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
        if (Fp32::value(d, i) != Fp32::value(d, i)) Fp32::set(d, i, 0);
    }
    uint8_t const scale = max(to_e4m3(fminf(__fmul_rn(Fp32::amax(d), kSixth), 448.0f)), kLeastScale);
    float const divisor = from_e4m3(scale);
    BoundedDivide<Rounding::kSigned> const divider{divisor, __fdiv_rn(1.0f, divisor)};
    return {{encode_half<Fp32>(d, 0, divider, rounding), encode_half<Fp32>(d, 1, divider, rounding)}, scale};
  }
}

}  // namespace fp4gemm
