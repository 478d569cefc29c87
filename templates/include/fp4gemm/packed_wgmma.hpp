// GEMM on prepacked weights for 8 to 256 tokens a tile: WGMMA with the weight as its register operand.
//
// A CTA has kPanels x 64 weight rows and kTokens tokens. Two warps stream stages of weights (bulk copies) and tokens (TMA);
// kRowGroups x kDepthGroups warpgroups turn codes into fragments while the tensor cores work on the last ones. What a CTA reads
// bounds the kernel, and 64 x 64 weights are a quarter of the bytes of 64 x 64 tokens: so a warpgroup may have several panels,
// each with accumulators of its own. Depth groups take alternate stages: with few panels they hide each other's latency.
// Two row groups with one panel take alternate tiles: one computes while the other writes.
// A cluster of kMulticast x kSplit CTAs shares tokens among row tiles and splits K; partial sums meet in a fixed order.
#pragma once

#include "fp4gemm/packed_tiles.hpp"
#include "fp4gemm/packed_wgmma_config.hpp"
#include "fp4gemm/packed_wgmma_results.hpp"

#include "cutlass/arch/reg_reconfig.h"

namespace fp4gemm {

template <class Config> class PackedWgmma {
  static constexpr int kRegisters = Config::kRegisters;
  using Operand = typename Config::Operand;
  using Atom = typename Wgmma<Operand, Config::kTokens>::Atom;
  using Tiles = PackedTiles<Config>;
  using Tile = typename Tiles::Tile;
  static constexpr int kCluster = Config::kMulticast * Config::kSplit;
  static constexpr int kProducer = 4 * Config::kGroups;  // the first of its warps
  static constexpr bool kUneven = Config::kUneven, kTurns = Config::kTurns;
  static constexpr int kOrderBarrier = 2 + Config::kRowGroups;  // and one more where row groups take turns

  PackedGemmArguments const& args_;
  uint32_t const shared_, tokens_, weights_, reduction_;
  int const rank_;  // in the multicast group: which row tile
  int const split_;  // which part of K
  int const first_, last_;  // blocks of K
  Tiles const tiles_;
  PackedWgmmaResults<Config> const results_;

  // Shared memory: barriers | token slots | weight slots | partial sums | lines | cut and experts.
  __device__ uint32_t full(int slot) const { return shared_ + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return shared_ + 16 * slot + 8; }
  __device__ uint32_t token_slot(int slot) const { return tokens_ + slot * Config::kTokenSlot; }
  __device__ uint32_t weight_slot(int slot) const { return weights_ + slot * Config::kWeightBytes; }

 public:
  __device__ PackedWgmma(PackedGemmArguments const& args, uint8_t* shared)
      : args_(args),
        shared_((shared_address(shared) + 1023) & ~1023u),
        tokens_(shared_ + Config::kBarrierBytes),
        weights_(tokens_ + Config::kStages * Config::kTokenSlot),
        reduction_(weights_ + Config::kStages * Config::kWeightBytes),
        rank_(blockIdx.x % kCluster % Config::kMulticast),
        split_(blockIdx.x % kCluster / Config::kMulticast),
        first_(args.k_blocks * split_ / Config::kSplit),
        last_(args.k_blocks * (split_ + 1) / Config::kSplit),
        tiles_(args, reduction_ + Config::kReductionBytes + Config::kLineBytes, rank_),
        results_(args, shared_ + 16 * Config::kStages, reduction_, rank_, split_) {}

  __device__ void run() const {
    int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == kProducer) {
      if (elect_one()) {
        for (int i = 0; i < Config::kStages; ++i) {
          barrier_init(full(i), 2);  // both producers
          barrier_init(empty(i), (kTurns ? 1 : Config::kRowGroups) * 4 * Config::kMulticast);
        }
        results_.init_barriers();
        barrier_init_fence();
      }
      __syncwarp();
    }
    cluster_arrive();
    launch_dependents();
    if constexpr (Config::kGrouped) {
      wait_for_inputs();
      tiles_.tabulate_experts();
    }
    if (warp >= kProducer) {
      if constexpr (Config::kTradesRegisters) cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
      if (warp == kProducer) {
        produce_weights();  // with barriers that this warp has made itself
      } else {
        cluster_wait();
        if (warp == kProducer + 1) produce_tokens();
      }
    } else {
      if constexpr (Config::kTradesRegisters) cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
      cluster_wait();
      // Panels are dealt out in turn: the first row groups may have one more.
      constexpr int kLeast = kTurns ? 1 : Config::kPanels / Config::kRowGroups;
      constexpr int kMore = kTurns ? 0 : Config::kPanels % Config::kRowGroups;
      int const row_group = warp / 4 % Config::kRowGroups, depth = warp / 4 / Config::kRowGroups;
      if (kMore == 0 || row_group >= kMore) {
        consume<kLeast>(row_group, depth);
      } else {
        consume<kLeast + (kMore > 0)>(row_group, depth);
      }
    }
    // No barrier at the end: nothing is sent to a peer that it does not wait for.
  }

