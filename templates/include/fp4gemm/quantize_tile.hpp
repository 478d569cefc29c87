// NVFP4 of x, of its transpose, or of both from one read of x; and the amaxes that these need.
// Outer scales come from amaxes, or decode multipliers, in memory. A CTA has 128 x 128 values in shared memory, from where a
// thread reads whole blocks along rows and along columns, so neither result needs communication.
#pragma once

#include "fp4gemm/hadamard.hpp"
#include "fp4gemm/philox.hpp"
#include "fp4gemm/quantize.hpp"
#include "fp4gemm/tile.hpp"

namespace fp4gemm {

template <bool kFirst, class First, class Second> struct Select {
  using Type = First;
};
template <class First, class Second> struct Select<false, First, Second> {
  using Type = Second;
};

// One result [lines, blocks * 16]: its lines are rows of x, or columns for the transpose.
struct TileOutput {
  uint8_t* data;  // uint8 [lines, blocks * 8]
  uint8_t* block_scale;  // in the layout, padding included; 16-byte aligned, as is data
  float* outer_scale;  // [lines], or [1]
  float const* scale_in;  // amaxes, or decode multipliers: [lines], or [1]
};

// Packed by fp4gemm/tile_calls.py (TILE_QUANTIZE_ARGUMENTS): keep both alike.
struct TileQuantizeArguments {
  TileSource source;
  TileOutput rows, columns;
  void const* noop;  // null, or where noop_bytes bytes that are not all 0 make the kernel do nothing
  uint64_t const* seed_at;  // null, or where the seed is
  uint64_t seed;
  int rows_stride, columns_stride;  // of scale_in and outer_scale: 0 or 1
  int hadamard;  // sign mask
  int noop_bytes;  // 1 or 4
};

template <class Element_, class Convention_, class RowScales_, class ColumnScales_, bool kGiven_, bool kRows_,
          bool kColumns_, bool kHadamard_, bool kStochastic_, bool kSquare_, bool kVectorized_>
struct TileQuantizeConfig {
  using Element = Element_;
  using Convention = Convention_;
  using RowScales = RowScales_;
  using ColumnScales = ColumnScales_;
  static constexpr bool kGiven = kGiven_;  // scale_in holds decode multipliers, not amaxes
  static constexpr bool kRows = kRows_, kColumns = kColumns_;  // which results
  static constexpr bool kHadamard = kHadamard_;  // transforms blocks along columns
  static constexpr bool kStochastic = kStochastic_;
  static constexpr bool kSquare = kSquare_;  // one block scale for 16 x 16 values
  static constexpr bool kVectorized = kVectorized_;  // rows are 16-byte aligned
  static constexpr int kThreads = kTileThreads;
  static constexpr int kSharedBytes =
      Tile<Element>::kBytes + 2 * kTile * kTileBlocks + 2 * kTile * 4 + (kSquare ? kTileBlocks * kTileBlocks * 4 : 0);
  static_assert(kRows || kColumns, "a result");
  static_assert(!(kSquare && kHadamard), "squares of x are not squares of what is transformed");
};

// Block scales of 128 lines and eight blocks of them, gathered in shared memory in the order of the layout.
template <class Scales> struct TileScales;

template <int kTileRows> struct TiledTileScales {
  // The rows of a tile of the layout that are in a row of tiles here take 2 * kTileRows * 4 bytes, one piece in memory.
  template <class Scales> __device__ static void flush(uint8_t const* staged, uint8_t* scales, int64_t line0,
                                                       int64_t lines, int block0, int blocks, int thread) {
    if (thread >= kTile * kTileBlocks / 16) return;
    constexpr int kPieces = kTileRows * kTileBlocks / 16;  // of 16 bytes in such a row
    int const group = thread / kPieces, piece = thread % kPieces;
    int64_t const line = line0 + group * kTileRows;
    int const block = block0 + piece / (kPieces / 2) * 4;
    if (line >= ceil_div(lines, kTileRows) * kTileRows || block >= Scales::padded_columns(blocks)) return;
    uint8_t* const to = scales + Scales::row_offset(line, blocks) + Scales::column_offset(block);
    reinterpret_cast<uint4*>(to)[piece % (kPieces / 2)] = reinterpret_cast<uint4 const*>(staged)[thread];
  }
  __device__ static int64_t ceil_div(int64_t a, int b) { return (a + b - 1) / b; }
};

template <> struct TileScales<Scales128x4> : TiledTileScales<128> {
  __device__ static int offset(int line, int block) {
    return block / 4 * 512 + line % 32 * 16 + line / 32 * 4 + block % 4;
  }
};
template <> struct TileScales<Scales8x4> : TiledTileScales<8> {
  __device__ static int offset(int line, int block) {
    return line / 8 * 64 + block / 4 * 32 + line % 8 * 4 + block % 4;
  }
};
template <> struct TileScales<LinearScales> {
  __device__ static int offset(int line, int block) { return line * kTileBlocks + block; }
  template <class Scales> __device__ static void flush(uint8_t const* staged, uint8_t* scales, int64_t line0,
                                                       int64_t lines, int block0, int blocks, int thread) {
    if (line0 + thread >= lines) return;
    uint8_t* const to = scales + (line0 + thread) * blocks + block0;
    uint8_t const* const from = staged + thread * kTileBlocks;
    if (blocks % kTileBlocks == 0) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<uint2 const*>(from);
    } else {
      for (int i = 0; i < min(kTileBlocks, blocks - block0); ++i) to[i] = from[i];
    }
  }
};

