// What the kernel of packed_mma.hpp is built for, and its instruction.
#pragma once

#include "fp4gemm/packed_gemm.hpp"

namespace fp4gemm {

template <class Operand>
__device__ __forceinline__ void mma_16x8x16(float4& c, uint32_t const* a, uint32_t b0, uint32_t b1) {
  if constexpr (Operand::kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Quantized_: None, or the element of tokens that this kernel quantizes with the given outer scales, on their way in.
template <class Operand_, class Quantized_, class Out_, class Bias_, bool kSource_, int kTokenTiles_, int kWarps_,
          int kStages_, int kBlocks_, int kSplit_, int kLoaders_, bool kPairs_>
struct PackedMmaConfig {
  using Operand = Operand_;
  using Quantized = Quantized_;
  using Out = Out_;
  using Bias = Bias_;
  static constexpr bool kSource = kSource_;
  static constexpr int kTokenTiles = kTokenTiles_;  // of 8
  static constexpr int kWarps = kWarps_, kLoaders = kLoaders_;  // more warps load tokens, all but the first piece
  static constexpr int kAllWarps = kWarps + kLoaders, kThreads = 32 * kAllWarps;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;  // stages of a warp's ring, blocks of a stage
  static constexpr int kSplit = kSplit_;  // CTAs of a cluster
  // Depth 2 in unequal parts, so that the four schedulers of an SM have equal work though an odd number of panels gives two of
  // them a warp more. Pays where instructions are the limit: from two token tiles on.
  static constexpr bool kPairs = kPairs_;
  static constexpr int kRound = 32;  // blocks of K, of which each warp of a pair takes its turn
  static constexpr int kPieces = 8;  // in which tokens arrive, at most
  static constexpr int kStageBytes = kBlocks * kPackedBlockBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  // Fragments of sums are 16 rows x 8 tokens, 512 bytes; each CTA of a cluster writes kOwnGroups of the four of a panel.
  static constexpr int kGroupBytes = kTokenTiles * 512, kOwnGroups = 4 / kSplit;
  static constexpr int kBarrierBytes = 1024;
  // The rest depends on the problem: sums of peers, kPeerBytes for each panel of a cluster, then the tokens.
  static constexpr int kSharedBytes = kBarrierBytes + kWarps * kRingBytes;
  static constexpr int kPeerBytes = (kSplit - 1) * kOwnGroups * kGroupBytes;
  static_assert(4 % kSplit == 0 && kWarps * kStages <= 100 && kRingBytes >= 4 * kGroupBytes &&
                (!kPairs || kBlocks == 1));
};

}  // namespace fp4gemm
