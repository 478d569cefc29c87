// What the GEMM kernels on prepacked weights share: their argument and their epilogue.
#pragma once

#include "fp4gemm/async.hpp"
#include "fp4gemm/packed.hpp"

namespace fp4gemm {

// Packed by fp4gemm/launch.py (PACKED_GEMM_ARGUMENTS): keep both alike.
// D[m, n] = cast(outer_a[m] * (outer_b[n] * acc) + bias[n] + beta * C[m, n]), terms as the kernel has them.
struct PackedGemmArguments {
  TensorMap x_map;       // tokens [m, k], boxes of 64 columns; kernels that load them by TMA
  void const* x;         // the same tokens, rows x_stride elements apart
  uint8_t const* w;      // prepacked: [panels, k_blocks, kPackedBlockBytes]
  void* d;               // element [m, n] at m * d_stride_m + n * d_stride_n, one of them 1
  void const* c;         // strides of d
  float const* outer_a;  // [m] or [1]; null: 1
  float const* outer_b;  // [n] or [1]
  void const* bias;      // [n]
  int64_t x_stride, d_stride_m, d_stride_n;
  int m, n, k;
  int panels, k_blocks;  // of 64 weight rows, of 64 columns
  int row_tiles, token_tiles, raster;  // WGMMA: tiles of a cluster; token tiles that share a pass over the rows
  int row_groups, depth_log2;          // mma.sync: warps of a CTA, along panels and (a power of two) along K
  int warp_blocks;                     // mma.sync: blocks of K of a warp, at most
  int panels_each, panels_extra;       // mma.sync: panels of a cluster; how many clusters have one more
  int outer_a_stride, outer_b_stride;  // 0 or 1
  float beta;
};

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(pair));
  return v;
}

template <class Element> __device__ __forceinline__ float element_at(void const* p, int64_t i) {
  if constexpr (Element::kBytes == 4) {
    return static_cast<float const*>(p)[i];
  } else {
    return Element::low(static_cast<uint16_t const*>(p)[i]);
  }
}

struct None {};  // an absent term
template <class T> inline constexpr bool kPresent = true;
template <> inline constexpr bool kPresent<None> = false;

// Rescales accumulator fragments of 16 weight rows x 8 tokens and writes them. A lane has rows g and g + 8 and tokens 2t and
// 2t + 1, as every MMA leaves them. All lanes of a warp call together.
template <class Out, class Bias, bool kSource> class PackedEpilogue {
  PackedGemmArguments const& args_;
  int const row_;  // of this lane's first fragment row
  int const g_, t_;
  float outer_b_[2], bias_[2];

 public:
  // The first of the 16 rows. Reads vectors: only after wait_for_inputs().
  __device__ PackedEpilogue(PackedGemmArguments const& args, int first_row)
      : args_(args), row_(first_row + threadIdx.x % 32 / 4), g_(threadIdx.x % 32 / 4), t_(threadIdx.x % 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const row = min(row_ + 8 * i, args.n - 1);
      outer_b_[i] = args.outer_b[static_cast<int64_t>(row) * args.outer_b_stride];
      if constexpr (kPresent<Bias>) bias_[i] = element_at<Bias>(args.bias, row);
    }
  }

  // Of this lane's two tokens of eight; fetched early by those who can.
  __device__ float2 outer_a(int first_token) const {
    int const token = first_token + 2 * t_;
    return {outer_a_at(token), outer_a_at(token + 1)};
  }

  // v: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1).
  __device__ void operator()(int first_token, float2 outer_a, float4 v) const {
    int const token = first_token + 2 * t_;
    float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = __fmul_rn(i % 2 ? outer_a.y : outer_a.x, __fmul_rn(outer_b_[i / 2], __fmul_rn(values[i], kPackedUnit)));
      if constexpr (kPresent<Bias>) value = __fadd_rn(value, bias_[i / 2]);
      if constexpr (kSource) value = __fadd_rn(value, source(token + i % 2, row_ + i / 2 * 8));
      values[i] = value;
    }
    if constexpr (Out::kBytes == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_float(token + i % 2, row_ + i / 2 * 8, values[i]);
    } else {
      store_pairs(first_token, row_ - g_, Out::pack(values[0], values[1]));
      store_pairs(first_token, row_ - g_ + 8, Out::pack(values[2], values[3]));
    }
  }

 private:
  __device__ float outer_a_at(int token) const {
    if (args_.outer_a == nullptr) return 1.0f;
    return args_.outer_a[static_cast<int64_t>(min(token, args_.m - 1)) * args_.outer_a_stride];
  }
  __device__ bool inside(int token, int row) const { return token < args_.m && row < args_.n; }
  __device__ int64_t offset(int token, int row) const {
    return token * args_.d_stride_m + row * args_.d_stride_n;
  }
  __device__ float source(int token, int row) const {
    return inside(token, row) ? __fmul_rn(args_.beta, element_at<Out>(args_.c, offset(token, row))) : 0.0f;
  }
  __device__ void store_float(int token, int row, float v) const {
    if (inside(token, row)) static_cast<float*>(args_.d)[offset(token, row)] = v;
  }

  // An 8 x 8 matrix, a pair of tokens a lane; row-major D takes pairs of rows instead: whole sectors either way.
  __device__ void store_pairs(int first_token, int first_row, uint32_t pair) const {
    bool const row_major = args_.d_stride_n == 1;
    if (row_major) pair = transpose_8x8(pair);
    int const token = first_token + (row_major ? g_ : 2 * t_), row = first_row + (row_major ? 2 * t_ : g_);
    bool const both = row_major ? inside(token, row + 1) : inside(token + 1, row);
    auto* const to = static_cast<uint16_t*>(args_.d) + offset(token, row);
    if (both && reinterpret_cast<uint64_t>(to) % 4 == 0) {
      *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      if (inside(token, row)) to[0] = static_cast<uint16_t>(pair);
      if (both) to[1] = static_cast<uint16_t>(pair >> 16);
    }
  }
};

}  // namespace fp4gemm
