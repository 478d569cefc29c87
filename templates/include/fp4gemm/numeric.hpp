// Scalar building blocks of docs/numerics.md: element types, e4m3 and e2m1 conversion, block maxima.
// No CUDA or C++ library header is included: a quantizer compiles in a fraction of a second.
#pragma once

namespace fp4gemm {

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

inline constexpr int kBlock = 16;             // values that share one e4m3 scale
inline constexpr float kFloatMax = 0x1.fffffep127f;
inline constexpr float kRange = 6.0f * 448.0f;  // largest e2m1 times largest e4m3
inline constexpr float kSixth = 1.0f / 6.0f;
inline constexpr uint8_t kE4m3Max = 0x7E;     // 448

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Keeps a value, and what is made of it, behind what stands before: loads that are to be asked for first, a wait for WGMMAs.
__device__ __forceinline__ void pin(uint32_t& v) { asm volatile("" : "+r"(v)::"memory"); }
__device__ __forceinline__ void pin(float& v) { asm volatile("" : "+f"(v)::"memory"); }

__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= kFloatMax; }

// A pointer that came through shared memory, as one to global memory: accesses then need not find out.
template <class T> __device__ __forceinline__ T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// Round to nearest even, saturating at 448; never NaN for the non-negative, non-NaN inputs of this package.
__device__ __forceinline__ uint8_t to_e4m3(float v) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
  return static_cast<uint8_t>(pair);
}

__device__ __forceinline__ uint32_t e4m3x2_to_half2(uint16_t bytes) {
  uint32_t both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(bytes));
  return both;
}

