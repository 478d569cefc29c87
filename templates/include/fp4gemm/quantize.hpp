// Row-wise NVFP4 quantizer: data, block scales (any layout, padding written as 0) and outer scales in one launch; or, for a
// GEMM that follows, the values code * block scale as bf16 instead of data and block scales.
// A group of kThreads threads owns a row; each thread holds whole 16-value blocks, so a block needs no communication.
// With per-row scaling and a row that fits in registers, memory is read once: load, reduce the row amax, encode.
#pragma once

#include "fp4gemm/async.hpp"
#include "fp4gemm/norm.hpp"
#include "fp4gemm/rows.hpp"
#include "fp4gemm/scale_writer.hpp"
#include "fp4gemm/values.hpp"

namespace fp4gemm {

// kStages: of block scales in shared memory, of which a CTA that goes through rows takes another each time.
template <class Config, int kStages = 1> class RowQuantizer {
  using Element = typename Config::Element;
  using Convention = typename Config::Convention;
  using Scales = typename Config::Scales;
  using Block = typename Element::Block;
  static constexpr int kStep = Config::kThreads * Config::kBlocks;  // columns at a time
  using Options = typename Config::Options;
  using Rounding = typename RoundingOf<Options::kStochastic>::Type;
  static constexpr bool kPairs = Options::kResidual != Residual::kNone;
  // Pairs of a column and its companion behind all other columns: in a CTA of several rows of four warps or more, of which one
  // would have all of a row's and the CTA would last as long; and where registers would not last: with noise in a CTA of
  // several rows, and in one of 512 threads.
  static constexpr bool kApart =
      kPairs && (Config::kThreads >= 512 || (Config::kRows > 1 && (Config::kThreads >= 128 || Options::kStochastic)));
  // Encoded before its scale is stored, which the codes decide.
  static constexpr bool kEarly = Options::kAdaptive != Adaptive::kNone;
  static_assert(!kPairs || (!kEarly && !Options::kNorm), "neither has pairs in their place");

  using Arguments = typename Config::Arguments;

  Arguments const& args_;
  int const cta_, stage_;
  int64_t const row_;
  int const thread_;  // of the row; kApart: turned from row to row, or pairs of all rows would share a scheduler
  bool const real_;  // false for a row that exists only as scale-factor padding
  char const* const x_;  // this row of it

 public:
  // A tiled layout scatters the scales of one row in words of four; the rows of a CTA together fill whole chunks, or
  // halves of them.
  static constexpr bool kStaged = Scales::kTiled && Config::kRows % 2 == 0 && (!kPairs || Config::kResident);

  __device__ explicit RowQuantizer(Arguments const& args) : RowQuantizer(args, blockIdx.x) {}

  // cta: which of those that share the rows of a tensor, or of a member of a group.
  __device__ RowQuantizer(Arguments const& args, int cta, int stage = 0)
      : args_(args),
        cta_(cta),
        stage_(stage),
        row_(Scales::template row<Config::kRows>(cta, threadIdx.x / Config::kThreads)),
        thread_((threadIdx.x + (kApart ? 32 * (cta * Config::kRows + threadIdx.x / Config::kThreads) : 0)) %
                Config::kThreads),
        real_(row_ < args.rows),
        x_(row_of_x(row_)) {}

  __device__ void run() const {
    if constexpr (Config::kValues) {
      prefetch_own();
      // In this order: what stands behind may then count on all that came before this kernel.
      wait_for_inputs();
      launch_dependents();
    }
    if constexpr (Options::kNoop) {
      bool const byte = args_.noop_mask == 0xFF;
      if (byte ? *static_cast<uint8_t const*>(args_.noop) : *static_cast<uint32_t const*>(args_.noop) & args_.noop_mask)
        return;
    }
    if constexpr (Config::kResident && (Config::kScaling == Scaling::kPerRow || Options::kNorm)) {
      Block x[Config::kBlocks];
      float amax[Config::kBlocks];
      float row_amax = load_step(0, x, amax);
      prefetch_ahead();
      if constexpr (Config::kScaling == Scaling::kPerRow)
        row_amax = reduce_group<Config::kThreads, Config::kRows>(row_amax);
      auto const outer = outer_of(Config::kScaling == Scaling::kPerRow ? row_amax : scale_in());
      write_outer(outer);
      store_step(0, x, amax, outer);
      finish_pairs(outer);
    } else if constexpr (Config::kScaling != Scaling::kPerRow) {
      // No reduction: CTAs split the row as well, where it is longer than a step.
      float scale = scale_in();
      auto const step = [&](int first) {
        Block x[Config::kBlocks];
        float amax[Config::kBlocks];
        load_step(first, x, amax);
        prefetch_ahead();  // of rows that are a step
        pin(scale);  // or what is made of it would be awaited before x is asked for
        store_step(first, x, amax, outer_of(scale));
      };
      if constexpr (Config::kValues) {
        step(blockIdx.y * kStep);  // of each CTA: what a loop makes ready would stand in front of the loads
      } else {
        for (int first = blockIdx.y * kStep; first < padded_columns(); first += gridDim.y * kStep) step(first);
      }
      finish_pairs(outer_of(scale));
      write_outer(outer_of(scale));
    } else {
      float row_amax = 0.0f;
      for (int first = 0; first < args_.columns; first += kStep) {
        Block x[Config::kBlocks];
        float amax[Config::kBlocks];
        row_amax = fmaxf(row_amax, load_step(first, x, amax));
      }
      auto const outer = outer_of(reduce_group<Config::kThreads, Config::kRows>(row_amax));
      write_outer(outer);
      for (int first = blockIdx.y * kStep; first < padded_columns(); first += gridDim.y * kStep) {
        Block x[Config::kBlocks];
        float amax[Config::kBlocks];
        load_step(first, x, amax);
        store_step(first, x, amax, outer);
      }
      finish_pairs(outer);
    }
  }

 private:
  __device__ char const* row_of_x(int64_t row) const {
    return static_cast<char const*>(in_global(args_.x)) + row * args_.x_stride * Element::kBytes;
  }

  __device__ void prefetch_row(int64_t row) const {
    int const bytes = args_.k * Element::kBytes;
    prefetch_l2(row_of_x(row), Options::kProducer == Producer::kSiluMul ? 2 * bytes : bytes);
    if constexpr (Options::kProducer == Producer::kAddRmsNorm)
      prefetch_l2(static_cast<char const*>(args_.residual) + row * args_.residual_stride * Element::kBytes, bytes);
  }

  // What this kernel reads, to L2, while the kernel in front goes on: that may still write it, there, so nothing is read yet.
  __device__ void prefetch_own() const {
    if (thread_ != 0 || blockIdx.y != 0 || !real_ || args_.prefetch != 0) return;
    if constexpr (Config::kScaling == Scaling::kGiven) prefetch_line_l2(args_.scale_in + row_ * args_.scale_in_stride);
    if constexpr (Config::kVectorized) prefetch_row(row_);
  }

  // Keeps memory busy while the CTAs of an SM all compute: they start together and stay in step.
  __device__ void prefetch_ahead() const {
    if (!Config::kVectorized || thread_ != 0 || args_.prefetch == 0) return;
    int64_t const row = Scales::template row<Config::kRows>(cta_ + args_.prefetch, threadIdx.x / Config::kThreads);
    if (row < args_.rows) prefetch_row(row);
  }

  __device__ int padded_columns() const { return Scales::padded_columns(args_.columns); }

  // What the outer scale of this row follows from, where that is not the row.
  __device__ float scale_in() const {
    if constexpr (Config::kScaling == Scaling::kGiven) {
      bool const given = real_ || args_.scale_in_stride == 0;  // one for all covers what has no rows, too
      return given ? args_.scale_in[row_ * args_.scale_in_stride] : 1.0f;
    } else if constexpr (Config::kScaling == Scaling::kAmaxes) {
      return real_ ? args_.scale_in[row_] : 0.0f;
    } else {
      return *args_.scale_in;
    }
  }
  __device__ static typename Convention::Outer outer_of(float given_or_amax) {
    if constexpr (Config::kScaling == Scaling::kGiven) return Convention::from_decode(given_or_amax);
    return Convention::from_amax(given_or_amax);
  }
  // Behind loads of x: none would be moved in front of this store, which waits for the scale.
  __device__ void write_outer(typename Convention::Outer const& outer) const {
    bool const per_row =
        Config::kScaling == Scaling::kPerRow || Config::kScaling == Scaling::kAmaxes || args_.scale_in_stride != 0;
    if (thread_ == 0 && blockIdx.y == 0 && (per_row ? real_ : row_ == 0))
      in_global(args_.outer_scale)[row_ * per_row] = outer.decode;
  }

  __device__ Block load(void const* row, int column) const {
    if constexpr (Options::kGathered) {
      return gather_block<Element>(row, args_.order, column);
    } else {
      return load_produced<Element, Config::kVectorized, Options::kProducer, !kApart>(row, column, args_.k);
    }
  }

  __device__ float load_step(int first, Block (&x)[Config::kBlocks], float (&amax)[Config::kBlocks]) const {
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      int const column = first + i * Config::kThreads + thread_;
      x[i] = Block{};
      if (real_ && column < args_.columns) x[i] = load(x_, column);
    }
    if constexpr (Options::kNorm) RowNorm<Config>(args_, row_, thread_, real_).apply(x);
    uint32_t largest = 0;  // as bits, of which those of Inf and NaN are the largest
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      amax[i] = Element::amax(x[i]);
      largest = max(largest, __float_as_uint(amax[i]));
    }
    float step_amax = __uint_as_float(largest);
    if (!is_finite(step_amax)) {  // one branch for all blocks
      step_amax = 0.0f;
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        amax[i] = flagged_amax<Element>(x[i]);
        step_amax = fmaxf(step_amax, fabsf(amax[i]));
      }
    }
    return step_amax;
  }

  __device__ void store_step(int first, Block const (&x)[Config::kBlocks], float const (&amax)[Config::kBlocks],
                             typename Convention::Outer const& outer) const {
    if constexpr (Config::kValues) {
      store_values(first, x, amax, outer);
    } else {
      store_packed(first, x, amax, outer);
    }
  }

  __device__ int single_columns() const { return fp4gemm::single_columns<Config>(args_); }

  __device__ uint64_t number(int place) const {
    return static_cast<uint64_t>(row_) * out_columns<Config>(args_) + place;
  }
  __device__ Rounding rounding(uint64_t seed, int place) const {
    if constexpr (Options::kStochastic) return {philox_block(seed, number(place))};
    return {};
  }
  // Of kNoiseBlocks from block i of a step: two share round keys, where there are registers for that.
  static constexpr int kNoiseBlocks = Config::kBlocks % 2 == 0 && Config::kCtasOfSm > 2 ? 2 : 1;
  __device__ void make_noise(uint64_t seed, int first, int i, Stochastic (&roundings)[Config::kBlocks]) const {
    uint64_t numbers[kNoiseBlocks];
    PhiloxBlock noise[kNoiseBlocks];
#pragma unroll
    for (int j = 0; j < kNoiseBlocks; ++j) numbers[j] = number(first + (i + j) * Config::kThreads + thread_);
    philox_blocks(seed, numbers, noise);
#pragma unroll
    for (int j = 0; j < kNoiseBlocks; ++j) roundings[i + j] = {noise[j]};
  }
  __device__ void make_noise(uint64_t, int, int, NearestEven (&)[Config::kBlocks]) const {}
  __device__ uint64_t seed() const {
    if constexpr (Options::kStochastic) return args_.seed_in ? *args_.seed_in : args_.seed;
    return 0;
  }

  __device__ EncodedBlock encode(Block const& x, float amax, typename Convention::Outer const& outer, int column,
                                 uint64_t seed) const {
    if constexpr (Options::kAdaptive != Adaptive::kNone) {
      return encode_adaptive<Options::kAdaptive, Element, Convention>(x, amax, outer);
    } else {
      uint8_t const scale = Convention::block_scale(outer, fabsf(amax));
      return {encode_block<Element, Convention>(x, amax, outer, scale, rounding(seed, column)), scale};
    }
  }

  // A column that has a companion, and that.
  __device__ void store_pair(int64_t row, int column, Block const& x, float amax,
                             typename Convention::Outer const& outer) const {
    int const place = 2 * column - single_columns();
    EncodedBlock block{}, companion{};
    if (real_) {
      uint64_t const seed = this->seed();
      block.scale = max(Convention::block_scale(outer, fabsf(amax)), kLeastScale);
      block.codes = encode_block<Element, Convention>(x, amax, outer, block.scale, rounding(seed, place));
      store_data(row, place, block);
      companion = companion_of<Options::kResidual, Element>(block, x, amax, outer.encode, rounding(seed, place + 1));
      store_data(row, place + 1, companion);
    }
    put_scale(row, place, block.scale), put_scale(row, place + 1, companion.scale);
  }
  // The same of a thread's column of a step, if it has a companion.
  __device__ void store_pair_of_step(int column, Block const& x, float amax,
                                     typename Convention::Outer const& outer) const {
    if constexpr (kPairs && !kApart) {
      if (column >= single_columns() && column < args_.columns) store_pair(row_, column, x, amax, outer);
    }
  }
  // What is left of a row with companions. kApart: the pairs, of which few threads have one: they read x again, from L1, and
  // what they need takes registers only once all other columns are done. Always: the scales of its padding.
  __device__ void finish_pairs(typename Convention::Outer const& outer) const {
    if constexpr (kApart) {
#pragma unroll 1
      for (int column = single_columns() + blockIdx.y * Config::kThreads + thread_; column < args_.columns;
           column += gridDim.y * Config::kThreads) {
        uint32_t group = threadIdx.x / Config::kThreads;
        pin(group);  // or addresses, and keys of the noise, would be made before, too
        int64_t const row = Scales::template row<Config::kRows>(cta_, group);
        Block x{};
        if (real_) x = load(row_of_x(row), column);
        float amax = Element::amax(x);
        if (!is_finite(amax)) amax = flagged_amax<Element>(x);
        store_pair(row, column, x, amax, outer);
      }
    }
    if constexpr (kPairs) {
      int const padding = args_.out_columns + thread_;
      if (blockIdx.y == 0 && padding < Scales::padded_columns(args_.out_columns)) put_scale(row_, padding, 0);
    }
  }
  __device__ void store_data(int64_t row, int place, EncodedBlock const& block) const {
    if constexpr (Config::kValues) {
      auto* const to =
          reinterpret_cast<uint4*>(static_cast<uint16_t*>(args_.data) + row * args_.out_stride) + 2 * place;
      BlockValues const values(block.scale);
      to[0] = values.eight(block.codes.x), to[1] = values.eight(block.codes.y);
    } else {
      static_cast<uint2*>(in_global(args_.data))[row * args_.out_columns + place] = block.codes;
    }
  }
  __device__ void put_scale(int64_t row, int place, uint8_t scale) const {
    if constexpr (!Config::kValues) ScaleWriter<Config, false, 1>(args_, cta_, row, 0, 0, 0).put(0, place, scale);
  }

  __device__ void store_values(int first, Block const (&x)[Config::kBlocks], float const (&amax)[Config::kBlocks],
                               typename Convention::Outer const& outer) const {
    auto* const values = reinterpret_cast<uint4*>(static_cast<uint16_t*>(args_.data) + row_ * args_.out_stride);
    int const odd = thread_ % 2, end = kPairs ? single_columns() * kBlock : args_.k;
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      // CTAs that share a resident row all reduce it, which is cheap, and each encodes one of the blocks of a thread.
      if (Config::kScaling == Scaling::kPerRow && Config::kResident && gridDim.y > 1 && i != blockIdx.y) continue;
      int const column = first + i * Config::kThreads + thread_;
      EncodedBlock result{};
      uint4 low{}, high{};
      if (real_ && column < single_columns()) {
        result = encode(x[i], amax[i], outer, column, seed());
        BlockValues const block(result.scale);
        low = block.eight(result.codes.x);
        high = block.eight(result.codes.y);
      }
      // A lane has two halves of a sector; it trades one with its neighbour so that both write whole sectors.
      uint4 const other = swap_with_neighbour(odd ? low : high);
      int const half = 2 * (column - odd) + odd;
      if (real_ && half * 8 < end) values[half] = odd ? other : low;
      if (real_ && half * 8 + 16 < end) values[half + 2] = odd ? high : other;
      store_pair_of_step(column, x[i], amax[i], outer);
    }
  }

  __device__ void store_packed(int first, Block const (&x)[Config::kBlocks], float const (&amax)[Config::kBlocks],
                               typename Convention::Outer const& outer) const {
    ScaleWriter<Config, kStaged, kStages> const writer(args_, cta_, row_, first, thread_, stage_);
    auto* const data = static_cast<uint2*>(in_global(args_.data)) + row_ * out_columns<Config>(args_) + first + thread_;
    uint64_t const seed = this->seed();
    if constexpr (kEarly) {
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        int const column = first + i * Config::kThreads + thread_;
        EncodedBlock result{};
        if (real_ && column < single_columns()) {
          result = encode(x[i], amax[i], outer, column, seed);
          data[i * Config::kThreads] = result.codes;  // at once: they are registers
        }
        writer.put(i, column, result.scale);
      }
      writer.flush();
    } else {
      // All scales before any data: the scale writer's barrier and stores hide behind the encoding.
      uint8_t scale[Config::kBlocks];
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        int const column = first + i * Config::kThreads + thread_;
        scale[i] = real_ && column < single_columns() ? Convention::block_scale(outer, fabsf(amax[i])) : 0;
        if (!kPairs || column < single_columns()) writer.put(i, column, scale[i]);
      }
      writer.flush();
      Rounding roundings[Config::kBlocks];
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        int const column = first + i * Config::kThreads + thread_;
        if (i % kNoiseBlocks == 0) make_noise(seed, first, i, roundings);
        if (real_ && column < single_columns())
          data[i * Config::kThreads] = encode_block<Element, Convention>(x[i], amax[i], outer, scale[i], roundings[i]);
        store_pair_of_step(column, x[i], amax[i], outer);
      }
    }
  }
};

}  // namespace fp4gemm
