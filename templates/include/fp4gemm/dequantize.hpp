// Packed NVFP4 to bf16, fp16 or fp32: code * block scale (exact in all three), times the outer scale where there is one.
#pragma once

#include "fp4gemm/layout.hpp"

namespace fp4gemm {

// Packed by fp4gemm/launch.py (DEQUANTIZE_ARGUMENTS): keep both alike.
struct DequantizeArguments {
  uint8_t const* data;  // [rows, columns * 8]
  uint8_t const* block_scale;
  float const* outer_scale;  // [1] or [rows]; null: leave it out
  void* out;  // [rows, columns * 16], contiguous
  uint32_t units;  // rows * columns * 2: half blocks, eight values each
  int columns;
  int outer_stride;  // 0 or 1
};

// Eight codes times their scale as four pairs of fp16, 2^-14 of the value: a code's three bits, shifted to the bottom of the
// exponent, are code * 2^-14 (0.5 is a subnormal), and the product has at most 6 significand bits: exact.
inline constexpr float kHalfUnit = 16384.0f;

__device__ __forceinline__ uint32_t half2_product(uint32_t codes, uint32_t scale) {
  uint32_t const bits = (codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 9;
  uint32_t product;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(product) : "r"(bits), "r"(scale));
  return product;
}

template <class Out> struct StoreEight;

template <class Out> struct StorePacked {
  __device__ static void store(void* out, int64_t unit, float const (&v)[8]) {
    uint4 const words = {Out::pack(v[0], v[1]), Out::pack(v[2], v[3]), Out::pack(v[4], v[5]), Out::pack(v[6], v[7])};
    static_cast<uint4*>(out)[unit] = words;
  }
};

template <> struct StoreEight<Bf16> : StorePacked<Bf16> {};
template <> struct StoreEight<Fp16> : StorePacked<Fp16> {};
template <> struct StoreEight<Fp32> {
  __device__ static void store(void* out, int64_t unit, float const (&v)[8]) {
    static_cast<float4*>(out)[2 * unit] = {v[0], v[1], v[2], v[3]};
    static_cast<float4*>(out)[2 * unit + 1] = {v[4], v[5], v[6], v[7]};
  }
};

template <class Out, class Scales, bool kOuter>
__device__ __forceinline__ void dequantize_unit(DequantizeArguments const& args, uint32_t unit) {
  uint32_t const column = unit / 2 % args.columns, row = unit / 2 / args.columns;
  uint32_t const word = reinterpret_cast<uint32_t const*>(args.data)[unit];
  uint32_t const scale =
      e4m3_to_half2(args.block_scale[Scales::row_offset(row, args.columns) + Scales::column_offset(column)]);
  float v[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Values i and i + 4 are 16 bits apart in the word.
    uint32_t const pair = half2_product(word >> (4 * i), scale);
    v[i] = __fmul_rn(half_to_float(static_cast<uint16_t>(pair)), kHalfUnit);
    v[i + 4] = __fmul_rn(half_to_float(static_cast<uint16_t>(pair >> 16)), kHalfUnit);
  }
  if constexpr (kOuter) {
    float const outer = args.outer_scale[static_cast<int64_t>(row) * args.outer_stride];
#pragma unroll
    for (float& value : v) value = __fmul_rn(value, outer);
  }
  StoreEight<Out>::store(args.out, unit, v);
}

template <class Out, class Scales, bool kOuter, int kThreads, int kUnits>
__device__ void dequantize(DequantizeArguments const& args) {
  uint32_t const first = blockIdx.x * (kThreads * kUnits) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (uint32_t const unit = first + i * kThreads; unit < args.units) dequantize_unit<Out, Scales, kOuter>(args, unit);
  }
}

}  // namespace fp4gemm
