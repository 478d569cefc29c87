// The amaxes that quantizers of tiles need, and sums of columns, from one read of x.
#pragma once

#include "fp4gemm/encode.hpp"
#include "fp4gemm/hadamard.hpp"
#include "fp4gemm/tile.hpp"

namespace fp4gemm {

// Largest magnitudes without NaN, of lines and of the tensor, as it is and with its columns transformed. All that is not null
// must be 0 at launch: non-negative floats order as their bits do. Sums of columns are those of each 128 rows.
struct TileAmaxView {
  TileSource source;
  float *rows, *columns;  // [rows], [columns]
  float *tensor, *transformed;  // [1]: the largest of rows, and of columns
  float* sums;  // [ceil(rows / 128), columns] (kSums)
};

// Packed by fp4gemm/tile_calls.py (TILE_AMAX_ARGUMENTS): keep both alike.
struct TileAmaxArguments {
  TileAmaxView view;
  HadamardSigns hadamard;
};

template <class Element_, bool kRows_, bool kColumns_, int kSigns_, bool kVectorized_, bool kSums_ = false,
          Producer kProducer_ = Producer::kNone>
struct TileAmaxConfig {
  using Element = Element_;
  static constexpr bool kRows = kRows_, kColumns = kColumns_, kVectorized = kVectorized_;
  static constexpr int kSigns = kSigns_;
  static constexpr bool kHadamard = kSigns != kNoHadamard;
  static constexpr bool kSums = kSums_;
  static constexpr Producer kProducer = kProducer_;
  static_assert(kColumns || !kSums, "sums are those of columns");
  static constexpr int kThreads = kTileThreads;
  static constexpr int kSharedBytes = Tile<Element>::kBytes + 2 * kTile * 4;
};

template <class Config> class TileAmax {
  using Tile = fp4gemm::Tile<typename Config::Element>;
  using Element = typename Tile::Value;

  TileAmaxView const& view_;
  HadamardSigns const& hadamard_;
  Tile const tile_;
  float* const lines_;  // of rows, then of columns
  int64_t const row0_;
  int const column0_;

 public:
  __device__ TileAmax(TileAmaxArguments const& args, uint8_t* shared)
      : TileAmax(args.view, args.hadamard, shared, args.view.source.place(blockIdx.x)) {}

  __device__ TileAmax(TileAmaxView const& view, HadamardSigns const& hadamard, uint8_t* shared, TilePlace place)
      : view_(view),
        hadamard_(hadamard),
        tile_(shared),
        lines_(reinterpret_cast<float*>(shared + Tile::kBytes)),
        row0_(place.row * int64_t{kTile}),
        column0_(place.column * kTile) {}

  __device__ void run() const {
    tile_.template load<Config::kVectorized, Config::kProducer>(view_.source, row0_, column0_);
    tile_.wait();
    if constexpr (Config::kRows) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        auto const place = tile_.row_place();
        float const amax =
            fmaxf(block_amax<Element>(tile_.row_block(step, 0)), block_amax<Element>(tile_.row_block(step, 1)));
        reduce_line<8>(amax, place.pair, lines_ + place.line + step * Tile::kRowStep);
      }
    }
    if constexpr (Config::kColumns) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        auto const place = tile_.column_place();
        float amax = fmaxf(column_amax(step, 0), column_amax(step, 1));
        if constexpr (Config::kHadamard) amax *= kHadamardFactor;
        reduce_line<1>(amax, place.pair, lines_ + kTile + place.line + step * Tile::kColumnStep);
        if constexpr (Config::kSums) add_columns(step, place);
      }
    }
    __syncthreads();
    // A line for each thread, so that a warp's atomics go to neighbours.
    int const line = threadIdx.x % kTile;
    if (Config::kRows && threadIdx.x < kTile)
      put(lines_[line], row0_ + line, view_.source.rows, view_.rows, view_.tensor);
    if (Config::kColumns && threadIdx.x >= kTile)
      put(lines_[kTile + line], column0_ + line, view_.source.columns, view_.columns, view_.transformed);
  }

 private:
  template <class Other> __device__ static float block_amax(typename Other::Block const& x) {
    return fabsf(flagged_amax<Other>(x));
  }
  __device__ float column_amax(int step, int half) const {
    auto const x = tile_.column_block(step, half);
    if constexpr (Config::kHadamard) {
      auto const sums = HadamardSums::of<Element, Config::kSigns>(x, hadamard_);
      float const amax = sums.amax();
      return is_finite(amax) ? amax : amax_without_nan<Fp32>(sums.block());
    } else {
      return block_amax<Element>(x);
    }
  }

  __device__ void add_columns(int step, typename Tile::Place const& place) const {
    float sum = __fadd_rn(column_sum(step, 0), column_sum(step, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
    int const column = column0_ + place.line + step * Tile::kColumnStep;
    if (place.pair == 0 && column < view_.source.columns)
      in_global(view_.sums)[row0_ / kTile * view_.source.columns + column] = sum;
  }
  __device__ float column_sum(int step, int half) const {
    auto const x = tile_.column_block(step, half);
    float sum = Element::value(x, 0);
#pragma unroll
    for (int i = 1; i < kBlock; ++i) sum = __fadd_rn(sum, Element::value(x, i));
    return sum;
  }

  // Four lanes have a line, kStride apart.
  template <int kStride> __device__ static void reduce_line(float amax, int lane, float* line) {
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, kStride));
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2 * kStride));
    if (lane == 0) *line = amax;
  }

  __device__ static void put(float amax, int64_t line, int64_t lines, float* each, float* whole) {
    if (each != nullptr && line < lines) raise(each + line, amax);
    if (whole == nullptr) return;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, mask));
    if (threadIdx.x % 32 == 0) raise(whole, amax);
  }
  __device__ static void raise(float* to, float amax) { atomicMax(reinterpret_cast<int*>(to), __float_as_int(amax)); }
};

}  // namespace fp4gemm
