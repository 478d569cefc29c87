// Plain NVFP4 to the prepacked form of packed.hpp, and back. Four warps work on a block of 64 x 64 values, one 16-row group
// each; lane l = 4g + t owns rows g and g + 8 of it and the 16 bytes at l. fp4gemm/reference/packed.py is the same in torch.
//
// A quad's lanes load one k-step's 16 codes of a row each, whole sectors between them; transposing bytes over the quad gives
// every lane its two bytes of each step: byte j of a word is then the lane's pair of codes of step j.
#pragma once

#include "fp4gemm/layout.hpp"
#include "fp4gemm/packed.hpp"

namespace fp4gemm {

// Packed by fp4gemm/launch.py (PACK_ARGUMENTS): keep both alike.
struct PackArguments {
  uint8_t* data;  // [rows, columns * 8], 8-byte aligned
  uint8_t* block_scale;  // in the layout
  uint8_t* packed;  // [ceil(rows / 64), blocks, 2304], 16-byte aligned
  int64_t rows;
  int64_t padded_rows;  // pack: rows; unpack: the rows that block_scale has
  int columns;  // ceil(k / 16)
  int blocks;  // ceil(k / 64)
};

// The inverse of split_codes.
__device__ __forceinline__ uint2 join_codes(uint32_t const (&r)[8]) {
  uint32_t const x = rotate_left(r[6], 8) | r[7] >> 2;
  return {r[0] | rotate_left(r[1], 4) | r[2] >> 6 | (x & kSharedBits),
          rotate_left(r[3], 2) | rotate_left(r[4], 6) | r[5] >> 4 | (x & ~kSharedBits)};
}

// A byte of two codes as a fragment register, and back.
__device__ __forceinline__ uint32_t to_register(uint32_t pair) {
  return (pair * 0x00040040u & 0x01C001C0u) | (pair * 0x01001000u & 0x80008000u);
}
__device__ __forceinline__ uint32_t to_pair(uint32_t r) {
  uint32_t const nibbles = (r >> 6 & 0x00070007u) | (r >> 12 & 0x00080008u);
  return (nibbles | nibbles >> 12) & 0xFFu;
}

// 4 x 4 bytes over the lanes of a quad: byte i of lane j goes to byte j of lane i.
__device__ __forceinline__ uint32_t transpose_quad(uint32_t v, int t) {
  v = __byte_perm(v, __shfl_xor_sync(~0u, v, 1), t & 1 ? 0x3715 : 0x6240);
  return __byte_perm(v, __shfl_xor_sync(~0u, v, 2), t & 2 ? 0x3276 : 0x5410);
}

// Both halves of a pair of e4m3 magnitudes as packed scale bytes, and back. NaN is 0x7F here and 0xFF there.
__device__ __forceinline__ uint32_t to_packed_scales(uint32_t pair) {
  uint32_t halves = e4m3x2_to_half2(static_cast<uint16_t>(pair));
  asm("mul.f16x2 %0, %0, %1;" : "+r"(halves) : "r"(0x58005800u));  // 2^7
  return (halves >> 7 & 0xFFu) | (halves >> 15 & 0xFF00u);
}
__device__ __forceinline__ uint32_t from_packed_scales(uint32_t pair) {
  uint32_t halves = (pair & 0xFFu) << 7 | (pair & 0xFF00u) << 15;
  uint16_t bytes;
  asm("mul.f16x2 %0, %0, %1;" : "+r"(halves) : "r"(0x20002000u));  // 2^-7
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(bytes) : "r"(halves));
  return bytes;
}

