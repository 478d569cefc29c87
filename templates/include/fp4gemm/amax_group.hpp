// The amaxes that quantizers of tiles need of the members of a group, and sums of their columns.
#pragma once

#include "fp4gemm/amax_tile.hpp"
#include "fp4gemm/work_items.hpp"

namespace fp4gemm {

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
