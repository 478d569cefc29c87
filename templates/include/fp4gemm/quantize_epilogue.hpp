// An epilogue's root that quantizes rows of D to NVFP4 under given outer scales: the codes leave as D, through shared memory
// and TMA as any D does; block scales are stored here, in their layout and with its padding.
// The arithmetic is that of the quantizer (convention.hpp), on fp32 values that nothing has rounded: docs/numerics.md.
//
// Two forms, by who holds a block of 16 columns after the MMA:
//   QuantizeRowsOfThreads  sm_100a: a thread has a row, and whole blocks of it
//   QuantizeRowsOfQuads    sm_120a: the four threads of a quad have four values each
#pragma once

#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"

#include "fp4gemm/convention.hpp"
#include "fp4gemm/layout.hpp"

namespace fp4gemm {

// v rounded to e2m1, as a float.
__device__ __forceinline__ float2 rounded_to_e2m1(float x, float y) {
  uint32_t pair;
  if constexpr (kHasE2m1) {
    asm("{\n.reg .b8 codes;\ncvt.rn.satfinite.e2m1x2.f32 codes, %2, %1;\ncvt.rn.f16x2.e2m1x2 %0, codes;\n}"
        : "=r"(pair)
        : "f"(x), "f"(y));
    return {half_to_float(static_cast<uint16_t>(pair)), half_to_float(static_cast<uint16_t>(pair >> 16))};
  } else {
    // As fp16 bits a code is its value times 2^-14.
    auto const value = [](uint32_t code) {
      return 0x1p14f * half_to_float(static_cast<uint16_t>((code & 7) << 9 | (code & 8) << 12));
    };
    return {value(to_e2m1(x)), value(to_e2m1(y))};
  }
}

// Where a thread's values stand: the shape of D and of its scales, and the thread's first element.
struct QuantizedRows {
  uint8_t* scales;
  float const* outer;
  int rows, columns, row, column, outer_stride;

  __device__ bool holds(int m, int n) const { return m < rows && n < columns; }
  __device__ EncodeOuter outer_of(int m) const {
    return TePerToken::from_decode(m < rows ? outer[m * outer_stride] : 1.0f);
  }

  // The scale of the block that begins at (m, n); past the end of D a layout's padding is 0.
  template <class Scales> __device__ void store(int m, int n, uint8_t scale) const {
    int const blocks = ceil_div(columns, kBlock), block = n / kBlock;
    if (m < ceil_div(rows, Scales::kRowTile) * Scales::kRowTile && block < Scales::padded_columns(blocks)) {
      scales[Scales::row_offset(m, blocks) + Scales::column_offset(block)] = holds(m, n) ? scale : 0;
    }
  }
};

// What a node of CUTLASS's visitor trees has to have. Derived gives get_consumer_store_callbacks.
struct QuantizeRowsNode {
  struct SharedStorage {};
  struct Arguments {
    uint8_t* scales = nullptr;
    float const* outer = nullptr;  // [m] or [1]
    int64_t batch_scales = 0, batch_outer = 0;  // from one member of a batch to the next
    int outer_per_row = 0;
  };
  using Params = Arguments;

  Params const* params = nullptr;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& args, void*) {
    return args;
  }
  template <class Problem> static bool can_implement(Problem const&, Arguments const&) { return true; }
  template <class Problem> static size_t get_workspace_size(Problem const&, Arguments const&) { return 0; }

  CUTLASS_HOST_DEVICE QuantizeRowsNode() {}
  CUTLASS_HOST_DEVICE QuantizeRowsNode(Params const& params_, SharedStorage const&) : params(&params_) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...> const&) {
    return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <class Args> CUTLASS_DEVICE QuantizedRows rows_of(Args const& args) const {
    int const m = cute::get<0>(args.problem_shape_mnkl), n = cute::get<1>(args.problem_shape_mnkl);
    int64_t const l = cute::get<3>(args.tile_coord_mnkl);
    // residue is the end of D seen from the thread's first element.
    return {params->scales + l * params->batch_scales,
            params->outer + l * params->batch_outer,
            m,
            n,
            m - static_cast<int>(cute::get<0>(args.residue_tCcD)),
            n - static_cast<int>(cute::get<1>(args.residue_tCcD)),
            params->outer_per_row};
  }
};

