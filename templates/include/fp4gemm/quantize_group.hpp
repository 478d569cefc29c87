// NVFP4 of the members of a group: persistent CTAs that go from work item to work item, each of which is what a CTA of the dense
// quantizer would have, with a member in place of the tensor. Members without rows or columns are an item, too, so that
// what has a value for them (an outer scale, or those of the lines that they have) is written.
#pragma once

#include "fp4gemm/group.hpp"
#include "fp4gemm/quantize.hpp"
#include "fp4gemm/quantize_tile.hpp"

namespace fp4gemm {

struct TileItems {
  __device__ int64_t operator()(int64_t rows, int64_t columns) const {
    return at_least_one(parts(rows, kTile)) * at_least_one(parts(columns, kTile));
  }
};

template <class Config> struct RowItems {
  __device__ int64_t operator()(int64_t rows, int64_t) const {
    constexpr int kRowTile = Config::Scales::kRowTile;
    return at_least_one(parts(parts(rows, kRowTile) * kRowTile, Config::kRows));
  }
};

// Elements on 16 bytes, or any.
template <class Config> constexpr int member_alignment() {
  return Config::kVectorized ? 16 / Config::Element::kBytes : 1;
}

__device__ inline TileOutput output_of(GroupOutput const& out, Member const& member, int64_t line, int64_t blocks,
                                       int64_t scales) {
  int64_t const outer = out.line_stride != 0 ? line : member.number;
  int64_t const scale_in = out.line_stride != 0 ? line : static_cast<int64_t>(member.number) * out.member_stride;
  return {out.data + blocks * (kBlock / 2), out.block_scale + scales, out.outer_scale + outer, out.scale_in + scale_in};
}

template <class Element> __device__ TileSource source_of(Group const& group, Member const& member) {
  auto const* const x = static_cast<char const*>(group.x) + member.at * Element::kBytes;
  auto const* const h = static_cast<char const*>(group.h) + member.at * Element::kBytes;
  return {x, h, member.columns, 1, member.rows, member.columns, ceil_div(member.columns, kTile), 0, 0};
}

__device__ inline TilePlace place_of(Member const& member, int64_t item) {
  int const columns = max(1, ceil_div(member.columns, kTile));
  int const tile = static_cast<int>(item - member.before.of[kItems]);
  return {tile / columns, tile % columns};
}

// The work items of a CTA. describe(item, which) says what an item is; one thread does that, an item ahead, while the others
// begin with work(which).
template <class Index, class Describe, class Work>
__device__ void for_items(Index const& index, Describe const& describe, Work const& work) {
  int64_t const items = index.items();
  bool const describes = threadIdx.x == 0;
  int which = 0;
  if (describes && blockIdx.x < items) describe(blockIdx.x, which);
  __syncthreads();
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x, which ^= 1) {
    if (describes && item + gridDim.x < items) describe(item + gridDim.x, which ^ 1);
    work(which);
    __syncthreads();
  }
}

// --- row by row -------------------------------------------------------------------------------------------------------

// Packed by fp4gemm/group/calls.py (GROUP_ROWS_ARGUMENTS): keep both alike.
struct GroupRowsArguments {
  Group group;
  GroupOutput rows;
  uint64_t const* seed_at;  // null, or where the seed is
  uint64_t seed;
};