// stochastic_code of each value, for blocks with NaN or Inf and for those beyond the largest code.
template <class Element, class Divider>
__device__ __noinline__ uint2 encode_any_stochastic(typename Element::Block x, Divider divider, PhiloxBlock noise) {
  uint32_t word[2] = {};
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float const value = Element::value(x, i), magnitude = divider.quotient(fabsf(value));
    uint32_t const sign = magnitude == magnitude ? __float_as_uint(value) >> 31 << 3 : 0;
    word[i / 8] |= (stochastic_code(magnitude, noise.w[i / 4] >> (i % 4 * 8) & 0xFF) | sign) << (4 * (i % 8));
  }
  return {word[0], word[1]};
}

// What a block's values are multiplied by, or divided by, where they are 1 / factor of what is at hand, a power of two; exact
// where in_range says so.
__device__ __forceinline__ MultiplyBy times(MultiplyBy divider, float factor) { return {divider.c * factor}; }
__device__ __forceinline__ DivideBy times(DivideBy divider, float factor) { return {divider.d / factor}; }
__device__ __forceinline__ float operand(MultiplyBy divider) { return divider.c; }
__device__ __forceinline__ float operand(DivideBy divider) { return divider.d; }
__device__ __forceinline__ bool in_range(float v) { return v <= 0x1p100f && (v >= 0x1p-100f || v == 0.0f); }

