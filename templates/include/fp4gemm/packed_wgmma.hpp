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

#include "cutlass/arch/reg_reconfig.h"

namespace fp4gemm {

template <class Config> class PackedWgmma {
  static constexpr int kRegisters = Config::kTokens / 2;  // accumulators of a panel
  using Operand = typename Config::Operand;
  using Atom = typename Wgmma<Operand, Config::kTokens>::Atom;
  using Epilogue = PackedEpilogue<typename Config::Out, typename Config::Bias, Config::kSource>;
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

  // Shared memory: barriers | token slots | weight slots | partial sums | lines | cut and experts.
  __device__ uint32_t full(int slot) const { return shared_ + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return shared_ + 16 * slot + 8; }
  __device__ uint32_t summed() const { return shared_ + 16 * Config::kStages; }
  __device__ uint32_t drained() const { return summed() + 8; }
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
        tiles_(args, reduction_ + Config::kReductionBytes + Config::kLineBytes, rank_) {}

  __device__ void run() const {
    int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == kProducer) {
      if (elect_one()) {
        for (int i = 0; i < Config::kStages; ++i) {
          barrier_init(full(i), 2);  // both producers
          barrier_init(empty(i), (kTurns ? 1 : Config::kRowGroups) * 4 * Config::kMulticast);
        }
        barrier_init(summed(), 1);
        barrier_init(drained(), (Config::kSplit - 1) * 4 * Config::kGroups + (Config::kSplit == 1));
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

  // Weights do not depend on the kernel before this one: they are asked for before its results are awaited.
  __device__ void produce_weights() const {
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

  // Of a tile, the i-th of a row group.
  __device__ static int panel_of(int row_group, int i) { return kTurns ? i : row_group + i * Config::kRowGroups; }
  __device__ uint32_t block_at(int slot, int row_group, int i) const {
    return weight_slot(slot) + panel_of(row_group, i) * kPackedBlockBytes;
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
      bool const less = kUneven && kMine > 1 && panel_of(row_group, kMine - 1) >= at.panels;
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
      finish<kMine>(at, row_group, depth, less, acc, round++, bool(left));
      if (kTurns) pass();
    }
  }

  // Two warpgroups that end a tile together leave the tensor cores idle while both write it. So the second one begins each tile
  // kLag stages behind the first: the one goes on while the other writes. Predicates, since a branch that might diverge costs
  // the main loop its uniform registers. With as many blocks as stages or more, the first cannot allow the next tile before the
  // second has seen this one: it would need stages that the second has yet to release.
  template <int kBarrier> __device__ __forceinline__ static void await(bool mine) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p bar.sync %1, 256;\n}" ::"r"(uint32_t(mine)), "n"(kBarrier)
                 : "memory");
  }
  template <int kBarrier> __device__ __forceinline__ static void allow(bool mine) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p bar.arrive %1, 256;\n}" ::"r"(uint32_t(mine)),
                 "n"(kBarrier)
                 : "memory");
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
      for (float& v : acc[i]) asm volatile("" : "+f"(v)::"memory");
    }
    if (count <= releases) release(done);
  }

  __device__ __forceinline__ static float4 fragment(float const (&acc)[kRegisters], int i) {
    return {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
  }

  // The first token of the i-th fragment that this CTA writes.
  __device__ int own_token(Tile at, int i) const { return at.token + (split_ * Config::kOwnFragments + i) * 8; }
  // A warp's first row of its i-th panel.
  __device__ int first_row(Tile at, int row_group, int i) const {
    return (at.panel + panel_of(row_group, i)) * kPackedRows + threadIdx.x / 32 % 4 * 16;
  }
  // Where a thread's part of a panel's partial sum is, in every CTA.
  __device__ uint32_t partial(int row_group, int i, int index) const {
    return reduction_ +
           ((panel_of(row_group, i) * Config::kPartials + index) * Config::kOwnFragments * 128 + threadIdx.x % 128) *
               16;
  }

  // Whether a panel is another tile's or nobody's: computed perhaps, but not stored.
  __device__ static bool foreign(Tile at, int row_group, int i) {
    return kUneven && panel_of(row_group, i) >= at.stored;
  }

  template <int kMine> struct Vectors {
    typename Epilogue::Rows panel[kMine];
    template <int... I>
    __device__ Vectors(PackedWgmma const& gemm, Tile at, int row_group, cute::integer_sequence<int, I...>)
        : panel{typename Epilogue::Rows(gemm.args_, gemm.first_row(at, row_group, I), at.expert)...} {}
  };

  template <int kMine> __device__ __forceinline__ void finish(Tile at, int row_group, int depth, bool less,
                                                              float (&acc)[kMine][kRegisters], uint32_t round,
                                                              bool more) const {
    // Each depth group sums its part of the fragments. Its vectors are on their way while partial sums are.
    constexpr int kPart = (Config::kOwnFragments + Config::kDepthGroups - 1) / Config::kDepthGroups;
    Vectors<kMine> const vectors(*this, at, row_group, cute::make_integer_sequence<int, kMine>{});
    float2 outer_a[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i)
      outer_a[i] = Epilogue::outer_a(args_, own_token(at, depth + i * Config::kDepthGroups));
    if constexpr (Config::kPartials > 0) share<kMine>(at.panels, row_group, depth, less, acc, round);
    if constexpr (Config::kLines) {
      if (whole_lines()) {
#pragma unroll
        for (int p = 0; p < kMine; ++p) {
          if (foreign(at, row_group, p)) break;
          write_lines(at, row_group, p, vectors.panel[p], outer_a, acc[p]);
        }
        if (Config::kSplit > 1 && more) free_partials();
        return;
      }
    }
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      if (foreign(at, row_group, p)) break;
      Epilogue const write(args_, first_row(at, row_group, p), vectors.panel[p], at.end);
#pragma unroll
      for (int k = 0; k < kPart; ++k) {
        int const i = depth + k * Config::kDepthGroups;
        if (i >= Config::kOwnFragments) break;
        write(own_token(at, i), outer_a[k], sum(row_group, p, i, fragment(acc[p], k)));
      }
    }
    if (Config::kSplit > 1 && more) free_partials();
  }

  // Of a fragment that this CTA writes. Without depth groups its own part is where share() has left it.
  __device__ __forceinline__ float4 sum(int row_group, int p, int i, float4 own) const {
    float4 sum = kKeep ? own : load_shared_float4(partial(row_group, p, 0) + i * 2048);
#pragma unroll
    for (int j = kKeep ? 0 : 1; j < Config::kPartials; ++j) {
      float4 const v = load_shared_float4(partial(row_group, p, j) + i * 2048);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    return sum;
  }

  // Whether all panels are whole and stand in whole, aligned lines of D. The same for all threads.
  __device__ bool whole_lines() const {
    return args_.d_stride_n == 1 && args_.n % 64 == 0 && args_.d_stride_m % 8 == 0 &&
           reinterpret_cast<uint64_t>(args_.d) % 16 == 0;
  }

  // A panel, 16 tokens at a time: each warp transposes its 16 rows into shared memory, then 8 lanes write 64 rows of a token.
  template <int kPart>
  __device__ __forceinline__ void write_lines(Tile at, int row_group, int p, typename Epilogue::Rows const& rows,
                                              float2 const (&outer_a)[kPart], float const (&acc)[kRegisters]) const {
    using Out = typename Config::Out;
    Epilogue const write(args_, first_row(at, row_group, p), rows, at.end);
    uint32_t const buffer = reduction_ + Config::kReductionBytes + row_group * 4096;
    uint32_t const thread = threadIdx.x % 128, lane = thread % 32;
    // Chunks of 16 bytes swap places within a token's line, so that neither side meets bank conflicts.
    uint32_t const to = (lane / 16 * 8 + lane % 8) * 128 + ((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
    uint32_t const from = thread / 8 * 128 + (thread % 8 ^ thread / 8 % 8) * 16;
    int const row = (at.panel + panel_of(row_group, p)) * kPackedRows + thread % 8 * 8;
    int token = own_token(at, 0) + thread / 8;
    auto* d = static_cast<uint16_t*>(args_.d) + token * args_.d_stride_m + row;
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
      uint32_t const half = buffer + i % 4 * 1024;
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float4 const v = sum(row_group, p, i + j, fragment(acc, i + j));
        float values[4] = {v.x, v.y, v.z, v.w};
        write.rescale(own_token(at, i + j), outer_a[i + j], values);
        matrices[2 * j] = Out::pack(values[0], values[1]), matrices[2 * j + 1] = Out::pack(values[2], values[3]);
      }
      store_transposed(half + to, matrices);
      asm volatile("bar.sync %0, 128;" ::"r"(2 + row_group) : "memory");
      uint4 const line = load_shared_128(half + from);
      if (token < at.end && row < args_.n) *reinterpret_cast<uint4*>(d) = line;
      token += 16, d += 16 * args_.d_stride_m;
    }
    if (kPart % 4 != 0) asm volatile("bar.sync %0, 128;" ::"r"(2 + row_group) : "memory");
  }

  __device__ static void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(128 * Config::kGroups) : "memory"); }

  static constexpr bool kKeep = Config::kDepthGroups == 1;  // own partial sums in registers

  // The partial sums of the tokens that CTA kTo of the split writes. If it is this one they are stored, or become the first
  // accumulators, which have been sent by then.
  template <int kTo, int kMine> __device__ __forceinline__ void hand_over(int row_group, int depth, bool less,
                                                                          float (&acc)[kMine][kRegisters]) const {
    constexpr int kOwn = kRegisters / Config::kSplit;
    bool const own = kTo == split_;
    uint32_t const rank = kTo * Config::kMulticast + rank_;
    uint32_t const peer_bar = own ? 0 : map_to_rank(summed(), rank);
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      if (p > 0 && p + 1 == kMine && less) break;
      uint32_t const here =
          partial(row_group, p, kKeep ? split_ - (split_ > kTo) : split_ * Config::kDepthGroups + depth);
      if (own && kKeep) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) acc[p][i] = acc[p][kTo * kOwn + i];
      } else if (own) {
#pragma unroll
        for (int i = 0; i < Config::kOwnFragments; ++i)
          store_shared_128(here + i * 2048, fragment(acc[p], kTo * Config::kOwnFragments + i));
      } else {
        uint32_t const there = map_to_rank(here, rank);
#pragma unroll
        for (int i = 0; i < Config::kOwnFragments; ++i)
          store_to_rank(there + i * 2048, fragment(acc[p], kTo * Config::kOwnFragments + i), peer_bar);
      }
    }
  }
  // Not a loop: the compiler would take an index that equals split_ for split_ and put accumulators into memory.
  template <int kMine, int... kTo>
  __device__ __forceinline__ void hand_over_all(int row_group, int depth, bool less, float (&acc)[kMine][kRegisters],
                                                cute::integer_sequence<int, kTo...>) const {
    (hand_over<kTo>(row_group, depth, less, acc), ...);
  }

  // Hands every partial sum to the CTA that writes its tokens, and waits for those of this CTA.
  template <int kMine> __device__ __forceinline__ void share(int panels, int row_group, int depth, bool less,
                                                             float (&acc)[kMine][kRegisters], uint32_t round) const {
    if constexpr (Config::kSplit > 1) {
      constexpr int kBytes = (Config::kSplit - 1) * Config::kDepthGroups * Config::kPartialBytes;  // of a panel
      if (threadIdx.x == 0) barrier_expect(summed(), panels * kBytes);
    }
    if (round > 0) {
      if constexpr (!kKeep) sync_consumers();
      if constexpr (Config::kSplit > 1) barrier_wait(drained(), round - 1 & 1);
    }
    hand_over_all(row_group, depth, less, acc, cute::make_integer_sequence<int, Config::kSplit>{});
    if constexpr (!kKeep) sync_consumers();
    if constexpr (Config::kSplit > 1) barrier_wait(summed(), round & 1);
  }

  // Tells the peers that their next partial sums may come.
  __device__ void free_partials() const {
    __syncwarp();
    uint32_t const peer = threadIdx.x % 32;
    if (peer < Config::kSplit && peer != split_)
      barrier_arrive_cluster(map_to_rank(drained(), peer * Config::kMulticast + rank_));
  }
};

}  // namespace fp4gemm
