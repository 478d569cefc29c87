// A CUTLASS main loop for sm_90a whose A operand is the prepacked weight (packed.hpp): codes become fragments in registers on
// their way into WGMMA, tokens are B from shared memory. CUTLASS's kernel layers, schedulers and epilogues take it unchanged.
// M runs along weight rows and N along tokens, so a tile of D is column-major.
#pragma once

#include "fp4gemm/gemm.hpp"

#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#include "fp4gemm/packed.hpp"
#include "fp4gemm/stream_k.hpp"

namespace fp4gemm {

// The dispatch tag: kernel layers look at Schedule, pipelines at Stages and ClusterShape.
template <int kStages, class Cluster, class KernelSchedule> struct PackedWeightMainloop {
  static constexpr int Stages = kStages;
  using ClusterShape = Cluster;
  using ArchTag = cutlass::arch::Sm90;
  using Schedule = KernelSchedule;
};

template <class Element> struct PackedOperand;
template <> struct PackedOperand<cutlass::bfloat16_t> {
  using type = OperandBf16;
};
template <> struct PackedOperand<cutlass::half_t> {
  using type = OperandFp16;
};

// One thread's part of a packed block, not yet dequantized: 32 codes and 8 scale bytes.
struct PackedWords {
  uint4 codes;
  uint2 scales;

  __device__ __forceinline__ static PackedWords load(uint8_t const* block, int warp, int lane) {
    return {*reinterpret_cast<uint4 const*>(block + 512 * warp + 16 * lane),
            *reinterpret_cast<uint2 const*>(block + kPackedCodeBytes + 64 * warp + 8 * (lane / 4))};
  }

  // The A registers a0..a3 of four k-steps. The fences keep the arithmetic where it is written: ahead of a warpgroup_wait it
  // would need registers of its own, and ptxas would serialize the WGMMAs in flight.
  template <class Operand> __device__ __forceinline__ void dequantize(uint32_t (&r)[16]) const {
    uint32_t const pairs[2][3] = {{codes.x, codes.y, scales.x}, {codes.z, codes.w, scales.y}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a = pairs[half][0], b = pairs[half][1], s = pairs[half][2], registers[8];
      cute::warpgroup_fence_operand(a);
      cute::warpgroup_fence_operand(b);
      cute::warpgroup_fence_operand(s);
      dequantize_fragments<Operand>(a, b, s, registers);
#pragma unroll
      for (int i = 0; i < 8; ++i) r[8 * half + i] = registers[i];
    }
  }
};

}  // namespace fp4gemm

