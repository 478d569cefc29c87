// A tile of 128 x 128 values of x in shared memory, from which 16-value blocks along rows and along columns are read: what
// the tile quantizer and the row and column amaxes share. All reads and writes of 16 bytes are free of bank conflicts.
#pragma once

#include "fp4gemm/async.hpp"
#include "fp4gemm/producer.hpp"

namespace fp4gemm {

inline constexpr int kTile = 128;  // rows and columns of x; 128x4 scales of both results then are whole pieces
inline constexpr int kTileBlocks = kTile / kBlock;
inline constexpr int kTileThreads = 256;

// The compiler would compute an address again in each round of a loop rather than keep it in a register.
__device__ __forceinline__ uint32_t keep(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ void* shared_pointer(uint32_t address) { return __cvta_shared_to_generic(address); }

struct TilePlace {
  int row, column;  // in tiles
};

// x [rows, columns], as kernels' arguments hold it.
struct TileSource {
  void const* x;
  void const* h;  // where x is a gradient: what the activation's derivative is taken at, as x is stored
  int64_t row_stride, column_stride;  // in elements; the second is 1 where loads are vectorized
  int64_t rows;
  int columns;
  int column_tiles;  // ceil(columns / 128)
  uint32_t magic;  // t / column_tiles for 0 <= t < 2^31 is (t * magic >> 32) >> shift; 0: column_tiles is 1
  int shift;

  __device__ TilePlace place(uint32_t tile) const {
    int const row = static_cast<int>(magic == 0 ? tile : __umulhi(tile, magic) >> shift);
    return {row, static_cast<int>(tile - row * column_tiles)};
  }
};

// What an element of x is in a tile: e4m3 becomes fp16, all others stay what they are.
template <class Element> struct TileValue {
  using Type = Element;
};
template <> struct TileValue<E4m3> {
  using Type = Fp16;
};

template <class Source> class Tile {
  using Element = typename TileValue<Source>::Type;
  using Block = typename Element::Block;
  static constexpr int kRowBytes = kTile * Element::kBytes;
  static constexpr int kChunks = kRowBytes / 16;

  uint8_t* const shared_;
  int const warp_ = threadIdx.x / 32, lane_ = threadIdx.x % 32;
  uint32_t const rows_, columns_;  // where this thread's first blocks begin

  // Rows are 128 or more bytes apart, so 16-byte chunks of one column fall in the same banks; those of rows 32 apart, and of
  // two neighbours, change places, which are the eight rows that are read at once.
  __device__ static int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ ((row & 1) | row >> 5 << 1)) * 16;
  }

 public:
  using Value = Element;
  static constexpr int kBytes = kTile * kRowBytes;

  __device__ explicit Tile(uint8_t* shared)
      : shared_(shared), rows_(keep(first_of_rows())), columns_(keep(first_of_columns())) {}

  // Starts to copy the tile at (row, column); what is outside of x becomes 0.
  template <bool kVectorized, Producer kProducer = Producer::kNone>
  __device__ void load(TileSource const& source, int64_t row0, int column0) const {
    auto const* const x = static_cast<char const*>(in_global(source.x));
    if constexpr (is_gradient(kProducer)) {
      load_gradients<kVectorized, kProducer>(source, row0, column0);
    } else if constexpr (kVectorized && Source::kBytes == 1) {
      load_bytes(source, row0, column0);
    } else if constexpr (kVectorized) {
      constexpr int kPerChunk = 16 / Element::kBytes, kRows = kTileThreads / kChunks;  // at a time
      int const first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, column = column0 + chunk * kPerChunk;
      int const bytes = min(max(source.columns - column, 0), kPerChunk) * Element::kBytes;
      auto const* from = x + ((row0 + first) * source.row_stride + column) * Element::kBytes;
      int64_t const step = source.row_stride * kRows * Element::kBytes;
      if (row0 + kTile <= source.rows && column0 + kTile <= source.columns) {
        uint32_t const to = keep(shared_address(shared_) + offset(first, chunk));
#pragma unroll
        for (int i = 0; i < kTile; i += kRows) {
          copy_16_bytes((to ^ i / 32 * 32) + i * kRowBytes, from);  // as offset() has it
          from += step;
        }
        return;
      }
#pragma unroll 1
      for (int row = first; row < kTile; row += kRows) {
        int const valid = row0 + row < source.rows ? bytes : 0;
        copy_16_bytes(shared_address(shared_) + offset(row, chunk), valid > 0 ? from : x, valid);
        from += step;
      }
    } else {
      for (int i = threadIdx.x; i < kTile * kTile; i += kTileThreads) {
        int const row = i / kTile, column = i % kTile;
        typename Source::Raw value{};
        if (row0 + row < source.rows && column0 + column < source.columns)
          value = reinterpret_cast<typename Source::Raw const*>(
              x)[(row0 + row) * source.row_stride + (column0 + column) * source.column_stride];
        int const at = column * Element::kBytes;
        auto* const to = shared_ + offset(row, at / 16) + at % 16;
        if constexpr (Source::kBytes == 1) {
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(e4m3_to_half2(value));
        } else {
          *reinterpret_cast<typename Source::Raw*>(to) = value;
        }
      }
    }
  }

  __device__ static void wait() {
    wait_for_copies();
    __syncthreads();
  }

  // A thread has two steps along rows and two along columns, and in each a pair of neighbouring blocks of a row, or of a
  // column: line is that row or column, pair the number of the blocks, divided by 2. Four lanes have a whole line.
  struct Place {
    int line, pair;
  };

