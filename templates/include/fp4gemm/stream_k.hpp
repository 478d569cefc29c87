// A tile scheduler for CUTLASS's cooperative kernel by which clusters share tiles (pieces.hpp). Sums of a part of a tile go through
// device memory; the cluster that stores the tile adds them, those of the nearest part first, in the same order each time.
#pragma once

#include "fp4gemm/async.hpp"
#include "fp4gemm/packed.hpp"
#include "fp4gemm/pieces.hpp"

#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace fp4gemm {

// A flag in device memory that another CTA waits for: who has seen it sees what was written before it was set.
CUTLASS_DEVICE void set_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
CUTLASS_DEVICE uint64_t read_flag(uint64_t const* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

template <class Tile, class Cluster> class StreamKScheduler
    : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  static constexpr int kCluster = cute::size(Cluster{});
  static constexpr int kGroups = cute::size<0>(Tile{}) / kPackedRows;  // warpgroups, each with sums of its own
  static constexpr int kGroupThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kGroupSums = cute::size<0>(Tile{}) * cute::size<1>(Tile{}) / kGroups;

 public:
  struct Params : Base::Params {
    Pieces pieces;
    // make_packed_launch writes both. A place for the sums of each CTA; then, of each of its warpgroups, a flag that says that
    // they are there, by a number that no other launch has: nobody need clear it before the first.
    float* partial_sums;
    uint64_t launch_number;
  };

  struct WorkTileInfo : Base::WorkTileInfo {
    Piece piece;
  };

 private:
  Params const& params_;
  int const cta_, cluster_;

 public:
  CUTLASS_DEVICE explicit StreamKScheduler(Params const& params)
      : Base(params), params_(params), cta_(cta_index(params)), cluster_(cta_ / kCluster) {}

  template <class Problem, class... Rest>
  static Params to_underlying_arguments(Problem problem, Tile tile, Cluster cluster,
                                        cutlass::KernelHardwareInfo const& hardware, Arguments const& arguments,
                                        Rest const&...) {
    Params params{Base::to_underlying_arguments(problem, tile, cluster, hardware, arguments)};
    dim3 const grid = get_grid_shape(params, problem, tile, cluster, hardware, arguments);
    int const blocks = cute::ceil_div(static_cast<int>(cute::get<2>(problem)), int(cute::size<2>(Tile{})));
    params.pieces = {static_cast<int>(params.blocks_per_problem_) / kCluster, blocks,
                     static_cast<int>(grid.x * grid.y) / kCluster};
    return params;
  }

  // All clusters that are resident at once, however few tiles there are.
  template <class Problem> static dim3 get_grid_shape(Params const&, Problem problem, Tile tile, Cluster cluster,
                                                      cutlass::KernelHardwareInfo hardware, Arguments arguments) {
    return Base::Params::get_grid_shape(get_tiled_cta_shape_mnl(problem, tile, cluster),
                                        cutlass::gemm::to_gemm_coord(cluster), hardware, arguments.max_swizzle_size,
                                        arguments.raster_order, false);
  }

  template <class Shape> CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Shape) const {
    return work(params_.pieces.first(cluster_));
  }
  template <class... Pipeline> CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo done, Pipeline const&...) const {
    return cute::make_tuple(next(done), true);
  }
  CUTLASS_DEVICE bool is_last_tile(WorkTileInfo const& at) const { return !next(at).is_valid(); }

  template <class Problem> CUTLASS_DEVICE static int get_work_k_tile_count(WorkTileInfo const& at, Problem, Tile) {
    return at.piece.count;
  }
  CUTLASS_DEVICE static int get_work_k_tile_start(WorkTileInfo const& at) { return at.piece.block; }
  CUTLASS_DEVICE static bool compute_epilogue(WorkTileInfo const& at, Params const& params) {
    return params.pieces.ends(at.piece);
  }

  // By a warpgroup, behind its main loop: leaves its sums for another cluster, or adds what others have left.
  template <class Sums>
  CUTLASS_DEVICE static void fixup(Params const& params, WorkTileInfo const& at, Sums& sums, uint32_t, uint32_t group) {
    constexpr int kSums = cute::size(Sums{});
    static_assert(kSums * kGroupThreads == kGroupSums && kSums % 4 == 0);
    if (at.piece.count == params.pieces.tile_blocks) return;
    int const thread = threadIdx.x % kGroupThreads;
    int const barrier = static_cast<int>(cutlass::arch::ReservedNamedBarriers::StreamkBarrier0) + group;
    auto const place = [&](int cta) {
      return reinterpret_cast<float4*>(params.partial_sums + int64_t(cta * kGroups + group) * kGroupSums) + thread;
    };
    auto* const flags = reinterpret_cast<uint64_t*>(params.partial_sums +
                                                    int64_t(params.pieces.clusters) * kCluster * kGroups * kGroupSums);
    int cta = cta_index(params);
    if (!compute_epilogue(at, params)) {
      float4* const to = place(cta);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSums; i += 4) {
        __stcg(to + i / 4 * kGroupThreads, float4{sums(i), sums(i + 1), sums(i + 2), sums(i + 3)});
      }
      named_sync<kGroupThreads>(barrier);
      if (thread == 0) set_flag(flags + cta * kGroups + group, params.launch_number);
      return;
    }
    for (int part = cta / kCluster; params.pieces.continues(part, at.piece.tile); --part) {
      cta -= kCluster;
      uint64_t* const flag = flags + cta * kGroups + group;
      if (thread == 0) {
        while (read_flag(flag) != params.launch_number) {
        }
        *flag = 0;  // a captured launch comes again with the same number
      }
      named_sync<kGroupThreads>(barrier);
      float4 const* const from = place(cta);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSums; i += 4) {
        float4 const v = __ldcg(from + i / 4 * kGroupThreads);
        sums(i) += v.x, sums(i + 1) += v.y, sums(i + 2) += v.z, sums(i + 3) += v.w;
      }
    }
  }

 private:
  // Of the CTA; those of a cluster follow each other.
  CUTLASS_DEVICE static int cta_index(Params const& params) {
    return params.raster_order_ == RasterOrder::AlongN ? blockIdx.x + blockIdx.y * gridDim.x
                                                       : blockIdx.x * gridDim.y + blockIdx.y;
  }

  CUTLASS_DEVICE WorkTileInfo work(Piece const& piece) const {
    return {get_current_work_for_linear_idx(uint64_t(piece.tile) * kCluster + cta_ % kCluster), piece};
  }
  CUTLASS_DEVICE WorkTileInfo next(WorkTileInfo const& done) const {
    return work(params_.pieces.next(done.piece, cluster_));
  }
};

struct StreamK {};  // the tag of its kernels

}  // namespace fp4gemm

namespace cutlass::gemm::kernel::detail {
template <class Tile, class Cluster, uint32_t kStages>
struct TileSchedulerSelector<fp4gemm::StreamK, arch::Sm90, Tile, Cluster, kStages> {
  using Scheduler = fp4gemm::StreamKScheduler<Tile, Cluster>;
};
}  // namespace cutlass::gemm::kernel::detail