// The e4m3 byte as fp16 bits in both halves of a word (every e4m3 is an fp16).
__device__ __forceinline__ uint32_t e4m3_to_half2(uint8_t byte) {
  return e4m3x2_to_half2(static_cast<uint16_t>(byte * 0x0101));
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

__device__ __forceinline__ float from_e4m3(uint8_t byte) {
  return half_to_float(static_cast<uint16_t>(e4m3_to_half2(byte)));
}

// Code of |v| by thresholds, sign from v; NaN gives +7, as cvt.rn.satfinite.e2m1x2 does. The readable form, for rare paths.
__device__ __forceinline__ uint32_t to_e2m1(float v) {
  if (v != v) return 7;
  float const a = fabsf(v);
  uint32_t const code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return code | (__float_as_uint(v) >> 31) << 3;
}

// Magnitude code of 0 <= v < kQuickLimit as the low bits of a word, plus the bits of `magic`, an even number from 2^23 to 2^24 - 16.
// Between grid points the code is linear in v, with slope 2, 1 and 1/2: it is the least of three lines, rounded. Adding 2^23
// rounds to an integer, to nearest and ties to the even code, and rounding is monotone, so the least of three rounded lines
// is the rounded least: three FMA-pipe instructions and one on the half-rate ALU pipe, which is what bounds a quantizer.
inline constexpr float kQuickLimit = 7.0f;
inline constexpr float kMagic = 0x1p23f;

__device__ __forceinline__ uint32_t magnitude_code(float v, float magic = kMagic) {
  float const by_half = __fmaf_rn(v, 2.0f, magic);
  float const by_one = __fadd_rn(v, magic + 2.0f);
  float const by_two = __fmaf_rn(v, 0.5f, magic + 4.0f);
  return __vimin3_u32(__float_as_uint(by_half), __float_as_uint(by_one), __float_as_uint(by_two));
}

// The same where the third line is never the least.
inline constexpr float kFourLimit = 4.5f;

__device__ __forceinline__ uint32_t magnitude_code_of_4(float v, float magic) {
  return min(__float_as_uint(__fmaf_rn(v, 2.0f, magic)), __float_as_uint(__fadd_rn(v, magic + 2.0f)));
}

// For the i-th of eight codes that become a word of nibbles. The bits of kMagic, 0x4B000000, are shifted out of all but the
// lowest two; those of the second are 0x4B500000, so that 16 times them and the first's add up to 5 * 2^32, and nothing is left.
__device__ __forceinline__ float magic_of(int i) { return i % 8 == 1 ? 0x1.Ap23f : kMagic; }

// sm_100a and sm_120a round eight values, whatever they are, as to_e2m1 does.
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
inline constexpr bool kHasE2m1 = true;
template <class Value> __device__ __forceinline__ uint32_t to_e2m1_eight(Value const& value) {
  uint32_t word;
  asm("{\n.reg .b8 b<4>;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\ncvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\ncvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3};\n}"
      : "=r"(word)
      : "f"(value(0)), "f"(value(1)), "f"(value(2)), "f"(value(3)), "f"(value(4)), "f"(value(5)), "f"(value(6)),
        "f"(value(7)));
  return word;
}
// And back: four pairs of fp16.
__device__ __forceinline__ void from_e2m1_eight(uint32_t word, uint32_t (&pairs)[4]) {
  asm("{\n.reg .b8 b<4>;\nmov.b32 {b0, b1, b2, b3}, %4;\n"
      "cvt.rn.f16x2.e2m1x2 %0, b0;\ncvt.rn.f16x2.e2m1x2 %1, b1;\n"
      "cvt.rn.f16x2.e2m1x2 %2, b2;\ncvt.rn.f16x2.e2m1x2 %3, b3;\n}"
      : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
      : "r"(word));
}
#else
inline constexpr bool kHasE2m1 = false;
template <class Value> __device__ uint32_t to_e2m1_eight(Value const&);
__device__ void from_e2m1_eight(uint32_t, uint32_t (&)[4]);
#endif

// One type per input element. Raw is one in memory, of kBytes; unpack makes a Block of the words of 16. Then: conversion to
// float, block maximum, sign bits of eight values as nibble bit 3.
template <int kBytes> struct Words {
  uint32_t w[kBlock * kBytes / 4];
};

__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

template <class Derived> struct Packed16 {
  static constexpr int kBytes = 2;
  using Block = Words<2>;
  __device__ static Block unpack(Words<2> const& x) { return x; }

  // Values 8h..8h+7 of the block: bit 15 and bit 31 of four words to bits 3, 7, ..., 31.
  __device__ static uint32_t signs(Block const& x, int h) {
    uint32_t const* w = x.w + 4 * h;
    uint32_t const a = gather_bytes(w[0], w[1], 0x7351);  // bytes: x0, x2, x1, x3
    uint32_t const b = gather_bytes(w[2], w[3], 0x7351);
    uint32_t const even = gather_bytes(a, b, 0x5410), odd = gather_bytes(a, b, 0x7632);
    return ((even >> 4) & 0x08080808u) | (odd & 0x80808080u);
  }

  __device__ static float amax(Block const& x) {
    uint32_t m = x.w[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) m = Derived::max_magnitude(m, x.w[i]);
    return fabsf(Derived::low(Derived::max_magnitude(m, m >> 16)));
  }

  __device__ static float value(Block const& x, int i) {
    return i % 2 ? Derived::high(x.w[i / 2]) : Derived::low(x.w[i / 2]);
  }
  __device__ static void set(Block& x, int i, uint16_t bits) {
    x.w[i / 2] |= static_cast<uint32_t>(bits) << (i % 2 * 16);
  }
  using Raw = uint16_t;
};

struct Bf16 : Packed16<Bf16> {
  __device__ static float low(uint32_t w) { return __uint_as_float(w << 16); }
  __device__ static float high(uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }
  // The larger magnitude under some sign, or NaN; one instruction.
  __device__ static uint32_t max_magnitude(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
  }
  __device__ static uint32_t pack(float low, float high) {
    uint32_t w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
    return w;
  }
};

struct Fp16 : Packed16<Fp16> {
  __device__ static float low(uint32_t w) { return half_to_float(static_cast<uint16_t>(w)); }
  __device__ static float high(uint32_t w) { return half_to_float(static_cast<uint16_t>(w >> 16)); }
  // The larger magnitude under some sign, or NaN; one instruction.
  __device__ static uint32_t max_magnitude(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
  }
  __device__ static uint32_t pack(float low, float high) {
    uint32_t w;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
    return w;
  }
};

// In registers an fp16: every e4m3 is one.
struct E4m3 : Fp16 {
  static constexpr int kBytes = 1;
  using Raw = uint8_t;
  __device__ static Block unpack(Words<1> const& x) {
    Block half;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      half.w[i] = e4m3x2_to_half2(static_cast<uint16_t>(i % 2 ? x.w[i / 2] >> 16 : x.w[i / 2]));
    return half;
  }
  __device__ static void set(Block& x, int i, uint8_t byte) { Fp16::set(x, i, e4m3_to_half2(byte)); }
};

struct Fp32 {
  static constexpr int kBytes = 4;
  using Block = Words<4>;
  using Raw = uint32_t;
  __device__ static Block unpack(Words<4> const& x) { return x; }

  __device__ static float value(Block const& x, int i) { return __uint_as_float(x.w[i]); }
  __device__ static void set(Block& x, int i, uint32_t bits) { x.w[i] = bits; }
  __device__ static float amax(Block const& x) {
    float m = value(x, 0);
#pragma unroll
    for (int i = 1; i < kBlock; ++i) asm("max.NaN.xorsign.abs.f32 %0, %0, %1;" : "+f"(m) : "f"(value(x, i)));
    return fabsf(m);
  }
  __device__ static uint32_t signs(Block const& x, int h) {
    uint32_t const* w = x.w + 8 * h;
    auto const tops = [&](int i) {  // top bytes of words i, i + 2, i + 4, i + 6
      return gather_bytes(gather_bytes(w[i], w[i + 2], 0x73), gather_bytes(w[i + 4], w[i + 6], 0x73), 0x5410);
    };
    return ((tops(0) >> 4) & 0x08080808u) | (tops(1) & 0x80808080u);
  }
};

}  // namespace fp4gemm
