// Block-scaled GEMMs of Blackwell: CUTLASS's collectives for packed NVFP4, and their arguments.
// The template says what the arch needs before it includes this: FP4GEMM_SM100 or FP4GEMM_SM120.
#pragma once

#include "fp4gemm/gemm.hpp"

#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
// collective_builder.hpp hides these under NVRTC, which only lacks what their host code needs.
#if defined(FP4GEMM_SM100)
#include "cutlass/gemm/collective/sm100_blockscaled_mma_warpspecialized.hpp"
#endif
#include "cutlass/gemm/collective/builders/sm100_umma_builder.inl"
#include "cutlass/gemm/collective/builders/sm100_blockscaled_umma_builder.inl"
#if defined(FP4GEMM_SM120)
#include "cutlass/gemm/collective/sm120_blockscaled_mma_tma.hpp"
#include "cutlass/gemm/collective/builders/sm120_blockscaled_mma_builder.inl"
#endif
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace fp4gemm {

#if defined(FP4GEMM_SM100)
// Tile is that of one MMA; two SMs share one of 256 rows.
template <class Tile> struct Sm100Schedule {
  static constexpr bool kTwoSm = cute::size<0>(Tile{}) == 256;
  using ArchTag = cutlass::arch::Sm100;
  using Mainloop = cute::conditional_t<kTwoSm, cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100,
                                       cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100>;
  using Epilogue =
      cute::conditional_t<kTwoSm, cutlass::epilogue::TmaWarpSpecialized2Sm, cutlass::epilogue::TmaWarpSpecialized1Sm>;
  // With 256 columns two accumulators overlap in TMEM by the columns of an epilogue tile, to leave room for block scales, 48
  // columns. CUTLASS's own choice, 128, takes more registers than there are.
  using EpilogueTile = cute::conditional_t<cute::size<1>(Tile{}) == 256, cute::Shape<cute::_128, cute::_64>,
                                           cutlass::epilogue::collective::EpilogueTileAuto>;
};
#endif

#if defined(FP4GEMM_SM120)
struct Sm120Cooperative {
  using ArchTag = cutlass::arch::Sm120;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedNvf4Sm120;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
};

struct Sm120Pingpong {
  using ArchTag = cutlass::arch::Sm120;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpongNvf4Sm120;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
};
#endif

// A row-major D of ElementD, and C of ElementC or void.
template <class Schedule, class Tile, class Cluster, class ElementC, class ElementD, class Tree, class Scheduler>
struct BlockScaledGemm {
  using Element = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  using RowMajor = cutlass::layout::RowMajor;
  static constexpr int kAlignment = 32;  // TMA takes rows of whole 16 bytes
  static constexpr int kAlignmentD = 128 / cutlass::sizeof_bits<ElementD>::value;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Schedule::ArchTag, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
      typename Schedule::EpilogueTile, float, float, ElementC, RowMajor, kAlignmentD, ElementD, RowMajor, kAlignmentD,
      typename Schedule::Epilogue, Tree>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Schedule::ArchTag, cutlass::arch::OpClassBlockScaledTensorOp, Element, RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
};

// The problem of D^T: to CUTLASS a row-major matrix like any other. The tree names vectors by the operand they belong to.
CUTLASS_DEVICE GemmArguments transposed(GemmArguments args) {
  auto const swap = [](auto& x, auto& y) {
    auto const z = x;
    x = y, y = z;
  };
  swap(args.a, args.b), swap(args.sfa, args.sfb), swap(args.lda, args.ldb), swap(args.m, args.n);
  swap(args.batch_a, args.batch_b);
  return args;
}

template <class Kernel> CUTLASS_DEVICE Launch<Kernel> make_block_scaled_launch(
    GemmArguments const& args, typename Kernel::CollectiveEpilogue::FusionCallbacks::Arguments const& tree) {
  using Mainloop = typename Kernel::CollectiveMainloop;
  using Epilogue = typename Kernel::CollectiveEpilogue;
  using Config = typename Mainloop::Sm1xxBlkScaledConfig;
  using Data = typename Mainloop::ArrayElementA;
  using Scale = typename Mainloop::ElementSF;
  auto const shape = cute::make_shape(args.m, args.n, args.k, args.l);
  typename Epilogue::Arguments epilogue{tree,
                                        {},
                                        packed_stride(args.ldc, args.batch_c),
                                        static_cast<typename Epilogue::ElementD*>(args.d),
                                        packed_stride(args.ldd, args.batch_d)};
  if constexpr (!cute::is_void_v<typename Epilogue::ElementC>) {
    epilogue.ptr_C = static_cast<typename Epilogue::ElementC const*>(args.c);
  }
  return make_launch<Kernel>(shape,
                             {static_cast<Data const*>(args.a), packed_stride(args.lda, args.batch_a),
                              static_cast<Data const*>(args.b), packed_stride(args.ldb, args.batch_b),
                              static_cast<Scale const*>(args.sfa), Config::tile_atom_to_shape_SFA(shape),
                              static_cast<Scale const*>(args.sfb), Config::tile_atom_to_shape_SFB(shape)},
                             epilogue, args.sm_count);
}

}  // namespace fp4gemm
