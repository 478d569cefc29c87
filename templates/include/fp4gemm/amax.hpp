// The largest magnitude of a tensor.
#pragma once

#include "fp4gemm/rows.hpp"

namespace fp4gemm {

// Packed by fp4gemm/launch.py (AMAX_ARGUMENTS): keep both alike.
// amax = max(|x|) without NaN over all rows; *amax must be 0 at launch. Non-negative floats order as their bits do.
struct AmaxArguments {
  void const* x;
  float* amax;
  int64_t x_stride, rows;
  int k, columns;
};

template <class Element, bool kVectorized, int kThreads, Producer kProducer = Producer::kNone>
__device__ void tensor_amax(AmaxArguments const& args) {
  float amax = 0.0f;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    auto const* source = static_cast<char const*>(args.x) + row * args.x_stride * Element::kBytes;
    for (int column = threadIdx.x; column < args.columns; column += kThreads) {
      auto const x = load_produced<Element, kVectorized, kProducer>(source, column, args.k);
      amax = fmaxf(amax, fabsf(flagged_amax<Element>(x)));
    }
  }
  // One atomic a CTA: they all meet at one address.
  amax = reduce_group<kThreads, 1>(amax);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<int*>(args.amax), __float_as_int(amax));
}

}  // namespace fp4gemm