 private:
  // Calls begin(tile) for every tile and fill(slot, block) for each of its stages, as slots come free, from one lane.
  template <class Begin, class Fill>
  __device__ __forceinline__ void produce(Begin const& begin, Fill const& fill) const {
    if (!elect_one()) return;
    int slot = 0;
    uint32_t phase = 1;  // a fresh barrier counts as free
    for (auto left = tiles_.all(); left;) {
      begin(tiles_.take(left));
#pragma unroll 1
      for (int block = first_; block < last_; ++block) {
        barrier_wait(empty(slot), phase);
        fill(slot, block);
        if (++slot == Config::kStages) slot = 0, phase ^= 1;
      }
    }
  }

  __device__ void produce_weights() const {
    if (!args_.weights_first) wait_for_inputs();
    uint64_t const policy = evict_first_policy();
    uint32_t const panel_bytes = args_.k_blocks * kPackedBlockBytes;
    uint8_t const* from;
    uint32_t offsets[Config::kPanels];  // ready beforehand: with small stages this lane's instructions set the pace
    int panels;
    produce(
        [&](Tile at) {
          // Panels past the last one compute what nobody stores.
          int const panel = min(at.panel, args_.panels - 1), last = args_.panels - 1 - panel;
          from = args_.w + (int64_t(at.expert) * args_.panels + panel) * panel_bytes + first_ * kPackedBlockBytes;
#pragma unroll
          for (int i = 0; i < Config::kPanels; ++i) offsets[i] = i == 0 ? 0 : min(i, last) * panel_bytes;
          panels = kUneven ? at.panels : Config::kPanels;
        },
        [&](int slot, int) {
          barrier_expect(full(slot), panels * kPackedBlockBytes);
#pragma unroll
          for (int i = 0; i < Config::kPanels; ++i) {
            if (kUneven && i >= Config::kLeastPanels && i >= panels) break;
            copy_bulk(weight_slot(slot) + i * kPackedBlockBytes, from + offsets[i], kPackedBlockBytes, full(slot),
                      policy);
          }
          from += kPackedBlockBytes;
        });
  }

  __device__ void produce_tokens() const {
    constexpr int kShare =
        Config::kTokens / Config::kMulticast;  // of the CTAs that share a tile, each brings a part to all
    if constexpr (!Config::kGrouped) wait_for_inputs();
    int token = 0;
    produce([&](Tile at) { token = at.token + rank_ * kShare; },
            [&](int slot, int block) {
              barrier_expect(full(slot), Config::kTokenBytes);
              if constexpr (Config::kMulticast == 1) {
                copy_tensor(token_slot(slot), args_.x_map, block * 64, token, full(slot));
              } else {
                copy_tensor_multicast(token_slot(slot) + rank_ * kShare * 128, args_.x_map, block * 64, token,
                                      full(slot), ((1 << Config::kMulticast) - 1) << (split_ * Config::kMulticast));
              }
            });
  }

  struct Cursor {
    int slot;
    uint32_t phase;
    int left;  // stages from this one on, of all tiles
    __device__ Cursor(int position, int total)
        : slot(position % Config::kStages), phase(position / Config::kStages & 1), left(total - position) {}
    __device__ void next() {
      left -= Config::kDepthGroups;
      slot += Config::kDepthGroups;
      if (slot >= Config::kStages) slot -= Config::kStages, phase ^= 1;
    }
  };

  // A lane's part of a block on its way into fragments.
  struct Words {
    uint4 codes;
    uint2 scale_bytes;
    uint32_t top, bottom;  // scales of two k-steps

