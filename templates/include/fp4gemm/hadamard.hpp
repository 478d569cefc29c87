// The random Hadamard transform of 16 values, docs/numerics.md: y = v . diag(s) . H16 . 0.25.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

inline constexpr float kHadamardFactor = 0.25f;

// 4 y, in fp32: the sums without the factor. Bit i of mask set: s_i = -1.
template <class Element>
__device__ __forceinline__ Fp32::Block hadamard_sums(typename Element::Block const& x, uint32_t mask) {
  float v[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i)
    v[i] = __uint_as_float(__float_as_uint(Element::value(x, i)) ^ (mask << (31 - i) & 0x80000000u));
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
