// Block scales chosen by error: the best of all 126 e4m3 scales, to the bit of an exhaustive search (docs/search.md has the
// definition and the proofs that let most candidates be left out; fp4gemm/reference/search.py is the same in torch).
//
// A lane searches a unit: a block of 16 values, or two neighbours that share a scale. Four lanes side by side take neighbouring
// units of a row, a CTA 32 rows at a time.
#pragma once

#include "fp4gemm/encode.hpp"
#include "fp4gemm/layout.hpp"
#include "fp4gemm/rows.hpp"

namespace fp4gemm {

enum class Metric { kSse, kHessian };

// Packed by fp4gemm/search/calls.py (SEARCH_ARGUMENTS): keep both alike.
struct SearchArguments {
  void const* x;
  uint8_t* data;  // [rows, columns * 8]
  uint8_t* block_scale;
  float* outer_scale;
  float const* scale_in;  // amaxes or decode multipliers, as the configuration says
  float const* factor;  // [units, kFactor] and then reaches [units, kValues]: Hessian
  float* errors;  // [rows, units] or null: the error of what was chosen, in units of the scaled tensor
  uint64_t* counters;  // {units searched, candidates tried, units that differ from an exhaustive search}: kAudit
  int64_t x_stride, rows, padded_rows;
  int k, columns;  // columns: ceil(k / 16)
  int scale_in_stride;  // 0 or 1
  int row_steps;  // 32 rows each
  int first, last;  // e4m3 bytes to choose from, 1 <= first <= last <= 126
};

// kFourSix: only the two scales of 4/6, which are both tried. kAudit: also search exhaustively, and count.
template <class Element_, class Scales_, Metric kMetric_, int kUnitBlocks_, bool kGiven_, bool kVectorized_,
          bool kFourSix_ = false, bool kAudit_ = false>
struct SearchConfig {
  using Element = Element_;
  using Scales = Scales_;
  using Convention = TePerTokenOf<kFourSix_ ? 256 : 448>;
  static constexpr Metric kMetric = kMetric_;
  static constexpr int kUnitBlocks = kUnitBlocks_, kValues = kBlock * kUnitBlocks;
  static constexpr bool kGiven = kGiven_, kVectorized = kVectorized_, kFourSix = kFourSix_, kAudit = kAudit_;
  static constexpr int kThreads = 128, kUnits = 4, kRows = kThreads / kUnits;
};

inline constexpr float kLeastLevel = 0x1p-30f;  // |x| * S below it counts as 0 in an error: nothing underflows then
inline constexpr float kLeastEncode = 0x1p-100f;  // an S below it could make S / scale subnormal: everything is tried
inline constexpr float kSlack = 1.0f - 0x1p-20f;  // more than rounding does to a level, or to a square of one
inline constexpr float kLeastBest = 0x1p-80f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }

// code - |v|, v = |x| * c.
template <bool kClamp> __device__ __forceinline__ float difference(float x, float c) {
  float const v = __fmul_rn(fabsf(x), c);
  uint32_t const code = magnitude_code(kClamp ? fminf(v, 6.0f) : v);
  return __fmaf_rn(__uint_as_float(code << 22), 0x1p126f, -v);
}

// The values of a unit, those that count as zero being zero, and what their error is under a scale.
template <int kValues> struct SquaredError {
  static constexpr int kFactor = 0;
  float x[kValues];

  __device__ void load(float const*, int, int) {}

  // In units of (S * x)^2. Not clamped: |x| * c < kQuickLimit.
  template <bool kClamp> __device__ __forceinline__ float error(float c, float scale, float) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      float const d = difference<kClamp>(x[i], c);
      sum = __fmaf_rn(d, d, sum);
    }
    return __fmul_rn(sum, __fmul_rn(scale, scale));
  }
};