namespace cutlass::gemm::collective {

using namespace cute;

template <int kStages, class ClusterShape, class KernelSchedule, class TileShape_, class StrideA_, class ElementB_,
          class StrideB_, class TiledMma_, class GmemTiledCopyB_, class SmemLayoutAtomB_>
struct CollectiveMma<fp4gemm::PackedWeightMainloop<kStages, ClusterShape, KernelSchedule>, TileShape_, uint8_t,
                     StrideA_, ElementB_, StrideB_, TiledMma_, void, void, void, void, GmemTiledCopyB_,
                     SmemLayoutAtomB_, void, void> {
  using DispatchPolicy = fp4gemm::PackedWeightMainloop<kStages, ClusterShape, KernelSchedule>;
  using ArchTag = typename DispatchPolicy::ArchTag;
  using TileShape = TileShape_;
  using ElementA = uint8_t;
  using StrideA = StrideA_;
  using ElementB = ElementB_;
  using StrideB = StrideB_;
  using TiledMma = TiledMma_;
  using ElementAccumulator = typename TiledMma::ValTypeC;
  using GmemTiledCopyB = GmemTiledCopyB_;
  using Operand = typename fp4gemm::PackedOperand<ElementB>::type;

  using MainloopPipeline = cutlass::PipelineTmaAsync<kStages>;
  using PipelineState = cutlass::PipelineState<kStages>;
  using PipelineParams = typename MainloopPipeline::Params;
  static constexpr int NumProducerThreadEvents = 1;
  static constexpr int K_PIPE_MAX = kStages;

  static constexpr int kPanels = size<0>(TileShape{}) / fp4gemm::kPackedRows;  // a consumer warpgroup has one
  static_assert(kPanels * NumThreadsPerWarpGroup == size(TiledMma{}), "a warpgroup takes 64 weight rows");
  static_assert(size<2>(TileShape{}) == fp4gemm::kPackedColumns && kStages >= 4);

  using SmemLayoutB = decltype(tile_to_shape(SmemLayoutAtomB_{},
                                             make_shape(shape<1>(TileShape{}), shape<2>(TileShape{}), Int<kStages>{})));
  static constexpr int kTokenBytes = size<1>(TileShape{}) * size<2>(TileShape{}) * sizeof(ElementB);
  static constexpr int kWeightBytes = kPanels * fp4gemm::kPackedBlockBytes;

  struct TensorStorage {
    alignas(1024) cute::array<ElementB, cosize_v<SmemLayoutB>> tokens;
    alignas(128) uint8_t weights[kStages][kPanels][fp4gemm::kPackedBlockBytes];
  };
  using PipelineStorage = typename MainloopPipeline::SharedStorage;

  struct Arguments {
    uint8_t const* weights = nullptr;  // packed, [ceil(M / 64)][ceil(K / 64)][2304]
    ElementB const* tokens = nullptr;  // [N, K]
    StrideB stride_tokens{};
  };

  struct Params {
    using TmaB = decltype(make_tma_copy_B_sm90(
        GmemTiledCopyB{},
        make_tensor(static_cast<ElementB const*>(nullptr), repeat_like(StrideB{}, int32_t(0)), StrideB{}),
        SmemLayoutB{}(_, _, Int<0>{}), TileShape{}, ClusterShape{}));
    TmaB tma_tokens;
    uint8_t const* weights;
    int panels, k_blocks;  // of the whole weight
    uint32_t tma_transaction_bytes;  // the kernel layers hand it to the pipeline
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const& problem, Arguments const& args, void*) {
    auto [M, N, K, L] = append<4>(problem, 1);
    Tensor tokens = make_tensor(args.tokens, make_layout(make_shape(N, K, L), args.stride_tokens));
    return {make_tma_copy_B_sm90(GmemTiledCopyB{}, tokens, SmemLayoutB{}(_, _, Int<0>{}), TileShape{}, ClusterShape{}),
            args.weights, ceil_div(M, fp4gemm::kPackedRows), ceil_div(K, fp4gemm::kPackedColumns),
            kTokenBytes + kWeightBytes};
  }

  template <class ProblemShape> static bool can_implement(ProblemShape const& problem, Arguments const& args) {
    auto [M, N, K, L] = append<4>(problem, 1);
    return L == 1 && get<0>(args.stride_tokens) * int(sizeof(ElementB)) % 16 == 0;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_tokens.get_tma_descriptor());
  }

  // Coordinates stand in for A: the kernel layers only take numbers of tiles from it.
  template <class ProblemShape> CUTLASS_DEVICE auto load_init(ProblemShape const& problem, Params const& params) const {
    using X = Underscore;
    auto [M, N, K, L] = problem;
    Tensor a = make_identity_tensor(make_shape(M, K, L));
    Tensor b = params.tma_tokens.get_tma_tensor(make_shape(N, K, L));
    return make_tuple(local_tile(a, TileShape{}, make_coord(_, _, _), Step<_1, X, _1>{}),  // (BLK_M,BLK_K,m,k,l)
                      local_tile(b, TileShape{}, make_coord(_, _, _), Step<X, _1, _1>{}));  // (BLK_N,BLK_K,n,k,l)
  }

