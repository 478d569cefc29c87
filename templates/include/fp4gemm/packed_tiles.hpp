// Which tiles of a product a cluster of the WGMMA kernel computes, and in which order.
//
// Clusters take the next tile each, and a few token tiles at a time pass over the rows together, so that what one of them has
// read of tokens or weights the others find in L2.
//
// Grouped: tokens are sorted by expert. Where they begin stands in device memory, so a captured graph follows it: every CTA
// makes a table of the token tiles in front of each expert, and finds tiles there. A tile's last tokens may be the next
// expert's: they are other columns of the product, computed and not stored. A few tokens make few rounds of clusters, of
// which the last one would be half empty: where warpgroups can do with fewer panels, its row tiles are smaller.
#pragma once

#include "fp4gemm/packed_gemm.hpp"

namespace fp4gemm {

template <class Config> class PackedTiles {
  static constexpr int kCluster = Config::kMulticast * Config::kSplit;

  PackedGemmArguments const& args_;
  uint32_t const table_;  // shared memory: the cut, then 8 bytes for each expert and 8 for the end
  int const rank_;  // in the multicast group
  int const cluster_, clusters_;

 public:
  struct Tile {
    int token, end;  // the first token, and the end of those that are stored
    int expert;
    int panel, panels;  // the first one, and how many are computed: kLeastPanels to kPanels
    int stored;  // of these, the first
  };

  // Rows of a weight as row tiles: first whole ones, which fill rounds, then the rest. Sizes are panels of a CTA.
  struct Cut {
    int size, rows, rest_size, rest_rows;
  };

  struct Left {
    int at, end;
    Cut cut;
    __device__ explicit operator bool() const { return at < end; }
  };

  __device__ PackedTiles(PackedGemmArguments const& args, uint32_t table, int rank)
      : args_(args), table_(table), rank_(rank), cluster_(blockIdx.x / kCluster), clusters_(gridDim.x / kCluster) {}

  // Grouped: before all else, by all threads of the CTA. Reads the offsets.
  __device__ void tabulate_experts() const {
    int const experts = args_.experts;
    for (int i = threadIdx.x; i <= experts; i += Config::kThreads) {
      int64_t const first = args_.offsets[i];
      store_shared_32(at(i) + 4, first < 0 ? 0 : first < args_.m ? static_cast<int>(first) : args_.m);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // A lane has so many experts in a row: it counts their tiles, then adds what the lanes in front have.
      int const each = experts / 32 + 1, first = threadIdx.x * each, last = min(first + each, experts + 1);
      auto const token_tiles = [&](int expert) {
        int const tokens = expert < experts ? first_token(expert + 1) - first_token(expert) : 0;
        return (max(tokens, 0) + Config::kTokens - 1) / Config::kTokens;
      };
      int mine = 0;
      for (int i = first; i < last; ++i) mine += token_tiles(i);
      int before = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        int const v = __shfl_up_sync(0xffffffffu, before, step);
        if (threadIdx.x >= step) before += v;
      }
      before -= mine;
      for (int i = first; i < last; ++i) {
        store_shared_32(at(i), before);
        before += token_tiles(i);
      }
      if constexpr (Config::kUneven) {
        __syncwarp();
        find_cut();
      }
    }
    __syncthreads();
  }

