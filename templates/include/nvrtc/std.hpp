// What CUTLASS uses and NVRTC lacks or hides; fp4gemm/gemm.hpp includes it before CUTLASS.
#pragma once

// CUTLASS divides by multiplication with 128-bit constants, which to_underlying_arguments computes; its own 128-bit type
// stops at a breakpoint on a device, NVRTC's (--device-int128) works.
#define CUTLASS_UINT128_NATIVE

#include <cuda/std/type_traits>
#include <cuda/std/utility>

namespace std {
using cuda::std::is_const_v;
using cuda::std::is_pointer_v;
using cuda::std::is_same_v;
using cuda::std::void_t;

// Structured bindings over cute::tuple need the const forms.
template <class... T> struct tuple_size;
template <size_t I, class... T> struct tuple_element;
template <class T> struct tuple_size<T const> : tuple_size<T> {};
template <size_t I, class T> struct tuple_element<I, T const> {
  using type = typename tuple_element<I, T>::type const;
};
}  // namespace std
