// NVFP4 of x, of its transpose, or of both from one read of x; either may have, instead of data and block scales, what GEMMs
// on prepacked weights read: the values code * block scale as bf16, or the prepacked form.
// Outer scales come from amaxes, or decode multipliers, in memory. A CTA has 128 x 128 values in shared memory, from where a
// thread reads whole blocks along rows and along columns, so neither result needs communication.
#pragma once

#include "fp4gemm/encode.hpp"
#include "fp4gemm/hadamard.hpp"
#include "fp4gemm/pack.hpp"
#include "fp4gemm/tile.hpp"
#include "fp4gemm/tile_scales.hpp"
#include "fp4gemm/values.hpp"

namespace fp4gemm {

template <bool kFirst, class First, class Second> struct Select {
  using Type = First;
};
template <class First, class Second> struct Select<false, First, Second> {
  using Type = Second;
};

// One result [lines, blocks * 16]: its lines are rows of x, or columns for the transpose. Values are bf16 of that shape, the
// packed form is uint8 [ceil(lines / 64), ceil(blocks / 4), 2304]; neither has block scales of its own.
struct TileOutput {
  uint8_t* data;  // uint8 [lines, blocks * 8], or one of these
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
          bool kColumns_, int kSigns_, bool kStochastic_, bool kSquare_, bool kVectorized_,
          Producer kProducer_ = Producer::kNone>
struct TileQuantizeConfig {
  using Element = Element_;
  using Convention = Convention_;
  using RowScales = RowScales_;
  using ColumnScales = ColumnScales_;
  static constexpr bool kGiven = kGiven_;  // scale_in holds decode multipliers, not amaxes
  static constexpr bool kRows = kRows_, kColumns = kColumns_;  // which results
  static constexpr int kSigns = kSigns_;
  static constexpr bool kHadamard = kSigns != kNoHadamard;  // transforms blocks along columns
  static constexpr bool kStochastic = kStochastic_;
  static constexpr bool kSquare = kSquare_;  // one block scale for 16 x 16 values
  static constexpr bool kVectorized = kVectorized_;  // rows are 16-byte aligned
  static constexpr Producer kProducer = kProducer_;  // kNone, or a gradient
  static constexpr int kThreads = kTileThreads;
  static constexpr bool kPacksRows = TileScales<RowScales>::kForm == Form::kPacked;
  static constexpr bool kPacksColumns = TileScales<ColumnScales>::kForm == Form::kPacked;
  static constexpr int kStagedBytes = kTile * kTile / 2;  // codes of a result that are to be packed
  static constexpr int kOtherBytes = Tile<Element>::kBytes + 2 * kTile * kTileBlocks + 2 * kTile * 12 +
                                     (kSquare ? kTileBlocks * kTileBlocks * 4 : 0) +
                                     (kStochastic ? kPhiloxRounds * 8 : 0);
  static constexpr int kStagedAt = (kOtherBytes + 15) / 16 * 16;
  static constexpr int kSharedBytes =
      kPacksRows || kPacksColumns ? kStagedAt + (kPacksRows + kPacksColumns) * kStagedBytes : kOtherBytes;
  static_assert(kRows || kColumns, "a result");
  static_assert(!(kSquare && kHadamard), "squares of x are not squares of what is transformed");
};

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
  using Rounding = typename RoundingOf<Config::kStochastic>::Type;
  static constexpr int kScaleBytes = kTile * kTileBlocks;

  TileView const& view_;
  TileOptions const& options_;
  uint8_t* const shared_;
  Tile const tile_;
  Place const place_;
  int const member_;  // of a group, of which each has a seed of its own
  uint32_t const keys_;  // kept: the compiler would find out where shared memory begins again for each block

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
  __device__ uint32_t keys_address() const {
    return Config::kStochastic ? keep(shared_address(square(Config::kSquare ? kTileBlocks : 0, 0))) : 0;
  }
  // 16 bytes of a line's codes; chunks change places so that neither writes along rows or columns nor pack's reads of eight
  // bytes meet a bank twice.
  __device__ uint8_t* staged(int side, int line, int pair) const {
    int const at = side != 0 && Config::kPacksRows ? Config::kStagedBytes : 0;
    return shared_ + Config::kStagedAt + at + line * (kTile / 2) + (pair ^ line >> 5 ^ (line & 2)) * 16;
  }
  __device__ uint2* keys() const { return static_cast<uint2*>(shared_pointer(keys_)); }