  __device__ Left all() const {
    if constexpr (Config::kGrouped) {
      Cut cut{Config::kPanels, args_.row_tiles, 0, 0};
      if constexpr (Config::kUneven) {
        uint4 const v = load_shared_128(table_);
        cut = {static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), static_cast<int>(v.w)};
      }
      return {cluster_, token_tiles() * (cut.rows + cut.rest_rows), cut};
    } else {
      return {cluster_, args_.row_tiles * args_.token_tiles, {}};
    }
  }

  // The next one of those that are left, which is no more.
  __device__ Tile take(Left& left) const {
    int const index = left.at;
    left.at += clusters_;
    if constexpr (Config::kGrouped) {
      return grouped_tile(index, left.cut);
    } else {
      return dense_tile(index);
    }
  }

  // Leaves the next one, if any, to another warpgroup.
  __device__ void pass(Left& left) const { left.at += clusters_; }

  __device__ int count(Left left) const { return (left.end - left.at + clusters_ - 1) / clusters_; }

 private:
  __device__ uint32_t at(int expert) const { return table_ + 16 + 8 * expert; }
  __device__ int tiles_before(int expert) const { return static_cast<int>(load_shared_32(at(expert))); }
  __device__ int first_token(int expert) const { return static_cast<int>(load_shared_32(at(expert) + 4)); }
  __device__ int token_tiles() const { return tiles_before(args_.experts); }

  __device__ Tile dense_tile(int index) const {
    int row;
    Tile at = tile(index, args_.row_tiles, args_.token_tiles, {0, args_.m, 0}, row);
    row = row * Config::kMulticast + rank_;
    // The first panels_extra row tiles have kPanels panels, the others one less: so that rounds come out even.
    at.panel = Config::kUneven ? row * (Config::kPanels - 1) + min(row, args_.panels_extra) : row * Config::kPanels;
    at.panels = at.stored = Config::kPanels - (Config::kUneven && row >= args_.panels_extra);
    return at;
  }

  __device__ Tile grouped_tile(int index, Cut cut) const {
    int const whole = token_tiles() * cut.rows;
    bool const rest = Config::kUneven && index >= whole;
    int const rows = rest ? cut.rest_rows : cut.rows;
    if (rest) index -= whole;
    int const expert = expert_of(index / rows), before = tiles_before(expert);
    int row;
    Tile at = tile(index - before * rows, rows, tiles_before(expert + 1) - before,
                   {first_token(expert), first_token(expert + 1), expert}, row);
    int const first = rest ? cut.rows * cut.size + row * cut.rest_size : row * cut.size;
    at.stored = rest ? min(cut.rest_size, row_panels() - first) : cut.size;
    at.panel = first * Config::kMulticast + rank_ * at.stored;
    at.panels = max(at.stored, Config::kLeastPanels);
    return at;
  }

  // Of a weight, for each CTA that shares tokens.
  __device__ int row_panels() const { return (args_.panels + Config::kMulticast - 1) / Config::kMulticast; }

  // Every lane of a warp tries two sizes of row tiles, one for the rounds that are full and one for the rest. The fewest
  // panels one after the other win, then the larger tiles.
  __device__ void find_cut() const {
    constexpr int kSizes = Config::kPanels - Config::kLeastPanels + 1;
    static_assert(kSizes * kSizes <= 32);
    int const lane = threadIdx.x, tokens = token_tiles(), panels = row_panels();
    Cut cut{Config::kPanels - lane / kSizes % kSizes, 0, Config::kPanels - lane % kSizes, 0};
    int const tiles = tokens * ((panels + cut.size - 1) / cut.size), rounds = tiles / clusters_;
    cut.rows = tokens == 0 ? 0 : min(panels / cut.size, rounds * clusters_ / tokens);
    int const rest = panels - cut.rows * cut.size;
    cut.rest_rows = (rest + cut.rest_size - 1) / cut.rest_size;
    // Clusters differ by where whole tiles end in a round, and where all do.
    int const whole = tokens * cut.rows, all = whole + tokens * cut.rest_rows;
    auto const panels_of = [&](int cluster) {
      int const large = whole / clusters_ + (cluster < whole % clusters_);
      return large * cut.size + (all / clusters_ + (cluster < all % clusters_) - large) * cut.rest_size;
    };
    uint32_t const cost = max(panels_of(0), max(panels_of(whole % clusters_), panels_of(all % clusters_)));
    uint32_t const mine = lane < kSizes * kSizes ? cost * 32 + lane : 0xffffffffu;
    if (cut.size == cut.rest_size) cut.rows += cut.rest_rows, cut.rest_rows = 0;
    if (__reduce_min_sync(0xffffffffu, mine) == mine) {
      store_shared_128(table_, uint4{static_cast<uint32_t>(cut.size), static_cast<uint32_t>(cut.rows),
                                     static_cast<uint32_t>(cut.rest_size), static_cast<uint32_t>(cut.rest_rows)});
    }
  }

  // The one whose token tiles have this one among them.
  __device__ int expert_of(int token_tile) const {
    int low = 0, high = args_.experts;
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      (tiles_before(middle) <= token_tile ? low : high) = middle;
    }
    return low;
  }

  // Of one expert: `raster` token tiles at a time pass over the rows together.
  __device__ Tile tile(int index, int rows, int token_tiles, Tile whole, int& row) const {
    if (token_tiles == 1) {
      row = index;
      return whole;
    }
    int const wide = args_.raster * rows, group = index / wide, rest = index - group * wide;
    int const width = min(args_.raster, token_tiles - group * args_.raster);
    row = rest / width;
    whole.token += (group * args_.raster + rest - row * width) * Config::kTokens;
    return whole;
  }
};

}  // namespace fp4gemm