  static constexpr int kSteps = 2;
  static constexpr int kRowStep = 2, kColumnStep = 64;  // from a line to that of the next step

  __device__ Place row_place() const { return {lane_ % 8 / 2 * 32 + 4 * warp_ + lane_ % 2, lane_ / 8}; }
  __device__ Place column_place() const { return {8 * warp_ + lane_ / 4, lane_ % 4}; }

  __device__ Block row_block(int step, int half) const {
    Block x;
#pragma unroll
    for (int i = 0; i < Element::kBytes; ++i) {
      // Neither a step of two rows nor the first of a pair's chunks touches the bits that change here.
      uint32_t const at = (rows_ ^ (half * Element::kBytes + i) * 16) + step * kRowStep * kRowBytes;
      reinterpret_cast<uint4*>(x.w)[i] = load_shared_128(at);
    }
    return x;
  }

  __device__ Block column_block(int step, int half) const {
    Block x;
    if constexpr (Element::kBytes == 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t const at = columns_ + (half * kBlock + i * 8) * kRowBytes + step * kColumnStep * 2;
        reinterpret_cast<uint4*>(x.w)[i] = load_matrices_transposed(at);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
        x.w[i] = load_shared_32((columns_ ^ i % 2 * 16) + (half * kBlock + i) * kRowBytes + step * kColumnStep * 4);
    }
    return x;
  }

 private:
  // Through registers; kVectorized: rows are whole 16 bytes.
  template <bool kVectorized, Producer kProducer>
  __device__ void load_gradients(TileSource const& source, int64_t row0, int column0) const {
    if constexpr (kVectorized) {
      constexpr int kPerChunk = 16 / Element::kBytes, kRows = kTileThreads / kChunks;
      int const first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, column = column0 + chunk * kPerChunk;
      int64_t const at = ((row0 + first) * source.row_stride + column) / kPerChunk;
      auto const* g = static_cast<uint4 const*>(in_global(source.x)) + at;
      auto const* h = static_cast<uint4 const*>(in_global(source.h)) + at;
      int64_t const step = source.row_stride / kPerChunk * kRows;
#pragma unroll 4
      for (int row = first; row < kTile; row += kRows, g += step, h += step) {
        uint4 values{};
        if (row0 + row < source.rows && column < source.columns)
          values = gradients<kProducer, Element>(__ldcs(g), __ldcs(h));
        *reinterpret_cast<uint4*>(shared_ + offset(row, chunk)) = values;
      }
    } else {
      using Raw = typename Element::Raw;
      for (int i = threadIdx.x; i < kTile * kTile; i += kTileThreads) {
        int const row = i / kTile, column = i % kTile;
        Raw value{};
        if (row0 + row < source.rows && column0 + column < source.columns) {
          int64_t const from = (row0 + row) * source.row_stride + (column0 + column) * source.column_stride;
          uint32_t const g = static_cast<Raw const*>(in_global(source.x))[from],
                         h = static_cast<Raw const*>(in_global(source.h))[from];
          value = static_cast<Raw>(gradients<kProducer, Element>({g, 0, 0, 0}, {h, 0, 0, 0}).x);
        }
        int const at = column * Element::kBytes;
        *reinterpret_cast<Raw*>(shared_ + offset(row, at / 16) + at % 16) = value;
      }
    }
  }

  // 16 bytes are a block, which becomes two chunks of the tile on its way through registers.
  __device__ void load_bytes(TileSource const& source, int64_t row0, int column0) const {
    int const column = column0 + threadIdx.x % kTileBlocks * kBlock;
#pragma unroll
    for (int row = threadIdx.x / kTileBlocks; row < kTile; row += kTileThreads / kTileBlocks) {
      auto const* const from =
          static_cast<uint8_t const*>(in_global(source.x)) + (row0 + row) * source.row_stride + column;
      Words<1> bytes{};
      if (row0 + row < source.rows) {
        if (column + kBlock <= source.columns) {
          *reinterpret_cast<uint4*>(bytes.w) = __ldcs(reinterpret_cast<uint4 const*>(from));
        } else {
#pragma unroll 1
          for (int i = 0; i < source.columns - column; ++i) bytes.w[i / 4] |= uint32_t{from[i]} << (i % 4 * 8);
        }
      }
      Block const x = E4m3::unpack(bytes);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<uint4*>(shared_ + offset(row, threadIdx.x % kTileBlocks * 2 + i)) =
            reinterpret_cast<uint4 const*>(x.w)[i];
    }
  }

  __device__ uint32_t first_of_rows() const {
    Place const place = row_place();
    return shared_address(shared_) + offset(place.line, place.pair * 2 * Element::kBytes);
  }
  __device__ uint32_t first_of_columns() const {
    if constexpr (Element::kBytes == 2) {
      // Of a transposed matrix lane l gets rows 2 (l % 4) and the next of column l / 4. Rows are where their addresses say: rows
      // 2 q and 2 q + 1 of matrix i are 32 q + 2 i and the next, so that a lane gets 16 in a row.
      return shared_address(shared_) + offset(lane_ % 8 / 2 * 32 + lane_ / 8 * 2 + lane_ % 2, warp_);
    } else {
      static_assert(Element::kBytes == 4, "elements of two or four bytes");
      Place const place = column_place();
      return shared_address(shared_) + offset(place.pair * 32, place.line / 4) + place.line % 4 * 4;
    }
  }
};

}  // namespace fp4gemm
