// GEMM on prepacked weights for a few tokens: mma.sync, bound by the bandwidth of memory.
//
// A warp streams blocks of one panel of 64 weight rows through a ring of its own, so that the main loop has no barrier of the
// CTA; tokens are resident in shared memory. `depth` warps take turns along K of a panel, a CTA has several panels, and a
// cluster splits K once more. Partial sums meet in shared memory, in a fixed order: first those of a CTA, then those of CTAs.
#pragma once

#include "fp4gemm/packed_mma_config.hpp"
#include "fp4gemm/rows.hpp"
#include "fp4gemm/values.hpp"

namespace fp4gemm {

template <class Config> class PackedMma {
  using Operand = typename Config::Operand;
  static constexpr bool kQuantize = kPresent<typename Config::Quantized>;

  PackedGemmArguments const& args_;
  uint32_t const shared_, rings_, peers_;
  int const warp_, row_group_, depth_;
  int const rank_, cluster_;
  int const begin_, panels_;  // panels of this cluster
  int const cta_first_, cta_blocks_;  // blocks of K of this CTA
  uint32_t const tokens_;

  // Shared memory: barriers | rings, and this CTA's sums after them | peers' sums | tokens, rows padded by 16 bytes against
  // bank conflicts.
  __device__ uint32_t pieces(int i) const { return shared_ + 8 * i; }
  __device__ uint32_t summed() const { return shared_ + 8 * Config::kPieces; }
  __device__ uint32_t full(int stage) const { return shared_ + 128 + 8 * (warp_ * Config::kStages + stage); }
  __device__ uint32_t ring(int warp) const { return rings_ + warp * Config::kRingBytes; }
  __device__ uint32_t stage(int i) const { return ring(warp_) + i * Config::kStageBytes; }
  __device__ int token_stride() const { return cta_blocks_ * 128 + 16; }

 public:
  __device__ PackedMma(PackedGemmArguments const& args, uint8_t* shared)
      : args_(args),
        shared_(shared_address(shared)),
        rings_(shared_ + Config::kBarrierBytes),
        peers_(shared_ + Config::kSharedBytes),
        warp_(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)),
        row_group_(row_group_of(args, warp_)),
        depth_(depth_of(args, warp_)),
        rank_(blockIdx.x % Config::kSplit),
        cluster_(blockIdx.x / Config::kSplit),
        begin_(cluster_ * args.panels_each + min(cluster_, args.panels_extra)),
        panels_(args.panels_each + (cluster_ < args.panels_extra)),
        cta_first_(args.k_blocks * rank_ / Config::kSplit),
        cta_blocks_(args.k_blocks * (rank_ + 1) / Config::kSplit - cta_first_),
        tokens_(peers_ + most_panels(args) * Config::kPeerBytes) {}

  __device__ void run() const {
    if (args_.launch_early) launch_dependents();
    // A deep queue of weights delays what is asked for after it, and nothing can be computed without tokens: those go before
    // all but a few weights.
    constexpr int kEarlyStages = 1;
    Ring ring(*this);
    bool const active = row_group_ < panels_ && warp_ < Config::kWarps;
    if (active) ring.init();
    if (!args_.weights_first) wait_for_inputs();
    if (active) ring.ask_stages(0, kEarlyStages);
    init_barriers();
    wait_for_inputs();
    if (!args_.launch_early) launch_dependents();
    bring_first_piece();
    __syncthreads();
    arrive_with_tokens(pieces(0));
    if constexpr (Config::kSplit > 1) cluster_arrive();  // peers may write sums from here on
    if (active) ring.ask_stages(kEarlyStages, Config::kStages);
    if (Config::kLoaders == 0 || warp_ >= Config::kWarps) bring_other_pieces();
    Unit const unit(*this);  // its vectors are on their way while the main loop runs
    float4 acc[4][Config::kTokenTiles] = {};
    if (active) {
      accumulate(ring, acc);
      keep(acc);
    }
    __syncthreads();
    if constexpr (Config::kSplit > 1) {
      cluster_wait();
      send();
    }
    write(unit);
  }

