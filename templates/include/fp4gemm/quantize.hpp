// Row-wise NVFP4 quantizer: data, block scales (any layout, padding written as 0) and outer scales in one launch; or, for a
// GEMM that follows, the values code * block scale as bf16 instead of data and block scales.
// A group of kThreads threads owns a row; each thread holds whole 16-value blocks, so a block needs no communication.
// With per-row scaling and a row that fits in registers, memory is read once: load, reduce the row amax, encode.
#pragma once

#include "fp4gemm/async.hpp"
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
  // Encoded before its scale is stored: what the codes are decides, or depends on, the scales.
  static constexpr bool kEarly = kPairs || Options::kAdaptive != Adaptive::kNone;

  using Arguments = typename Config::Arguments;

  Arguments const& args_;
  int const cta_, stage_;
  int64_t const row_;
  int const thread_;
  bool const real_;  // false for a row that exists only as scale-factor padding
  char const* const x_;  // this row of it

 public:
  // A tiled layout scatters the scales of one row in words of four; the rows of a CTA together fill whole chunks, or
  // halves of them.
  static constexpr bool kStaged =
      Scales::kTiled && Config::kRows % (kPairs ? 2 : 4) == 0 && (!kPairs || Config::kResident);

  __device__ explicit RowQuantizer(Arguments const& args) : RowQuantizer(args, blockIdx.x) {}

  // cta: which of those that share the rows of a tensor, or of a member of a group.
  __device__ RowQuantizer(Arguments const& args, int cta, int stage = 0)
      : args_(args),
        cta_(cta),
        stage_(stage),
        row_(Scales::template row<Config::kRows>(cta, threadIdx.x / Config::kThreads)),
        thread_(threadIdx.x % Config::kThreads),
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
      return load_produced<Element, Config::kVectorized, Options::kProducer>(row, column, args_.k);
    }
  }

  // x becomes its norm, and x + residual is written where there is one. Padding stays 0, whatever the scale is.
  __device__ void normalize(Block (&x)[Config::kBlocks]) const {
    constexpr int kWarps = Config::kThreads / 32;
    __shared__ float sums[Config::kRows][Config::kBlocks * kWarps];
    float* const own = sums[threadIdx.x / Config::kThreads];
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      if constexpr (Options::kProducer == Producer::kAddRmsNorm) add_residual(i, x[i]);
      float const sum = sum_of_lanes(sum_of_squares<Element>(x[i]));
      if (thread_ % 32 == 0) own[i * kWarps + thread_ / 32] = sum;
    }
    group_barrier<Config::kThreads>(threadIdx.x / Config::kThreads);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < Config::kBlocks * kWarps; ++i) total = __fadd_rn(total, own[i]);
    float const mean = __fdiv_rn(total, static_cast<float>(args_.k));
    float const scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args_.eps)));
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      int const column = i * Config::kThreads + thread_;
      if (!real_ || column >= args_.columns) continue;
      int const values = Config::kVectorized ? kBlock : args_.k - column * kBlock;
      auto const weight = load_block<Element, Config::kVectorized, false>(args_.weight, column, args_.k);
      x[i] = scaled_by<Element>(x[i], weight, scale, values);
    }
  }

  __device__ void add_residual(int i, Block& x) const {
    int const column = i * Config::kThreads + thread_;
    if (!real_ || column >= args_.columns) return;
    auto const* residual = static_cast<typename Element::Raw const*>(args_.residual) + row_ * args_.residual_stride;
    auto* const sum = static_cast<typename Element::Raw*>(args_.sum) + row_ * args_.k;
    x = sum_of<Element>(x, load_block<Element, Config::kVectorized>(residual, column, args_.k));
    store_block<Element, Config::kVectorized>(sum, column, args_.k, x);
  }

  __device__ float load_step(int first, Block (&x)[Config::kBlocks], float (&amax)[Config::kBlocks]) const {
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      int const column = first + i * Config::kThreads + thread_;
      x[i] = Block{};
      if (real_ && column < args_.columns) x[i] = load(x_, column);
    }
    if constexpr (Options::kNorm) normalize(x);
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

  // Blocks of the result: where that of column c stands, and how many of column c there are.
  __device__ int first_pair() const { return 2 * args_.columns - args_.out_columns; }
  __device__ bool has_companion(int column) const { return kPairs && column >= first_pair() && column < args_.columns; }
  __device__ int place(int column) const { return kPairs ? column + max(0, column - first_pair()) : column; }

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

  // All of a block, and of its companion if it has one.
  __device__ EncodedPair encode(Block const& x, float amax, typename Convention::Outer const& outer, int column,
                                uint64_t seed) const {
    EncodedPair result{};
    if constexpr (Options::kAdaptive != Adaptive::kNone) {
      auto const chosen = encode_adaptive<Options::kAdaptive, Element, Convention>(x, amax, outer);
      result.codes = chosen.codes, result.scale = chosen.scale;
    } else {
      int const at = place(column);
      result.scale = Convention::block_scale(outer, fabsf(amax));
      if (has_companion(column) && result.scale == 0) result.scale = kLeastScale;
      result.codes = encode_block<Element, Convention>(x, amax, outer, result.scale, rounding(seed, at));
      if constexpr (kPairs) {
        if (has_companion(column))
          add_companion<Options::kResidual, Element>(result, x, amax, outer.encode, rounding(seed, at + 1));
      }
    }
    return result;
  }

  __device__ void store_values(int first, Block const (&x)[Config::kBlocks], float const (&amax)[Config::kBlocks],
                               typename Convention::Outer const& outer) const {
    auto* const values = reinterpret_cast<uint4*>(static_cast<uint16_t*>(args_.data) + row_ * args_.out_stride);
    int const odd = thread_ % 2;
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      // CTAs that share a resident row all reduce it, which is cheap, and each encodes one of the blocks of a thread.
      if (Config::kScaling == Scaling::kPerRow && Config::kResident && gridDim.y > 1 && i != blockIdx.y) continue;
      int const column = first + i * Config::kThreads + thread_;
      EncodedPair result{};
      uint4 low{}, high{};
      if (real_ && column < args_.columns) {
        result = encode(x[i], amax[i], outer, column, seed());
        BlockValues const block(result.scale);
        low = block.eight(result.codes.x);
        high = block.eight(result.codes.y);
      }
      if constexpr (kPairs) {
        if (!real_ || column >= args_.columns) continue;
        uint4* const to = values + 2 * place(column);
        to[0] = low, to[1] = high;
        if (!has_companion(column)) continue;
        BlockValues const companion(result.companion_scale);
        to[2] = companion.eight(result.companion.x), to[3] = companion.eight(result.companion.y);
      } else {
        // A lane has two halves of a sector; it trades one with its neighbour so that both write whole sectors.
        uint4 const other = swap_with_neighbour(odd ? low : high);
        int const half = 2 * (column - odd) + odd;
        if (real_ && half * 8 < args_.k) values[half] = odd ? other : low;
        if (real_ && half * 8 + 16 < args_.k) values[half + 2] = odd ? high : other;
      }
    }
  }

  __device__ void store_packed(int first, Block const (&x)[Config::kBlocks], float const (&amax)[Config::kBlocks],
                               typename Convention::Outer const& outer) const {
    ScaleWriter<Config, kStaged, kStages> const writer(args_, cta_, row_, first, stage_);
    auto* const data = static_cast<uint2*>(in_global(args_.data)) + row_ * out_columns<Config>(args_) + first + thread_;
    uint64_t const seed = this->seed();
    if constexpr (kEarly) {
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        int const column = first + i * Config::kThreads + thread_;
        EncodedPair result{};
        if (real_ && column < args_.columns) {
          result = encode(x[i], amax[i], outer, column, seed);
          uint2* const to = data + i * Config::kThreads + (place(column) - column);
          to[0] = result.codes;  // at once: they are registers
          if (has_companion(column)) to[1] = result.companion;
        }
        if constexpr (kPairs) {
          if (column >= args_.columns) continue;
          writer.put(place(column), result.scale);
          if (has_companion(column)) writer.put(place(column) + 1, result.companion_scale);
        } else {
          writer.put(column, result.scale);
        }
      }
      if constexpr (kPairs) {  // which push padding beyond the columns that threads have
        int const column = args_.out_columns + thread_;
        if (first == 0 && column < Scales::padded_columns(args_.out_columns)) writer.put(column, 0);
      }
      writer.flush();
    } else {
      // All scales before any data: the scale writer's barrier and stores hide behind the encoding.
      uint8_t scale[Config::kBlocks];
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        int const column = first + i * Config::kThreads + thread_;
        scale[i] = real_ && column < args_.columns ? Convention::block_scale(outer, fabsf(amax[i])) : 0;
        writer.put(column, scale[i]);
      }
      writer.flush();
      Rounding roundings[Config::kBlocks];
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        int const column = first + i * Config::kThreads + thread_;
        if (i % kNoiseBlocks == 0) make_noise(seed, first, i, roundings);
        if (real_ && column < args_.columns)
          data[i * Config::kThreads] = encode_block<Element, Convention>(x[i], amax[i], outer, scale[i], roundings[i]);
      }
    }
  }
};

}  // namespace fp4gemm