// A block and its largest magnitude, of values that are kFactor of what it holds; 1 if they are not transformed.
template <class Element_, bool kHadamard> struct TileBlock {
  using Element = Element_;
  typename Element::Block x;
  float amax;  // flagged_amax of the values

  __device__ explicit TileBlock(typename Element::Block const& block) : x(block), amax(flagged_amax<Element>(block)) {
    if constexpr (kHadamard) amax *= kHadamardFactor;
  }

  template <class Convention, bool kStochastic>
  __device__ uint2 codes(typename Convention::Outer const& outer, uint8_t scale, uint64_t seed, int64_t number) const {
    auto divider = Convention::divider(outer, scale);
    bool quick = __float_as_uint(amax) >> 31 == 0 && divider.quotient(amax) < kQuickLimit;
    // The factor is taken into the divider. Both products are exact, or the value so small that its code is 0 anyway.
    if constexpr (kHadamard) quick = quick && in_range(operand(divider));
    if constexpr (kStochastic) {
      PhiloxBlock const noise = philox_block(seed, number);
      if (!quick) return any_stochastic(divider, noise);
      if constexpr (kHadamard) divider = times(divider, kHadamardFactor);
      auto const half = [&](int h) {
        auto const magnitude = [&](int i) { return divider.quotient(fabsf(Element::value(x, 8 * h + i))); };
        return stochastic_eight(magnitude, noise.w[2 * h], noise.w[2 * h + 1]) | Element::signs(x, h);
      };
      return {half(0), half(1)};
    } else {
      if (!quick) return any(divider);
      if constexpr (kHadamard) divider = times(divider, kHadamardFactor);
      return {encode_half<Element>(x, 0, divider), encode_half<Element>(x, 1, divider)};
    }
  }

 private:
  __device__ typename Element::Block values() const {
    auto y = x;
    if constexpr (kHadamard) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) y.w[i] = __float_as_uint(__fmul_rn(__uint_as_float(x.w[i]), kHadamardFactor));
    }
    return y;
  }
  template <class Divider> __device__ uint2 any(Divider const& divider) const {
    return encode_any<Element>(values(), divider);
  }
  template <class Divider> __device__ uint2 any_stochastic(Divider const& divider, PhiloxBlock const& noise) const {
    return encode_any_stochastic<Element>(values(), divider, noise);
  }
};