 private:
  __device__ static int most_panels(PackedGemmArguments const& args) {
    return args.panels_each + (args.panels_extra > 0);
  }
  // Warps w of equal w % 4 share a scheduler. An odd number of pairs leaves 0 and 1 with a warp more: a pair has its first
  // warp there and the other one on 2 or 3, except for the last pair.
  __device__ static int mixed_warps(PackedGemmArguments const& args) { return most_panels(args) / 2 * 4; }
  __device__ static int row_group_of(PackedGemmArguments const& args, int warp) {
    if constexpr (!Config::kPairs) return warp * args.depth_inverse >> 16;
    return warp < mixed_warps(args) ? warp / 4 * 2 + warp % 2 : warp / 2;
  }
  __device__ static int depth_of(PackedGemmArguments const& args, int warp) {
    if constexpr (!Config::kPairs) return warp - row_group_of(args, warp) * args.depth;
    return warp < mixed_warps(args) ? warp / 2 % 2 : warp % 2;
  }
  __device__ int warp_of(int row_group, int depth) const {
    if constexpr (!Config::kPairs) return row_group * args_.depth + depth;
    return 2 * row_group < mixed_warps(args_) ? row_group / 2 * 4 + depth * 2 + row_group % 2 : row_group * 2 + depth;
  }
  // Blocks of a round that the first warp of this warp's pair takes.
  __device__ int first_turn() const {
    return 2 * row_group_ < mixed_warps(args_) ? args_.first_turn : Config::kRound / 2;
  }

  // The stages of this warp's part of K, by their first blocks: every depth-th one, or its turns of a pair.
  struct Walk {
    int const turn, step;
    int block, left;

    __device__ Walk(PackedMma const& p) : Walk(p, Config::kPairs ? p.first_turn() : 0) {}
    __device__ Walk(PackedMma const& p, int first_turn)
        : turn(p.depth_ == 0 ? first_turn : Config::kRound - first_turn),
          step(p.args_.depth * Config::kBlocks),
          block(Config::kPairs ? p.depth_ * first_turn : p.depth_ * Config::kBlocks),
          left(turn) {}
    // Blocks from this stage to the next one, which it goes to.
    __device__ int next() {
      int by = step;
      if constexpr (Config::kPairs) {
        by = 1;
        if (--left == 0) by += Config::kRound - turn, left = turn;
      }
      block += by;
      return by;
    }
  };

  __device__ void init_barriers() const {
    if (threadIdx.x == Config::kThreads - 32) {  // the last warp: it may have no ring of its own
#pragma unroll
      for (int i = 0; i < Config::kPieces; ++i)
        barrier_init(pieces(i), i == 0 || Config::kLoaders == 0 ? Config::kThreads : 32 * Config::kLoaders);
      if constexpr (Config::kSplit > 1) {
        barrier_init(summed(), 1);
        barrier_expect(summed(), panels_ * Config::kPeerBytes);
      }
      barrier_init_fence();
    }
  }

  // This warp's weights.
  struct Ring {
    PackedMma const& parent;
    Walk walk;
    uint8_t const* source;  // of the next stage to ask for
    int slot = 0;
    uint32_t phase = 0;
    uint64_t policy;

    __device__ Ring(PackedMma const& p)
        : parent(p),
          walk(p),
          source(p.args_.w +
                 (static_cast<int64_t>(p.begin_ + p.row_group_) * p.args_.k_blocks + p.cta_first_ + walk.block) *
                     kPackedBlockBytes),
          policy(evict_first_policy()) {}

    __device__ void ask(int into) {
      int const blocks = min(Config::kBlocks, parent.cta_blocks_ - walk.block);
      if (blocks <= 0) return;
      if (elect_one()) {
        barrier_expect(parent.full(into), blocks * kPackedBlockBytes);
        copy_bulk(parent.stage(into), source, blocks * kPackedBlockBytes, parent.full(into), policy);
      }
      source += walk.next() * kPackedBlockBytes;
    }
    __device__ void init() const {
      if (elect_one()) {
#pragma unroll
        for (int i = 0; i < Config::kStages; ++i) barrier_init(parent.full(i), 1);
        barrier_init_fence();
      }
      __syncwarp();
    }
    __device__ void ask_stages(int begin, int end) {
#pragma unroll 1
      for (int i = begin; i < end; ++i) ask(i);
    }
    __device__ uint32_t wait() const {
      barrier_wait(parent.full(slot), phase);
      return parent.stage(slot);
    }
    __device__ void refill() {
      __syncwarp();
      ask(slot);
      if (++slot == Config::kStages) slot = 0, phase ^= 1;
    }
  };