template <class Config> class GroupRowQuantizer {
  using Scales = typename Config::Scales;
  using Index = GroupIndex<Scales, LinearScales, member_alignment<Config>(), RowItems<Config>>;
  struct Work {
    QuantizeArguments args;
    int cta;
  };

  GroupRowsArguments const& args_;

 public:
  __device__ explicit GroupRowQuantizer(GroupRowsArguments const& args) : args_(args) {}

  __device__ void run() const {
    __shared__ typename Index::Storage storage;
    __shared__ Work work[2];
    Index const index(args_.group, storage, {});
    index.prepare();
    if (blockIdx.x == 0) index.template write<false>(args_.rows.index);
    for_items(
        index, [&](int64_t item, int which) { describe(index, item, work[which]); },
        [&](int which) { RowQuantizer<Config>(work[which].args, work[which].cta).run(); });
  }

 private:
  __device__ __noinline__ void describe(Index const& index, int64_t item, Work& work) const {
    Member const member = index.find(item);
    work = {arguments_of(member), static_cast<int>(item - member.before.of[kItems])};
    if constexpr (Config::kVectorized) {
      int const bytes = member.columns * Config::Element::kBytes;
      for (int i = 0; i < Config::kRows && bytes > 0; ++i) {
        int64_t const row = Scales::template row<Config::kRows>(work.cta, i);
        if (row < member.rows) prefetch_l2(static_cast<char const*>(work.args.x) + row * bytes, bytes);
      }
    }
  }

  __device__ QuantizeArguments arguments_of(Member const& member) const {
    GroupOutput const& out = args_.rows;
    TileOutput const at =
        output_of(out, member, member.before.of[kRows], member.before.of[kRowBlocks], member.before.of[kRowScales]);
    int const columns = ceil_div(member.columns, kBlock);
    uint64_t const seed = args_.seed_at == nullptr ? args_.seed : *args_.seed_at;
    return {source_of<typename Config::Element>(args_.group, member).x,
            at.data,
            at.block_scale,
            at.outer_scale,
            at.scale_in,
            member.columns,
            0,
            member.rows,
            parts(member.rows, Scales::kRowTile) * Scales::kRowTile,
            member.columns,
            columns,
            out.line_stride,
            0,
            nullptr,
            member_seed(seed, member.number),
            nullptr,
            nullptr,
            0,
            columns};
  }
};

// --- by tiles ---------------------------------------------------------------------------------------------------------

// Packed by fp4gemm/group/calls.py (GROUP_TILE_ARGUMENTS): keep both alike.
struct GroupTileArguments {
  Group group;
  GroupOutput rows, columns;
  TileOptions options;
};

template <class Config> class GroupTileQuantizer {
  using Index =
      GroupIndex<typename Config::RowScales, typename Config::ColumnScales, member_alignment<Config>(), TileItems>;
  struct Work {
    TileView view;
    TilePlace place;
    int member;
  };
  struct Shared {  // behind what a tile needs
    typename Index::Storage sums;
    Work work[2];
  };

  GroupTileArguments const& args_;
  uint8_t* const shared_;

 public:
  static constexpr int kSharedBytes = Config::kSharedBytes + sizeof(Shared);
  static_assert(Config::kSharedBytes % alignof(Shared) == 0, "aligned behind the tile");

  __device__ GroupTileQuantizer(GroupTileArguments const& args, uint8_t* shared) : args_(args), shared_(shared) {}

  __device__ void run() const {
    auto& shared = *reinterpret_cast<Shared*>(shared_ + Config::kSharedBytes);
    Index const index(args_.group, shared.sums, {});
    index.prepare();
    if (blockIdx.x == 0) {
      index.template write<false>(args_.rows.index);
      index.template write<true>(args_.columns.index, Config::kHadamard ? kBlock : 1);
    }
    for_items(
        index, [&](int64_t item, int which) { describe(index, item, shared.work[which]); },
        [&](int which) {
          Work const& work = shared.work[which];
          TileQuantizer<Config>(work.view, args_.options, shared_, work.place, work.member).run();
        });
  }

 private:
  __device__ __noinline__ void describe(Index const& index, int64_t item, Work& work) const {
    Member const member = index.find(item);
    auto const& before = member.before.of;
    work.view = {source_of<typename Config::Element>(args_.group, member),
                 output_of(args_.rows, member, before[kRows], before[kRowBlocks], before[kRowScales]),
                 output_of(args_.columns, member, before[kColumns], before[kColumnBlocks], before[kColumnScales])};
    work.place = place_of(member, item);
    work.member = member.number;
  }
};