  // Producer: a panel is one bulk copy; the cluster's CTAs along M share their tokens by multicast.
  template <class TensorA, class TensorB, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB> const& inputs, BlockCoord const& block, KTileIterator k_tile,
                           int k_tile_count, int, uint32_t block_rank, TensorStorage& storage) {
    if (!cute::elect_one_sync()) return;
    auto [m, n, k, l] = block;
    Layout const cluster = Layout<ClusterShape>{};
    int const cta_m = block_rank % size<0>(cluster), cta_n = block_rank / size<0>(cluster);
    uint16_t sharers = 0;
    for (int i = 0; i < size<0>(cluster); ++i) sharers |= uint16_t(1) << cluster(i, cta_n, Int<0>{});

    auto tma = params.tma_tokens.get_slice(cta_m);
    Tensor source = tma.partition_S(get<1>(inputs)(_, _, n, _, l));  // (TMA,TMA_N,TMA_K,k)
    Tensor target = tma.partition_D(as_position_independent_swizzle_tensor(
        make_tensor(make_smem_ptr(storage.tokens.data()), SmemLayoutB{})));  // (TMA,TMA_N,TMA_K,PIPE)
    uint8_t const* panels[kPanels];
    CUTLASS_PRAGMA_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      int const panel = cute::min(m * kPanels + p, params.panels - 1);  // rows past M: some other panel, never stored
      panels[p] = params.weights + int64_t(panel) * params.k_blocks * fp4gemm::kPackedBlockBytes;
    }

    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tile_count > 0; --k_tile_count, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* const full = pipeline.producer_get_barrier(write);
      int const stage = write.index();
      CUTLASS_PRAGMA_UNROLL
      for (int p = 0; p < kPanels; ++p) {
        SM90_BULK_COPY_G2S::copy(panels[p] + int64_t(*k_tile) * fp4gemm::kPackedBlockBytes, full,
                                 storage.weights[stage][p], fp4gemm::kPackedBlockBytes);
      }
      copy(params.tma_tokens.with(*full, sharers), source(_, _, _, *k_tile), target(_, _, _, stage));
    }
  }

  // A CTA must not leave while others of its cluster still write to it.
  CUTLASS_DEVICE void load_tail(MainloopPipeline pipeline, PipelineState write) {
    if (cute::elect_one_sync()) pipeline.producer_tail(write);
  }

  // Consumer: while the WGMMAs of one k-block run, the next block's fragments are made in the other buffer.
  template <class Accumulators> CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read,
                                                        Accumulators& accumulators, int k_tile_count, int thread_idx,
                                                        TensorStorage& storage, Params const&) {
    int const warpgroup = __shfl_sync(0xFFFFFFFF, thread_idx / NumThreadsPerWarpGroup, 0);
    int const warp = thread_idx / NumThreadsPerWarp % NumWarpsPerWarpGroup, lane = thread_idx % NumThreadsPerWarp;

    TiledMma tiled_mma;
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    auto slice = tiled_mma.get_slice(warpgroup * NumThreadsPerWarpGroup);
    Tensor smem_tokens = make_tensor(make_smem_ptr(storage.tokens.data()), SmemLayoutB{});
    Tensor tokens = slice.make_fragment_B(slice.partition_B(smem_tokens));  // (MMA,MMA_N,MMA_K,PIPE)
    Tensor weights = make_tensor<ElementB>(Shape<_8, _1, _4, _2>{});  // (MMA,MMA_M,MMA_K,buffer)
    Tensor registers = recast<uint32_t>(weights);

    // Words are read two blocks before the block is multiplied, fragments are made one block before: while four WGMMAs run,
    // a warp only computes. Beyond the last block whatever the stages hold is dequantized, and not used.
    struct Fetched {
      fp4gemm::PackedWords words;
      int stage;
    };
    PipelineState ahead = read;
    auto fetch = [&](bool exists) {
      if (exists) pipeline.consumer_wait(ahead);
      int const stage = ahead.index();
      ++ahead;
      return Fetched{fp4gemm::PackedWords::load(storage.weights[stage][warpgroup], warp, lane), stage};
    };
    Fetched now = fetch(true), next = fetch(1 < k_tile_count);
    int before = 0;
    auto dequantize = [&](fp4gemm::PackedWords const& words, auto buffer) {
      uint32_t r[16];
      words.template dequantize<Operand>(r);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 16; ++i) registers(i % 4, 0, i / 4, buffer) = r[i];
    };
    auto block = [&](auto current, auto other, int i) {
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < 4; ++step) {
        cute::gemm(tiled_mma, weights(_, _, step, current), tokens(_, _, step, now.stage), accumulators);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      Fetched const after = fetch(i + 2 < k_tile_count);
      warpgroup_wait<1>();  // of the block before: its stage and its fragments are free
      if (i != 0) pipeline.consumer_release(PipelineState(before, 0, 0));
      dequantize(next.words, other);
      before = now.stage, now = next, next = after;
    };

    dequantize(now.words, _0{});
    warpgroup_fence_operand(accumulators);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < k_tile_count; i += 2) {
      block(_0{}, _1{}, i);
      if (i + 1 == k_tile_count) break;
      block(_1{}, _0{}, i + 1);
    }
    warpgroup_fence_operand(accumulators);
  }

  // mma() leaves the last block's WGMMAs in flight and its stage held.
  CUTLASS_DEVICE void mma_tail(MainloopPipeline pipeline, PipelineState release, int k_tile_count) {
    release.advance(k_tile_count - 1);
    warpgroup_wait<0>();
    pipeline.consumer_release(release);
  }
};

}  // namespace cutlass::gemm::collective

