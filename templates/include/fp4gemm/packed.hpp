// The prepacked weight form of sm_90a, and how its codes become tensor-core operands in registers.
//
// Rows and columns are padded to whole blocks of 64 x 64; blocks stand in row-major order, 2304 bytes each. A block holds, for
// each 16-row group w, lane l = 4g + t and k-step j (16 columns, one scale group):
//   byte 512w + 16l: words A0 B0 A1 B1; words Ah Bh are the lane's A fragments (m16k16) of the k-steps 2h and 2h + 1;
//   byte 2048 + 64w + 8g: a scale byte for each (step, row): (0, g) (0, g + 8) (1, g) (1, g + 8) (2, g) ... (3, g + 8).
//
// A fragment register holds two codes as  sign | exponent low 2 | mantissa top  of a bf16, which is code * 2^-126 (0.5 is a
// subnormal). Two words hold 16 codes so that eight AND, shift, rotate and select steps give eight registers.
// A scale byte is bits 14..7 of fp16(scale * 2^7), exact for every e4m3; 255 stands for NaN. Groups of scale 0 have codes 0.
// The product code * scale * 2^-7 has at most 6 significand bits: exact. Epilogues multiply by kPackedUnit.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

inline constexpr int kPackedRows = 64;
inline constexpr int kPackedColumns = 64;
inline constexpr int kPackedCodeBytes = 2048;
inline constexpr int kPackedBlockBytes = kPackedCodeBytes + 256;
inline constexpr float kPackedUnit = 128.0f;

inline constexpr uint32_t kFragmentMask = 0x81C081C0u;
inline constexpr uint32_t kSharedBits =
    0x60306030u;  // bits of word A in the fourth register pair; the rest are of word B

__device__ __forceinline__ uint32_t rotate_left(uint32_t v, int n) { return __funnelshift_l(v, v, n); }

// 16 codes in two words as eight bf16x2 registers: a0..a3 of one k-step, then a0..a3 of the next.
__device__ __forceinline__ void split_codes(uint32_t a, uint32_t b, uint32_t (&r)[8]) {
  uint32_t x;  // (a & kSharedBits) | (b & ~kSharedBits), which the compiler makes two instructions
  asm("lop3.b32 %0, %1, %2, %3, 0xE2;" : "=r"(x) : "r"(a), "n"(kSharedBits), "r"(b));
  r[0] = a & kFragmentMask;
  r[1] = rotate_left(a, 28) & kFragmentMask;
  r[2] = (a << 6) & kFragmentMask;
  r[3] = rotate_left(b, 30) & kFragmentMask;
  r[4] = rotate_left(b, 26) & kFragmentMask;
  r[5] = (b << 4) & kFragmentMask;
  r[6] = rotate_left(x, 24) & kFragmentMask;
  r[7] = (x << 2) & kFragmentMask;
}

// The low or the high half of a pair in both halves: ptxas makes it an operand modifier, not an instruction.
template <bool kHigh> __device__ __forceinline__ uint32_t broadcast_half(uint32_t pair) {
  uint32_t both;
  if constexpr (kHigh) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {h, h};\n}" : "=r"(both) : "r"(pair));
  } else {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {l, l};\n}" : "=r"(both) : "r"(pair));
  }
  return both;
}

// The operand element: how a register of split_codes and a pair of scale bytes (bits 7..0 of each half) become numbers.
struct OperandBf16 {
  static constexpr bool kBf16 = true;
  __device__ static uint32_t codes(uint32_t r) { return r; }
  __device__ static uint32_t scales(uint32_t bytes) { return bytes * 16u + 0x70007000u; }
  __device__ static uint32_t product(uint32_t codes, uint32_t scale) {
    uint32_t v;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(codes), "r"(scale));
    return v;
  }
};

struct OperandFp16 {
  static constexpr bool kBf16 = false;
  // bf16 bits 8..6 to fp16 bits 11..9: code * 2^-126 becomes code * 2^-14.
  __device__ static uint32_t codes(uint32_t r) { return (r & 0x80008000u) | ((r << 3) & 0x0E000E00u); }
  __device__ static uint32_t scales(uint32_t bytes) { return bytes << 7; }
  __device__ static uint32_t product(uint32_t codes, uint32_t scale) {
    uint32_t v;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(v) : "r"(codes), "r"(scale));
    return v;
  }
};

// The scales of two k-steps, step 0 in the low halves: of row g and of row g + 8.
template <class Operand>
__device__ __forceinline__ void packed_scales(uint32_t bytes, uint32_t& top, uint32_t& bottom) {
  top = Operand::scales(__byte_perm(bytes, 0, 0x4240));
  bottom = Operand::scales(__byte_perm(bytes, 0, 0x4341));
}

// The fragment of one of two k-steps: a0..a3.
template <class Operand, int kStep> __device__ __forceinline__ void dequantize_step(uint32_t a, uint32_t b,
                                                                                    uint32_t top, uint32_t bottom,
                                                                                    uint32_t (&r)[4]) {
  uint32_t codes[8];
  split_codes(a, b, codes);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    r[i] = Operand::product(Operand::codes(codes[4 * kStep + i]), broadcast_half < kStep == 1 > (i % 2 ? bottom : top));
}

// Fragments of two k-steps: words of codes, and the four scale bytes of (step, row) in the order above.
template <class Operand>
__device__ __forceinline__ void dequantize_fragments(uint32_t a, uint32_t b, uint32_t scale_bytes, uint32_t (&r)[8]) {
  split_codes(a, b, r);
  uint32_t const top = Operand::scales(__byte_perm(scale_bytes, 0, 0x4240));  // row g, steps 0 and 1
  uint32_t const bottom = Operand::scales(__byte_perm(scale_bytes, 0, 0x4341));  // row g + 8
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t const scales = i % 2 ? bottom : top;
    r[i] = Operand::product(Operand::codes(r[i]), broadcast_half<false>(scales));
    r[i + 4] = Operand::product(Operand::codes(r[i + 4]), broadcast_half<true>(scales));
  }
}

}  // namespace fp4gemm
