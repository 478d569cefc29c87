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
  int const tiles = max(1, ceil_div(member.columns, kTile));
  // As fp4gemm/tile_calls.py (_division) has them.
  int const bits = 32 - __clz(tiles - 1);
  uint64_t const magic = ((1ull << (31 + bits)) + tiles - 1) / tiles;
  return {
      x,       h, member.columns, 1, member.rows, member.columns, tiles, bits == 0 ? 0 : static_cast<uint32_t>(magic),
      bits - 1};
}

// CTAs of a team take neighbouring items, as these write parts of one line of memory; a team has a run of items, as those of a
// member follow each other.
struct Team {
  int size, rank;
  int64_t begin, end;  // of all items

  __device__ explicit Team(int64_t items)
      : size(gridDim.x % 24 == 0  ? 24
             : gridDim.x % 8 == 0 ? 8
                                  : 1),
        rank(blockIdx.x % size) {
    int64_t const team = blockIdx.x / size, teams = gridDim.x / size;
    begin = items * team / teams, end = items * (team + 1) / teams;
  }
};

// Work items of a CTA, and what those of a member have in common. An item's name is how many the CTA has left, itself included.
// Four at a time: one is written while slow threads still read the second before it.
template <class Common> class WorkItems {
 public:
  static constexpr int kSlots = 4;

 private:
  struct Item {
    int number;  // among those of the member
    int member;  // one of those below
  } items_[kSlots];
  struct {
    int64_t first, items;  // its first one among all, and how many they are
    Common common;
  } members_[kSlots];
  int step_;

 public:
  // Before all items of a CTA, which has every step-th from `first` on.
  __device__ void start(int left, int64_t first, int step) {
    items_[(left + 1) % kSlots] = {-step, 0};
    members_[0].first = first, members_[0].items = 0, step_ = step;
  }
  // Says what the item is that comes behind left + 1: most have the member of the one before. Not inlined: the registers are the
  // work's.
  template <class Index, class Describe, class Place>
  __device__ __noinline__ void look_up(int left, Index const& index, Describe const& describe, Place const& place) {
    if (left <= 0) return;
    Item& item = items_[left % kSlots];
    item = items_[(left + 1) % kSlots];
    item.number += step_;
    if (item.number >= members_[item.member].items) {
      int64_t const number = members_[item.member].first + item.number;
      Member const found = index.find(number);
      int64_t const first = found.before.of[kItems];
      item = {static_cast<int>(number - first), (item.member + 1) % kSlots};
      members_[item.member] = {first, found.items, describe(found)};
    }
    place(left, members_[item.member].common, item.number);
  }
  __device__ int number(int left) const { return items_[left % kSlots].number; }
  __device__ Common const& common(int left) const { return members_[items_[left % kSlots].member].common; }
};

// It has an item less than others, if any has.
__device__ inline bool last_cta() { return blockIdx.x == gridDim.x - 1; }

// The items of a CTA. One thread looks them up, two ahead, behind its part of the work(left) on another: describe(member) is what
// the items of one have in common, and place(left, common, number) is told of each. kSynced: work has a barrier, and needs no
// other.
template <bool kSynced, class Common, class Index, class Describe, class Place, class Work>
__device__ void for_items(Index const& index, WorkItems<Common>& items, Describe const& describe, Place const& place,
                          Work const& work) {
  int left;
  {
    Team const team(index.items());
    left = (static_cast<int>(team.end - team.begin) + team.size - 1 - team.rank) / team.size;
    if (threadIdx.x == 0) {
      items.start(left, team.begin + team.rank, team.size);
      items.look_up(left, index, describe, place);
      items.look_up(left - 1, index, describe, place);
    }
  }
  __syncthreads();
  for (; left > 0; --left) {
    if (!kSynced && threadIdx.x == 0) items.look_up(left - 2, index, describe, place);
    work(left);
    if (kSynced && threadIdx.x == 0) items.look_up(left - 2, index, describe, place);
    if constexpr (!kSynced) __syncthreads();
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
  using Index = GroupIndex<Scales, LinearScales, member_alignment<Config>(), RowItems<Config>, kColumnBlocks>;
  static constexpr bool kSynced =
      RowQuantizer<Config>::kStaged && Config::kResident && Config::kScaling == Scaling::kPerRow;

  GroupRowsArguments const& args_;

 public:
  __device__ explicit GroupRowQuantizer(GroupRowsArguments const& args) : args_(args) {}

  __device__ void run() const {
    __shared__ typename Index::Storage storage;
    __shared__ WorkItems<QuantizeArguments> items;
    Index const index(args_.group, storage, {});
    index.prepare();
    if (last_cta()) index.template write<false>(args_.rows.index);
    for_items<kSynced>(
        index, items, [&](Member const& member) { return arguments_of(member); },
        [](int, QuantizeArguments const&, int) {},
        [&](int left) {
          RowQuantizer<Config, kSynced ? 2 : 1>(items.common(left), items.number(left), left % 2).run();
        });
  }

 private:
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
            Config::kResident ? Team(0).size : 0,  // what this CTA has next
            nullptr,
            member_seed(seed, member.number),
            nullptr,
            nullptr,
            0,
            columns};
  }
};

