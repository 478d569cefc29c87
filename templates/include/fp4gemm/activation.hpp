// Activations of an epilogue, one fp32 value at a time; fp4gemm/reference/activation.py is the same in torch.
// As CUTLASS's visitors want them: templates that take a value or an Array of values.
#pragma once

#include "cutlass/array.h"

namespace fp4gemm {

template <class Function, class T> struct Elementwise {
  CUTLASS_DEVICE T operator()(T x) const { return Function::of(x); }
};

template <class Function, class T, int N> struct Elementwise<Function, cutlass::Array<T, N>> {
  CUTLASS_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& x) const {
    cutlass::Array<T, N> y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) y[i] = Function::of(x[i]);
    return y;
  }
};

struct ReluFunction {  // NaN stays NaN
  CUTLASS_DEVICE static float of(float x) { return x < 0.0f ? 0.0f : x; }
};

struct GeluFunction {
  CUTLASS_DEVICE static float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};

struct SiluFunction {
  CUTLASS_DEVICE static float of(float x) { return x / (1.0f + expf(-x)); }
};

template <class T> using Relu = Elementwise<ReluFunction, T>;
template <class T> using Gelu = Elementwise<GeluFunction, T>;
template <class T> using Silu = Elementwise<SiluFunction, T>;

}  // namespace fp4gemm