template <class Config> class TileQuantizer {
  using Element = typename Config::Element;
  using Convention = typename Config::Convention;
  using Outer = typename Convention::Outer;
  static constexpr int kScaleBytes = kTile * kTileBlocks;

  TileQuantizeArguments const& args_;
  uint8_t* const shared_;
  Tile<Element> const tile_;
  int64_t const row0_;
  int const column0_;

  // Behind the tile: scales of either result, then a level for each line of either, then the squares' amaxes.
  __device__ uint8_t* scales(int side) const { return shared_ + Tile<Element>::kBytes + side * kScaleBytes; }
  __device__ float* levels(int side) const {
    return reinterpret_cast<float*>(shared_ + Tile<Element>::kBytes + 2 * kScaleBytes) + side * kTile;
  }
  __device__ int* square(int row, int column) const {  // a block of rows and one of columns
    return reinterpret_cast<int*>(levels(2)) + row * kTileBlocks + column;
  }

 public:
  __device__ TileQuantizer(TileQuantizeArguments const& args, uint8_t* shared)
      : args_(args),
        shared_(shared),
        tile_(shared),
        row0_(static_cast<int64_t>(blockIdx.x / args.source.column_tiles) * kTile),
        column0_(blockIdx.x % args.source.column_tiles * kTile) {}

  __device__ void run() const {
    if (args_.noop != nullptr && skips()) return;
    tile_.template load<Config::kVectorized>(args_.source, row0_, column0_);
    prepare_levels();
    tile_.wait();
    if constexpr (Config::kSquare) reduce_squares();
    uint64_t seed = args_.seed;
    if constexpr (Config::kStochastic) seed = args_.seed_at == nullptr ? seed : *args_.seed_at;
    if constexpr (Config::kRows) {
#pragma unroll 1
      for (int step = 0; step < 2; ++step) {
        auto const place = tile_.row_place(step);
        store_pair<false>(place, seed, [&](int half) { return tile_.row_block(place, half); });
      }
    }
    if constexpr (Config::kColumns) {
#pragma unroll 1
      for (int step = 0; step < 2; ++step)
        store_pair<true>(tile_.column_place(step), seed, [&](int half) { return tile_.column_block(step, half); });
    }
    __syncthreads();
    int const thread = threadIdx.x % kTile, side = threadIdx.x / kTile;
    if (Config::kRows && side == 0) flush<false>(thread);
    if (Config::kColumns && side == 1) flush<true>(thread);
  }

 private:
  __device__ bool skips() const {
    return (args_.noop_bytes == 1 ? *static_cast<uint8_t const*>(args_.noop)
                                  : *static_cast<uint32_t const*>(args_.noop)) != 0;
  }

  // Of the result along columns, or of the other.
  template <bool kColumn> __device__ TileOutput const& output() const { return kColumn ? args_.columns : args_.rows; }
  template <bool kColumn> __device__ int64_t line0() const { return kColumn ? column0_ : row0_; }
  template <bool kColumn> __device__ int64_t lines() const {
    return kColumn ? args_.source.columns : args_.source.rows;
  }
  template <bool kColumn> __device__ int block0() const {
    return kColumn ? static_cast<int>(row0_ / kBlock) : column0_ / kBlock;
  }
  template <bool kColumn> __device__ int blocks() const {
    return kColumn ? static_cast<int>((args_.source.rows + kBlock - 1) / kBlock)
                   : ceil_div(args_.source.columns, kBlock);
  }

  __device__ void prepare_levels() const {
    if constexpr (Config::kSquare) {
      if (threadIdx.x < kTileBlocks * kTileBlocks) *square(0, threadIdx.x) = 0;
    }
    int const line = threadIdx.x % kTile;
    if (Config::kRows && threadIdx.x < kTile) prepare_level<false>(line, args_.rows_stride, column0_ == 0);
    if (Config::kColumns && threadIdx.x >= kTile) prepare_level<true>(line, args_.columns_stride, row0_ == 0);
  }

  template <bool kColumn> __device__ void prepare_level(int line, int stride, bool writes) const {
    int64_t const at = line0<kColumn>() + line;
    bool const real = at < lines<kColumn>();
    float const given = real ? output<kColumn>().scale_in[at * stride] : 1.0f;
    Outer outer;
    if constexpr (Config::kGiven) {
      outer = Convention::from_decode(given);
    } else {
      outer = Convention::from_amax(given);
    }
    if (writes && (stride == 0 ? at == 0 : real)) output<kColumn>().outer_scale[at * stride] = outer.decode;
    auto const [level, decode] = outer;
    levels(kColumn)[line] = level;
  }

  __device__ void reduce_squares() const {
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      auto const place = tile_.row_place(step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const amax = fabsf(flagged_amax<Element>(tile_.row_block(place, half)));
        atomicMax(square(place.line / kBlock, place.pair * 2 + half), __float_as_int(amax));
      }
    }
    __syncthreads();
  }

  template <bool kColumn, class Load>
  __device__ void store_pair(typename Tile<Element>::Place const& place, uint64_t seed, Load const& load) const {
    using Scales = typename Select<kColumn, typename Config::ColumnScales, typename Config::RowScales>::Type;
    constexpr bool kHadamard = kColumn && Config::kHadamard;
    Outer const outer{levels(kColumn)[place.line], 0.0f};
    int64_t const line = line0<kColumn>() + place.line;
    int const block = block0<kColumn>() + 2 * place.pair, left = blocks<kColumn>() - block;  // blocks that there are
    bool const real = line < lines<kColumn>();
    int64_t const number = line * blocks<kColumn>() + block;
    uint2 codes[2];
    uint32_t both = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto const values = [&] {
        if constexpr (kHadamard) {
          return TileBlock<Fp32, true>(hadamard_sums<Element>(load(half), args_.hadamard));
        } else {
          return TileBlock<Element, false>(load(half));
        }
      }();
      float bmax = fabsf(values.amax);
      if constexpr (Config::kSquare) {
        int const other = place.line / kBlock, own = 2 * place.pair + half;
        bmax = __int_as_float(kColumn ? *square(own, other) : *square(other, own));
      }
      uint8_t const scale = real && half < left ? Convention::block_scale(outer, bmax) : 0;
      both |= scale << (8 * half);
      codes[half] = values.template codes<Convention, Config::kStochastic>(outer, scale, seed, number + half);
    }
    *reinterpret_cast<uint16_t*>(scales(kColumn) + TileScales<Scales>::offset(place.line, 2 * place.pair)) = both;
    if (!real || left <= 0) return;
    uint8_t* const to = output<kColumn>().data + number * (kBlock / 2);
    if (blocks<kColumn>() % 2 == 0) {
      *reinterpret_cast<uint4*>(to) = {codes[0].x, codes[0].y, codes[1].x, codes[1].y};
    } else {
      reinterpret_cast<uint2*>(to)[0] = codes[0];
      if (left > 1) reinterpret_cast<uint2*>(to)[1] = codes[1];
    }
  }

  template <bool kColumn> __device__ void flush(int thread) const {
    using Scales = typename Select<kColumn, typename Config::ColumnScales, typename Config::RowScales>::Type;
    TileScales<Scales>::template flush<Scales>(scales(kColumn), output<kColumn>().block_scale, line0<kColumn>(),
                                               lines<kColumn>(), block0<kColumn>(), blocks<kColumn>(), thread);
  }
};

