// From a thread's block scales to their places in a layout.
#pragma once

#include "fp4gemm/layout.hpp"
#include "fp4gemm/quantize_config.hpp"

namespace fp4gemm {

template <class Config> __device__ int out_columns(QuantizeArguments const& args) {
  return Config::Options::kResidual == Residual::kNone ? args.columns : args.out_columns;
}

// Those without a companion, which come first: of the result they are the same.
template <class Config> __device__ int single_columns(QuantizeArguments const& args) {
  return Config::Options::kResidual == Residual::kNone ? args.columns : 2 * args.columns - args.out_columns;
}

// Where a thread's block scales go: straight to their place, byte by byte ...
template <class Config, bool kStaged, int kStages> class ScaleWriter {
  using Scales = typename Config::Scales;
  uint8_t* const row_;
  int const end_;

 public:
  __device__ ScaleWriter(QuantizeArguments const& args, int /*cta*/, int64_t row, int /*first*/, int /*stage*/)
      : row_(in_global(args.block_scale) + Scales::row_offset(row, out_columns<Config>(args))),
        end_(row < args.padded_rows ? Scales::padded_columns(out_columns<Config>(args)) : 0) {}
  __device__ void put(int column, uint8_t scale) const {
    if (column < end_) row_[Scales::column_offset(column)] = scale;
  }
  __device__ void flush() const {}
};

// ... or, in a tiled layout, to shared memory, from where each thread writes four columns of all rows of the CTA at once:
// one row has only words of four bytes to write, which cost the memory system as much as whole sectors. Those of pairs
// come later, and are few: straight to their place, with up to three that share a word with the first.
template <class Config, int kStages> class ScaleWriter<Config, true, kStages> {
  using Scales = typename Config::Scales;
  static constexpr bool kPairs = Config::Options::kResidual != Residual::kNone;
  static constexpr int kStep = Config::kThreads * Config::kBlocks;
  using Stage = uint8_t[Config::kRows][kStep];

  QuantizeArguments const& args_;
  int const cta_, first_, stage_;
  int64_t const row_;

  __device__ Stage& stage() const {
    __shared__ __align__(16) Stage shared[kStages];
    return shared[kStages == 1 ? 0 : stage_];
  }
  __device__ int staged_columns() const {
    return kPairs ? single_columns<Config>(args_) / 4 * 4 : Scales::padded_columns(args_.columns);
  }

 public:
  __device__ ScaleWriter(QuantizeArguments const& args, int cta, int64_t row, int first, int stage)
      : args_(args), cta_(cta), first_(first), stage_(stage), row_(row) {
    if (first_ != 0) __syncthreads();  // the last step's scales have been read
  }
  __device__ void put(int column, uint8_t scale) const {
    if (kPairs && column >= staged_columns()) {
      ScaleWriter<Config, false, 1>(args_, cta_, row_, 0, 0).put(column, scale);
    } else {
      stage()[threadIdx.x / Config::kThreads][column - first_] = scale;
    }
  }
  __device__ void flush() const {
    __syncthreads();
    int64_t const row = Scales::template row<Config::kRows>(cta_, 0);
    uint8_t* const chunks = in_global(args_.block_scale) + Scales::row_offset(row, out_columns<Config>(args_));
    int const end = min(kStep, staged_columns() - first_);
    for (int column = threadIdx.x * 4; column < end && row < args_.padded_rows; column += Config::kCta * 4) {
      uint8_t* const chunk = chunks + Scales::column_offset(first_ + column);
      if constexpr (Config::kRows == 2) {
        *reinterpret_cast<uint2*>(chunk) = {word(0, column), word(1, column)};
      } else {
#pragma unroll
        for (int i = 0; i < Config::kRows; i += 4)
          reinterpret_cast<uint4*>(chunk)[i / 4] = {word(i, column), word(i + 1, column), word(i + 2, column),
                                                    word(i + 3, column)};
      }
    }
  }

 private:
  __device__ uint32_t word(int row, int column) const {
    return *reinterpret_cast<uint32_t const*>(&stage()[row][column]);
  }
};

}  // namespace fp4gemm
