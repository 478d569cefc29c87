// Block scales of a tile of 128 x 128 values on their way to memory.
#pragma once

#include "fp4gemm/layout.hpp"
#include "fp4gemm/tile.hpp"

namespace fp4gemm {

// In place of a layout: results that are values, code * block scale as bf16, or in the form of packed.hpp.
struct ValuesForm {};
struct PackedForm {};

enum class Form { kCodes, kValues, kPacked };

// Block scales of 128 lines and eight blocks of them, gathered in shared memory in the order of the layout.
template <class Scales> struct TileScales;

template <int kTileRows> struct TiledTileScales {
  static constexpr Form kForm = Form::kCodes;
  // The rows of a tile of the layout that are in a row of tiles here take 2 * kTileRows * 4 bytes, one piece in memory.
  template <class Scales> __device__ static void flush(uint8_t const* staged, uint8_t* scales, int64_t line0,
                                                       int64_t lines, int block0, int blocks, int thread) {
    if (thread >= kTile * kTileBlocks / 16) return;
    constexpr int kPieces = kTileRows * kTileBlocks / 16;  // of 16 bytes in such a row
    int const group = thread / kPieces, piece = thread % kPieces;
    int64_t const line = line0 + group * kTileRows;
    int const block = block0 + piece / (kPieces / 2) * 4;
    if (line >= ceil_div(lines, kTileRows) * kTileRows || block >= Scales::padded_columns(blocks)) return;
    uint8_t* const to = scales + Scales::row_offset(line, blocks) + Scales::column_offset(block);
    reinterpret_cast<uint4*>(to)[piece % (kPieces / 2)] = reinterpret_cast<uint4 const*>(staged)[thread];
  }
  __device__ static int64_t ceil_div(int64_t a, int b) { return (a + b - 1) / b; }
};

template <> struct TileScales<Scales128x4> : TiledTileScales<128> {
  __device__ static int offset(int line, int block) {
    return block / 4 * 512 + line % 32 * 16 + line / 32 * 4 + block % 4;
  }
};
template <> struct TileScales<Scales8x4> : TiledTileScales<8> {
  __device__ static int offset(int line, int block) {
    return line / 8 * 64 + block / 4 * 32 + line % 8 * 4 + block % 4;
  }
};
template <> struct TileScales<LinearScales> {
  static constexpr Form kForm = Form::kCodes;
  __device__ static int offset(int line, int block) { return line * kTileBlocks + block; }
  template <class Scales> __device__ static void flush(uint8_t const* staged, uint8_t* scales, int64_t line0,
                                                       int64_t lines, int block0, int blocks, int thread) {
    if (line0 + thread >= lines) return;
    uint8_t* const to = scales + (line0 + thread) * blocks + block0;
    uint8_t const* const from = staged + thread * kTileBlocks;
    // A row of a member of a group may begin anywhere.
    if (block0 + kTileBlocks <= blocks && reinterpret_cast<uint64_t>(to) % 8 == 0) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<uint2 const*>(from);
    } else {
      for (int i = 0; i < min(kTileBlocks, blocks - block0); ++i) to[i] = from[i];
    }
  }
};
template <> struct TileScales<ValuesForm> {
  static constexpr Form kForm = Form::kValues;
};
template <> struct TileScales<PackedForm> {
  static constexpr Form kForm = Form::kPacked;
  __device__ static int offset(int line, int block) { return line * kTileBlocks + block; }
};

}  // namespace fp4gemm
