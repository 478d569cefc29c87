// What one WGMMA kernel on prepacked weights is: its tile, warpgroups and shared memory, and the WGMMA of its tokens.
#pragma once

#include "nvrtc/std.hpp"

#include "cute/arch/mma_sm90_gmma.hpp"
#include "cute/numeric/integer_sequence.hpp"
#include "fp4gemm/packed_gemm.hpp"

namespace fp4gemm {

template <class Operand, int kTokens> struct Wgmma;

template <class Atom, int... I> __device__ __forceinline__ void wgmma_call(uint32_t const* a, uint64_t b, float* acc,
                                                                           cute::integer_sequence<int, I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, acc[I]..., cute::SM90::GMMA::ScaleOut::One);
}

#define FP4GEMM_WGMMA(tokens) \
  template <> struct Wgmma<OperandBf16, tokens> { \
    using Atom = \
        cute::SM90::GMMA::MMA_64x##tokens##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  }; \
  template <> struct Wgmma<OperandFp16, tokens> { \
    using Atom = \
        cute::SM90::GMMA::MMA_64x##tokens##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
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

// A shape that CUTLASS has in a header of three megabytes.
#define FP4GEMM_WGMMA_48(type) \
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type \
               " {" \
               "%0, %1, %2, %3, %4, %5, %6, %7, " \
               "%8, %9, %10, %11, %12, %13, %14, %15, " \
               "%16, %17, %18, %19, %20, %21, %22, %23}, " \
               "{%24, %25, %26, %27}, %28, p, 1, 1, 0;\n}" \
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3), "+f"(d4), "+f"(d5), "+f"(d6), "+f"(d7), "+f"(d8), "+f"(d9), \
                 "+f"(d10), "+f"(d11), "+f"(d12), "+f"(d13), "+f"(d14), "+f"(d15), "+f"(d16), "+f"(d17), "+f"(d18), \
                 "+f"(d19), "+f"(d20), "+f"(d21), "+f"(d22), "+f"(d23) \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))
template <bool kBf16> struct Wgmma48 {
  __device__ static void fma(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, float& d0, float& d1,
                             float& d2, float& d3, float& d4, float& d5, float& d6, float& d7, float& d8, float& d9,
                             float& d10, float& d11, float& d12, float& d13, float& d14, float& d15, float& d16,
                             float& d17, float& d18, float& d19, float& d20, float& d21, float& d22, float& d23,
                             cute::SM90::GMMA::ScaleOut) {
    if constexpr (kBf16) {
      FP4GEMM_WGMMA_48("bf16");
    } else {
      FP4GEMM_WGMMA_48("f16");
    }
  }
};
#undef FP4GEMM_WGMMA_48
template <> struct Wgmma<OperandBf16, 48> {
  using Atom = Wgmma48<true>;
};
template <> struct Wgmma<OperandFp16, 48> {
  using Atom = Wgmma48<false>;
};

template <class Operand_, class Out_, class Bias_, bool kSource_, int kTokens_, int kPanels_, int kRowGroups_,
          int kDepthGroups_, int kMulticast_, int kSplit_, int kStages_, int kLag_, bool kRoomy, bool kUneven_,
          bool kGrouped_ = false>
struct PackedWgmmaConfig {
  using Operand = Operand_;
  using Out = Out_;
  using Bias = Bias_;
  static constexpr bool kSource = kSource_;
  static constexpr int kTokens = kTokens_, kPanels = kPanels_, kRowGroups = kRowGroups_, kDepthGroups = kDepthGroups_;
  static constexpr int kMulticast = kMulticast_, kSplit = kSplit_, kStages = kStages_;
  static constexpr int kLag = kLag_;  // stages that the second row group stays behind the first, if any

  // One panel, two row groups: each has tiles of its own, and one computes while the other writes.
  static constexpr bool kTurns = kRowGroups > kPanels;
  static constexpr int kGroups = kRowGroups * kDepthGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);  // the last warpgroup produces
  // What a thread starts with (a multiple of 8 that fits the SM), and what consumers have once the producer gave up its own.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kGroups > 2 ? 32 : 24;
  static constexpr int kConsumerRegisters = (kLaunchRegisters * (kGroups + 1) - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kRegisters = kTokens / 2;  // accumulators of a panel
  static constexpr int kMost = (kPanels + kRowGroups - 1) / kRowGroups;  // panels of a warpgroup
  // Consumers with few sums need no more than they start with. They then do not wait until the producer has given up its own,
  // and leave room for the next quantizer. A table of experts takes more.
  static constexpr bool kTradesRegisters = kGroups > 1 && (kGrouped_ || kMost * kTokens > 64);
  // If registers last (spec.py: roomy), row tiles may have fewer panels: a warpgroup may skip its last panel, but not its only
  // one; and two k-steps go to a group of WGMMAs, which ptxas would serialize without registers to spare.
  static constexpr bool kUneven = kUneven_;
  static constexpr bool kGrouped = kGrouped_;  // tokens sorted by expert, a weight for each
  static constexpr int kLeastPanels =  // that a tile computes
      !kUneven ? kPanels : kPanels - (kPanels % kRowGroups > 0 ? kPanels % kRowGroups : kRowGroups);
  static constexpr bool kPairs = kRoomy;
  // Of a tile, the i-th of a row group.
  __device__ static int panel_of(int row_group, int i) { return kTurns ? i : row_group + i * kRowGroups; }
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kTokenSlot = (kTokenBytes + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kPanels * kPackedBlockBytes;
  // Partial sums of the tokens that this CTA writes. Without depth groups its own ones stay in registers.
  static constexpr int kOwnFragments = kTokens / 8 / kSplit;
  static constexpr int kPartials = kDepthGroups > 1 ? kDepthGroups* kSplit : kSplit - 1;
  static constexpr int kPartialBytes = kOwnFragments * 128 * 16;
  static constexpr int kReductionBytes = kPanels * kPartials * kPartialBytes;
  // Results of 16 tokens, twice, for every row group: where it may, a warpgroup writes whole lines of D.
  static constexpr bool kLines = Out::kBytes == 2 && kDepthGroups == 1 && kOwnFragments % 2 == 0;
  static constexpr int kLineBytes = kLines ? kRowGroups * 4096 : 0;
  static constexpr int kBarrierBytes = 1024;
  // A launch of a grouped kernel adds its cut and its table of experts, which no constant bounds.
  static constexpr int kSharedBytes =
      1024 + kBarrierBytes + kStages * (kTokenSlot + kWeightBytes) + kReductionBytes + kLineBytes;  // 1024: to align
  static_assert(kTokens / 8 % kSplit == 0 && kStages <= 60);
  static_assert(!kTurns || (kPanels == 1 && kRowGroups == 2 && kDepthGroups == 1 && kSplit == 1 && kLag == 0));
  static_assert(kLag == 0 || (kRowGroups == 2 && kDepthGroups == 1 && kLag < kStages));
  // A depth group waits for one stage while it holds another. Slots belong to one depth group each: a group that waited for
  // a slot whose last filling another one has yet to see would take the parity of the filling before for its own.
  static_assert(kStages >= 2 * kDepthGroups && kStages % kDepthGroups == 0);
};

}  // namespace fp4gemm
