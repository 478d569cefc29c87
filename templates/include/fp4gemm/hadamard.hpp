// The random Hadamard transform of 16 values, docs/numerics.md: y = v . diag(s) . H16 . 0.25.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

inline constexpr float kHadamardFactor = 0.25f;

// Where values change their sign: bit 15 of word i for value 2 i, bit 31 for value 2 i + 1; a kernel argument, so that it is an
// operand of the instruction that applies it.
struct HadamardSigns {
  uint32_t w[kBlock / 2];
};

// 4 y, in fp32: the sums without the factor.
template <class Element>
__device__ __forceinline__ Fp32::Block hadamard_sums(typename Element::Block x, HadamardSigns const& signs) {
  float v[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if constexpr (Element::kBytes == 2) {
      if (i % 2 == 0) x.w[i / 2] ^= signs.w[i / 2];
    } else {
      x.w[i] ^= i % 2 == 0 ? signs.w[i / 2] << 16 : signs.w[i / 2] & 0x80000000u;
    }
    v[i] = Element::value(x, i);
  }
#pragma unroll
  for (int stride = 1; stride < kBlock; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i & stride) continue;
      float const a = v[i], b = v[i + stride];
      v[i] = __fadd_rn(a, b);
      v[i + stride] = __fadd_rn(a, -b);
    }
  }
  Fp32::Block sums;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) sums.w[i] = __float_as_uint(v[i]);
  return sums;
}

}  // namespace fp4gemm
