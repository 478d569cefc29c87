// GEMM on prepacked weights for 16 to 256 tokens a tile: WGMMA with the weight as its register operand.
//
// A CTA has 64 * kRowGroups weight rows and kTokens tokens. Two warps stream stages of weights (bulk copies) and tokens (TMA);
// kRowGroups x kDepthGroups warpgroups turn codes into fragments while the tensor cores work on the last ones. The depth
// groups take alternate stages, so that several of them hide each other's latency where tokens are few. A cluster of
// kMulticast x kSplit CTAs shares tokens among row tiles and splits K; partial sums meet in shared memory, in a fixed order.
#pragma once

#include "nvrtc/std.hpp"

#include "cute/arch/mma_sm90_gmma.hpp"
#include "cute/numeric/integer_sequence.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "fp4gemm/packed_gemm.hpp"

namespace fp4gemm {

template <class Operand, int kTokens> struct Wgmma;

template <class Atom, int... I>
__device__ __forceinline__ void wgmma_call(uint32_t const* a, uint64_t b, float* acc,
                                           cute::integer_sequence<int, I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, acc[I]..., cute::SM90::GMMA::ScaleOut::One);
}

#define FP4GEMM_WGMMA(tokens) \
  template <> struct Wgmma<OperandBf16, tokens> { \
    using Atom = cute::SM90::GMMA::MMA_64x##tokens##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  }; \
  template <> struct Wgmma<OperandFp16, tokens> { \
    using Atom = cute::SM90::GMMA::MMA_64x##tokens##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };
FP4GEMM_WGMMA(8)
FP4GEMM_WGMMA(16)
FP4GEMM_WGMMA(32)
FP4GEMM_WGMMA(64)
FP4GEMM_WGMMA(96)
FP4GEMM_WGMMA(128)
FP4GEMM_WGMMA(192)
FP4GEMM_WGMMA(256)
#undef FP4GEMM_WGMMA

// Keeps a register's definition behind what stands before: the compiler must not move it over a wait for WGMMAs.
__device__ __forceinline__ void pin(uint32_t& v) { asm volatile("" : "+r"(v)::"memory"); }

template <class Operand_, class Out_, class Bias_, bool kSource_, int kTokens_, int kRowGroups_, int kDepthGroups_, int kMulticast_,
          int kSplit_, int kStages_>
struct PackedWgmmaConfig {
  using Operand = Operand_;
  using Out = Out_;
  using Bias = Bias_;
  static constexpr bool kSource = kSource_;
  static constexpr int kTokens = kTokens_, kRowGroups = kRowGroups_, kDepthGroups = kDepthGroups_;
  static constexpr int kMulticast = kMulticast_, kSplit = kSplit_, kStages = kStages_;

  static constexpr int kGroups = kRowGroups * kDepthGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);  // the last warpgroup produces
  // What a thread starts with (a multiple of 8 that fits the SM), and what consumers have once the producer gave up its own.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = (kLaunchRegisters * (kGroups + 1) - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kPartials = kDepthGroups * kSplit;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kTokenSlot = (kTokenBytes + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kRowGroups * kPackedBlockBytes;
  static constexpr int kWeightSlot = (kWeightBytes + 127) / 128 * 128;
  // Fragments of all partial sums of the tokens that this CTA writes.
  static constexpr int kOwnFragments = kTokens / 8 / kSplit;
  static constexpr int kSlotBytes = kOwnFragments * 128 * 16;
  static constexpr int kReductionBytes = kPartials > 1 ? kRowGroups * kPartials * kSlotBytes : 0;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kSharedBytes =
      1024 + kBarrierBytes + kStages * (kTokenSlot + kWeightSlot) + kReductionBytes;  // 1024: to align
  // A depth group holds two stages while it waits for a third.
  static_assert(kTokens / 8 % kSplit == 0 && kStages > 2 * kDepthGroups && kStages <= 60);
};

template <class Config> class PackedWgmma {
  static constexpr int kRegisters = Config::kTokens / 2;
  using Operand = typename Config::Operand;
  using Atom = typename Wgmma<Operand, Config::kTokens>::Atom;
  static constexpr int kCluster = Config::kMulticast * Config::kSplit;

  PackedGemmArguments const& args_;
  uint32_t const shared_, tokens_, weights_, reduction_;
  int const rank_;        // in the multicast group: which row tile
  int const split_;       // which part of K
  int const first_, last_;  // blocks of K
  int const cluster_, clusters_;
  int const rotation_;  // of the order of blocks: CTAs that read the same tokens at once would all meet at the same lines of L2

  // Shared memory: barriers | token slots | weight slots | partial sums.
  __device__ uint32_t full(int slot) const { return shared_ + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return shared_ + 16 * slot + 8; }
  __device__ uint32_t summed() const { return shared_ + 16 * Config::kStages; }
  __device__ uint32_t drained() const { return summed() + 8; }
  __device__ uint32_t token_slot(int slot) const { return tokens_ + slot * Config::kTokenSlot; }
  __device__ uint32_t weight_slot(int slot) const { return weights_ + slot * Config::kWeightSlot; }

  struct Tile {
    int row, token;  // tiles
  };

 public:
  __device__ PackedWgmma(PackedGemmArguments const& args, uint8_t* shared)
      : args_(args),
        shared_((shared_address(shared) + 1023) & ~1023u),
        tokens_(shared_ + Config::kBarrierBytes),
        weights_(tokens_ + Config::kStages * Config::kTokenSlot),
        reduction_(weights_ + Config::kStages * Config::kWeightSlot),
        rank_(blockIdx.x % kCluster % Config::kMulticast),
        split_(blockIdx.x % kCluster / Config::kMulticast),
        first_(args.k_blocks * split_ / Config::kSplit),
        last_(args.k_blocks * (split_ + 1) / Config::kSplit),
        cluster_(blockIdx.x / kCluster),
        clusters_(gridDim.x / kCluster),
        rotation_((last_ - first_) * (cluster_ % 128) / 128) {}

  __device__ void run() const {
    int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) {
      for (int i = 0; i < Config::kStages; ++i) {
        barrier_init(full(i), 2);  // both producers
        barrier_init(empty(i), Config::kRowGroups * 4 * Config::kMulticast);
      }
      barrier_init(summed(), 1);
      barrier_init(drained(), (Config::kSplit - 1) * 4 * Config::kGroups + (Config::kSplit == 1));
      barrier_init_fence();
    }
    if constexpr (kCluster > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    launch_dependents();
    if (warp >= 4 * Config::kGroups) {
      if constexpr (Config::kGroups > 1) cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
      if (warp == 4 * Config::kGroups) produce_weights();
      if (warp == 4 * Config::kGroups + 1) produce_tokens();
    } else {
      if constexpr (Config::kGroups > 1) cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
      consume(warp / 4);
    }
    // No barrier at the end: nothing is sent to a peer that it does not wait for.
  }

 private:
  __device__ int tiles() const { return args_.row_tiles * args_.token_tiles; }

  // `raster` token tiles at a time pass over the rows together, so that weights are read from L2 again.
  __device__ Tile tile(int index) const {
    if (args_.token_tiles == 1) return {index * Config::kMulticast + rank_, 0};
    int const wide = args_.raster * args_.row_tiles, group = index / wide, rest = index - group * wide;
    int const width = min(args_.raster, args_.token_tiles - group * args_.raster);
    int const row = rest / width;
    return {row * Config::kMulticast + rank_, group * args_.raster + rest - row * width};
  }

  // Calls fill(slot, block, at) for every stage of every tile, as slots come free, from one lane.
  template <class Begin, class Fill> __device__ __forceinline__ void produce(Begin const& begin, Fill const& fill) const {
    if (!elect_one()) return;
    int slot = 0;
    uint32_t phase = 1;  // a fresh barrier counts as free
    for (int index = cluster_; index < tiles(); index += clusters_) {
      begin(tile(index));
      int block = first_ + rotation_;
#pragma unroll 1
      for (int left = last_ - first_; left > 0; --left) {
        barrier_wait(empty(slot), phase);
        fill(slot, block);
        if (++block == last_) block = first_;
        if (++slot == Config::kStages) slot = 0, phase ^= 1;
      }
    }
  }

  // Weights do not depend on the kernel before this one: they are asked for before its results are awaited.
  __device__ void produce_weights() const {
    uint64_t const policy = evict_first_policy();
    uint8_t const* panels[Config::kRowGroups];
    produce(
        [&](Tile at) {
#pragma unroll
          for (int i = 0; i < Config::kRowGroups; ++i) {
            // Panels past the last one compute what nobody stores.
            int64_t const panel = min(at.row * Config::kRowGroups + i, args_.panels - 1);
            panels[i] = args_.w + panel * args_.k_blocks * kPackedBlockBytes;
          }
        },
        [&](int slot, int block) {
          barrier_expect(full(slot), Config::kWeightBytes);
#pragma unroll
          for (int i = 0; i < Config::kRowGroups; ++i)
            copy_bulk(weight_slot(slot) + i * kPackedBlockBytes, panels[i] + block * kPackedBlockBytes, kPackedBlockBytes,
                      full(slot), policy);
        });
  }

  __device__ void produce_tokens() const {
    constexpr int kShare = Config::kTokens / Config::kMulticast;  // of the CTAs that share a tile, each brings a part to all
    wait_for_inputs();
    int token = 0;
    produce([&](Tile at) { token = at.token * Config::kTokens + rank_ * kShare; },
            [&](int slot, int block) {
              barrier_expect(full(slot), Config::kTokenBytes);
              if constexpr (Config::kMulticast == 1) {
                copy_tensor(token_slot(slot), args_.x_map, block * 64, token, full(slot));
              } else {
                copy_tensor_multicast(token_slot(slot) + rank_ * kShare * 128, args_.x_map, block * 64, token, full(slot),
                                      ((1 << Config::kMulticast) - 1) << (split_ * Config::kMulticast));
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

  struct Words {
    uint4 codes;
    uint2 scales;
    // Fragments of k-steps 0 and 1, or 2 and 3.
    __device__ void dequantize(int half, uint32_t (&fragments)[8]) {
      uint32_t &a = half ? codes.z : codes.x, &b = half ? codes.w : codes.y, &s = half ? scales.y : scales.x;
      pin(a), pin(b), pin(s);
      dequantize_fragments<Operand>(a, b, s, fragments);
    }
  };

  __device__ Words load(int row_group, int slot) const {
    uint32_t const block = weight_slot(slot) + row_group * kPackedBlockBytes, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    return {load_shared_128(block + warp * 512 + lane * 16),
            load_shared_64(block + kPackedCodeBytes + warp * 64 + lane / 4 * 8)};
  }

  // Only where the slot is filled once more: a peer's producer that is done may be gone.
  __device__ void release(Cursor const& at) const {
    if (at.left <= Config::kStages) return;
    int const slot = at.slot;
    uint32_t const lane = threadIdx.x % 32;
    if constexpr (Config::kMulticast == 1) {
      if (lane == 0) barrier_arrive(empty(slot));
    } else {
      if (lane < Config::kMulticast)
        barrier_arrive_cluster(map_to_rank(empty(slot), split_ * Config::kMulticast + lane));
    }
  }

  __device__ void consume(int group) const {
    int const row_group = group % Config::kRowGroups, depth = group / Config::kRowGroups;
    int const blocks = last_ - first_;
    int const mine = max(0, (blocks - depth + Config::kDepthGroups - 1) / Config::kDepthGroups);
    int const total = blocks * ((tiles() - cluster_ + clusters_ - 1) / clusters_);
    int position = 0;
    uint32_t round = 0;
    wait_for_inputs();
    for (int index = cluster_; index < tiles(); index += clusters_) {
      float acc[kRegisters];
#pragma unroll
      for (float& v : acc) v = 0.0f;
      if (mine > 0) accumulate(row_group, Cursor(position + depth, total), mine, acc);
      position += blocks;
      finish(tile(index), row_group, depth, acc, round++, index + clusters_ < tiles());
    }
  }

  struct Fragments {
    uint32_t half[2][8];
  };

  // One k-step, in a group of its own: ptxas then leaves what stands between two of them where it is.
  __device__ static void multiply(Fragments const& a, int k, uint64_t tokens, float (&acc)[kRegisters]) {
    cute::warpgroup_arrive();
    wgmma_call<Atom>(a.half[k / 2] + k % 2 * 4, tokens + 2 * k, acc, cute::make_integer_sequence<int, kRegisters>{});
    cute::warpgroup_commit_batch();
  }

  // The main loop. A warp waits where it issues a WGMMA while the last one still reads its registers, so the next block's
  // fragments are made between the WGMMAs of this one.
  __device__ void accumulate(int row_group, Cursor at, int count, float (&acc)[kRegisters]) const {
    constexpr uint64_t kDescriptor = uint64_t(1) << 62 | uint64_t(64) << 32 | uint64_t(1) << 16;  // swizzle 128 B, 8 rows 1024 B
    Fragments even, odd;
    Cursor done = at;
    barrier_wait(full(at.slot), at.phase);
    Words words = load(row_group, at.slot);
    words.dequantize(0, even.half[0]);
    words.dequantize(1, even.half[1]);
    auto step = [&](Fragments const& now, Fragments& next, int i) {
      uint64_t const tokens = kDescriptor | token_slot(at.slot) >> 4;
      multiply(now, 0, tokens, acc);
      Cursor const current = at;
      at.next();
      if (i + 1 < count) barrier_wait(full(at.slot), at.phase);
      words = load(row_group, at.slot);  // after the last block: whatever is there, unused
      cute::warpgroup_wait<1>();         // the last block's are complete
      multiply(now, 1, tokens, acc);
      if (i > 0) release(done);
      done = current;
      words.dequantize(0, next.half[0]);
      multiply(now, 2, tokens, acc);
      words.dequantize(1, next.half[1]);
      multiply(now, 3, tokens, acc);
    };
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
      step(even, odd, i);
      if (i + 1 < count) step(odd, even, i + 1);
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (float& v : acc) asm volatile("" : "+f"(v)::"memory");
    release(done);
  }

  __device__ static float4 fragment(float const (&acc)[kRegisters], int i) {
    return {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
  }

  // The first token of the i-th fragment that this CTA writes.
  __device__ int own_token(Tile at, int i) const {
    return at.token * Config::kTokens + (split_ * Config::kOwnFragments + i) * 8;
  }

  __device__ void finish(Tile at, int row_group, int depth, float (&acc)[kRegisters], uint32_t round,
                         bool more) const {
    int const row = (at.row * Config::kRowGroups + row_group) * kPackedRows + threadIdx.x / 32 % 4 * 16;
    PackedEpilogue<typename Config::Out, typename Config::Bias, Config::kSource> const epilogue(args_, row);
    if constexpr (Config::kPartials == 1) {
#pragma unroll
      for (int i = 0; i < Config::kTokens / 8; ++i)
        epilogue(own_token(at, i), epilogue.outer_a(own_token(at, i)), fragment(acc, i));
    } else {
      // Vectors are on their way while partial sums are.
      constexpr int kMine = (Config::kOwnFragments + Config::kDepthGroups - 1) / Config::kDepthGroups;
      float2 outer_a[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) outer_a[i] = epilogue.outer_a(own_token(at, depth + i * Config::kDepthGroups));
      share(row_group, depth, acc, round);
      uint32_t const slots = reduction_ + row_group * Config::kPartials * Config::kSlotBytes + threadIdx.x % 128 * 16;
#pragma unroll
      for (int k = 0; k < kMine; ++k) {
        int const i = depth + k * Config::kDepthGroups;
        if (i >= Config::kOwnFragments) break;
        float4 sum = load_shared_float4(slots + i * 2048);
#pragma unroll
        for (int p = 1; p < Config::kPartials; ++p) {
          float4 const v = load_shared_float4(slots + p * Config::kSlotBytes + i * 2048);
          sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
        }
        epilogue(own_token(at, i), outer_a[k], sum);
      }
      if (Config::kSplit > 1 && more) free_partials();
    }
  }

  __device__ static void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(128 * Config::kGroups) : "memory"); }

  // Hands every partial sum to the CTA that writes its tokens, and waits for those of this CTA.
  __device__ void share(int row_group, int depth, float const (&acc)[kRegisters], uint32_t round) const {
    uint32_t const slot = reduction_ +
                          ((row_group * Config::kPartials + split_ * Config::kDepthGroups + depth) * Config::kOwnFragments * 128 +
                           threadIdx.x % 128) * 16;
    if constexpr (Config::kSplit > 1) {
      constexpr int kBytes = Config::kRowGroups * (Config::kSplit - 1) * Config::kDepthGroups * Config::kSlotBytes;
      if (threadIdx.x == 0) barrier_expect(summed(), kBytes);
    }
    if (round > 0) {
      sync_consumers();
      if constexpr (Config::kSplit > 1) barrier_wait(drained(), round - 1 & 1);
    }
#pragma unroll
    for (int to = 0; to < Config::kSplit; ++to) {
      bool const own = to == split_;
      uint32_t const rank = to * Config::kMulticast + rank_;
      uint32_t const peer = own ? 0 : map_to_rank(slot, rank), peer_bar = own ? 0 : map_to_rank(summed(), rank);
#pragma unroll
      for (int i = 0; i < Config::kOwnFragments; ++i) {
        float4 const v = fragment(acc, to * Config::kOwnFragments + i);
        if (own) {
          store_shared_128(slot + i * 2048, v);
        } else {
          store_to_rank(peer + i * 2048, v, peer_bar);
        }
      }
    }
    sync_consumers();
    if constexpr (Config::kSplit > 1) barrier_wait(summed(), round & 1);
  }

  // Tells the peers that their next partial sums may come.
  __device__ void free_partials() const {
    uint32_t const peer = threadIdx.x % 32;
    if (peer < Config::kSplit && peer != split_)
      barrier_arrive_cluster(map_to_rank(drained(), peer * Config::kMulticast + rank_));
  }
};

}  // namespace fp4gemm