    __device__ __forceinline__ void load(uint32_t block) {
      uint32_t const warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
      codes = load_shared_128(block + warp * 512 + lane * 16);
      scale_bytes = load_shared_64(block + kPackedCodeBytes + warp * 64 + lane / 4 * 8);
    }

    // The fragment of a k-step; in order 0 to 3.
    template <int kStep> __device__ __forceinline__ void dequantize(uint32_t (&fragment)[4]) {
      uint32_t &a = kStep / 2 ? codes.z : codes.x, &b = kStep / 2 ? codes.w : codes.y;
      if constexpr (kStep % 2 == 0) {
        uint32_t& bytes = kStep / 2 ? scale_bytes.y : scale_bytes.x;
        pin(bytes);
        packed_scales<Operand>(bytes, top, bottom);
      }
      pin(a), pin(b), pin(top), pin(bottom);
      dequantize_step<Operand, kStep % 2>(a, b, top, bottom, fragment);
#pragma unroll
      for (uint32_t& v : fragment) pin(v);
    }
  };

  __device__ uint32_t block_at(int slot, int row_group, int i) const {
    return weight_slot(slot) + Config::panel_of(row_group, i) * kPackedBlockBytes;
  }

  // By the lanes that a slot waits for: one for each CTA that fills it.
  __device__ void release(int slot) const {
    uint32_t const lane = threadIdx.x % 32;
    if constexpr (Config::kMulticast == 1) {
      barrier_arrive(empty(slot));
    } else {
      barrier_arrive_cluster(map_to_rank(empty(slot), split_ * Config::kMulticast + lane));
    }
  }