// Packed by fp4gemm/tile_calls.py (TILE_AMAX_ARGUMENTS): keep both alike.
// Largest magnitudes without NaN, of lines and of the tensor, as it is and with its columns transformed. All that is not null
// must be 0 at launch: non-negative floats order as their bits do.
struct TileAmaxArguments {
  TileSource source;
  float *rows, *columns;  // [rows], [columns]
  float *tensor, *transformed;  // [1]: the largest of rows, and of columns
  int hadamard;  // sign mask
};

template <class Element_, bool kRows_, bool kColumns_, bool kHadamard_, bool kVectorized_> struct TileAmaxConfig {
  using Element = Element_;
  static constexpr bool kRows = kRows_, kColumns = kColumns_, kHadamard = kHadamard_, kVectorized = kVectorized_;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kSharedBytes = Tile<Element>::kBytes + 2 * kTile * 4;
};

template <class Config> class TileAmax {
  using Element = typename Config::Element;

  TileAmaxArguments const& args_;
  Tile<Element> const tile_;
  float* const lines_;  // of rows, then of columns
  int64_t const row0_;
  int const column0_;

 public:
  __device__ TileAmax(TileAmaxArguments const& args, uint8_t* shared)
      : args_(args),
        tile_(shared),
        lines_(reinterpret_cast<float*>(shared + Tile<Element>::kBytes)),
        row0_(static_cast<int64_t>(blockIdx.x / args.source.column_tiles) * kTile),
        column0_(blockIdx.x % args.source.column_tiles * kTile) {}

  __device__ void run() const {
    tile_.template load<Config::kVectorized>(args_.source, row0_, column0_);
    tile_.wait();
    if constexpr (Config::kRows) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        auto const place = tile_.row_place(step);
        float const amax =
            fmaxf(block_amax<Element>(tile_.row_block(place, 0)), block_amax<Element>(tile_.row_block(place, 1)));
        reduce_line<8>(amax, place.pair, lines_ + place.line);
      }
    }
    if constexpr (Config::kColumns) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        auto const place = tile_.column_place(step);
        float amax = fmaxf(column_amax(step, 0), column_amax(step, 1));
        if constexpr (Config::kHadamard) amax *= kHadamardFactor;
        reduce_line<1>(amax, place.pair, lines_ + kTile + place.line);
      }
    }
    __syncthreads();
    // A line for each thread, so that a warp's atomics go to neighbours.
    int const line = threadIdx.x % kTile;
    if (Config::kRows && threadIdx.x < kTile)
      put(lines_[line], row0_ + line, args_.source.rows, args_.rows, args_.tensor);
    if (Config::kColumns && threadIdx.x >= kTile)
      put(lines_[kTile + line], column0_ + line, args_.source.columns, args_.columns, args_.transformed);
  }

 private:
  template <class Other> __device__ static float block_amax(typename Other::Block const& x) {
    return fabsf(flagged_amax<Other>(x));
  }
  __device__ float column_amax(int step, int half) const {
    auto const x = tile_.column_block(step, half);
    if constexpr (Config::kHadamard) {
      return block_amax<Fp32>(hadamard_sums<Element>(x, args_.hadamard));
    } else {
      return block_amax<Element>(x);
    }
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
