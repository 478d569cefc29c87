// Blocks of a row: from memory, through a producer, and back; and what threads that share a row do together.
#pragma once

#include "fp4gemm/async.hpp"
#include "fp4gemm/encode.hpp"
#include "fp4gemm/producer.hpp"

namespace fp4gemm {

// kOnce: nothing else reads it.
template <class Element, bool kVectorized, bool kOnce = true>
__device__ __forceinline__ typename Element::Block load_block(void const* row, int column, int k) {
  if constexpr (kVectorized) {
    Words<Element::kBytes> words;
    auto const* source = reinterpret_cast<uint4 const*>(row) + column * Element::kBytes;
#pragma unroll
    for (int i = 0; i < Element::kBytes; ++i)
      reinterpret_cast<uint4*>(words.w)[i] = kOnce ? __ldcs(source + i) : source[i];
    return Element::unpack(words);
  } else {
    typename Element::Block x{};
    auto const* source = reinterpret_cast<typename Element::Raw const*>(row) + static_cast<int64_t>(column) * kBlock;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (column * kBlock + i < k) Element::set(x, i, source[i]);
    }
    return x;
  }
}

// By stores that mark what they write as the first to leave L2, where they are of 16 bytes.
template <class Element, bool kVectorized>
__device__ __forceinline__ void stream_block(void* row, int column, int k, typename Element::Block const& x) {
  if constexpr (kVectorized) {
    auto* const target = reinterpret_cast<uint4*>(row) + column * Element::kBytes;
#pragma unroll
    for (int i = 0; i < Element::kBytes; ++i) __stcs(target + i, reinterpret_cast<uint4 const*>(x.w)[i]);
  } else {
    constexpr int kOfWord = 4 / Element::kBytes;
    auto* const target = reinterpret_cast<typename Element::Raw*>(row) + static_cast<int64_t>(column) * kBlock;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (column * kBlock + i < k)
        target[i] = static_cast<typename Element::Raw>(x.w[i / kOfWord] >> (i % kOfWord * 8 * Element::kBytes));
    }
  }
}

// A block of what an element-wise producer makes of a row.
template <class Element, bool kVectorized, Producer kProducer, bool kOnce = true>
__device__ __forceinline__ typename Element::Block load_produced(void const* row, int column, int k) {
  auto const x = load_block<Element, kVectorized, kOnce>(row, column, k);
  if constexpr (kProducer == Producer::kNone || is_norm(kProducer)) {
    return x;
  } else if constexpr (kProducer == Producer::kSiluMul) {
    auto const* up = static_cast<typename Element::Raw const*>(row) + k;
    return produce<kProducer, Element>(x, load_block<Element, kVectorized, kOnce>(up, column, k));
  } else {
    return produce<kProducer, Element>(x, x);
  }
}

// The same of a row whose columns are taken in another order; k % 16 == 0.
template <class Element>
__device__ __forceinline__ typename Element::Block gather_block(void const* row, int const* order, int column) {
  auto const* source = reinterpret_cast<typename Element::Raw const*>(row);
  typename Element::Block x{};
#pragma unroll
  for (int i = 0; i < kBlock; i += 4) {
    auto const at = *reinterpret_cast<int4 const*>(order + column * kBlock + i);
    Element::set(x, i, source[at.x]), Element::set(x, i + 1, source[at.y]);
    Element::set(x, i + 2, source[at.z]), Element::set(x, i + 3, source[at.w]);
  }
  return x;
}

template <int kThreads> __device__ __forceinline__ void group_barrier(int group) { named_sync<kThreads>(group + 1); }

// Maximum over a group of kThreads threads of the CTA; groups do not wait for one another.
template <int kThreads, int kGroups> __device__ __forceinline__ float reduce_group(float amax) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, lane));
  constexpr int kWarps = kThreads / 32;
  if constexpr (kWarps > 1) {
    __shared__ float partial[kGroups][kWarps];
    int const group = threadIdx.x / kThreads;
    if (threadIdx.x % 32 == 0) partial[group][threadIdx.x % kThreads / 32] = amax;
    group_barrier<kThreads>(group);
    amax = partial[group][0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) amax = fmaxf(amax, partial[group][w]);
  }
  return amax;
}

__device__ __forceinline__ void prefetch_l2(void const* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void prefetch_line_l2(void const* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)) : "memory");
}

__device__ __forceinline__ uint4 swap_with_neighbour(uint4 v) {
  return {__shfl_xor_sync(~0u, v.x, 1), __shfl_xor_sync(~0u, v.y, 1), __shfl_xor_sync(~0u, v.z, 1),
          __shfl_xor_sync(~0u, v.w, 1)};
}

}  // namespace fp4gemm