// |U d|^2 with the upper triangular U of U^T U = H. Rows are summed from the last one, which has one element: a sum can only
// grow, and what exceeds the best on the way is left.
template <int kValues> struct HessianError {
  static constexpr int kFactor = kValues * (kValues + 1) / 2;
  static constexpr bool kInRegisters = kValues == kBlock;
  static constexpr int kStage = 4;  // rows between two looks at the best
  float x[kValues];
  float held_[kInRegisters ? kFactor : 1];
  float const* factor_;
  float const* reach_;

  __device__ void load(float const* factor, int units, int unit) {
    reach_ = factor + static_cast<int64_t>(units) * kFactor + static_cast<int64_t>(unit) * kValues;
    factor_ = factor + static_cast<int64_t>(unit) * kFactor;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kFactor; i += 4) {
        float4 const four = *reinterpret_cast<float4 const*>(factor_ + i);
        held_[i] = four.x, held_[i + 1] = four.y, held_[i + 2] = four.z, held_[i + 3] = four.w;
      }
    }
  }

  // Row i, column j >= i: from the last row and the last column on.
  __device__ __forceinline__ float u(int i, int j) const {
    int const at = (kValues - 1 - i) * (kValues - i) / 2 + (kValues - 1 - j);
    if constexpr (kInRegisters) return held_[at];
    return factor_[at];
  }
  // How far an error at value i can go: |d_i| * scale > reach * sqrt(best) exceeds the best. Infinite where nothing is known.
  __device__ float reach(int i) const { return reach_[i]; }

  template <bool kClamp> __device__ __forceinline__ float error(float c, float scale, float best) const {
    float const squared = __fmul_rn(scale, scale);
    float d[kValues], sum = 0.0f;
    return stage<kClamp, kValues>(d, sum, c, squared, best);
  }

 private:
  template <bool kClamp, int kEnd>
  __device__ __forceinline__ float stage(float (&d)[kValues], float sum, float c, float squared, float best) const {
    constexpr int kStart = kEnd - kStage;
#pragma unroll
    for (int i = kEnd - 1; i >= kStart; --i) {
      uint32_t const sign = __float_as_uint(x[i]) & 0x80000000u;
      d[i] = __uint_as_float(__float_as_uint(difference<kClamp>(x[i], c)) ^ sign);
    }
#pragma unroll
    for (int i = kEnd - 1; i >= kStart; --i) {
      float t = __fmul_rn(u(i, kValues - 1), d[kValues - 1]);
#pragma unroll
      for (int j = kValues - 2; j >= i; --j) t = __fmaf_rn(u(i, j), d[j], t);
      sum = __fmaf_rn(t, t, sum);
    }
    float const error = __fmul_rn(sum, squared);
    if constexpr (kStart > 0) {
      if (error <= best) return stage<kClamp, kStart>(d, sum, c, squared, best);
    }
    return error;
  }
};

template <Metric kMetric, int kValues> struct ErrorOf {
  using Type = SquaredError<kValues>;
};
template <int kValues> struct ErrorOf<Metric::kHessian, kValues> {
  using Type = HessianError<kValues>;
};

// The lowest error of what was tried, the lowest scale among equals; none is finite: the largest scale.
struct Best {
  float error = infinity();
  int byte = kE4m3Max;
  int tried = 0;

  __device__ __forceinline__ void take(float e, int b) {
    bool const better = e < error || (e == error && b < byte && is_finite(e));
    error = better ? e : error;
    byte = better ? b : byte;
    ++tried;
  }
};