  __device__ int64_t row0() const { return place_.row * int64_t{kTile}; }
  __device__ int column0() const { return place_.column * kTile; }

 public:
  // The tile that a CTA has of a whole tensor.
  __device__ TileQuantizer(TileQuantizeArguments const& args, uint8_t* shared)
      : TileQuantizer(args.view, args.options, shared, args.view.source.place(blockIdx.x), 0) {}

  __device__ TileQuantizer(TileView const& view, TileOptions const& options, uint8_t* shared, Place place, int member)
      : view_(view),
        options_(options),
        shared_(shared),
        tile_(shared),
        place_(place),
        member_(member),
        keys_(keys_address()) {}

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
    if constexpr (Config::kRows) finish<false>();
    if constexpr (Config::kColumns) finish<true>();
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
    using Quick = QuickScales<Convention>;
    constexpr bool kSums = kColumn && Config::kHadamard;
    quick(kColumn)[line] = kSums ? Quick::of_larger(Quick::line(level), 1.0f / kHadamardFactor) : Quick::line(level);
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
    constexpr Form kForm = TileScales<Scales>::kForm;
    constexpr bool kValues = kForm == Form::kValues, kPacked = kForm == Form::kPacked;
    constexpr int kBytes = kValues ? kBlock * 2 : kBlock / 2;  // of a block
    uint8_t* to = in_global(output<kColumn>().data) + number * kBytes;
    int64_t const step_blocks = static_cast<int64_t>(kStep) * row_blocks;
    uint32_t scale_at = 0;
    if constexpr (!kValues) scale_at = keep(TileScales<Scales>::offset(place.line, 2 * place.pair));
#pragma unroll 1
    for (int step = 0; step < Tile::kSteps; ++step) {
      int const line = place.line + step * kStep;
      float2 const level = quick(kColumn)[line];
      Encoded low = encode<kColumn>(load(step, 0), level, line, 2 * place.pair, number);
      Encoded high = encode<kColumn>(load(step, 1), level, line, 2 * place.pair + 1, number + 1);
      if constexpr (kValues) {
        put_values<kColumn>(to, low, high, place.pair % 2, line < lines_left ? left : -2);
      } else if constexpr (kPacked) {
        // The form has whole blocks of 64 x 64, and a transform of what stands for nothing may be -0.
        if (line >= lines_left || left < 1) low = {};
        if (line >= lines_left || left < 2) high = {};
        *reinterpret_cast<uint4*>(staged(kColumn, line, place.pair)) = {low.codes.x, low.codes.y, high.codes.x,
                                                                        high.codes.y};
      } else if (whole) {
        *reinterpret_cast<uint4*>(to) = {low.codes.x, low.codes.y, high.codes.x, high.codes.y};
      } else {
        // What stands for nothing is 0: the tile is 0 there, but a convention may have another scale for it.
        if (line >= lines_left || left < 1) low.scale = 0;
        if (line >= lines_left || left < 2) high.scale = 0;
        if (line < lines_left && left > 0) reinterpret_cast<uint2*>(to)[0] = low.codes;
        if (line < lines_left && left > 1) reinterpret_cast<uint2*>(to)[1] = high.codes;
      }
      if constexpr (!kValues) {
        // One instruction, where a shift and an or are two.
        *reinterpret_cast<uint16_t*>(scales(kColumn) + scale_at) = gather_bytes(low.scale, high.scale, 0x0040);
        // Lines of a step and of the next are as far apart in each layout as the first of all and that of the next.
        scale_at += TileScales<Scales>::offset(kStep, 0);
      }
      number += step_blocks;
      to += step_blocks * kBytes;
    }
  }

  // Two blocks of a line, at `to`, of which `left` are there. A lane has two halves of each sector; it trades codes with the
  // one that has the next two blocks, or the two before, so that they write whole sectors together.
  template <bool kColumn>
  __device__ static void put_values(uint8_t* to, Encoded const& low, Encoded const& high, bool odd, int left) {
    constexpr int kOther = kColumn ? 1 : 8;
    uint32_t const mine = gather_bytes(low.scale, high.scale, 0x0040);
    uint32_t const theirs = __shfl_xor_sync(~0u, mine, kOther);
    uint32_t const other_low = __shfl_xor_sync(~0u, odd ? low.codes.x : low.codes.y, kOther);
    uint32_t const other_high = __shfl_xor_sync(~0u, odd ? high.codes.x : high.codes.y, kOther);
    uint32_t const first = odd ? theirs : mine, second = odd ? mine : theirs;
    if (odd) {  // from here on the sectors of both, and this lane's half of each
      left += 2;
      to -= 2 * kBlock * 2 - 16;
    }
    auto* const halves = reinterpret_cast<uint4*>(to);
    if (left > 0) halves[0] = BlockValues(first & 0xFF).eight(odd ? other_low : low.codes.x);
    if (left > 1) halves[2] = BlockValues(first >> 8 & 0xFF).eight(odd ? other_high : high.codes.x);
    if (left > 2) halves[4] = BlockValues(second & 0xFF).eight(odd ? low.codes.y : other_low);
    if (left > 3) halves[6] = BlockValues(second >> 8 & 0xFF).eight(odd ? high.codes.y : other_high);
  }

