// What the GEMM kernels on prepacked weights share: their argument and their epilogue.
#pragma once

#include "fp4gemm/async.hpp"
#include "fp4gemm/packed.hpp"

namespace fp4gemm {

// Packed by fp4gemm/packed_plan.py (PACKED_GEMM_ARGUMENTS): keep both alike.
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
  int64_t const* offsets;  // grouped: [experts + 1], the first token of each expert and the end of the last one's
  int64_t x_stride, d_stride_m, d_stride_n;
  int m, n, k;
  int panels, k_blocks;  // of 64 weight rows, of 64 columns
  int row_tiles, token_tiles, raster;  // WGMMA: tiles of a cluster; token tiles that share a pass over the rows
  int depth, depth_inverse;            // mma.sync: warps of a CTA that share a panel; 65536 / depth + 1
  int first_turn;                      // mma.sync, pairs: blocks of a round that the first warp of a pair takes
  int piece_blocks;                    // mma.sync: blocks of K of a piece of tokens, a multiple of 4
  int weights_first;                   // 1: asked for before the kernel in front, which leaves them alone, has ended
  int launch_early;                    // mma.sync, 1: dependents may start at once
  int panels_each;                     // mma.sync: panels of a cluster
  int panels_extra;                    // mma.sync: clusters with one more; WGMMA: row tiles with all their panels
  int experts;                         // grouped: w, outer_b and bias have one part for each, one after the other
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
  int const end_;  // of the tokens that are written
  int const row_;  // of this lane's first fragment row
  int const g_, t_;
  float outer_b_[2], bias_[2];
  // Whether all fragments have 16 contiguous rows of D in one sector. The same for all threads, and seen to be: around a branch
  // that could diverge ptxas gives up uniform registers, in the main loop too.
  bool const sectors_;

 public:
  // The vectors along rows of one lane, which callers may fetch early.
  struct Rows {
    float outer_b[2], bias[2];
    __device__ Rows(PackedGemmArguments const& args, int first_row, int64_t expert = 0) {
      float const* const scales = args.outer_b + expert * (args.outer_b_stride ? args.n : 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const row = min(first_row + static_cast<int>(threadIdx.x % 32 / 4) + 8 * i, args.n - 1);
        outer_b[i] = scales[static_cast<int64_t>(row) * args.outer_b_stride];
        if constexpr (kPresent<Bias>) bias[i] = element_at<Bias>(args.bias, expert * args.n + row);
      }
    }
  };

  // The first of the 16 rows. Reads vectors: only after wait_for_inputs().
  __device__ PackedEpilogue(PackedGemmArguments const& args, int first_row)
      : PackedEpilogue(args, first_row, Rows(args, first_row), args.m) {}
  __device__ PackedEpilogue(PackedGemmArguments const& args, int first_row, Rows const& rows, int end)
      : args_(args),
        end_(end),
        row_(first_row + threadIdx.x % 32 / 4),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        sectors_(args.d_stride_n == 1 && args.n % 16 == 0 && args.d_stride_m % 4 == 0 &&
                 reinterpret_cast<uint64_t>(args.d) % 8 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      outer_b_[i] = rows.outer_b[i];
      if constexpr (kPresent<Bias>) bias_[i] = rows.bias[i];
    }
  }

  // Of this lane's two tokens of eight; fetched early by those who can.
  __device__ float2 outer_a(int first_token) const { return outer_a(args_, first_token); }
  __device__ static float2 outer_a(PackedGemmArguments const& args, int first_token) {
    int const token = first_token + 2 * (threadIdx.x % 4);
    return {outer_a_at(args, token), outer_a_at(args, token + 1)};
  }

  // The numbers to store. v: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1).
  __device__ void rescale(int first_token, float2 outer_a, float (&values)[4]) const {
    int const token = first_token + 2 * t_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value =
          __fmul_rn(i % 2 ? outer_a.y : outer_a.x, __fmul_rn(outer_b_[i / 2], __fmul_rn(values[i], kPackedUnit)));
      if constexpr (kPresent<Bias>) value = __fadd_rn(value, bias_[i / 2]);
      if constexpr (kSource) value = __fadd_rn(value, source(token + i % 2, row_ + i / 2 * 8));
      values[i] = value;
    }
  }

  __device__ void operator()(int first_token, float2 outer_a, float4 v) const {
    int const token = first_token + 2 * t_;
    float values[4] = {v.x, v.y, v.z, v.w};
    rescale(first_token, outer_a, values);
    if constexpr (Out::kBytes == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_float(token + i % 2, row_ + i / 2 * 8, values[i]);
    } else if (sectors_) {
      store_sectors(first_token, Out::pack(values[0], values[1]), Out::pack(values[2], values[3]));
    } else {
      store_pairs(first_token, row_ - g_, Out::pack(values[0], values[1]));
      store_pairs(first_token, row_ - g_ + 8, Out::pack(values[2], values[3]));
    }
  }

 private:
  __device__ static float outer_a_at(PackedGemmArguments const& args, int token) {
    if (args.outer_a == nullptr) return 1.0f;
    return args.outer_a[static_cast<int64_t>(min(token, args.m - 1)) * args.outer_a_stride];
  }
  __device__ bool inside(int token, int row) const { return token < end_ && row < args_.n; }
  __device__ int64_t offset(int token, int row) const { return token * args_.d_stride_m + row * args_.d_stride_n; }
  __device__ float source(int token, int row) const {
    return inside(token, row) ? __fmul_rn(args_.beta, element_at<Out>(args_.c, offset(token, row))) : 0.0f;
  }
  __device__ void store_float(int token, int row, float v) const {
    if (inside(token, row)) static_cast<float*>(args_.d)[offset(token, row)] = v;
  }

  // Whole sectors, 16 rows of a token: even lanes take four of the upper rows, odd ones four of the lower.
  __device__ void store_sectors(int first_token, uint32_t upper, uint32_t lower) const {
    upper = transpose_8x8(upper), lower = transpose_8x8(lower);
    bool const odd = t_ & 1;
    uint32_t const other = __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 1);
    uint2 const v = odd ? uint2{other, lower} : uint2{upper, other};
    int const token = first_token + g_, row = row_ - g_ + (t_ & 1) * 8 + (t_ & 2) * 2;
    if (inside(token, row))
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(args_.d) + token * args_.d_stride_m + row) = v;
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