template <class Config> class ScaleSearch {
  using Element = typename Config::Element;
  using Scales = typename Config::Scales;
  using Convention = typename Config::Convention;
  using Outer = typename Convention::Outer;
  static constexpr int kValues = Config::kValues, kUnitBlocks = Config::kUnitBlocks;
  static constexpr bool kHessian = Config::kMetric == Metric::kHessian;
  using Error = typename ErrorOf<Config::kMetric, kValues>::Type;

  SearchArguments const& args_;
  int const unit_, units_;
  Error error_;

 public:
  __device__ explicit ScaleSearch(SearchArguments const& args)
      : args_(args),
        unit_(blockIdx.x * Config::kUnits + threadIdx.x % Config::kUnits),
        units_(ceil_div(args.columns, kUnitBlocks)) {}

  __device__ void run() {
    if (unit_ < units_) error_.load(args_.factor, units_, unit_);
    for (int step = 0; step < args_.row_steps; ++step) {
      int64_t const group = static_cast<int64_t>(blockIdx.y) * args_.row_steps + step;
      int64_t const row = group * Config::kRows + threadIdx.x / Config::kUnits;
      if (row < args_.rows && unit_ < units_) {
        search_row(row);
      } else if (row < args_.padded_rows) {
        for (int i = 0; i < kUnitBlocks; ++i) store_scale(row, unit_ * kUnitBlocks + i, 0);
      }
    }
  }

 private:
  __device__ void store_scale(int64_t row, int column, uint8_t scale) const {
    if (column < Scales::padded_columns(args_.columns))
      args_.block_scale[Scales::row_offset(row, args_.columns) + Scales::column_offset(column)] = scale;
  }

  __device__ void search_row(int64_t row) {
    float const in = args_.scale_in[row * args_.scale_in_stride];
    Outer const outer = Config::kGiven ? Convention::from_decode(in) : Convention::from_amax(in);
    if (unit_ == 0 && (row == 0 || args_.scale_in_stride != 0))
      args_.outer_scale[row * args_.scale_in_stride] = outer.decode;
    auto const* source = static_cast<char const*>(args_.x) + row * args_.x_stride * Element::kBytes;
    typename Element::Block x[kUnitBlocks];
    float amax[kUnitBlocks], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnitBlocks; ++i) {
      int const column = unit_ * kUnitBlocks + i;
      x[i] = {};
      if (column < args_.columns) x[i] = load_block<Element, Config::kVectorized>(source, column, args_.k);
      amax[i] = flagged_amax<Element>(x[i]);
      largest = fmaxf(largest, fabsf(amax[i]));
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        float const value = Element::value(x[i], j);
        error_.x[i * kBlock + j] = __fmul_rn(fabsf(value), outer.encode) >= kLeastLevel ? value : 0.0f;
      }
    }
    Best const best = choose(outer, largest);
    auto const scale = static_cast<uint8_t>(best.byte);
