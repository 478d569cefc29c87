// GEMM on prepacked weights for a few tokens: mma.sync, bound by the bandwidth of memory.
//
// A warp streams blocks of one panel of 64 weight rows through a ring of its own, so that the main loop has no barrier of the
// CTA; tokens are resident in shared memory. A CTA has row_groups x depth_groups such warps, along panels and along K, and a
// cluster splits K once more. Partial sums meet in shared memory, in a fixed order.
#pragma once

#include "fp4gemm/packed_gemm.hpp"

namespace fp4gemm {

template <class Operand> __device__ __forceinline__ void mma_16x8x16(float4& c, uint32_t const* a, uint32_t b0, uint32_t b1) {
  if constexpr (Operand::kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ void copy_16_bytes(uint32_t to, void const* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}

template <class Operand_, class Out_, class Bias_, bool kSource_, int kTokenTiles_, int kWarps_, int kStages_, int kBlocks_, int kSplit_>
struct PackedMmaConfig {
  using Operand = Operand_;
  using Out = Out_;
  using Bias = Bias_;
  static constexpr bool kSource = kSource_;
  static constexpr int kTokenTiles = kTokenTiles_;  // of 8
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;  // stages of a warp's ring, blocks of a stage
  static constexpr int kSplit = kSplit_;                        // CTAs of a cluster
  static constexpr int kPieces = 4;                             // in which tokens arrive
  static constexpr int kStageBytes = kBlocks * kPackedBlockBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kMinPiece = 4;  // blocks: a row of a piece is then 16 bytes for every lane
  // Fragments of a panel that one CTA of the cluster writes: 16 rows x 8 tokens, 512 bytes each.
  static constexpr int kOwnGroups = 4 / kSplit;
  static constexpr int kSlotBytes = kOwnGroups * kTokenTiles * 512;
  static constexpr int kBarrierBytes = 1024;
  // Before the tokens, whose size depends on K.
  static constexpr int kSharedBytes = kBarrierBytes + kWarps * kRingBytes;
  static_assert(4 % kSplit == 0 && kWarps * kStages <= 100 && kRingBytes >= kSplit * kSlotBytes);
};

template <class Config> class PackedMma {
  using Operand = typename Config::Operand;

  PackedGemmArguments const& args_;
  uint32_t const shared_, rings_, partials_, tokens_;
  int const warp_, row_group_, depth_;
  int const rank_;
  int const cluster_;
  int const cta_first_, cta_blocks_;  // blocks of K of this CTA
  int const first_, last_;            // of this warp, from cta_first_ on

  // Shared memory: barriers | rings, and partial sums after them | tokens, rows padded by 16 bytes against bank conflicts.
  __device__ uint32_t pieces(int i) const { return shared_ + 8 * i; }
  __device__ uint32_t summed() const { return shared_ + 8 * Config::kPieces; }
  __device__ uint32_t full(int stage) const {
    return shared_ + 128 + 8 * (warp_ * Config::kStages + stage);
  }
  __device__ uint32_t stage(int i) const {
    return rings_ + warp_ * Config::kRingBytes + i * Config::kStageBytes;
  }
  __device__ int token_stride() const { return cta_blocks_ * 128 + 16; }
  __device__ int piece_blocks() const { 
    return max((args_.warp_blocks + Config::kPieces - 1) / Config::kPieces, Config::kMinPiece);
  }
  __device__ int partial_count() const { return Config::kSplit << args_.depth_log2; }

 public:
  __device__ PackedMma(PackedGemmArguments const& args, uint8_t* shared)
      : args_(args),
        shared_(shared_address(shared)),
        rings_(shared_ + Config::kBarrierBytes),
        partials_(rings_),
        tokens_(shared_ + Config::kSharedBytes),
        warp_(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)),
        row_group_(warp_ >> args.depth_log2),
        depth_(warp_ & ((1 << args.depth_log2) - 1)),
        rank_(blockIdx.x % Config::kSplit),
        cluster_(blockIdx.x / Config::kSplit),
        cta_first_(args.k_blocks * rank_ / Config::kSplit),
        cta_blocks_(args.k_blocks * (rank_ + 1) / Config::kSplit - cta_first_),
        first_(min(depth_ * args.warp_blocks, cta_blocks_)),
        last_(min(first_ + args.warp_blocks, cta_blocks_)) {}

  __device__ void run() const {
    int const begin = cluster_ * args_.panels_each + min(cluster_, args_.panels_extra);
    int const end = begin + args_.panels_each + (cluster_ < args_.panels_extra);
    bool const active = begin + row_group_ < end && row_group_ < args_.row_groups && first_ < last_;
    Ring ring(*this, begin + row_group_);
    launch_dependents();
    if (active) ring.prime();
    if (threadIdx.x == 0) {
      for (int i = 0; i < Config::kPieces; ++i) barrier_init(pieces(i), Config::kThreads);
      barrier_init(summed(), 1);
      barrier_init_fence();
    }
    __syncthreads();
    wait_for_inputs();
    load_tokens();
    Unit const unit(*this, begin, end);  // its vectors are on their way while the main loop runs
    float4 acc[4][Config::kTokenTiles] = {};
    if (active) accumulate(ring, acc);
    share(end - begin, acc);
    write(unit);
  }

 private:
  // This warp's weights: its part of K of one panel.
  struct Ring {
    PackedMma const& parent;
    uint8_t const* source;  // of the next stage to ask for
    int ask_left;           // blocks still to ask for
    int slot = 0;
    uint32_t phase = 0;
    uint64_t policy;

    __device__ Ring(PackedMma const& p, int panel)
        : parent(p),
          source(p.args_.w + (static_cast<int64_t>(panel) * p.args_.k_blocks + p.cta_first_ + p.first_) * kPackedBlockBytes),
          ask_left(p.last_ - p.first_),
          policy(evict_first_policy()) {}

    __device__ void ask(int into) {
      if (ask_left <= 0) return;
      int const bytes = min(Config::kBlocks, ask_left) * kPackedBlockBytes;
      if (elect_one()) {
        barrier_expect(parent.full(into), bytes);
        copy_bulk(parent.stage(into), source, bytes, parent.full(into), policy);
      }
      source += bytes;
      ask_left -= Config::kBlocks;
    }
    __device__ void prime() {
      if (elect_one()) {
#pragma unroll
        for (int i = 0; i < Config::kStages; ++i) barrier_init(parent.full(i), 1);
        barrier_init_fence();
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Config::kStages; ++i) ask(i);
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

  // The tokens of this CTA's part of K, piece by piece: piece i holds the i-th blocks of every warp's part. CTAs begin at
  // different rows, because they all read the same.
  __device__ void load_tokens() const {
    int const lane = threadIdx.x % 32, depth_groups = 1 << args_.depth_log2, rows = args_.m * depth_groups;
    int const start = cluster_ % rows;
    for (int piece = 0; piece < Config::kPieces; ++piece) {
      int const begin = piece * piece_blocks() * 8, end = min(begin + piece_blocks() * 8, args_.warp_blocks * 8);  // 16-byte chunks
      for (int i = warp_; i < rows; i += Config::kWarps) {
        int const at = i + start < rows ? i + start : i + start - rows;
        int const row = at >> args_.depth_log2, first = (at & (depth_groups - 1)) * args_.warp_blocks * 8;
        auto const* from = static_cast<uint16_t const*>(args_.x) + row * args_.x_stride;
        uint32_t const to = tokens_ + row * token_stride();
        for (int chunk = first + begin + lane; chunk < min(first + end, cta_blocks_ * 8); chunk += 32) {
          int const k = cta_first_ * 64 + chunk * 8, valid = max(0, min(16, (args_.k - k) * 2));
          copy_16_bytes(to + chunk * 16, from + (valid > 0 ? k : 0), valid);
        }
      }
      barrier_arrive_after_copies(pieces(piece));
    }
  }

  __device__ void accumulate(Ring& ring, float4 (&acc)[4][Config::kTokenTiles]) const {
    int const lane = threadIdx.x % 32;
    uint32_t tokens[Config::kTokenTiles];
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i)
      tokens[i] = tokens_ + min(8 * i + lane % 8, args_.m - 1) * token_stride() + first_ * 128 + lane / 8 * 16;
    int const count = last_ - first_, piece_size = piece_blocks();
    int next_piece = 0, piece = 0;
    for (int block = 0; block < count; block += Config::kBlocks) {
      uint32_t const codes = ring.wait() + lane * 16;
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        if (i > 0 && block + i >= count) break;
        if (block + i == next_piece) {
          barrier_wait(pieces(piece++), 0);
          next_piece += piece_size;
        }
        multiply_block(codes + i * kPackedBlockBytes, tokens, acc);
#pragma unroll
        for (uint32_t& t : tokens) t += 128;
      }
      ring.refill();
    }
  }

  __device__ static void multiply_block(uint32_t codes, uint32_t const (&tokens)[Config::kTokenTiles],
                                        float4 (&acc)[4][Config::kTokenTiles]) {
    int const lane = threadIdx.x % 32;
    uint32_t const scales = codes - lane * 16 + kPackedCodeBytes + lane / 4 * 8;
    uint4 b[Config::kTokenTiles][2];
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i) b[i][0] = load_matrices(tokens[i]), b[i][1] = load_matrices(tokens[i] + 64);
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

  __device__ uint32_t partial(int row_group, int index) const {
    return partials_ + (row_group * partial_count() + index) * Config::kSlotBytes + threadIdx.x % 32 * 16;
  }

  // Hands this warp's sums to the CTAs that write them (16-row groups are divided among a cluster), and waits for theirs.
  __device__ void share(int row_groups, float4 const (&acc)[4][Config::kTokenTiles]) const {
    __syncthreads();  // the rings have been read
    if constexpr (Config::kSplit > 1) {
      cluster_arrive();
      if (threadIdx.x == 0)
        barrier_expect(summed(), row_groups * ((Config::kSplit - 1) << args_.depth_log2) * Config::kSlotBytes);
      cluster_wait();
    }
    if (row_group_ < row_groups) {
      uint32_t const slot = partial(row_group_, (rank_ << args_.depth_log2) + depth_);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        int const to = w / Config::kOwnGroups;
        uint32_t const at = slot + w % Config::kOwnGroups * Config::kTokenTiles * 512;
        bool const own = to == rank_;
        uint32_t const peer = own ? 0 : map_to_rank(at, to), peer_bar = own ? 0 : map_to_rank(summed(), to);
#pragma unroll
        for (int i = 0; i < Config::kTokenTiles; ++i) {
          if (own) {
            store_shared_128(at + i * 512, acc[w][i]);
          } else {
            store_to_rank(peer + i * 512, acc[w][i], peer_bar);
          }
        }
      }
    }
    __syncthreads();
    if constexpr (Config::kSplit > 1) barrier_wait(summed(), 0);
  }

  // What this warp writes: one 16-row group at most, because a CTA has fewer of them than warps.
  struct Unit {
    int const row_group, group;
    bool const valid;
    PackedEpilogue<typename Config::Out, typename Config::Bias, Config::kSource> const epilogue;
    float2 outer_a[Config::kTokenTiles];

    __device__ Unit(PackedMma const& p, int begin, int end)
        : row_group(p.warp_ / Config::kOwnGroups),
          group(p.warp_ % Config::kOwnGroups),
          valid(begin + row_group < end),
          epilogue(p.args_, (begin + row_group) * kPackedRows + (p.rank_ * Config::kOwnGroups + group) * 16) {
#pragma unroll
      for (int i = 0; i < Config::kTokenTiles; ++i) outer_a[i] = epilogue.outer_a(8 * i);
    }
  };

  __device__ void write(Unit const& unit) const {
    if (!unit.valid) return;
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i) {
      uint32_t const at = partial(unit.row_group, 0) + (unit.group * Config::kTokenTiles + i) * 512;
      float4 sum = load_shared_float4(at);
#pragma unroll 4
      for (int p = 1; p < partial_count(); ++p) {
        float4 const v = load_shared_float4(at + p * Config::kSlotBytes);
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      unit.epilogue(8 * i, unit.outer_a[i], sum);
    }
  }
};

}  // namespace fp4gemm