// What the e4m3 bytes of four steps do to the codes: those of scale 0 keep only their sign, negative scales flip it.
__device__ __forceinline__ uint32_t apply_scale_rules(uint32_t pairs, uint32_t scales) {
  uint32_t const nonzero = ((scales & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) >> 7 & 0x01010101u;
  uint32_t const negative = scales & 0x80808080u;
  return (pairs & (nonzero * 0x77u | 0x88888888u)) ^ (negative | negative >> 4);
}

// A packed block of 2304 bytes from its 128 threads: of thread 32 w + 4 g + t the codes and the block scales of its step of
// rows 16 w + g and 8 below, columns 0..7 and 8..15.
__device__ __forceinline__ void pack_block(uint8_t* to, int thread, uint2 const (&halves)[2],
                                           uint32_t const (&scales)[2]) {
  int const t = thread % 4;
  reinterpret_cast<uint16_t*>(to + kPackedCodeBytes)[thread] =
      static_cast<uint16_t>(to_packed_scales((scales[0] | scales[1] << 8) & 0x7F7Fu));
  uint32_t fragments[4];  // a0..a3, byte j for step j
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t every = scales[i] << (8 * t);
    every |= __shfl_xor_sync(~0u, every, 1);
    every |= __shfl_xor_sync(~0u, every, 2);
    fragments[i] = apply_scale_rules(transpose_quad(halves[i].x, t), every);
    fragments[i + 2] = apply_scale_rules(transpose_quad(halves[i].y, t), every);
  }
  uint2 words[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t r[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) r[i] = to_register(__byte_perm(fragments[i % 4], 0, 0x4440 + 2 * h + i / 4));
    words[h] = join_codes(r);
  }
  reinterpret_cast<uint4*>(to)[thread] = {words[0].x, words[0].y, words[1].x, words[1].y};
}

template <class Scales, int kThreads> class BlockPacker {
  static_assert(kThreads % 128 == 0, "four warps a block");
  PackArguments const& args_;
  int const t_ = threadIdx.x % 4, g_ = threadIdx.x / 4 % 8;
  int64_t band_;
  int block_;

  __device__ int64_t row(int half) const { return band_ * kPackedRows + threadIdx.x / 32 % 4 * 16 + g_ + 8 * half; }
  __device__ int column() const { return block_ * 4 + t_; }  // of block scales: the lane's own step
  __device__ uint2* codes(int64_t row) const {
    return reinterpret_cast<uint2*>(args_.data) + row * args_.columns + column();
  }
  __device__ uint8_t* scale(int64_t row) const {
    return args_.block_scale + Scales::row_offset(row, args_.columns) + Scales::column_offset(column());
  }
  __device__ bool stored(int64_t row) const { return row < args_.rows && column() < args_.columns; }
  __device__ uint8_t* packed() const { return args_.packed + (band_ * args_.blocks + block_) * kPackedBlockBytes; }
  __device__ uint4* packed_codes() const { return reinterpret_cast<uint4*>(packed()) + threadIdx.x % 128; }
  __device__ uint16_t* packed_scales() const {
    return reinterpret_cast<uint16_t*>(packed() + kPackedCodeBytes) + threadIdx.x % 128;
  }

 public:
  __device__ explicit BlockPacker(PackArguments const& args) : args_(args) {
    uint32_t const unit = blockIdx.x * (kThreads / 128) + threadIdx.x / 128;  // below 2^31: calls.py
    band_ = unit / args.blocks;
    block_ = static_cast<int>(unit % args.blocks);
  }

  __device__ void pack() const {
    if (band_ * kPackedRows >= args_.rows) return;
    uint2 halves[2] = {};  // codes of the lane's step: columns 0..7 and 8..15
    uint32_t scales[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (int64_t const m = row(i); stored(m)) {
        halves[i] = __ldcs(codes(m));
        scales[i] = *scale(m);
      }
    }
    pack_block(packed(), threadIdx.x % 128, halves, scales);
  }

  __device__ void unpack() const {
    if (band_ * kPackedRows >= args_.padded_rows) return;
    uint4 words = {};
    uint32_t pair = 0;
    if (band_ * kPackedRows < args_.rows) {
      words = __ldcs(packed_codes());
      pair = from_packed_scales(*packed_scales());
    }
    uint32_t fragments[4] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t r[8];
      split_codes(h ? words.z : words.x, h ? words.w : words.y, r);
#pragma unroll
      for (int i = 0; i < 8; ++i) fragments[i % 4] |= to_pair(r[i]) << (16 * h + i / 4 * 8);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint2 const half = {transpose_quad(fragments[i], t_), transpose_quad(fragments[i + 2], t_)};
      int64_t const m = row(i);
      if (stored(m)) *codes(m) = half;
      if (m < args_.padded_rows && column() < Scales::padded_columns(args_.columns))
        *scale(m) = stored(m) ? static_cast<uint8_t>(pair >> (8 * i)) : 0;
    }
  }
};

}  // namespace fp4gemm
