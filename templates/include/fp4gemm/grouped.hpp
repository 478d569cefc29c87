// A grouped GEMM of Blackwell: rows of A and D are sorted by expert, B has a member for each, and where an expert's rows begin
// stands on the device. To CUTLASS it is a batch whose members share A, its block scales, C and D: their stride from one member
// to the next is 0. What is left is which tiles there are, and that a tile stores no other expert's rows.
//
// Tiles lie on one grid over all rows, wherever an expert's begin: so block scales of A need no padding between experts, and
// there are at most E - 1 tiles of rows more than without experts. A tile that has rows of others (one on the border) is computed
// for each of its experts. TMA stores whole tiles; of one on the border it stores nothing, because the coordinate of its expert
// is out of bounds, and each thread stores what it has of the expert's rows.
#pragma once

#include "fp4gemm/blockscaled.hpp"

#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"

namespace fp4gemm {

// fp4gemm/launch.py packs what follows behind GemmArguments: keep both alike. There m is T, l is E, n and k are one expert's.
struct GroupedArguments : GemmArguments {
  int64_t const* offsets;  // [l + 1]
};

// The rows of each expert: offsets[e] to offsets[e + 1], clamped to 0..tokens.
struct ExpertRows {
  int64_t const* offsets;
  int tokens, experts;

  CUTLASS_DEVICE int offset(int i) const {
    return static_cast<int>(cute::max(int64_t(0), cute::min(offsets[i], int64_t(tokens))));
  }
  CUTLASS_DEVICE int2 operator[](int expert) const { return {offset(expert), offset(expert + 1)}; }
};

using TileCoordinate = cute::Coord<int, int, cute::Underscore, int>;  // m, n, k, l

// In a tile's l, beside its expert: the tile has rows of others. No batch is as long.
inline constexpr int kOnBorder = 1 << 20;

// Gives arguments of CUTLASS's functions on; a tile's coordinate without its mark.
template <class T> CUTLASS_DEVICE T&& unmarked(T&& argument) { return static_cast<T&&>(argument); }
CUTLASS_DEVICE TileCoordinate unmarked(TileCoordinate tile) {
  cute::get<3>(tile) &= ~kOnBorder;
  return tile;
}
template <class... T> inline constexpr bool kOneTile =
    (cute::is_same_v<cute::remove_cvref_t<T>, TileCoordinate> + ...) == 1;

template <class Base> struct ExpertMainloop : Base {
  using Base::Base;

  template <class... T> CUTLASS_DEVICE auto load(T&&... arguments) {
    static_assert(kOneTile<T...>, "an argument is the tile");
    return Base::load(unmarked(static_cast<T&&>(arguments))...);
  }
};

template <class Base> struct ExpertEpilogue : Base {
  using Base::Base;

  template <bool... kOptions, class... T> CUTLASS_DEVICE auto load(T&&... arguments) {  // of C
    static_assert(kOneTile<T...>, "an argument is the tile");
    return Base::template load<kOptions...>(unmarked(static_cast<T&&>(arguments))...);
  }
};

// A visitor tree whose values are stored here where a tile is on the border. A thread has them in runs of kRun along N, at most 16
// bytes, and rows of D are whole 16 bytes.
template <class Tree, class Element, int kRun> struct ExpertTree : Tree {
  struct Arguments {
    typename Tree::Arguments tree{};
    ExpertRows experts{};
    Element* d = nullptr;
    int64_t ldd = 0;
  };
  struct Params {
    typename Tree::Params tree{};
    ExpertRows experts{};
    Element* d = nullptr;
    int64_t ldd = 0;
  };
  using SharedStorage = typename Tree::SharedStorage;

  Params const* params = nullptr;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const& problem, Arguments const& args, void* workspace) {
    return {Tree::to_underlying_arguments(problem, args.tree, workspace), args.experts, args.d, args.ldd};
  }
  template <class Problem> static size_t get_workspace_size(Problem const& problem, Arguments const& args) {
    return Tree::get_workspace_size(problem, args.tree);
  }

  CUTLASS_HOST_DEVICE ExpertTree() {}
  CUTLASS_HOST_DEVICE ExpertTree(Params const& params_, SharedStorage const& shared)
      : Tree(params_.tree, shared), params(&params_) {}