// --- amaxes and sums --------------------------------------------------------------------------------------------------

// Packed by fp4gemm/group/calls.py (GROUP_AMAX_ARGUMENTS): keep both alike. As TileAmaxView has them, of all members: each
// line, each member (or one for all of them), and the sums of each 128 rows.
struct GroupAmaxArguments {
  Group group;
  float *rows, *columns, *tensor, *transformed;
  float* sums;
  HadamardSigns hadamard;
  int member_stride;  // of tensor and transformed
};

template <class Config> class GroupAmax {
  using Index = GroupIndex<LinearScales, LinearScales, member_alignment<Config>(), TileItems>;
  struct Work {
    TileAmaxView view;
    TilePlace place;
  };
  struct Shared {  // behind what a tile needs
    typename Index::Storage sums;
    Work work[2];
  };

  GroupAmaxArguments const& args_;
  uint8_t* const shared_;

 public:
  static constexpr int kSharedBytes = Config::kSharedBytes + sizeof(Shared);
  static_assert(Config::kSharedBytes % alignof(Shared) == 0, "aligned behind the tile");

  __device__ GroupAmax(GroupAmaxArguments const& args, uint8_t* shared) : args_(args), shared_(shared) {}

  __device__ void run() const {
    auto& shared = *reinterpret_cast<Shared*>(shared_ + Config::kSharedBytes);
    Index const index(args_.group, shared.sums, {});
    index.prepare();
    for_items(
        index, [&](int64_t item, int which) { describe(index, item, shared.work[which]); },
        [&](int which) {
          Work const& work = shared.work[which];
          TileAmax<Config>(work.view, args_.hadamard, shared_, work.place).run();
        });
  }

 private:
  __device__ __noinline__ void describe(Index const& index, int64_t item, Work& work) const {
    Member const member = index.find(item);
    auto const& before = member.before.of;
    int64_t const one = static_cast<int64_t>(member.number) * args_.member_stride;
    work.view = {source_of<typename Config::Element>(args_.group, member),
                 at(args_.rows, before[kRows]),
                 at(args_.columns, before[kColumns]),
                 at(args_.tensor, one),
                 at(args_.transformed, one),
                 at(args_.sums, before[kPartials])};
    work.place = place_of(member, item);
  }
  __device__ static float* at(float* p, int64_t i) { return p == nullptr ? nullptr : p + i; }
};

// Packed by fp4gemm/group/calls.py (GROUP_SUMS_ARGUMENTS): keep both alike.
struct GroupSumsArguments {
  Group group;
  float const* partial;  // of each 128 rows, as GroupAmax leaves them
  float* sums;  // [columns of all members]
};

// The sums of 128 rows of a member, in order: the same in each run, whatever CTA had which.
template <int kThreads, int kAlignment> class GroupSums {
  struct Items {
    __device__ int64_t operator()(int64_t, int64_t columns) const { return parts(columns, kThreads); }
  };
  using Index = GroupIndex<LinearScales, LinearScales, kAlignment, Items>;

  GroupSumsArguments const& args_;

 public:
  __device__ explicit GroupSums(GroupSumsArguments const& args) : args_(args) {}

  __device__ void run() const {
    __shared__ typename Index::Storage storage;
    Index const index(args_.group, storage, {});
    index.prepare();
    for (int64_t item = blockIdx.x; item < index.items(); item += gridDim.x) {
      Member const member = index.find(item);
      int64_t const column = (item - member.before.of[kItems]) * kThreads + threadIdx.x;
      if (column >= member.columns) continue;
      float const* partial = args_.partial + member.before.of[kPartials] + column;
      float sum = 0.0f;
      for (int64_t part = 0; part < parts(member.rows, kTile); ++part, partial += member.columns)
        sum = __fadd_rn(sum, *partial);
      args_.sums[member.before.of[kColumns] + column] = sum;
    }
  }
};

}  // namespace fp4gemm