  // 512-byte segments of rows of a piece of this CTA's tokens. CTAs begin at different rows: they all read the same.
  __device__ void copy_piece(int piece, int first_row, int row_step, int first_segment, int segment_step) const {
    int const k_piece = piece * args_.piece_blocks * 64;
    int const k_end = min(k_piece / 64 + args_.piece_blocks, cta_blocks_) * 64;
    int const k_first = k_piece + first_segment * 256 + threadIdx.x % 32 * 8, k_left = args_.k - cta_first_ * 64;
    auto const* const x = static_cast<uint16_t const*>(args_.x) + cta_first_ * 64;
    for (int i = first_row; i < args_.m; i += row_step) {
      int const shifted = i + ((cluster_ & 127) * args_.m >> 7), row = shifted < args_.m ? shifted : shifted - args_.m;
      auto const* const from = x + row * args_.x_stride;
      uint32_t const to = tokens_ + row * token_stride();
      for (int k = k_first; k < k_end; k += segment_step * 256)
        copy_16_bytes(to + k * 2, from + (k < k_left ? k : -cta_first_ * 64), max(0, min(16, (k_left - k) * 2)));
    }
  }
  // The same with the values that quantize.hpp makes of blocks, code * block scale. Rows are 16-byte aligned, k % 16 == 0.
  __device__ void quantize_piece(int piece, int first_row, int row_step, int first_segment, int segment_step) const {
    if constexpr (kQuantize) {
      using Element = typename Config::Quantized;
      int const piece_end = min((piece + 1) * args_.piece_blocks, cta_blocks_) * 4;  // blocks of 16 values
      int const piece_first = piece * args_.piece_blocks * 4 + first_segment * 32 + threadIdx.x % 32;
      for (int row = first_row; row < args_.m; row += row_step) {
        auto const* const x = static_cast<char const*>(args_.x) + row * args_.x_stride * Element::kBytes;
        float decode = args_.outer_a[static_cast<int64_t>(row) * args_.outer_a_stride];
        for (int block = piece_first; block < piece_end; block += segment_step * 32) {
          int const column = cta_first_ * 4 + block;
          typename Element::Block values{};
          if (column * kBlock < args_.k) values = load_block<Element, true>(x, column, args_.k);
          pin(decode);  // or what is made of it would be awaited before x is asked for
          auto const outer = TePerToken::from_decode(decode);
          float const amax = flagged_amax<Element>(values);
          uint8_t const scale = TePerToken::block_scale(outer, fabsf(amax));
          uint2 const codes = encode_block<Element, TePerToken>(values, amax, outer, scale);
          BlockValues const exact(scale);
          uint32_t const to = tokens_ + row * token_stride() + block * 32;
          store_shared_128(to, exact.eight(codes.x));
          store_shared_128(to + 16, exact.eight(codes.y));
        }
      }
    }
  }
  __device__ void bring_piece(int piece, int first_row, int row_step, int first_segment, int segment_step) const {
    if constexpr (kQuantize) {
      quantize_piece(piece, first_row, row_step, first_segment, segment_step);
    } else {
      copy_piece(piece, first_row, row_step, first_segment, segment_step);
    }
  }
  __device__ static void arrive_with_tokens(uint32_t bar) {
    if constexpr (kQuantize) {
      barrier_arrive(bar);
    } else {
      barrier_arrive_after_copies(bar);
    }
  }
  // Everything waits for this one: all warps take part.
  __device__ void bring_first_piece() const {
    bool const by_row = 2 * args_.m >= Config::kAllWarps;
    bring_piece(0, by_row ? warp_ : 0, by_row ? Config::kAllWarps : 1, by_row ? 0 : warp_,
                by_row ? 1 : Config::kAllWarps);
  }
  __device__ void bring_other_pieces() const {
    int const first = Config::kLoaders ? warp_ - Config::kWarps : warp_;
    for (int piece = 1; piece * args_.piece_blocks < cta_blocks_; ++piece) {
      bring_piece(piece, first, Config::kLoaders ? Config::kLoaders : Config::kWarps, 0, 1);
      arrive_with_tokens(pieces(piece));
    }
  }

  __device__ void accumulate(Ring& ring, float4 (&acc)[4][Config::kTokenTiles]) const {
    int const lane = threadIdx.x % 32;
    Walk walk(*this);
    uint32_t tokens[Config::kTokenTiles];
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i)
      tokens[i] = tokens_ + min(8 * i + lane % 8, args_.m - 1) * token_stride() + walk.block * 128 + lane / 8 * 16;
    int piece = 0, arrived = 0;  // pieces, and their blocks
    while (walk.block < cta_blocks_) {
      int const blocks = min(Config::kBlocks, cta_blocks_ - walk.block);
      for (; arrived < walk.block + blocks; arrived += args_.piece_blocks) barrier_wait(pieces(piece++), 0);
      uint32_t const codes = ring.wait() + lane * 16;
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        if (i > 0 && i >= blocks) break;
        multiply_block(codes + i * kPackedBlockBytes, tokens, i * 128, acc);
      }
      int const by = walk.next() * 128;
#pragma unroll
      for (uint32_t& t : tokens) t += by;
      ring.refill();
    }
  }

  __device__ static void multiply_block(uint32_t codes, uint32_t const (&tokens)[Config::kTokenTiles], int offset,
                                        float4 (&acc)[4][Config::kTokenTiles]) {
    int const lane = threadIdx.x % 32;
    uint32_t const scales = codes - lane * 16 + kPackedCodeBytes + lane / 4 * 8;
    uint4 b[Config::kTokenTiles][2];
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i)
      b[i][0] = load_matrices(tokens[i] + offset), b[i][1] = load_matrices(tokens[i] + offset + 64);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint4 const words = load_shared_128(codes + w * 512);
      uint2 const s = load_shared_64(scales + w * 64);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[8];
        dequantize_fragments<Operand>(half ? words.z : words.x, half ? words.w : words.y, half ? s.y : s.x, a);