  template <class Callbacks, class Coordinates> struct ConsumerStoreCallbacks : Callbacks {
    Params const& params;
    Coordinates coordinates;  // of the thread's values, from its first
    int row, column, columns;  // the first, and the end of D
    int2 stored;  // rows

    CUTLASS_DEVICE ConsumerStoreCallbacks(Callbacks&& tree, Params const& params_, Coordinates const& coordinates_,
                                          int row_, int column_, int columns_, int2 stored_)
        : Callbacks(static_cast<Callbacks&&>(tree)),
          params(params_),
          coordinates(coordinates_),
          row(row_),
          column(column_),
          columns(columns_),
          stored(stored_) {}

    template <class Accumulator, int N>
    CUTLASS_DEVICE auto visit(cutlass::Array<Accumulator, N> const& accumulators, int epi_v, int epi_m, int epi_n) {
      static_assert(N % kRun == 0, "whole runs");
      cutlass::Array<Element, N> const values = Callbacks::visit(accumulators, epi_v, epi_m, epi_n);
      if (stored.x < stored.y) {
        auto const subtile = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; i += kRun) {
          auto const first = subtile(epi_v * N + i);
          int const m = row + cute::get<0>(first), n = column + cute::get<1>(first);
          if (stored.x <= m && m < stored.y && n < columns) {
            using Run = cutlass::AlignedArray<Element, kRun>;
            *reinterpret_cast<Run*>(params.d + m * params.ldd + n) = *reinterpret_cast<Run const*>(values.data() + i);
          }
        }
      }
      return values;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> args) {
    bool const on_border = cute::get<3>(args.tile_coord_mnkl) & kOnBorder;
    args.tile_coord_mnkl = unmarked(args.tile_coord_mnkl);
    auto tree = Tree::template get_consumer_store_callbacks<kReferenceSource>(args);
    int const m = cute::get<0>(args.problem_shape_mnkl), n = cute::get<1>(args.problem_shape_mnkl);
    int2 const stored = on_border ? params->experts[cute::get<3>(args.tile_coord_mnkl)] : int2{0, 0};
    return ConsumerStoreCallbacks<decltype(tree), decltype(args.tCcD)>(
        static_cast<decltype(tree)&&>(tree), *params, args.tCcD, m - static_cast<int>(cute::get<0>(args.residue_tCcD)),
        n - static_cast<int>(cute::get<1>(args.residue_tCcD)), n, stored);
  }
};

// Hands out tiles, round robin: those of an expert follow each other, first down its rows, so that CTAs that run at once share B.
// Each lane of a warp has looked up one of 32 experts, and all lanes must ask for the next tile.
template <int kRows, int kColumns> class ExpertScheduler
    : public cutlass::gemm::kernel::detail::StaticPersistentTileScheduler100 {
  using Base = cutlass::gemm::kernel::detail::StaticPersistentTileScheduler100;

 public:
  using WorkTileInfo = Base::WorkTileInfo;

  struct Params : Base::Params {
    ExpertRows experts;  // make_grouped_launch writes both
    int columns;  // of tiles
  };

  template <class... Args> static Params to_underlying_arguments(Args const&... args) {
    return {Base::to_underlying_arguments(args...), {}, 0};
  }

  CUTLASS_DEVICE explicit ExpertScheduler(Params const& params)
      : Base(nullptr, params, dim3{}), params_(params), tile_(blockIdx.x) {
    look_up(0, 0);
  }
  CUTLASS_DEVICE ExpertScheduler(Base::CLCResponse*, Params const& params, dim3) : ExpertScheduler(params) {}

  template <class Cluster> CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Cluster) { return tile(); }

  template <class... Pipeline> CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo, Pipeline const&...) {
    tile_ += gridDim.x;
    return cute::make_tuple(tile(), true);
  }

  // Only the device knows, and only when it is over: then the next kernel begins anyway.
  CUTLASS_DEVICE static bool is_last_tile(WorkTileInfo const&) { return false; }

 private:
  static constexpr int kLanes = 32;

  Params const& params_;
  int tile_, group_ = 0;
  // Of the lane's expert, group_ + lane: its rows, the tiles of rows, and the first tile that is not its.
  int2 rows_{};
  int first_ = 0, down_ = 0, end_ = 0;

  CUTLASS_DEVICE static int broadcast(int value, int lane) { return __shfl_sync(~0u, value, lane); }

  CUTLASS_DEVICE void look_up(int group, int before) {
    int const lane = threadIdx.x % kLanes, expert = group + lane;
    group_ = group;
    rows_ = expert < params_.experts.experts ? params_.experts[expert] : int2{0, 0};
    first_ = rows_.x / kRows;
    down_ = rows_.x < rows_.y ? cute::ceil_div(rows_.y, kRows) - first_ : 0;
    int sum = down_ * params_.columns;
    CUTLASS_PRAGMA_UNROLL
    for (int step = 1; step < kLanes; step *= 2) {
      int const other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    end_ = before + sum;
  }

  CUTLASS_DEVICE WorkTileInfo tile() {
    while (true) {
      if (uint32_t const later = __ballot_sync(~0u, tile_ < end_)) return tile_of(__ffs(later) - 1);
      if (group_ + kLanes >= params_.experts.experts) return WorkTileInfo::invalid_work_tile();
      look_up(group_ + kLanes, broadcast(end_, kLanes - 1));
    }
  }

  CUTLASS_DEVICE WorkTileInfo tile_of(int lane) const {
    int const down = broadcast(down_, lane), index = tile_ - broadcast(end_, lane) + down * params_.columns;
    int const m = broadcast(first_, lane) + index % down, n = index / down;
    int const begin = broadcast(rows_.x, lane), end = broadcast(rows_.y, lane);
    bool const on_border = begin > m * kRows || end < cute::min((m + 1) * kRows, params_.experts.tokens);
    return {m, n, (group_ + lane) | (on_border ? kOnBorder : 0), true};
  }
};

