// What a row-wise quantizer is told at launch, and what it is built for.
#pragma once

#include "fp4gemm/adaptive.hpp"
#include "fp4gemm/producer.hpp"
#include "fp4gemm/residual.hpp"

namespace fp4gemm {

// Packed by fp4gemm/launch.py (QUANTIZE_ARGUMENTS): keep both alike.
struct QuantizeArguments {
  void const* x;  // [rows, k], k contiguous; kSiluMul: [rows, 2 k]
  void* data;  // uint8 [rows, columns * 8]; values: bf16 [rows, out_stride], ceil8(k) columns
  uint8_t* block_scale;  // padded rows x padded columns in the layout; unused for values
  float* outer_scale;  // [rows] per row, [1] otherwise
  float const* scale_in;  // kPerTensor: the amax [1]; kAmaxes: [rows]; kGiven: decode multipliers, [1] or [rows]
  int64_t x_stride;  // elements between rows of x
  int64_t out_stride;  // of values, a multiple of 8
  int64_t rows, padded_rows;
  int k, columns;  // columns = ceil(k / 16)
  int scale_in_stride;  // 0 or 1
  int prefetch;  // how many CTAs ahead to fetch rows into L2; 0: do not
  uint64_t const* seed_in;  // kStochastic: the seed, or null
  uint64_t seed;  // where seed_in is null
  void const* noop;  // kNoop: nothing is written if this is not 0
  int const* order;  // kGathered: column i of what is quantized is order[i] of x
  uint32_t noop_mask;  // 0xFF: a byte; else a word, of which these bits count
  int out_columns;  // of the result: columns, and a companion for each of the last ones (kResidual)
};

// What a norm needs besides (fp4gemm/launch.py, NORM_ARGUMENTS); all of the dtype of x, and as aligned.
struct NormArguments : QuantizeArguments {
  void const* weight;  // [k]
  void const* residual;  // [rows, k], k contiguous (kAddRmsNorm)
  void* sum;  // [rows, k], contiguous: x + residual (kAddRmsNorm)
  int64_t residual_stride;
  float eps;
};

enum class Scaling { kPerRow, kPerTensor, kAmaxes, kGiven };

// What a quantizer does beyond a convention's plain rule.
template <bool kStochastic_ = false, Adaptive kAdaptive_ = Adaptive::kNone, Residual kResidual_ = Residual::kNone,
          bool kGathered_ = false, bool kNoop_ = false, Producer kProducer_ = Producer::kNone>
struct QuantizeOptions {
  static constexpr bool kStochastic = kStochastic_;
  static constexpr Adaptive kAdaptive = kAdaptive_;
  static constexpr Residual kResidual = kResidual_;
  static constexpr bool kGathered = kGathered_;
  static constexpr bool kNoop = kNoop_;
  static constexpr Producer kProducer = kProducer_;
  static constexpr bool kNorm = is_norm(kProducer_);
  static_assert(kAdaptive == Adaptive::kNone || (!kStochastic && kResidual == Residual::kNone), "4/6 stands alone");
  static_assert(kProducer == Producer::kNone || !kGathered, "columns of x are not those of what is made of it");
};

template <bool kNorm> struct ArgumentsOf {
  using Type = QuantizeArguments;
};
template <> struct ArgumentsOf<true> {
  using Type = NormArguments;
};

template <bool kAdaptive, class Convention> struct WithRange {
  using Type = Convention;
};
template <class Convention> struct WithRange<true, Convention> {
  using Type = typename Convention::Adaptive;
};

template <class Element_, class Convention_, class Scales_, Scaling kScaling_, int kThreads_, int kBlocks_, int kRows_,
          bool kVectorized_, bool kResident_, bool kValues_, class Options_ = QuantizeOptions<>>
struct QuantizeConfig {
  using Element = Element_;
  using Options = Options_;
  using Convention = typename WithRange<Options::kAdaptive != Adaptive::kNone, Convention_>::Type;
  using Scales = Scales_;
  using Arguments = typename ArgumentsOf<Options::kNorm>::Type;
  static constexpr Scaling kScaling = kScaling_;
  static constexpr int kThreads = kThreads_;  // threads of a row
  static constexpr int kBlocks = kBlocks_;  // 16-value blocks a thread holds
  static constexpr int kRows = kRows_;  // rows of a CTA
  static constexpr bool kVectorized = kVectorized_;  // rows are 16-byte aligned and k % 16 == 0
  static constexpr bool kResident = kResident_;  // kThreads * kBlocks covers the row
  // Write values. CTAs (y) may share a row: one for each step; where a row in registers is reduced, kBlocks or one; any number
  // where it is streamed.
  static constexpr bool kValues = kValues_;
  static constexpr int kCta = kThreads * kRows;
  static constexpr int kCtasOfSm = 1024 / kCta;  // that should have registers
  static_assert(kThreads % 32 == 0 && kCta <= 1024, "a row is a whole number of warps of one CTA");
  static_assert(kThreads == 32 || kRows <= 8, "a barrier for each row");
  static_assert(kResident || !Options::kNorm, "the mean square is that of a row in registers");
};

}  // namespace fp4gemm
