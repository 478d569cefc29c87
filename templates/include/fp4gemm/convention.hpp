// What "NVFP4" means to whom: how an amax becomes an outer scale, a block maximum an e4m3 scale, and a value its quotient.
// docs/numerics.md is the definition, fp4gemm/reference the same in torch. Every step is one IEEE fp32 operation.
//
//   from_amax, from_decode    the Outer of a row or tensor, from its amax or a given decode multiplier; .decode is stored
//   block_scale(outer, amax)  e4m3 byte
//   level(outer)              the one of its numbers that blocks follow from
//   divider(outer, byte)      an object whose quotient(x) is what e2m1 rounds, with the sign of x, -0 too
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

struct MultiplyBy {
  float c;
  __device__ float quotient(float x) const { return __fmul_rn(x, c); }
};

struct DivideBy {
  float d;
  // d can underflow to 0; zeros stay zeros.
  __device__ float quotient(float x) const { return x == 0.0f ? x : __fdiv_rn(x, d); }
};

// The divider that gives `factor`, a power of two, times the quotient: exactly, unless exponents end before.
__device__ __forceinline__ MultiplyBy times(MultiplyBy divider, float factor) { return {divider.c * factor}; }
__device__ __forceinline__ DivideBy times(DivideBy divider, float factor) { return {divider.d / factor}; }

// Transformer Engine's conventions carry the encode multiplier S = 2688 / amax from the row to its blocks.
struct EncodeOuter {
  float encode, decode;
};

struct TeScales {
  using Outer = EncodeOuter;
  // fminf drops the NaN of an Inf block (S = 0, Inf * 0), which so gets the largest scale.
  __device__ static uint8_t block_scale(Outer const& outer, float amax) {
    return to_e4m3(fminf(__fmul_rn(amax, __fmul_rn(outer.encode, kSixth)), kFloatMax));
  }
  __device__ static Outer from_decode(float decode) { return {fminf(__fdiv_rn(1.0f, decode), kFloatMax), decode}; }
  __device__ static float level(Outer const& outer) { return outer.encode; }
};

// kLargest: the block scale that the amax gets; 4/6 (adaptive.hpp) leaves room for the larger scale of its 4.
template <int kLargest> struct TePerTokenOf : TeScales {
  using Adaptive = TePerTokenOf<256>;
  static constexpr float kRange = 6.0f * kLargest;
  __device__ static Outer from_amax(float amax) {
    return {fminf(__fdiv_rn(kRange, fmaxf(amax, 1e-12f)), kFloatMax), __fmul_rn(amax, 1.0f / kRange)};
  }
  __device__ static MultiplyBy divider(Outer const& outer, uint8_t scale) {
    return {scale == 0 ? 0.0f : __fdiv_rn(outer.encode, from_e4m3(scale))};
  }
};

template <int kLargest> struct TeOf : TeScales {
  using Adaptive = TeOf<256>;
  static constexpr float kRange = 6.0f * kLargest;
  __device__ static Outer from_amax(float amax) {
    float const encode = amax == 0.0f ? 1.0f : fminf(__fdiv_rn(kRange, amax), kFloatMax);
    return {encode, __fmul_rn(amax, 1.0f / kRange)};
  }
  __device__ static MultiplyBy divider(Outer const& outer, uint8_t scale) {
    float const product = __fmul_rn(from_e4m3(scale), __fdiv_rn(1.0f, outer.encode));
    return {fminf(__fdiv_rn(1.0f, product), kFloatMax)};
  }
};

using TePerToken = TePerTokenOf<448>;
using Te = TeOf<448>;

// torchao and ModelOpt carry the decode multiplier itself; a zero one encodes as 1.
struct DecodeOuter {
  float level, decode;
};

struct DecodeScales {
  using Outer = DecodeOuter;
  __device__ static Outer from_decode(float decode) { return {decode == 0.0f ? 1.0f : decode, decode}; }
  __device__ static Outer from_amax(float amax) { return from_decode(__fdiv_rn(amax, kRange)); }
  __device__ static float level(Outer const& outer) { return outer.level; }
};

struct Torchao : DecodeScales {
  __device__ static uint8_t block_scale(Outer const& outer, float amax) {
    return to_e4m3(fmaxf(fminf(__fdiv_rn(__fdiv_rn(amax, 6.0f), outer.level), 448.0f), 0x1p-6f));
  }
  __device__ static MultiplyBy divider(Outer const& outer, uint8_t scale) {
    float const reciprocal = fminf(__fdiv_rn(1.0f, outer.level), kFloatMax);
    return {fminf(__fdiv_rn(reciprocal, from_e4m3(scale)), kFloatMax)};
  }
};

struct ModelOpt : DecodeScales {
  __device__ static uint8_t block_scale(Outer const& outer, float amax) {
    float const scale = __fdiv_rn(amax, __fmul_rn(outer.level, 6.0f));
    return to_e4m3(fmaxf(fminf(scale == 0.0f ? 1.0f : scale, 448.0f), 0x1p-9f));
  }
  __device__ static DivideBy divider(Outer const& outer, uint8_t scale) {
    return {__fmul_rn(from_e4m3(scale), outer.level)};
  }
};

}  // namespace fp4gemm