#pragma unroll
    for (int i = 0; i < kUnitBlocks; ++i) {
      int const column = unit_ * kUnitBlocks + i;
      store_scale(row, column, column < args_.columns ? scale : 0);
      if (column < args_.columns)
        reinterpret_cast<uint2*>(args_.data)[row * args_.columns + column] =
            encode_block<Element, Convention>(x[i], amax[i], outer, scale);
    }
    if (args_.errors != nullptr) args_.errors[row * units_ + unit_] = best.error;
  }

  __device__ Best choose(Outer const& outer, float largest) {
    Best best;
    float const level = __fmul_rn(largest, outer.encode);
    if (!is_finite(largest)) return best;
    if (level < kLeastLevel) {
      best.byte = 0, best.error = 0.0f;
      return best;
    }
    if constexpr (Config::kFourSix) {
      four_six(best, outer, largest);
    } else if constexpr (kHessian) {
      by_hessian(best, outer, level);
    } else {
      by_squares(best, outer, level);
    }
    if constexpr (Config::kAudit) audit(best, outer);
    return best;
  }

  template <bool kClamp> __device__ __forceinline__ void attempt(Best& best, Outer const& outer, int byte) const {
    float const scale = from_e4m3(static_cast<uint8_t>(byte));  // not 0: the convention's divider without its question
    best.take(error_.template error<kClamp>(__fdiv_rn(outer.encode, scale), scale, best.error), byte);
  }

  // The e4m3 byte of the scale under which the largest value is a seventh of it, rounded: any larger byte leaves all values
  // below kQuickLimit.
  __device__ int seventh(float level) const { return to_e4m3(fminf(__fmul_rn(level, 1.0f / 7.0f), 448.0f)); }

  // Half a scale is never worse where nothing exceeds 7 of its units, so one octave is left above, and what saturates below.
  __device__ void by_squares(Best& best, Outer const& outer, float level) const {
    bool const bounded = outer.encode >= kLeastEncode;
    int const full = seventh(level);
    int const top = bounded ? min(args_.last, max(full + 8, max(args_.first + 7, 15))) : args_.last;
    int const quick = bounded ? max(full, args_.first - 1) : top;
    int byte = top;
#pragma unroll 1
    for (; byte > quick; --byte) attempt<false>(best, outer, byte);
    float const reduced = __fmul_rn(level, kSlack);
#pragma unroll 1
    for (; byte >= args_.first; --byte) {
      float const clipped = __fmaf_rn(-6.0f, from_e4m3(static_cast<uint8_t>(byte)), reduced);
      if (bounded && clipped > 0.0f && __fmul_rn(__fmul_rn(clipped, clipped), kSlack) > best.error) break;
      attempt<true>(best, outer, byte);
    }
  }

  // From the octave in which squares would have their best, down to what saturates too much, and then up to where too much is
  // zero.
  __device__ void by_hessian(Best& best, Outer const& outer, float level) const {
    bool const bounded = outer.encode >= kLeastEncode;
    int const middle = max(args_.first, min(args_.last, seventh(level)));
    int const top = min(args_.last, middle + 8);
    int byte = top, low = middle, high = top, step = -1;
    bool known = false;
#pragma unroll 1
    while (byte <= high) {
      attempt<true>(best, outer, byte);
      byte += step;
      if (step < 0 && byte < low && !known) {
        known = true, low = args_.first, high = args_.last;
        if (bounded) bound(best, outer, low, high);
        high = max(high, top);
      }
      if (step < 0 && byte < low) byte = top + 1, step = 1;
    }
  }

  // Bytes outside of low..high exceed the best error.
  __device__ void bound(Best const& best, Outer const& outer, int& low, int& high) const {
    if constexpr (kHessian) {
      float const root = __fmul_rn(__fsqrt_rn(fmaxf(best.error, kLeastBest)), 1.0f + 0x1p-20f);
      float least = 0.0f, most = kFloatMax;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        float const level = __fmul_rn(fabsf(error_.x[i]), outer.encode);
        float const beyond = __fmaf_rn(level, kSlack, -__fmul_rn(root, error_.reach(i)));
        least = fmaxf(least, beyond);  // of 6 * scale
        most = fminf(most, beyond > 0.0f ? level : kFloatMax);  // of scale / 4
      }
      low = max(low, static_cast<int>(to_e4m3(fminf(__fmul_rn(least, kSixth), 448.0f))));
      high = min(high, static_cast<int>(to_e4m3(fminf(__fmul_rn(most, 4.0f), 448.0f))));
    }
  }

  __device__ void four_six(Best& best, Outer const& outer, float largest) const {
    float const base = __fmul_rn(largest, __fmul_rn(outer.encode, kSixth));
    int const six = max(1, static_cast<int>(to_e4m3(fminf(base, 448.0f))));
    attempt<true>(best, outer, six);
    attempt<true>(best, outer, max(1, static_cast<int>(to_e4m3(fminf(__fmul_rn(base, 1.5f), 448.0f)))));
  }

  __device__ void audit(Best const& best, Outer const& outer) const {
    Best every;
#pragma unroll 1
    for (int byte = args_.first; byte <= args_.last && !Config::kFourSix; ++byte) {
      float const scale = from_e4m3(static_cast<uint8_t>(byte));
      every.take(error_.template error<true>(__fdiv_rn(outer.encode, scale), scale, infinity()), byte);
    }
    bool const same = Config::kFourSix || (every.byte == best.byte && every.error == best.error);
    atomicAdd(args_.counters, 1ull);
    atomicAdd(args_.counters + 1, static_cast<unsigned long long>(best.tried));
    atomicAdd(args_.counters + 2, same ? 0ull : 1ull);
  }
};

}  // namespace fp4gemm
