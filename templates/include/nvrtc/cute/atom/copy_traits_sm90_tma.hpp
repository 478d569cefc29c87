// Stands before CuTe's header of this name and lets it build TMA descriptors in device code: the driver call becomes a
// recorded request. No descriptor logic is written twice.
#pragma once

#include <cute/algorithm/prefetch.hpp>
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/copy_traits.hpp>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>
#include <cute/numeric/integral_ratio.hpp>
#include <cutlass/cuda_host_adapter.hpp>

#include "fp4gemm/tensor_map.hpp"

namespace cute::TMA {

// CuTe has these two for hosts only.
template <class T> __device__ constexpr CUtensorMapDataType to_CUtensorMapDataType() {
  if constexpr (is_same_v<T, bfloat16_t>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  else if constexpr (is_same_v<T, half_t>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  else if constexpr (is_same_v<T, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  else if constexpr (is_same_v<T, uint16_t>) return CU_TENSOR_MAP_DATA_TYPE_UINT16;
  else if constexpr (is_same_v<T, uint32_t>) return CU_TENSOR_MAP_DATA_TYPE_UINT32;
  else if constexpr (is_same_v<T, uint64_t>) return CU_TENSOR_MAP_DATA_TYPE_UINT64;
  else if constexpr (sizeof_bits_v<T> == 4) return CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B;
  else if constexpr (sizeof_bits_v<T> == 8) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  else static_assert(sizeof(T) == 0, "no tensor-map data type for this element");
}

__device__ inline CUtensorMapSwizzle to_CUtensorMapSwizzle(SmemSwizzleBits bits, SmemSwizzleBase base) {
  if (base != SmemSwizzleBase::SWIZZLE_BASE_16B) __trap();
  switch (bits) {
    case SmemSwizzleBits::B32: return CU_TENSOR_MAP_SWIZZLE_32B;
    case SmemSwizzleBits::B64: return CU_TENSOR_MAP_SWIZZLE_64B;
    case SmemSwizzleBits::B128: return CU_TENSOR_MAP_SWIZZLE_128B;
    default: return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace cute::TMA

namespace std {
inline __device__ fp4gemm::NullStream cerr;
inline __device__ int endl;
}  // namespace std

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) ::fp4gemm::record_tensor_map
#undef __CUDACC_RTC__
#include_next <cute/atom/copy_traits_sm90_tma.hpp>
#define __CUDACC_RTC__ 1