namespace fp4gemm {

template <class Element, class Tile, class Cluster, class Schedule, int kCarveout> struct PackedMainloopOf {
  static constexpr int kPanels = cute::size<0>(Tile{}) / kPackedRows;
  // Of the shared memory that the epilogue leaves; 2 KB are for barriers and alignment.
  static constexpr int kStageBytes =
      cute::size<1>(Tile{}) * kPackedColumns * sizeof(Element) + kPanels * kPackedBlockBytes;
  static constexpr int kStages =
      (cutlass::gemm::collective::detail::sm90_smem_capacity_bytes - kCarveout - 2048) / kStageBytes;
  using Atom =
      decltype(cute::GMMA::rs_op_selector<Element, Element, float, Tile, cute::GMMA::Major::K, cute::GMMA::Major::K>());
  using TiledMma =
      decltype(cute::make_tiled_mma(Atom{}, cute::Layout<cute::Shape<cute::Int<kPanels>, cute::_1, cute::_1>>{}));
  using Copy = cute::conditional_t<cute::size<0>(Cluster{}) == 1, cute::SM90_TMA_LOAD, cute::SM90_TMA_LOAD_MULTICAST>;
  using Stride = cute::Stride<int64_t, cute::_1, int64_t>;
  using type = cutlass::gemm::collective::CollectiveMma<PackedWeightMainloop<kStages, Cluster, Schedule>, Tile, uint8_t,
                                                        Stride, Element, Stride, TiledMma, void, void, void, void, Copy,
                                                        cute::GMMA::Layout_K_SW128_Atom<Element>, void, void>;
};

// The main loop of a tile of weight rows x tokens x 64, with all the stages that fit beside `kCarveout` bytes of epilogue.
template <class Element, class Tile, class Cluster, class Schedule, int kCarveout> using PackedMainloop =
    typename PackedMainloopOf<Element, Tile, Cluster, Schedule, kCarveout>::type;

// A few token tiles at a time pass over all rows, since a tile of tokens is several times the bytes of one of weights: those
// that run at once then read about as much of either. Where there are fewer of them than of rows, CUTLASS would let all token
// tiles pass over a few rows. It rounds both counts of tiles up to that width and computes the rest for nobody, so the
// width divides them.
template <class Kernel>
CUTLASS_DEVICE typename Kernel::TileSchedulerArguments token_tiles_together(GemmArguments const& args) {
  using Tile = typename Kernel::TileShape;
  typename Kernel::TileSchedulerArguments order;
  int const rows = cute::ceil_div(args.n, cute::size<0>(Tile{}) * cute::size<0>(typename Kernel::ClusterShape{}));
  int const tokens = cute::ceil_div(args.m, cute::size<1>(Tile{}) * cute::size<1>(typename Kernel::ClusterShape{}));
  if (tokens < 8) return order;
  order.raster_order = decltype(order.raster_order)::AlongM;
  order.max_swizzle_size = (rows | tokens) % 4 == 0 ? 4 : (rows | tokens) % 2 == 0 ? 2 : 1;
  return order;
}

// a: tokens; b: the packed weight.
template <class Kernel> CUTLASS_DEVICE Launch<Kernel> make_packed_launch(
    GemmArguments const& args, typename Kernel::CollectiveEpilogue::FusionCallbacks::Arguments const& tree) {
  using Mainloop = typename Kernel::CollectiveMainloop;
  using Epilogue = typename Kernel::CollectiveEpilogue;
  using Tokens = typename Mainloop::ElementB;
  using ElementD = typename Epilogue::ElementD;
  auto const column_major = [](int64_t ld) { return cute::make_stride(cute::_1{}, ld, int64_t(0)); };
  typename Epilogue::Arguments epilogue{
      tree, {}, column_major(args.ldc), static_cast<ElementD*>(args.d), column_major(args.ldd)};
  if constexpr (!cute::is_void_v<typename Epilogue::ElementC>) {
    epilogue.ptr_C = static_cast<typename Epilogue::ElementC const*>(args.c);
  }
  auto launch = make_launch<Kernel>(
      {args.n, args.m, args.k, 1},
      {static_cast<uint8_t const*>(args.b), static_cast<Tokens const*>(args.a), packed_stride(args.lda)}, epilogue,
      args.sm_count, token_tiles_together<Kernel>(args));
  if constexpr (cute::is_same_v<typename Kernel::TileSchedulerTag, StreamK>) {
    launch.params.scheduler.partial_sums = static_cast<float*>(args.workspace);
    launch.params.scheduler.launch_number = args.launch_number;
  }
  return launch;
}

}  // namespace fp4gemm