  template <int kMine> __device__ __forceinline__ void consume(int row_group, int depth) const {
    int const blocks = last_ - first_;
    int const count = max(0, (blocks - depth + Config::kDepthGroups - 1) / Config::kDepthGroups);
    auto left = tiles_.all();
    int const total = blocks * tiles_.count(left);
    int position = 0;
    uint32_t round = 0;
    auto const pass = [&] { tiles_.pass(left), position += blocks; };
    if constexpr (!Config::kGrouped) wait_for_inputs();
    if (kTurns && row_group == 1) pass();
    while (left) {
      Tile const at = tiles_.take(left);
      // Whether the group lacks its last panel in this tile.
      bool const less = kUneven && kMine > 1 && Config::panel_of(row_group, kMine - 1) >= at.panels;
      float acc[kMine][kRegisters];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
#pragma unroll
        for (float& v : acc[i]) v = 0.0f;
      }
      if (count > 0) {
        Turn const turn{row_group == 1 || round > 0, bool(left)};
        Cursor const first(position + depth, total);
        if constexpr (kUneven && kMine > 1) {
          if (less) {
            accumulate<kMine - 1>(row_group, first, count, turn, acc);
          } else {
            accumulate<kMine>(row_group, first, count, turn, acc);
          }
        } else {
          accumulate<kMine>(row_group, first, count, turn, acc);
        }
      }
      position += blocks;
      results_.template finish<kMine>(at, row_group, depth, less, acc, round++, bool(left));
      if (kTurns) pass();
    }
  }

  // Two warpgroups that end a tile together leave the tensor cores idle while both write it. So the second one begins each tile
  // kLag stages behind the first: the one goes on while the other writes. With as many blocks as stages or more, the first
  // cannot allow the next tile before the second has seen this one: it would need stages that the second has yet to release.
  template <int kBarrier> __device__ __forceinline__ static void await(bool mine) {
    named_sync_if<256>(mine, kBarrier);
  }
  template <int kBarrier> __device__ __forceinline__ static void allow(bool mine) {
    named_arrive_if<256>(mine, kBarrier);
  }

  // Row groups that take turns: whether the other one has the tile before this one, and the one after it. Each hands over with
  // its last stage in sight: whatever was in the ring before the other's stages has been seen by then, so that no wait takes
  // the parity of an older filling for its own.
  struct Turn {
    bool follows, followed;
  };

  // A k-step or two in a group of their own: ptxas then leaves what stands between two groups where it is. On return the
  // fragments of the last two k-steps but these are free.
  __device__ __forceinline__ static void multiply(uint32_t const (&fragment)[4], uint64_t tokens,
                                                  float (&acc)[kRegisters]) {
    cute::warpgroup_arrive();
    wgmma_call<Atom>(fragment, tokens, acc, cute::make_integer_sequence<int, kRegisters>{});
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<2>();
  }
  __device__ __forceinline__ static void multiply(uint32_t const (&first)[4], uint32_t const (&second)[4],
                                                  uint64_t tokens, float (&acc)[kRegisters]) {
    cute::warpgroup_arrive();
    wgmma_call<Atom>(first, tokens, acc, cute::make_integer_sequence<int, kRegisters>{});
    wgmma_call<Atom>(second, tokens + 2, acc, cute::make_integer_sequence<int, kRegisters>{});
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
  }

  // The main loop, for the first kComputed panels of a warpgroup. A warp waits where it issues a WGMMA while the last one still
  // reads its registers, so fragments are made two k-steps ahead, between the WGMMAs. A stage is released before the next but
  // one is awaited.
  template <int kComputed, int kMine>
  __device__ __forceinline__ void accumulate(int row_group, Cursor at, int count, Turn turn,
                                             float (&acc)[kMine][kRegisters]) const {
    // Of the first slot: swizzle 128 B, 8 rows 1024 B.
    uint64_t const descriptor = uint64_t(1) << 62 | uint64_t(64) << 32 | uint64_t(1) << 16 | tokens_ >> 4;
    // Only slots that are filled once more are released: a peer's producer that is done may be gone.
    int const again = max(0, at.left - Config::kStages + Config::kDepthGroups - 1) / Config::kDepthGroups;
    int const releases = threadIdx.x % 32 < Config::kMulticast ? min(count, again) : 0;
    uint32_t fragments[4][4];
    Words words;
    if constexpr (kTurns) {
      await<kOrderBarrier>(turn.follows && row_group == 0);
      await<kOrderBarrier + 1>(turn.follows && row_group == 1);
    }
    barrier_wait(full(at.slot), at.phase);
    words.load(block_at(at.slot, row_group, 0));
    words.template dequantize<0>(fragments[0]);
    words.template dequantize<1>(fragments[1]);
    bool const lags = Config::kLag > 0 && count >= Config::kStages;
    if constexpr (Config::kLag > 0) await<kOrderBarrier>(lags && row_group == 1);
    int done = at.slot;
    bool more = true;
    int i = 0;
#pragma unroll 1
    do {
      if constexpr (Config::kLag > 0) allow<kOrderBarrier>(lags && row_group == 0 && i == Config::kLag);
      if constexpr (kTurns) {
        bool const over = turn.followed && i + 1 == count;
        allow<kOrderBarrier>(over && row_group == 1), allow<kOrderBarrier + 1>(over && row_group == 0);
      }
      uint64_t const tokens = descriptor + uint32_t(at.slot * (Config::kTokenSlot / 16));
      int const slot = at.slot;
#pragma unroll
      for (int p = 0; p < kComputed; ++p) {
        if constexpr (Config::kPairs) {
          multiply(fragments[0], fragments[1], tokens, acc[p]);
          words.template dequantize<2>(fragments[2]);
        } else {
          multiply(fragments[0], tokens, acc[p]);
          words.template dequantize<2>(fragments[2]);
          multiply(fragments[1], tokens + 2, acc[p]);
        }
        if (p == 0 && uint32_t(i) - 1 < uint32_t(releases)) release(done);  // its last WGMMA is complete
        words.template dequantize<3>(fragments[3]);
        if (p + 1 < kComputed) {
          words.load(block_at(slot, row_group, p + 1));
        } else {
          at.next();
          more = ++i < count;
          if (more) barrier_wait(full(at.slot), at.phase);
          words.load(block_at(at.slot, row_group, 0));  // after the last block: whatever is there, unused
        }
        if constexpr (Config::kPairs) {
          multiply(fragments[2], fragments[3], tokens + 4, acc[p]);
          words.template dequantize<0>(fragments[0]);
        } else {
          multiply(fragments[2], tokens + 4, acc[p]);
          words.template dequantize<0>(fragments[0]);
          multiply(fragments[3], tokens + 6, acc[p]);
        }
        words.template dequantize<1>(fragments[1]);
      }
      done = slot;
    } while (more);
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int i = 0; i < kComputed; ++i) {
#pragma unroll
      for (float& v : acc[i]) pin(v);
    }
    if (count <= releases) release(done);
  }
};

}  // namespace fp4gemm
