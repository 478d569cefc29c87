// 4/6: a block's largest value becomes the code 6 or, under a scale 1.5 times that, the code 4: whichever errs less.
#pragma once

#include "fp4gemm/encode.hpp"

namespace fp4gemm {

enum class Adaptive { kNone, kMse, kMae };  // what is summed over the 16 values: squares or magnitudes of errors

// How a block can be written: scale, codes, and its error in units of the scaled tensor, whose value is `level` = |x| * S.
// Errors, and without hardware codes, are those of magnitudes: the sign changes neither.
template <Adaptive kError, class Divider> class Candidate {
 public:
  uint8_t const scale;

 private:
  Divider const divider_;
  float const decoded_;
  float error_ = 0.0f;
  uint32_t word_[2] = {};

  // code * scale is exact, so one rounding in all.
  __device__ void add(float value, float level) {
    float const d = __fmaf_rn(value, decoded_, -level);
    error_ = __fadd_rn(error_, kError == Adaptive::kMse ? __fmul_rn(d, d) : fabsf(d));
  }

 public:
  __device__ Candidate(uint16_t scale, Divider divider)
      : scale(static_cast<uint8_t>(scale)), divider_(divider), decoded_(from_e4m3_pair(scale)) {}
  __device__ float quotient(float magnitude) const { return divider_.quotient(magnitude); }
  __device__ float error() const { return error_; }
  __device__ uint32_t codes(int half) const { return word_[half]; }

  // Value i, whose quotient is below kQuickLimit, or below kFourLimit. The bits of a code at the place of an fp32's exponent are
  // its value * 2^-126.
  template <bool kFour> __device__ __forceinline__ void take(int i, float magnitude, float level) {
    float const v = quotient(magnitude);
    uint32_t const bits = kFour ? magnitude_code_of_4(v, magic_of(i)) : magnitude_code(v, magic_of(i));
    word_[i / 8] += bits << (4 * (i % 8));
    add(__fmul_rn(__uint_as_float(bits << 22), 0x1p126f), level);
  }
  // Eight values, with their signs, where the hardware rounds.
  template <class Element>
  __device__ __forceinline__ void take_eight(typename Element::Block const& x, int half, float encode) {
    auto const value = [&](int i) { return Element::value(x, 8 * half + i); };
    word_[half] = to_e2m1_eight([&](int i) { return quotient(value(i)); });
    uint32_t pairs[4];
    from_e2m1_eight(word_[half], pairs);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      add(half_to_float(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16))), __fmul_rn(value(i), encode));
  }
  // Any value, with its sign; NaN does not count.
  __device__ void take_any(int i, float value, float encode) {
    uint32_t const code = to_e2m1(copysignf(quotient(fabsf(value)), value));
    word_[i / 8] |= code << (4 * (i % 8));
    if (value == value) add(__fmul_rn(__uint_as_float((code & 7) << 22), 0x1p126f), __fmul_rn(fabsf(value), encode));
  }
};

template <class Candidate> __device__ __forceinline__ EncodedBlock better(Candidate const& six, Candidate const& four) {
  bool const second = four.error() < six.error();
  return {{second ? four.codes(0) : six.codes(0), second ? four.codes(1) : six.codes(1)},
          second ? four.scale : six.scale};
}

// It makes its candidates itself: those of the quick way, handed over, would have to live in memory.
template <Adaptive kError, class Element, class Convention>
__device__ __noinline__ EncodedBlock adaptive_any(typename Element::Block x, float amax,
                                                  typename Convention::Outer outer) {
  float const unrounded = __fmul_rn(fabsf(amax), __fmul_rn(outer.encode, kSixth));
  auto const candidate = [&](float unrounded) {
    uint8_t const scale = to_e4m3(fminf(unrounded, 448.0f));
    return Candidate<kError, decltype(Convention::divider(outer, scale))>(scale, Convention::divider(outer, scale));
  };
  auto six = candidate(unrounded), four = candidate(__fmul_rn(unrounded, 1.5f));
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    six.take_any(i, Element::value(x, i), outer.encode);
    four.take_any(i, Element::value(x, i), outer.encode);
  }
  return better(six, four);
}

template <Adaptive kError, class Element, class Convention>
__device__ __forceinline__ EncodedBlock encode_adaptive(typename Element::Block const& x, float amax,
                                                        typename Convention::Outer const& outer) {
  using Quick = QuickScales<Convention>;
  static_assert(__is_base_of(QuickTeScales, Quick), "always ok: a line that is not has NaN");
  float2 const line = Quick::line(Convention::level(outer));  // once for all blocks of a line
  auto const candidate = [&](float unrounded) {
    uint16_t const scale = to_e4m3_pair(unrounded);
    return Candidate<kError, decltype(Quick::divider(line, scale))>(scale, Quick::divider(line, scale));
  };
  float const unrounded = __fmul_rn(fabsf(amax), line.x);
  auto six = candidate(unrounded), four = candidate(__fmul_rn(unrounded, 1.5f));
  // As bits: those of NaN and of what is flagged, whose sign is set, are larger.
  if constexpr (kHasE2m1) {  // which saturates
    if (max(__float_as_uint(six.quotient(amax)), __float_as_uint(four.quotient(amax))) > __float_as_uint(kFloatMax))
      return adaptive_any<kError, Element, Convention>(x, amax, outer);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      six.template take_eight<Element>(x, half, outer.encode);
      four.template take_eight<Element>(x, half, outer.encode);
    }
    return better(six, four);
  }
  if (!(__float_as_uint(six.quotient(amax)) < __float_as_uint(kQuickLimit) && four.quotient(amax) < kFourLimit))
    return adaptive_any<kError, Element, Convention>(x, amax, outer);
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float const magnitude = fabsf(Element::value(x, i)), level = __fmul_rn(magnitude, outer.encode);
    six.template take<false>(i, magnitude, level);
    four.template take<true>(i, magnitude, level);
  }
  EncodedBlock best = better(six, four);
  best.codes.x |= Element::signs(x, 0), best.codes.y |= Element::signs(x, 1);
  return best;
}

}  // namespace fp4gemm