  // Block `block` of line `line` of this tile, which is block `number` of the result.
  template <bool kColumn>
  __device__ Encoded encode(typename Element::Block const& x, float2 level, int line, int block, int64_t number) const {
    float bmax = -1.0f;
    if constexpr (Config::kSquare)
      bmax = __int_as_float(kColumn ? *square(block, line / kBlock) : *square(line / kBlock, block));
    Rounding rounding;  // first, as it is small: what is made after it need not live beside Philox's state
    if constexpr (Config::kStochastic)
      rounding.noise = philox_block_of([this](int round) { return keys()[round]; }, number);
    if constexpr (kColumn && Config::kHadamard) {
      auto const sums = HadamardSums::of<Element, Config::kSigns>(x, options_.hadamard);
      return encode_values<Fp32, true>(sums.block(), sums.amax(), bmax, kColumn, level, line, rounding);
    } else {
      return encode_values<Element, false>(x, Element::amax(x), bmax, kColumn, level, line, rounding);
    }
  }

  // kHadamard: of kHadamardFactor times x. `level` is made for that: products are exact, or so small that codes are 0.
  template <class Values, bool kHadamard> __device__ Encoded encode_values(typename Values::Block const& x, float amax,
                                                                           float square_amax, int side, float2 level,
                                                                           int line, Rounding const& rounding) const {
    using Quick = QuickScales<Convention>;
    auto const scale = Quick::scale(level, Config::kSquare ? square_amax : amax);
    auto const divider = Quick::divider(level, scale);
    // False for NaN, too.
    if (!(divider.quotient(amax) < kQuickLimit && Quick::ok(level, amax)))
      return encode_slowly<Values, Convention, kHadamard>(x, square_amax, levels(side)[line], rounding);
    return {{encode_half<Values>(x, 0, divider, rounding), encode_half<Values>(x, 1, divider, rounding)}, scale};
  }

  // What a result has in shared memory on its way out.
  template <bool kColumn> __device__ void finish() const {
    using Scales = typename Select<kColumn, typename Config::ColumnScales, typename Config::RowScales>::Type;
    if constexpr (TileScales<Scales>::kForm == Form::kCodes) {
      if (threadIdx.x / kTile == kColumn)
        TileScales<Scales>::template flush<Scales>(scales(kColumn), in_global(output<kColumn>().block_scale),
                                                   line0<kColumn>(), lines<kColumn>(), block0<kColumn>(),
                                                   blocks<kColumn>(), threadIdx.x % kTile);
    } else if constexpr (TileScales<Scales>::kForm == Form::kPacked) {
      pack<kColumn>();
    }
  }

  // The four packed blocks of a tile, two at a time.
  template <bool kColumn> __device__ void pack() const {
    constexpr int kBlocks = kTileBlocks / 2;  // of a line of a packed block
    int const thread = threadIdx.x % 128, right = threadIdx.x / 128;  // half of the tile's columns
    int const all = ceil_div(blocks<kColumn>(), kBlocks), column = block0<kColumn>() / kBlocks + right;
    int const block = right * kBlocks + thread % 4;
    if (column >= all) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int64_t const band = line0<kColumn>() / kPackedRows + i;
      if (band * kPackedRows >= lines<kColumn>()) return;
      uint2 halves[2];
      uint32_t block_scales[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int const line = i * kPackedRows + thread / 32 * 16 + thread / 4 % 8 + 8 * j;
        halves[j] = reinterpret_cast<uint2 const*>(staged(kColumn, line, block / 2))[block % 2];
        block_scales[j] = scales(kColumn)[TileScales<PackedForm>::offset(line, block)];
      }
      pack_block(in_global(output<kColumn>().data) + (band * all + column) * kPackedBlockBytes, thread, halves,
                 block_scales);
    }
  }
};

}  // namespace fp4gemm
