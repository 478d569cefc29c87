// NVFP4 of x, of its transpose, or of both from one read of x; and the amaxes that these need.
// Outer scales come from amaxes, or decode multipliers, in memory. A CTA has 128 x 128 values in shared memory, from where a
// thread reads whole blocks along rows and along columns, so neither result needs communication.
#pragma once

#include "fp4gemm/encode.hpp"
#include "fp4gemm/hadamard.hpp"
#include "fp4gemm/layout.hpp"
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

// A tensor, or a member of a group, and its results.
struct TileView {
  TileSource source;
  TileOutput rows, columns;
};

struct TileOptions {
  void const* noop;  // null, or the kernel does nothing where this is not 0
  uint64_t const* seed_at;  // null, or where the seed is
  uint64_t seed;
  HadamardSigns hadamard;
  int rows_stride, columns_stride;  // of scale_in and outer_scale: 0 or 1
  uint32_t noop_mask;  // 0xFF: a byte; else a word, of which these bits count
};

// Packed by fp4gemm/tile_calls.py (TILE_QUANTIZE_ARGUMENTS): keep both alike.
struct TileQuantizeArguments {
  TileView view;
  TileOptions options;
};

template <class Element_, class Convention_, class RowScales_, class ColumnScales_, bool kGiven_, bool kRows_,
          bool kColumns_, bool kHadamard_, bool kStochastic_, bool kSquare_, bool kVectorized_,
          Producer kProducer_ = Producer::kNone>
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
  static constexpr Producer kProducer = kProducer_;  // kNone, or a gradient
  static constexpr int kThreads = kTileThreads;
  static constexpr int kSharedBytes = Tile<Element>::kBytes + 2 * kTile * kTileBlocks + 2 * kTile * 12 +
                                      (kSquare ? kTileBlocks * kTileBlocks * 4 : 0) +
                                      (kStochastic ? kPhiloxRounds * 8 : 0);
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
    // A row of a member of a group may begin anywhere.
    if (block0 + kTileBlocks <= blocks && reinterpret_cast<uint64_t>(to) % 8 == 0) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<uint2 const*>(from);
    } else {
      for (int i = 0; i < min(kTileBlocks, blocks - block0); ++i) to[i] = from[i];
    }
  }
};

// e4m3 of v, saturating, in the low byte of a word that is 0 elsewhere, and back: without instructions that make it so.
__device__ __forceinline__ uint16_t to_e4m3_pair(float v) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
  return pair;
}
__device__ __forceinline__ float from_e4m3_pair(uint16_t pair) {
  return half_to_float(static_cast<uint16_t>(e4m3x2_to_half2(pair)));
}

__device__ __forceinline__ float approximate_reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// A convention's arithmetic for the common case, from two numbers that a line's blocks share. A line for which it would not
// be exact has NaN for them, or is not ok, and its blocks, as those with NaN or Inf, take the slow path.
template <class Convention> struct QuickScales {
  using Outer = typename Convention::Outer;
  __device__ static float2 line(float level) { return {level, level}; }
  __device__ static bool ok(float2 line) { return line.x >= 0x1p-90f && line.x <= 0x1p90f; }
  __device__ static uint8_t scale(float2 line, float amax) {
    return Convention::block_scale(Outer{line.x, 0.0f}, amax);
  }
  __device__ static auto divider(float2 line, uint8_t scale) { return Convention::divider(Outer{line.x, 0.0f}, scale); }
};

template <class Convention> struct QuickTeScales {
  // Quotients and remainders of S and block scales then are far from the ends of the exponents.
  __device__ static bool in_range(float encode) { return encode >= 0x1p-90f && encode <= 0x1p90f; }
  __device__ static bool ok(float2) { return true; }
  __device__ static float not_a_number() { return __uint_as_float(0x7FC00000u); }
  // Of NaN it is NaN, and so is then the divider.
  __device__ static uint16_t scale(float2 line, float amax) { return to_e4m3_pair(__fmul_rn(amax, line.x)); }
};

template <> struct QuickScales<TePerToken> : QuickTeScales<TePerToken> {
  __device__ static float2 line(float encode) {
    return in_range(encode) ? float2{__fmul_rn(encode, kSixth), encode} : float2{not_a_number(), not_a_number()};
  }
  // S / scale rounded as division rounds: the reciprocal of a number of four bits is the nearest one after a Newton step,
  // and then a quotient is after one.
  __device__ static MultiplyBy divider(float2 line, uint16_t scale) {
    float const s = from_e4m3_pair(scale), near = approximate_reciprocal(s);
    float const reciprocal = __fmaf_rn(near, __fmaf_rn(-s, near, 1.0f), near);
    float const quotient = __fmul_rn(line.y, reciprocal);
    float const c = __fmaf_rn(__fmaf_rn(-s, quotient, line.y), reciprocal, quotient);
    return {scale == 0 ? 0.0f : c};
  }
};

