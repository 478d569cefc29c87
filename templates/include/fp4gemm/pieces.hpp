// How the clusters of a launch share tiles whose K is long: no last round of tiles that leaves clusters idle.
//
// As many rounds as are full hand out whole tiles. The blocks of K of the tiles that are left, and of one round more where these
// are few, are a line, one tile behind the other, of which each cluster takes an equal piece. A piece may end inside a tile: then
// its sums go to memory, and the cluster that has the tile's last block adds them.
//
// Pieces come before whole tiles, and each from its end: so what another cluster waits for is computed first, and who waits
// for it has about as much to do before. A cluster waits for those with lower numbers only.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

// What a cluster does without a break: blocks of a tile's K.
struct Piece {
  int tile;
  int block, count;  // the first one, and how many
  int left;  // of the cluster's part of the line, in front of these
};

struct Pieces {
  static constexpr int kLeast = 4;  // ends that are nearer to the border of a tile than so many blocks move there

  int clusters;
  int tile_blocks;  // of K
  int cut;  // tiles in the line, the first ones
  int parts;  // of the line

  Pieces() = default;
  __device__ Pieces(int tiles, int tile_blocks_, int clusters_) : clusters(clusters_), tile_blocks(tile_blocks_) {
    int const rest = tiles % clusters;
    cut = rest > 0 && 2 * rest < clusters && tiles > clusters ? rest + clusters : rest;
    if (int64_t(cut) * tile_blocks * clusters > UINT32_MAX) cut = 0;  // K of many millions: begin() would overflow
    // Twice kLeast blocks each, so that none is empty when ends have moved; of a short K whole tiles.
    int const twice = cut * tile_blocks / (2 * kLeast), most = twice > cut ? twice : cut;
    parts = most < 1 ? 1 : most < clusters ? most : clusters;
  }

  // The first block of a part, and the end of the one before: at the border of tiles where there is one nearby.
  __device__ int begin(int part) const {
    int const blocks = cut * tile_blocks;
    if (part >= parts) return blocks;
    int const at = static_cast<int>(static_cast<uint32_t>(blocks) * part / parts), inside = at % tile_blocks;
    return inside < kLeast ? at - inside : inside > tile_blocks - kLeast ? at - inside + tile_blocks : at;
  }

  // The first one of a cluster; of a tile that does not exist where there is none.
  __device__ Piece first(int cluster) const {
    int const from = begin(cluster), to = begin(cluster + 1);
    return from < to ? last_of(from, to) : whole(cut + cluster);
  }

  __device__ Piece next(Piece const& done, int cluster) const {
    if (done.left > 0) {
      int const to = done.tile * tile_blocks + done.block;
      return last_of(to - done.left, to);
    }
    return whole(done.tile < cut ? cut + cluster : done.tile + clusters);
  }

  // Whoever has a tile's last block stores it.
  __device__ bool ends(Piece const& piece) const { return piece.block + piece.count == tile_blocks; }

  // Whether, in front of what a part has of a tile, there is more, in the part before.
  __device__ bool continues(int part, int tile) const { return begin(part) > tile * tile_blocks; }

 private:
  __device__ Piece whole(int tile) const { return {tile, 0, tile_blocks, 0}; }

  // What the last of the tiles has of these blocks of the line.
  __device__ Piece last_of(int from, int to) const {
    int const tile = (to - 1) / tile_blocks, border = tile * tile_blocks, at = from > border ? from : border;
    return {tile, at - border, to - at, at - from};
  }
};

}  // namespace fp4gemm
