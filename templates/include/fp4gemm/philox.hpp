// Stochastic rounding: Philox4x32-7, one call for the 16 values of a block, a byte for each; docs/numerics.md has the rule.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

struct PhiloxBlock {
  uint32_t w[4];  // byte i of word w, 0 the lowest, belongs to value 4 * w + i
};

// The keys of round 0 to 6: the seed, plus Weyl constants for each round before.
inline constexpr int kPhiloxRounds = 7;

__device__ __forceinline__ uint2 philox_key(uint64_t seed, int round) {
  return {static_cast<uint32_t>(seed) + round * 0x9E3779B9u, static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u};
}

// Of member i of a group: far apart, so that those of neighbouring seeds do not meet. Member 0 has the seed itself.
inline constexpr uint64_t kMemberSeed = 0x9E3779B97F4A7C15;

__device__ __forceinline__ uint64_t member_seed(uint64_t seed, int member) {
  return member == 0 ? seed : (seed + member * kMemberSeed) & 0x7FFFFFFFFFFFFFFF;
}

// As PTX: what the compiler makes of a product of two uint64_t adds a zero to its upper half, in each of them.
__device__ __forceinline__ uint2 low_and_high_product(uint32_t a, uint32_t b) {
  uint2 product;
  asm("{\n.reg .b64 p;\nmul.wide.u32 p, %2, %3;\nmov.b64 {%0, %1}, p;\n}"
      : "=r"(product.x), "=r"(product.y)
      : "r"(a), "r"(b));
  return product;
}

// Counter: (block, 0), block = row * ceil(K / 16) + column of the result. key(round) is a philox_key.
template <class Key> __device__ __forceinline__ PhiloxBlock philox_block_of(Key const& key, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint2 const k = key(round);
    uint2 const p0 = low_and_high_product(0xD2511F53, c0), p1 = low_and_high_product(0xCD9E8D57, c2);
    c0 = p1.y ^ c1 ^ k.x, c1 = p1.x;
    c2 = p0.y ^ c3 ^ k.y, c3 = p0.x;
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

// The rule as docs/numerics.md has it, for any magnitude: its place among the codes plus byte / 256, rounded down. NaN gives 7.
// The place is the least of three lines in the magnitude (numeric.hpp); each is rounded down to 1/256 of a code, exactly.
__device__ __forceinline__ uint32_t stochastic_code(float magnitude, uint32_t byte) {
  if (!(magnitude < 6.0f)) return 7;
  uint32_t const by_half = static_cast<uint32_t>(magnitude * 512.0f);
  uint32_t const by_one = static_cast<uint32_t>(magnitude * 256.0f) + 512;
  uint32_t const by_two = static_cast<uint32_t>(magnitude * 128.0f) + 1024;
  return (__vimin3_u32(by_half, by_one, by_two) + byte) >> 8;
}

// Places of two values, times kPlaceUnit, in 1/512 of a code, towards zero, with their signs, as the halves of a word. The bits
// of an fp16 number grow with it as places do: by as much in every binade, and by as much again up to the least normal number,
// which stands for 1.
inline constexpr float kPlaceUnit = 0x1p-14f;

__device__ __forceinline__ uint32_t places_among_codes(float low, float high) {
  uint32_t places;
  asm("cvt.rz.f16x2.f32 %0, %2, %1;" : "=r"(places) : "f"(low), "f"(high));
  return places;
}

// Bits of a where the mask is 1, else those of b; the compiler would give each a mask of its own.
template <uint32_t kMask> __device__ __forceinline__ uint32_t bits_of(uint32_t a, uint32_t b) {
  uint32_t both;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(both) : "r"(a), "r"(b), "n"(kMask));
  return both;
}

// Of four values: codes of the magnitudes as bytes 1 and 3, a nibble for each, with 8 for 7. Signs are the top bits of bytes 1
// and 3 of `even` and `odd`. Other bits are undefined.
struct StochasticFour {
  uint32_t even, odd, codes;

  template <class Value> __device__ __forceinline__ StochasticFour(Value const& value, int first, uint32_t noise) {
    even = places_among_codes(value(first), value(first + 2));
    odd = places_among_codes(value(first + 1), value(first + 3));
    // Codes in bits 8 to 11 of each half, or 12 to 15: there the place keeps its last bit, below those of the noise. What the FMA
    // pipe can do is a product: the ALU has more to do.
    uint32_t const odd_noise = gather_bytes(noise, 0, 0x4341), even_noise = noise - odd_noise * 256;
    uint32_t const low = (even >> 1) + even_noise, high = odd * 8 + odd_noise * 16;
    codes = bits_of<0xF000F000>(high, low);
  }
};

// Codes of eight values below 8 in magnitude, given times kPlaceUnit: value(0) to value(7), as nibbles; the first is the lowest.
// stochastic_code of the magnitude, and the sign.
template <class Value>
__device__ __forceinline__ uint32_t stochastic_eight(Value const& value, uint32_t noise0, uint32_t noise1) {
  StochasticFour const a(value, 0, noise0), b(value, 4, noise1);
  auto const gather = [](uint32_t of_a, uint32_t of_b) { return gather_bytes(of_a, of_b, 0x7531); };
  uint32_t codes = gather(a.codes, b.codes);
  codes -= codes >> 3 & 0x11111111u;  // 8 is 7
  return bits_of<0x80808080>(gather(a.odd, b.odd), bits_of<0x08080808>(gather(a.even, b.even) >> 4, codes));
}

}  // namespace fp4gemm