template <> struct QuickScales<Te> : QuickTeScales<Te> {
  __device__ static float2 line(float encode) {
    return in_range(encode) ? float2{__fmul_rn(encode, kSixth), __fdiv_rn(1.0f, encode)}
                            : float2{not_a_number(), not_a_number()};
  }
  // A scale of 0 gives Inf, and the slow path.
  __device__ static MultiplyBy divider(float2 line, uint16_t scale) {
    return {__fdiv_rn(1.0f, __fmul_rn(from_e4m3_pair(scale), line.y))};
  }
};

// The divider of values from that of kHadamardFactor times values.
__device__ __forceinline__ MultiplyBy times_factor(MultiplyBy divider) { return {divider.c * kHadamardFactor}; }
__device__ __forceinline__ DivideBy times_factor(DivideBy divider) { return {divider.d / kHadamardFactor}; }

struct Encoded {
  uint2 codes;
  uint32_t scale;
};

// A block in any case. square_amax: the largest magnitude that its scale covers, if that is not its own; else negative.
template <class Element, class Convention, bool kHadamard, class Rounding>
__device__ __noinline__ Encoded encode_slowly(typename Element::Block x, float square_amax, float level,
                                              Rounding rounding) {
  if constexpr (kHadamard) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) x.w[i] = __float_as_uint(__fmul_rn(__uint_as_float(x.w[i]), kHadamardFactor));
  }
  typename Convention::Outer const outer{level, 0.0f};
  uint8_t const scale = Convention::block_scale(outer, square_amax < 0.0f ? amax_without_nan<Element>(x) : square_amax);
  return {encode_any<Element>(x, Convention::divider(outer, scale), rounding), scale};
}