struct ExpertSchedulerTag {};

}  // namespace fp4gemm

namespace cutlass::gemm::kernel::detail {
template <class Arch, class Tile, class Cluster, uint32_t kStages>
struct TileSchedulerSelector<fp4gemm::ExpertSchedulerTag, Arch, Tile, Cluster, kStages> {
  static_assert(cute::size(Cluster{}) == 1, "a CTA finds its own tiles");
  using Scheduler = fp4gemm::ExpertScheduler<cute::size<0>(Tile{}), cute::size<1>(Tile{})>;
};
}  // namespace cutlass::gemm::kernel::detail

namespace fp4gemm {

// As BlockScaledGemm, of one CTA.
template <class Schedule, class Tile, class ElementC, class ElementD, class Tree> struct GroupedGemm {
#if defined(FP4GEMM_SM100)
  static constexpr int kRun = 16 / sizeof(ElementD);  // a thread has a row
#else
  static constexpr int kRun = 2;  // a thread has pairs, as mma.sync leaves them
#endif
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Plain = BlockScaledGemm<Schedule, Tile, Cluster, ElementC, ElementD, ExpertTree<Tree, ElementD, kRun>,
                                ExpertSchedulerTag>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, ExpertMainloop<typename Plain::Mainloop>,
                                           ExpertEpilogue<typename Plain::Epilogue>, ExpertSchedulerTag>;
};

template <class Kernel, class Tree>
CUTLASS_DEVICE Launch<Kernel> make_grouped_launch(GroupedArguments const& args, Tree const& tree) {
  using Mainloop = typename Kernel::CollectiveMainloop;
  using Epilogue = typename Kernel::CollectiveEpilogue;
  using Config = typename Mainloop::Sm1xxBlkScaledConfig;
  using Data = typename Mainloop::ArrayElementA;
  using Scale = typename Mainloop::ElementSF;
  using Output = typename Epilogue::ElementD;
  using Tile = typename Kernel::TileShape;
  auto const shape = cute::make_shape(args.m, args.n, args.k, args.l);
  auto scales_of_a = Config::tile_atom_to_shape_SFA(shape);
  cute::get<2, 1>(scales_of_a.stride()) = 0;
  ExpertRows const experts{args.offsets, args.m, args.l};
  auto* const d = static_cast<Output*>(args.d);
  typename Epilogue::Arguments epilogue{
      {tree, experts, d, args.ldd}, {}, packed_stride(args.ldc), d, packed_stride(args.ldd)};
  if constexpr (!cute::is_void_v<typename Epilogue::ElementC>) {
    epilogue.ptr_C = static_cast<typename Epilogue::ElementC const*>(args.c);
  }
  auto launch =
      make_launch<Kernel>(shape,
                          {static_cast<Data const*>(args.a), packed_stride(args.lda), static_cast<Data const*>(args.b),
                           packed_stride(args.ldb, args.batch_b), static_cast<Scale const*>(args.sfa), scales_of_a,
                           static_cast<Scale const*>(args.sfb), Config::tile_atom_to_shape_SFB(shape)},
                          epilogue, args.sm_count);
  int const columns = cute::ceil_div(args.n, int(cute::size<1>(Tile{})));
  int64_t const most = (cute::ceil_div(args.m, int(cute::size<0>(Tile{}))) + args.l - 1) * int64_t(columns);
  launch.params.scheduler.experts = experts;
  launch.params.scheduler.columns = columns;
  launch.grid[0] = static_cast<int>(cute::min(most, int64_t(args.sm_count))), launch.grid[1] = launch.grid[2] = 1;
  return launch;
}

// Whether there is a tile for this CTA: without one it ends, since CUTLASS's kernel for sm_100 counts on a first tile. Waits for
// the kernel in front, which may have written the offsets.
template <class Kernel> CUTLASS_DEVICE bool has_tiles(typename Kernel::Params const& params) {
  cutlass::arch::wait_on_dependent_grids();
  return typename Kernel::TileScheduler(params.scheduler).initial_work_tile_info(cute::_1{}).is_valid();
}

}  // namespace fp4gemm