#pragma unroll
        for (int i = 0; i < Config::kTokenTiles; ++i) {
          mma_16x8x16<Operand>(acc[w][i], a, b[i][half].x, b[i][half].y);
          mma_16x8x16<Operand>(acc[w][i], a + 4, b[i][half].z, b[i][half].w);
        }
      }
    }
  }

  // This warp's sums take the place of its ring, which it has read.
  __device__ void keep(float4 const (&acc)[4][Config::kTokenTiles]) const {
    uint32_t const to = ring(warp_) + threadIdx.x % 32 * 16;
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int i = 0; i < Config::kTokenTiles; ++i)
        store_shared_128(to + (w * Config::kTokenTiles + i) * 512, acc[w][i]);
  }

  // Of the CTA: 16 rows (a group of a panel) x 8 tokens.
  __device__ float4 sum_of_warps(int row_group, int group, int tile) const {
    uint32_t from = ring(warp_of(row_group, 0)) + group * Config::kGroupBytes + tile * 512 + threadIdx.x % 32 * 16;
    uint32_t const step = ring(warp_of(row_group, 1)) - ring(warp_of(row_group, 0));
    float4 sum = load_shared_float4(from);
#pragma unroll 4
    for (int i = 1; i < args_.depth; ++i) sum = add(sum, load_shared_float4(from += step));
    return sum;
  }
  __device__ static float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

  // Where the CTA of rank `to` finds the sums of the CTA of rank `from`.
  __device__ uint32_t peer_sums(int row_group, int from, int to, int group, int tile) const {
    int const index = (row_group * (Config::kSplit - 1) + from - (from > to)) * Config::kOwnGroups + group;
    return peers_ + index * Config::kGroupBytes + tile * 512 + threadIdx.x % 32 * 16;
  }

  // Hands the sums of groups that peers write to them. The last warps do so, and the first ones write.
  __device__ void send() const {
    constexpr int kGroups = 4 - Config::kOwnGroups;
    for (int i = Config::kAllWarps - 1 - warp_; i < panels_ * kGroups; i += Config::kAllWarps) {
      int const row_group = i / kGroups, other = i % kGroups, own = rank_ * Config::kOwnGroups;
      int const group = other < own ? other : other + Config::kOwnGroups, to = group / Config::kOwnGroups;
#pragma unroll
      for (int tile = 0; tile < Config::kTokenTiles; ++tile)
        store_to_rank(map_to_rank(peer_sums(row_group, rank_, to, group % Config::kOwnGroups, tile), to),
                      sum_of_warps(row_group, group, tile), map_to_rank(summed(), to));
    }
  }

  // What this warp writes: one 16-row group at most, because a CTA has fewer of them than warps.
  struct Unit {
    int const row_group, group;
    bool const valid;
    PackedEpilogue<typename Config::Out, typename Config::Bias, Config::kSource> const epilogue;
    float2 outer_a[Config::kTokenTiles];

    __device__ Unit(PackedMma const& p)
        : row_group(p.warp_ / Config::kOwnGroups),
          group(p.warp_ % Config::kOwnGroups),
          valid(row_group < p.panels_ && p.warp_ < Config::kWarps),
          epilogue(p.args_, (p.begin_ + row_group) * kPackedRows + (p.rank_ * Config::kOwnGroups + group) * 16) {
#pragma unroll
      for (int i = 0; i < Config::kTokenTiles; ++i) outer_a[i] = epilogue.outer_a(8 * i);
    }
  };

  __device__ void write(Unit const& unit) const {
    if (!unit.valid) return;
    float4 own[Config::kTokenTiles];
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i)
      own[i] = sum_of_warps(unit.row_group, rank_ * Config::kOwnGroups + unit.group, i);
    if constexpr (Config::kSplit > 1) barrier_wait(summed(), 0);
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i) {
      float4 sum = own[i];
      if constexpr (Config::kSplit > 1) {
        sum = part(unit, 0, i, own[i]);
#pragma unroll
        for (int rank = 1; rank < Config::kSplit; ++rank) sum = add(sum, part(unit, rank, i, own[i]));
      }
      unit.epilogue(8 * i, unit.outer_a[i], sum);
    }
  }
  __device__ float4 part(Unit const& unit, int rank, int tile, float4 own) const {
    return rank == rank_ ? own : load_shared_float4(peer_sums(unit.row_group, rank, rank_, unit.group, tile));
  }
};

}  // namespace fp4gemm