// Place: TilePlace, or a reference to one in shared memory, which takes no registers.
template <class Config, class Place = TilePlace> class TileQuantizer {
  using Tile = fp4gemm::Tile<typename Config::Element>;
  using Element = typename Tile::Value;
  using Convention = typename Config::Convention;
  using Outer = typename Convention::Outer;
  static constexpr int kScaleBytes = kTile * kTileBlocks;

  TileView const& view_;
  TileOptions const& options_;
  uint8_t* const shared_;
  Tile const tile_;
  Place const place_;
  int const member_;  // of a group, of which each has a seed of its own

  // Behind the tile: scales of either result, then for each line of either a level and the quick form of it, then the squares' amaxes and the keys of
  // Philox, which would take two instructions a round to make again for each block.
  __device__ uint8_t* scales(int side) const { return shared_ + Tile::kBytes + side * kScaleBytes; }
  __device__ float* levels(int side) const {
    return reinterpret_cast<float*>(shared_ + Tile::kBytes + 2 * kScaleBytes) + side * kTile;
  }
  __device__ float2* quick(int side) const { return reinterpret_cast<float2*>(levels(2)) + side * kTile; }
  __device__ int* square(int row, int column) const {  // a block of rows and one of columns
    return reinterpret_cast<int*>(quick(2)) + row * kTileBlocks + column;
  }
  __device__ uint2* keys() const { return reinterpret_cast<uint2*>(square(Config::kSquare ? kTileBlocks : 0, 0)); }

  __device__ int64_t row0() const { return place_.row * int64_t{kTile}; }
  __device__ int column0() const { return place_.column * kTile; }

 public:
  // The tile that a CTA has of a whole tensor.
  __device__ TileQuantizer(TileQuantizeArguments const& args, uint8_t* shared)
      : TileQuantizer(args.view, args.options, shared, args.view.source.place(blockIdx.x), 0) {}

  __device__ TileQuantizer(TileView const& view, TileOptions const& options, uint8_t* shared, Place place, int member)
      : view_(view), options_(options), shared_(shared), tile_(shared), place_(place), member_(member) {}

  __device__ void run() const {
    if (options_.noop != nullptr && skips()) return;
    tile_.template load<Config::kVectorized, Config::kProducer>(view_.source, row0(), column0());
    prepare_levels();
    tile_.wait();
    if constexpr (Config::kSquare) reduce_squares();
    if constexpr (Config::kRows) {
      store_lines<false>(tile_.row_place(), [&](int step, int half) { return tile_.row_block(step, half); });
    }
    if constexpr (Config::kColumns) {
      store_lines<true>(tile_.column_place(), [&](int step, int half) { return tile_.column_block(step, half); });
    }
    __syncthreads();
    int const thread = threadIdx.x % kTile, side = threadIdx.x / kTile;
    if (Config::kRows && side == 0) flush<false>(thread);
    if (Config::kColumns && side == 1) flush<true>(thread);
  }

 private:
  __device__ bool skips() const {
    return (options_.noop_mask == 0xFF ? *static_cast<uint8_t const*>(options_.noop)
                                       : *static_cast<uint32_t const*>(options_.noop) & options_.noop_mask) != 0;
  }

  // Of the result along columns, or of the other.
  template <bool kColumn> __device__ TileOutput const& output() const { return kColumn ? view_.columns : view_.rows; }
  template <bool kColumn> __device__ int64_t line0() const { return kColumn ? column0() : row0(); }
  template <bool kColumn> __device__ int64_t lines() const {
    return kColumn ? view_.source.columns : view_.source.rows;
  }
  template <bool kColumn> __device__ int block0() const {
    return kColumn ? place_.row * kTileBlocks : place_.column * kTileBlocks;
  }
  template <bool kColumn> __device__ int blocks() const {
    return kColumn ? static_cast<int>((view_.source.rows + kBlock - 1) / kBlock)
                   : ceil_div(view_.source.columns, kBlock);
  }

  __device__ void prepare_levels() const {
    if constexpr (Config::kStochastic) {
      if (threadIdx.x < kPhiloxRounds) {
        uint64_t const seed = options_.seed_at == nullptr ? options_.seed : *options_.seed_at;
        keys()[threadIdx.x] = philox_key(member_seed(seed, member_), threadIdx.x);
      }
    }
    if constexpr (Config::kSquare) {
      if (threadIdx.x < kTileBlocks * kTileBlocks) *square(0, threadIdx.x) = 0;
    }
    int const line = threadIdx.x % kTile;
    if (Config::kRows && threadIdx.x < kTile) prepare_level<false>(line, options_.rows_stride, place_.column == 0);
    if (Config::kColumns && threadIdx.x >= kTile) prepare_level<true>(line, options_.columns_stride, place_.row == 0);
  }

  template <bool kColumn> __device__ void prepare_level(int line, int stride, bool writes) const {
    int64_t const at = line0<kColumn>() + line;
    bool const real = at < lines<kColumn>();
    // One for all covers what has no lines, too.
    float const given = real || stride == 0 ? in_global(output<kColumn>().scale_in)[at * stride] : 1.0f;
    Outer outer;
    if constexpr (Config::kGiven) {
      outer = Convention::from_decode(given);
    } else {
      outer = Convention::from_amax(given);
    }
    if (writes && (stride == 0 ? at == 0 : real)) in_global(output<kColumn>().outer_scale)[at * stride] = outer.decode;
    auto const [level, decode] = outer;
    levels(kColumn)[line] = level;
    quick(kColumn)[line] = QuickScales<Convention>::line(level);
  }

  __device__ void reduce_squares() const {
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      auto const place = tile_.row_place();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const amax = fabsf(flagged_amax<Element>(tile_.row_block(step, half)));
        int const row = (place.line + step * Tile::kRowStep) / kBlock;
        atomicMax(square(row, place.pair * 2 + half), __float_as_int(amax));
      }
    }
    __syncthreads();
  }

  // A thread's blocks of one of the results; load(step, half) reads one.
  template <bool kColumn, class Load>
  __device__ void store_lines(typename Tile::Place const& place, Load const& load) const {
    using Scales = typename Select<kColumn, typename Config::ColumnScales, typename Config::RowScales>::Type;
    constexpr int kStep = kColumn ? Tile::kColumnStep : Tile::kRowStep;
    int const row_blocks = blocks<kColumn>(), left = row_blocks - block0<kColumn>() - 2 * place.pair;
    int64_t const lines_left = lines<kColumn>() - line0<kColumn>();
    // All of the tile is there, and rows of the result begin on 16 bytes: the same for all threads.
    bool const whole = lines_left >= kTile && row_blocks - block0<kColumn>() >= kTileBlocks && row_blocks % 2 == 0 &&
                       reinterpret_cast<uint64_t>(output<kColumn>().data) % 16 == 0;
    int64_t number = (line0<kColumn>() + place.line) * row_blocks + block0<kColumn>() + 2 * place.pair;
    uint8_t* to = in_global(output<kColumn>().data) + number * (kBlock / 2);
    int64_t const step_blocks = static_cast<int64_t>(kStep) * row_blocks;
    uint32_t scale_at = keep(TileScales<Scales>::offset(place.line, 2 * place.pair));
#pragma unroll 1
    for (int step = 0; step < Tile::kSteps; ++step) {
      int const line = place.line + step * kStep;
      float2 const level = quick(kColumn)[line];
      Encoded low = encode<kColumn>(load(step, 0), level, line, 2 * place.pair, number);
      Encoded high = encode<kColumn>(load(step, 1), level, line, 2 * place.pair + 1, number + 1);
      if (whole) {
        *reinterpret_cast<uint4*>(to) = {low.codes.x, low.codes.y, high.codes.x, high.codes.y};
      } else {
        // What stands for nothing is 0: the tile is 0 there, but a convention may have another scale for it.
        if (line >= lines_left || left < 1) low.scale = 0;
        if (line >= lines_left || left < 2) high.scale = 0;
        if (line < lines_left && left > 0) reinterpret_cast<uint2*>(to)[0] = low.codes;
        if (line < lines_left && left > 1) reinterpret_cast<uint2*>(to)[1] = high.codes;
      }
      *reinterpret_cast<uint16_t*>(scales(kColumn) + scale_at) = low.scale | high.scale << 8;
      // Lines of a step and of the next are as far apart in each layout as the first of all and that of the next.
      scale_at += TileScales<Scales>::offset(kStep, 0);
      number += step_blocks;
      to += step_blocks * (kBlock / 2);
    }
  }

  // Block `block` of line `line` of this tile, which is block `number` of the result.
  template <bool kColumn>
  __device__ Encoded encode(typename Element::Block const& x, float2 level, int line, int block, int64_t number) const {
    float bmax = -1.0f;
    if constexpr (Config::kSquare)
      bmax = __int_as_float(kColumn ? *square(block, line / kBlock) : *square(line / kBlock, block));
    if constexpr (kColumn && Config::kHadamard) {
      return encode_values<Fp32, true>(hadamard_sums<Element>(x, options_.hadamard), bmax, kColumn, level, line,
                                       number);
    } else {
      return encode_values<Element, false>(x, bmax, kColumn, level, line, number);
    }
  }

  // kHadamard: of kHadamardFactor times x. The factor goes to the divider: products are exact, or so small that codes are 0.
  template <class Values, bool kHadamard> __device__ Encoded encode_values(typename Values::Block const& x,
                                                                           float square_amax, int side, float2 level,
                                                                           int line, int64_t number) const {
    using Quick = QuickScales<Convention>;
    float const amax = kHadamard ? Values::amax(x) * kHadamardFactor : Values::amax(x);
    auto const scale = Quick::scale(level, Config::kSquare ? square_amax : amax);
    auto divider = Quick::divider(level, scale);
    typename RoundingOf<Config::kStochastic>::Type rounding;
    if constexpr (Config::kStochastic)
      rounding.noise = philox_block_of([this](int round) { return keys()[round]; }, number);
    // False for NaN, too.
    if (!(divider.quotient(amax) < kQuickLimit && Quick::ok(level)))
      return encode_slowly<Values, Convention, kHadamard>(x, square_amax, levels(side)[line], rounding);
    if constexpr (kHadamard) divider = times_factor(divider);
    return {{encode_half<Values>(x, 0, divider, rounding), encode_half<Values>(x, 1, divider, rounding)}, scale};
  }

  template <bool kColumn> __device__ void flush(int thread) const {
    using Scales = typename Select<kColumn, typename Config::ColumnScales, typename Config::RowScales>::Type;
    TileScales<Scales>::template flush<Scales>(scales(kColumn), in_global(output<kColumn>().block_scale),
                                               line0<kColumn>(), lines<kColumn>(), block0<kColumn>(), blocks<kColumn>(),
                                               thread);
  }
};

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

template <class Element_, bool kRows_, bool kColumns_, bool kHadamard_, bool kVectorized_, bool kSums_ = false,
          Producer kProducer_ = Producer::kNone>
struct TileAmaxConfig {
  using Element = Element_;
  static constexpr bool kRows = kRows_, kColumns = kColumns_, kHadamard = kHadamard_, kVectorized = kVectorized_;
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
      return block_amax<Fp32>(hadamard_sums<Element>(x, hadamard_));
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
