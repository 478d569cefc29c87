// From a thread's block scales to their places in a layout.
#pragma once

#include "fp4gemm/layout.hpp"
#include "fp4gemm/quantize_config.hpp"
#include "fp4gemm/rows.hpp"

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
  __device__ ScaleWriter(QuantizeArguments const& args, int /*cta*/, int64_t row, int /*first*/, int /*thread*/,
                         int /*stage*/)
      : row_(in_global(args.block_scale) + Scales::row_offset(row, out_columns<Config>(args))),
        end_(row < args.padded_rows ? Scales::padded_columns(out_columns<Config>(args)) : 0) {}
  __device__ void put(int /*block*/, int column, uint8_t scale) const {
    if (column < end_) row_[Scales::column_offset(column)] = scale;
  }
  __device__ void flush() const {}
};

// ... or, in a tiled layout, to shared memory, from where the warps of the CTA's first row write four columns of all its rows
// at once: one row has only words of four bytes to write, which cost the memory system as much as whole sectors. Those of
// pairs come later, and are few: straight to their place, with up to three that share a word with the first.
template <class Config, int kStages> class ScaleWriter<Config, true, kStages> {
  using Scales = typename Config::Scales;
  static constexpr bool kPairs = Config::Options::kResidual != Residual::kNone;
  static constexpr int kWarps = Config::kThreads / 32;  // of a row
  static constexpr int kWords = 8 * Config::kBlocks;  // of four columns that a warp has
  // Warps that have the same columns meet at a barrier of their own. All threads meet where a stage is filled again (a resident
  // row is one step, or has a CTA for each), and where barriers would not last.
  static constexpr bool kAllMeet = kStages > 1 || !Config::kResident || Config::kRows + kWarps > 15;
  using Stage = uint32_t[kWarps][Config::kRows][kWords];

  QuantizeArguments const& args_;
  int const cta_, first_, thread_, stage_;
  int64_t const row_;

  __device__ Stage& stage() const {
    __shared__ __align__(16) Stage shared[kStages];
    return shared[kStages == 1 ? 0 : stage_];
  }
  __device__ int staged_columns() const {
    return kPairs ? single_columns<Config>(args_) / 4 * 4 : Scales::padded_columns(args_.columns);
  }
  __device__ int group() const { return threadIdx.x / Config::kThreads; }
  __device__ int warp() const { return thread_ / 32; }

 public:
  // thread: of the row.
  __device__ ScaleWriter(QuantizeArguments const& args, int cta, int64_t row, int first, int thread, int stage)
      : args_(args), cta_(cta), first_(first), thread_(thread), stage_(stage), row_(row) {
    if (first_ != 0) __syncthreads();  // the last step's scales have been read
  }
  // block: of the thread.
  __device__ void put(int block, int column, uint8_t scale) const {
    if (kPairs && column >= staged_columns()) {
      ScaleWriter<Config, false, 1>(args_, cta_, row_, 0, 0, 0).put(block, column, scale);
    } else {
      reinterpret_cast<uint8_t*>(stage()[warp()][group()])[block * 32 + thread_ % 32] = scale;
    }
  }
  __device__ void flush() const {
    meet();
    int64_t const row = Scales::template row<Config::kRows>(cta_, 0);
    if (group() != 0 || row >= args_.padded_rows) return;
    uint8_t* const chunks = in_global(args_.block_scale) + Scales::row_offset(row, out_columns<Config>(args_));
#pragma unroll
    for (int i = thread_ % 32; i < kWords; i += 32) {
      int const column = first_ + i / 8 * Config::kThreads + warp() * 32 + i % 8 * 4;
      if (column >= staged_columns()) break;
      uint8_t* const chunk = chunks + Scales::column_offset(column);
      auto const& words = stage()[warp()];
      if constexpr (Config::kRows == 2) {
        *reinterpret_cast<uint2*>(chunk) = {words[0][i], words[1][i]};
      } else {
#pragma unroll
        for (int r = 0; r < Config::kRows; r += 4)
          reinterpret_cast<uint4*>(chunk)[r / 4] = {words[r][i], words[r + 1][i], words[r + 2][i], words[r + 3][i]};
      }
    }
  }

 private:
  // Only the first row has to wait for the others. But where more CTAs follow than have some 256 KB of x for each SM, rows that
  // stay in step are quicker (docs/performance.md); rows that are not prefetched always do.
  __device__ void meet() const {
    if constexpr (kAllMeet) {
      __syncthreads();
    } else {
      int const barrier = 1 + Config::kRows + warp();  // behind those of rows
      if (group() == 0 || gridDim.x > 4 * args_.prefetch) {
        named_sync<32 * Config::kRows>(barrier);
      } else {
        named_arrive<32 * Config::kRows>(barrier);
      }
    }
  }
};

}  // namespace fp4gemm