template <class Scales> struct QuantizeRowsOfThreads : QuantizeRowsNode {
  using QuantizeRowsNode::QuantizeRowsNode;

  template <class Coordinates> struct ConsumerStoreCallbacks
      : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    QuantizedRows at;
    Coordinates coordinates;  // of the thread's values, from its first

    CUTLASS_DEVICE ConsumerStoreCallbacks(QuantizedRows const& at_, Coordinates const& coordinates_)
        : at(at_), coordinates(coordinates_) {}

    template <class Accumulator, int N>
    CUTLASS_DEVICE cutlass::Array<cutlass::float_e2m1_t, N> visit(cutlass::Array<Accumulator, N> const&, int, int epi_m,
                                                                  int epi_n, cutlass::Array<float, N> const& values) {
      static_assert(N % kBlock == 0, "a thread has whole blocks");
      auto const first = coordinates(cute::_0{}, cute::_0{}, cute::_0{}, epi_m, epi_n);
      int const m = at.row + cute::get<0>(first), n = at.column + cute::get<1>(first);
      EncodeOuter const outer = at.outer_of(m);
      cutlass::Array<cutlass::float_e2m1_t, N> codes;
      auto* const words = reinterpret_cast<uint32_t*>(codes.raw_data());
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < N / kBlock; ++block) {
        float x[kBlock], amax = 0.0f;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kBlock; ++i) {
          x[i] = n + kBlock * block + i < at.columns ? values[kBlock * block + i] : 0.0f;
          amax = fmaxf(amax, fabsf(x[i]));  // drops NaN
        }
        uint8_t const scale = TePerToken::block_scale(outer, amax);
        at.template store<Scales>(m, n + kBlock * block, scale);
        auto const divider = TePerToken::divider(outer, scale);
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          words[2 * block + half] = encode_eight([&](int i) { return divider.quotient(x[8 * half + i]); });
        }
      }
      return codes;
    }
  };

  template <class Value> CUTLASS_DEVICE static uint32_t encode_eight(Value const& value) {
    if constexpr (kHasE2m1) {
      return to_e2m1_eight(value);
    } else {
      uint32_t word = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) word |= to_e2m1(value(i)) << (4 * i);
      return word;
    }
  }

  template <bool kReferenceSource, class... Args> CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    return ConsumerStoreCallbacks<decltype(args.tCcD)>(rows_of(args), args.tCcD);
  }
};

template <class Scales> struct QuantizeRowsOfQuads : QuantizeRowsNode {
  using QuantizeRowsNode::QuantizeRowsNode;

  template <class Coordinates> struct ConsumerStoreCallbacks
      : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    QuantizedRows at;
    Coordinates coordinates;

    CUTLASS_DEVICE ConsumerStoreCallbacks(QuantizedRows const& at_, Coordinates const& coordinates_)
        : at(at_), coordinates(coordinates_) {}

    template <class Accumulator, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(cutlass::Array<Accumulator, N> const&, int, int, int,
                                                  cutlass::Array<float, N> const& values) {
      return values;
    }

    // A fragment is a thread's part of a 16 x 8 tile: two neighbours of a row, and the same of the row 8 below. Two fragments
    // along N are the thread's part of blocks. Values become those of their codes, which converts to e2m1 exactly.
    template <class Shared, class Sync, class Fragments>
    CUTLASS_DEVICE void reduce(Shared&&, Sync const&, int epi_m, int epi_n, bool, Fragments fragments) {
      static_assert(cute::size<2>(Fragments{}.layout()) % 2 == 0, "whole blocks");
      static_assert(decltype(cute::size<0>(coordinates))::value == 4, "coordinates of one fragment");
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < cute::size<1>(fragments); ++i) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < cute::size<2>(fragments); j += 2) {
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) {
            auto const first = coordinates(2 * half, i, j, epi_m, epi_n);
            int const m = at.row + cute::get<0>(first), n = at.column + cute::get<1>(first);
            quantize(m, n, fragments(cute::_0{}, i, j)[2 * half], fragments(cute::_0{}, i, j)[2 * half + 1],
                     fragments(cute::_0{}, i, j + 1)[2 * half], fragments(cute::_0{}, i, j + 1)[2 * half + 1]);
          }
        }
      }
    }

    // A quad's block; this thread has columns n, n + 1, n + 8, n + 9 of it.
    CUTLASS_DEVICE void quantize(int m, int n, float& a, float& b, float& c, float& d) const {
      a = n < at.columns ? a : 0.0f, b = n + 1 < at.columns ? b : 0.0f;
      c = n + 8 < at.columns ? c : 0.0f, d = n + 9 < at.columns ? d : 0.0f;
      float amax = fmaxf(fmaxf(fmaxf(0.0f, fabsf(a)), fabsf(b)), fmaxf(fmaxf(0.0f, fabsf(c)), fabsf(d)));  // drops NaN
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
      EncodeOuter const outer = at.outer_of(m);
      uint8_t const scale = TePerToken::block_scale(outer, amax);
      if (threadIdx.x % 4 == 0) at.template store<Scales>(m, n, scale);
      auto const divider = TePerToken::divider(outer, scale);
      float2 const low = rounded_to_e2m1(divider.quotient(a), divider.quotient(b));
      float2 const high = rounded_to_e2m1(divider.quotient(c), divider.quotient(d));
      a = low.x, b = low.y, c = high.x, d = high.y;
    }
  };

  template <bool kReferenceSource, class... Args> CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    return ConsumerStoreCallbacks<decltype(args.tCcD)>(rows_of(args), args.tCcD);
  }
};

}  // namespace fp4gemm
