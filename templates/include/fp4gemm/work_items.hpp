// How persistent CTAs go through the members of a group: from work item to work item, each of which is what a CTA of a dense kernel
// would have, with a member in place of the tensor. Members without rows or columns are an item, too, so that what has a value for
// them (an outer scale, or those of the lines that they have) is written.
#pragma once

#include "fp4gemm/group.hpp"
#include "fp4gemm/tile.hpp"

namespace fp4gemm {

struct TileItems {
  __device__ int64_t operator()(int64_t rows, int64_t columns) const {
    return at_least_one(parts(rows, kTile)) * at_least_one(parts(columns, kTile));
  }
};

// Elements on 16 bytes, or any.
template <class Config> constexpr int member_alignment() {
  return Config::kVectorized ? 16 / Config::Element::kBytes : 1;
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

}  // namespace fp4gemm
