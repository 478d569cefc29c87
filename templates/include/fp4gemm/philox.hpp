// Stochastic rounding: Philox4x32-10, one call for the 16 values of a block, a byte for each; docs/numerics.md has the rule.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

struct PhiloxBlock {
  uint32_t w[4];  // byte i of word w, 0 the lowest, belongs to value 4 * w + i
};

// The keys of round 0 to 9: the seed, plus Weyl constants for each round before.
inline constexpr int kPhiloxRounds = 10;

__device__ __forceinline__ uint2 philox_key(uint64_t seed, int round) {
  return {static_cast<uint32_t>(seed) + round * 0x9E3779B9u, static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u};
}

// Of member i of a group: far apart, so that those of neighbouring seeds do not meet. Member 0 has the seed itself.
inline constexpr uint64_t kMemberSeed = 0x9E3779B97F4A7C15;

__device__ __forceinline__ uint64_t member_seed(uint64_t seed, int member) {
  return member == 0 ? seed : (seed + member * kMemberSeed) & 0x7FFFFFFFFFFFFFFF;
}

// Counter: (block, 0), block = row * ceil(K / 16) + column of the result. key(round) is a philox_key.
template <class Key> __device__ __forceinline__ PhiloxBlock philox_block_of(Key const& key, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint2 const k = key(round);
    uint64_t const p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k.x;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k.y;
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ PhiloxBlock philox_block(uint64_t seed, uint64_t block) {
  return philox_block_of([seed](int round) { return philox_key(seed, round); }, block);
}

// Several at once, which share round keys.
template <int kCount> __device__ __forceinline__ void philox_blocks(uint64_t seed, uint64_t const (&block)[kCount],
                                                                    PhiloxBlock (&noise)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    noise[i] = philox_block_of([seed](int round) { return philox_key(seed, round); }, block[i]);
}

// The rule as docs/numerics.md has it, for any magnitude: t = |v| + step * byte / 256, rounded once, then down to the grid.
// The code is the least of three lines in t (numeric.hpp), rounded down. NaN gives 7.
__device__ __forceinline__ uint32_t stochastic_code(float magnitude, uint32_t byte) {
  float const step = magnitude < 2.0f ? 0.5f : magnitude < 4.0f ? 1.0f : 2.0f;
  float const t = __fmaf_rn(static_cast<float>(byte) * 0x1p-8f, step, magnitude);
  if (!(t < 6.0f)) return 7;
  uint32_t const by_half = static_cast<uint32_t>(t * 2.0f), by_one = static_cast<uint32_t>(t) + 2;
  uint32_t const by_two = static_cast<uint32_t>(t * 0.5f) + 4;
  return __vimin3_u32(by_half, by_one, by_two);
}

// The place of 0 <= v < kQuickLimit among the codes, in 1/256 of one, rounded down, in the low 12 bits. With a byte of noise added
// to it, bits 8 to 11 are the code, or 8 for 7: rounding down only once is the same as rounding t first, except where t is
// rounded up to a grid point. The binade of t is that of |v| or holds no grid point below its end, but for |v| < .5, whose
// rounding up at .5 is half an ulp below it: 2^-25, here, added to 2 v.
__device__ __forceinline__ uint32_t place_among_codes(float v) {
  float const by_half = __fadd_rd(__fmaf_rd(v, 2.0f, 0x1p-25f), 32768.0f);
  float const by_one = __fadd_rd(v, 32770.0f);
  float const by_two = __fmaf_rd(v, 0.5f, 32772.0f);
  return __vimin3_u32(__float_as_uint(by_half), __float_as_uint(by_one), __float_as_uint(by_two));
}

// Codes of four magnitudes as bytes 1 and 3, two in each, a nibble for each; other bits are undefined.
__device__ __forceinline__ uint32_t stochastic_four(uint32_t p0, uint32_t p1, uint32_t p2, uint32_t p3,
                                                    uint32_t noise) {
  uint32_t const even = gather_bytes(p0, p2, 0x5410) + (noise & 0x00FF00FFu);
  uint32_t const odd = gather_bytes(p1, p3, 0x5410) + gather_bytes(noise, 0, 0x4341);
  return (odd & 0x0F000F00u) * 16 + even;
}

// stochastic_code of eight magnitudes below kQuickLimit, magnitude(0) to magnitude(7), as nibbles; the first is the lowest.
template <class Magnitude>
__device__ __forceinline__ uint32_t stochastic_eight(Magnitude const& magnitude, uint32_t noise0, uint32_t noise1) {
  uint32_t p[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = place_among_codes(magnitude(i));
  uint32_t const codes = gather_bytes(stochastic_four(p[0], p[1], p[2], p[3], noise0),
                                      stochastic_four(p[4], p[5], p[6], p[7], noise1), 0x7531);
  return codes - (codes >> 3 & 0x11111111u);  // 8 is 7
}

}  // namespace fp4gemm
