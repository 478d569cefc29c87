// Codes and a block scale as the bf16 values that they stand for, without the outer scale.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

// A code shifted to sign | exponent low 2 | mantissa top is code * 2^-126, the scale is made scale * 2^119, and both products
// are exact; a zero scale has no such form and is put in the last factor, which undoes 2^-7.
class BlockValues {
  uint32_t scale_, unit_;

  __device__ uint32_t pair(uint32_t codes) const {  // the code at the bottom of each half
    uint32_t const bits = (codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 6;
    uint32_t v;
    asm("{\n.reg .b32 p;\nmul.bf16x2 p, %1, %2;\nmul.bf16x2 %0, p, %3;\n}"
        : "=r"(v)
        : "r"(bits), "r"(scale_), "r"(unit_));
    return v;
  }

 public:
  __device__ explicit BlockValues(uint8_t scale) : unit_(scale == 0 ? 0 : 0x43004300u) {
    uint32_t half;  // scale * 2^7 as fp16
    asm("mul.f16x2 %0, %1, %2;" : "=r"(half) : "r"(e4m3_to_half2(scale)), "r"(0x58005800u));
    scale_ = (half >> 3 & 0x0FF00FF0u) + 0x70007000u;
  }

  // Eight codes, the first in the lowest nibble. Codes i and i + 4 are 16 bits apart.
  __device__ uint4 eight(uint32_t codes) const {
    uint32_t const p0 = pair(codes), p1 = pair(codes >> 4), p2 = pair(codes >> 8), p3 = pair(codes >> 12);
    return {gather_bytes(p0, p1, 0x5410), gather_bytes(p2, p3, 0x5410), gather_bytes(p0, p1, 0x7632),
            gather_bytes(p2, p3, 0x7632)};
  }
};

}  // namespace fp4gemm
