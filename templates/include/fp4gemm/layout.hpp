// Where the scale factor of row m, block k stands; columns is ceil(K / 16). The table is in docs/numerics.md.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

// offset(m, k) = row_offset(m) + column_offset(k): a thread computes the first, in 64 bits, once for its row.
// row<kRows>(cta, i) is the row that group i of a CTA takes: the rows of a CTA are neighbours in the layout, so that their
// scales of four columns are 4 * kRows contiguous bytes.
struct LinearScales {
  static constexpr int kRowTile = 1;
  static constexpr bool kTiled = false;
  __device__ static int padded_columns(int columns) { return columns; }
  __device__ static int64_t row_offset(int64_t m, int columns) { return m * columns; }
  __device__ static int column_offset(int k) { return k; }
  __device__ static int64_t bytes(int64_t rows, int columns) { return rows * columns; }
  template <int kRows> __device__ static int64_t row(int cta, int i) { return static_cast<int64_t>(cta) * kRows + i; }
};

// Tiles of kTile rows by 4 columns, row-major over tiles.
template <int kTile> struct TiledScales {
  static constexpr int kRowTile = kTile;
  static constexpr bool kTiled = true;
  __device__ static int padded_columns(int columns) { return ceil_div(columns, 4) * 4; }
  __device__ static int column_offset(int k) { return k / 4 * (kTile * 4) + k % 4; }
  __device__ static int64_t tile_offset(int64_t tile, int columns) { return tile * (kTile * 4) * ceil_div(columns, 4); }
  __device__ static int64_t bytes(int64_t rows, int columns) {
    return tile_offset((rows + kTile - 1) / kTile, columns);
  }
};

struct Scales8x4 : TiledScales<8> {
  __device__ static int64_t row_offset(int64_t m, int columns) { return tile_offset(m / 8, columns) + m % 8 * 4; }
  template <int kRows> __device__ static int64_t row(int cta, int i) { return static_cast<int64_t>(cta) * kRows + i; }
};

// Rows 32 apart stand side by side: (m % 32, m % 128 / 32) is the place in a tile.
struct Scales128x4 : TiledScales<128> {
  __device__ static int64_t row_offset(int64_t m, int columns) {
    return tile_offset(m / 128, columns) + m % 32 * 16 + m % 128 / 32 * 4;
  }
  template <int kRows> __device__ static int64_t row(int cta, int i) {
    if constexpr (kRows != 2 && kRows % 4 != 0) return static_cast<int64_t>(cta) * kRows + i;
    constexpr int kCtas = 128 / kRows;  // of a tile
    int64_t const tile = static_cast<int64_t>(cta / kCtas) * 128;
    if constexpr (kRows == 2) return tile + cta % 32 + (cta % kCtas / 32 * 2 + i) * 32;
    return tile + cta % kCtas * (kRows / 4) + i / 4 + i % 4 * 32;
  }
};

}  // namespace fp4gemm