// --- members of one shape ---------------------------------------------------------------------------------------------

// Packed by fp4gemm/group/calls.py (UNIFORM_ROWS_ARGUMENTS): keep both alike.
struct UniformRowsArguments {
  QuantizeArguments rows;  // of all members
  int64_t* index;  // as a GroupOutput has it
  int64_t data_bytes, scale_bytes;  // of a member
  int members, member_rows;
};

// Where the rows of each member are whole tiles of the layout, members are one matrix: what the dense quantizer makes of it, and the
// index.
template <class Config> class UniformRowQuantizer {
  UniformRowsArguments const& args_;

 public:
  __device__ explicit UniformRowQuantizer(UniformRowsArguments const& args) : args_(args) {}

  __device__ void run() const {
    if (last_cta()) write_index();
    RowQuantizer<Config>(args_.rows).run();
  }

 private:
  __device__ void write_index() const {
    int64_t const stride = args_.members + 1;
    for (int number = threadIdx.x; number <= args_.members; number += Config::kCta) {
      bool const real = number < args_.members;
      int64_t* const entry = args_.index + number;
      entry[0] = real ? args_.member_rows : 0;
      entry[stride] = real ? args_.rows.k : 0;
      entry[2 * stride] = number * args_.data_bytes;
      entry[3 * stride] = number * args_.scale_bytes;
      entry[4 * stride] = static_cast<int64_t>(number) * args_.member_rows;
    }
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
  struct Common {
    TileView view;
    int member;
  };
  using Items = WorkItems<Common>;
  struct Shared {  // behind what a tile needs
    typename Index::Storage sums;
    Items items;
    TilePlace places[Items::kSlots];
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
    if (last_cta()) {
      index.template write<false>(args_.rows.index);
      index.template write<true>(args_.columns.index, Config::kHadamard ? kBlock : 1);
    }
    for_items<false>(
        index, shared.items, [&](Member const& member) { return common_of(member); },
        [&](int left, Common const& of, int number) {
          shared.places[left % Items::kSlots] = of.view.source.place(number);
        },
        [&](int left) {
          auto const& [view, member] = shared.items.common(left);
          TileQuantizer<Config, TilePlace const&>(view, args_.options, shared_, shared.places[left % Items::kSlots],
                                                  member)
              .run();
        });
  }

 private:
  __device__ Common common_of(Member const& member) const {
    auto const& before = member.before.of;
    return {{source_of<typename Config::Element>(args_.group, member),
             output_of(args_.rows, member, before[kRows], before[kRowBlocks], before[kRowScales]),
             output_of(args_.columns, member, before[kColumns], before[kColumnBlocks], before[kColumnScales])},
            member.number};
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
  using Items = WorkItems<TileAmaxView>;
  struct Shared {  // behind what a tile needs
    typename Index::Storage sums;
    Items items;
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
    for_items<false>(
        index, shared.items, [&](Member const& member) { return view_of(member); },
        [](int, TileAmaxView const&, int) {},
        [&](int left) {
          auto const& view = shared.items.common(left);
          TileAmax<Config>(view, args_.hadamard, shared_, view.source.place(shared.items.number(left))).run();
        });
  }

 private:
  __device__ TileAmaxView view_of(Member const& member) const {
    auto const& before = member.before.of;
    int64_t const one = static_cast<int64_t>(member.number) * args_.member_stride;
    return {source_of<typename Config::Element>(args_.group, member),
            at(args_.rows, before[kRows]),
            at(args_.columns, before[kColumns]),
            at(args_.tensor, one),
            at(args_.transformed, one),
            at(args_.sums, before[kPartials])};
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
