// RMSNorm of a row that the registers of its threads hold.
#pragma once

#include "fp4gemm/quantize_config.hpp"
#include "fp4gemm/rows.hpp"

namespace fp4gemm {

template <class Element> __device__ __forceinline__ typename Element::Block sum_of(typename Element::Block const& a,
                                                                                   typename Element::Block const& b) {
  return block_of<Element>([&](int i) { return __fadd_rn(Element::value(a, i), Element::value(b, i)); });
}

// RMSNorm's last step: times the inverse root of the mean square, and times the weight; so many values, then zeros.
template <class Element>
__device__ __forceinline__ typename Element::Block scaled_by(typename Element::Block const& x,
                                                             typename Element::Block const& weight, float scale,
                                                             int values) {
  return block_of<Element>([&](int i) {
    return i < values ? __fmul_rn(__fmul_rn(Element::value(x, i), scale), Element::value(weight, i)) : 0.0f;
  });
}

// Halves folded onto each other. By recursion: of a loop in a loop whose end the first one changes the compiler unrolls half,
// and finds each of these registers by comparing numbers.
template <int kCount> __device__ __forceinline__ float folded(float (&s)[kBlock]) {
  constexpr int kHalf = kCount / 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) s[i] = __fadd_rn(s[i], s[i + kHalf]);
  if constexpr (kHalf > 1) return folded<kHalf>(s);
  return s[0];
}

// Of a block, in an order that no tiling changes.
template <class Element> __device__ __forceinline__ float sum_of_squares(typename Element::Block const& x) {
  float s[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) s[i] = __fmul_rn(Element::value(x, i), Element::value(x, i));
  return folded<kBlock>(s);
}

template <class Config> class RowNorm {
  using Element = typename Config::Element;
  using Block = typename Element::Block;
  using Raw = typename Element::Raw;
  static constexpr int kBlocks = Config::kBlocks;
  static constexpr bool kWide = Element::kBytes == 4;  // of which few blocks fit into registers
  // Blocks of the weight at a time: a row of many warps waits for its last one, and then for the weight (docs/performance.md).
  static constexpr int kTogether = !kWide && Config::kThreads >= 256 && kBlocks % 2 == 0 ? 2 : 1;
  static constexpr int kWarps = Config::kThreads / 32;  // of a row

  NormArguments const& args_;
  int64_t const row_;
  int const thread_;  // of the row
  bool const real_;

 public:
  __device__ RowNorm(NormArguments const& args, int64_t row, int thread, bool real)
      : args_(args), row_(row), thread_(thread), real_(real) {}

  // x becomes its norm, and x + residual is written where there is one. Padding stays 0, whatever the scale is.
  __device__ void apply(Block (&x)[kBlocks]) const {
    if constexpr (Config::Options::kProducer == Producer::kAddRmsNorm) add_residual(x);
    Block weights[kTogether];
    float const mean = __fdiv_rn(sum_of_squares(x), static_cast<float>(args_.k));
    float const scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args_.eps)));
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i % kTogether == 0) load_blocks<false>(args_.weight, i, weights);
      int const values = Config::kVectorized ? kBlock : args_.k - column(i) * kBlock;
      if (has(i)) x[i] = scaled_by<Element>(x[i], weights[i % kTogether], scale, values);
    }
  }

 private:
  __device__ int column(int i) const { return i * Config::kThreads + thread_; }
  __device__ bool has(int i) const { return real_ && column(i) < args_.columns; }

  // kOnce: nothing else reads them. Zeros where the row has none.
  template <bool kOnce = true, int kCount>
  __device__ void load_blocks(void const* row, int first, Block (&blocks)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      blocks[i] = Block{};
      if (has(first + i)) blocks[i] = load_block<Element, Config::kVectorized, kOnce>(row, column(first + i), args_.k);
    }
  }

  // Nothing is stored before x and the residual are loaded: the compiler keeps loads behind a store, and each would be awaited.
  // The sum is as large as x and read much later, so that it leaves L2 early.
  __device__ void add_residual(Block (&x)[kBlocks]) const {
    constexpr int kAhead = kWide ? 1 : kBlocks;
    auto const* const residual = static_cast<Raw const*>(args_.residual) + row_ * args_.residual_stride;
    auto* const sum = static_cast<Raw*>(args_.sum) + row_ * args_.k;
    Block added[kAhead];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i % kAhead == 0) load_blocks(residual, i, added);
      x[i] = sum_of<Element>(x[i], added[i % kAhead]);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (has(i)) stream_block<Element, Config::kVectorized>(sum, column(i), args_.k, x[i]);
    }
  }

  // Of the row, in an order that no tiling changes: lanes of each 32 blocks, folded, then those one after the other.
  __device__ float sum_of_squares(Block const (&x)[kBlocks]) const {
    __shared__ float sums[Config::kRows][kBlocks * kWarps];
    int const group = threadIdx.x / Config::kThreads;
    float* const own = sums[group];
    float of_block[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) of_block[i] = fp4gemm::sum_of_squares<Element>(x[i]);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) of_block[i] = __fadd_rn(of_block[i], __shfl_xor_sync(~0u, of_block[i], half));
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (thread_ % 32 == 0) own[i * kWarps + thread_ / 32] = of_block[i];
    }
    group_barrier<Config::kThreads>(group);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlocks * kWarps; ++i) total = __fadd_rn(total, own[i]);
    return total;
  }
};

}  // namespace fp4gemm
