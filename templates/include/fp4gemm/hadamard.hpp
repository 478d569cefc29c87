// The random Hadamard transform of 16 values, docs/numerics.md: y = v . diag(s) . H16 . 0.25.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

inline constexpr float kHadamardFactor = 0.25f;

// What a kernel knows of the transform: its mask, bit i for value i, or that there is none, or that signs are an argument.
inline constexpr int kNoHadamard = -2, kAnySigns = -1;

// Where values change their sign: bit 15 of word i for value 2 i, bit 31 for value 2 i + 1; a kernel argument, so that it is an
// operand of the instruction that applies it.
struct HadamardSigns {
  uint32_t w[kBlock / 2];
};

// 4 y in fp32, y without its factor, but for the last of the four stages: what both of its results and their maximum follow from.
struct HadamardSums {
  static constexpr int kHalf = kBlock / 2;
  float v[kBlock];

  // Signs that the kernel knows cost nothing: the first additions are subtractions.
  template <class Element, int kSigns>
  __device__ __forceinline__ static HadamardSums of(typename Element::Block x, HadamardSigns const& signs) {
    HadamardSums result;
    float (&v)[kBlock] = result.v;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if constexpr (kSigns == kAnySigns) {
        if constexpr (Element::kBytes == 2) {
          if (i % 2 == 0) x.w[i / 2] ^= signs.w[i / 2];
        } else {
          x.w[i] ^= i % 2 == 0 ? signs.w[i / 2] << 16 : signs.w[i / 2] & 0x80000000u;
        }
      }
      v[i] = Element::value(x, i);
      if (kSigns >= 0 && (kSigns >> i & 1) != 0) v[i] = -v[i];
    }
#pragma unroll
    for (int stride = 1; stride < kHalf; stride *= 2) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (i & stride) continue;
        float const a = v[i], b = v[i + stride];
        v[i] = __fadd_rn(a, b);
        v[i + stride] = __fadd_rn(a, -b);
      }
    }
    return result;
  }

  // Of a + b and a - b one is |a| + |b|, rounded alike, and the other is not larger. Inf or NaN where one of all is Inf or NaN.
  __device__ __forceinline__ float amax() const {
    uint32_t m = 0;  // of floats without signs, which order as their bits do
#pragma unroll
    for (int i = 0; i < kHalf; i += 2) m = __vimax3_u32(m, larger(i), larger(i + 1));
    return __uint_as_float(m);
  }

  __device__ __forceinline__ Fp32::Block block() const {
    Fp32::Block sums;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      sums.w[i] = __float_as_uint(__fadd_rn(v[i], v[i + kHalf]));
      sums.w[i + kHalf] = __float_as_uint(__fadd_rn(v[i], -v[i + kHalf]));
    }
    return sums;
  }

 private:
  __device__ __forceinline__ uint32_t larger(int i) const {
    return __float_as_uint(__fadd_rn(fabsf(v[i]), fabsf(v[i + kHalf])));
  }
};

}  // namespace fp4gemm
