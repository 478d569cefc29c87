// NVFP4 of the members of a group: the dense quantizers' code on each work item.
#pragma once

#include "fp4gemm/quantize.hpp"
#include "fp4gemm/quantize_tile.hpp"
#include "fp4gemm/work_items.hpp"

namespace fp4gemm {

template <class Config> struct RowItems {
  __device__ int64_t operator()(int64_t rows, int64_t) const {
    constexpr int kRowTile = Config::Scales::kRowTile;
    return at_least_one(parts(parts(rows, kRowTile) * kRowTile, Config::kRows));
  }
};

__device__ inline TileOutput output_of(GroupOutput const& out, Member const& member, int64_t line, int64_t blocks,
                                       int64_t scales) {
  int64_t const outer = out.line_stride != 0 ? line : member.number;
  int64_t const scale_in = out.line_stride != 0 ? line : static_cast<int64_t>(member.number) * out.member_stride;
  return {out.data + blocks * (kBlock / 2), out.block_scale + scales, out.outer_scale + outer, out.scale_in + scale_in};
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

}  // namespace fp4gemm
