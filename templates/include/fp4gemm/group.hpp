// Members of a group, tensors in one buffer whose sizes stand in memory: no host reads them. A CTA sums the sizes once, and then finds the
// member of any of its work items.
#pragma once

#include "fp4gemm/layout.hpp"

namespace fp4gemm {

// Packed by fp4gemm/group/calls.py (GROUP): keep both alike. Rows of a member are contiguous.
struct Group {
  void const* x;
  void const* h;  // where x is a gradient: of the size of x (tile.hpp)
  int64_t const *first_dims, *last_dims;  // [members], rows and columns of each; null: those below
  int64_t const* offsets;  // [members + 1], where each begins, in units; null: without gaps
  int64_t elements;  // of x
  int64_t rows, columns;  // of each member; rows < 0: as many as there are between its offset and the next
  int64_t unit, units;  // elements of a unit: a row where all have as many columns, else one; and how many x has
  int64_t row_bound, column_bound;  // of all members together: more has no place in the results
  int members;
};

// One result of all members, one after another.
struct GroupOutput {
  uint8_t* data;
  uint8_t* block_scale;
  float* outer_scale;  // of each line, or each member
  float const* scale_in;  // amaxes, or decode multipliers: of each line, each member, or one
  int64_t*
      index;  // [5, members + 1]: lines, K; where data, block scales and lines begin. -1 lines and K: a member that does not fit
  int line_stride, member_stride;  // of scale_in: (1, 0), (0, 1) or (0, 0)
};

// What is summed over members: sizes, and with them places in all that a member has a part of.
enum Sum {
  kElements,
  kRows,
  kColumns,
  kItems,  // work
  kRowBlocks,  // of 16 values
  kRowScales,  // bytes
  kColumnBlocks,
  kColumnScales,
  kPartials,  // columns of each 128 rows
  kSums
};

struct Sums {
  int64_t of[kSums];
};

struct Member {
  int number;
  bool fits;  // else it has neither rows nor columns
  int64_t rows;
  int columns;
  int64_t at;  // in x
  int64_t items;  // that it has even where it does not fit
  Sums before;
};

__device__ inline int64_t parts(int64_t size, int part) { return (size + part - 1) / part; }
__device__ inline int64_t at_least_one(int64_t v) { return v < 1 ? 1 : v; }

// kAlignment: elements on which a member must begin. items(rows, columns) is how much work a member is. kUsed: how many of the
// sums are made.
template <class RowScales, class ColumnScales, int kAlignment, class Items, int kUsed = kSums> class GroupIndex {
  static constexpr int kBuckets = 32;  // of members, a lane for each
  Group const& group_;
  Items const items_;

 public:
  struct Storage {
    Sums before[kBuckets + 1];
  };

 private:
  Storage& storage_;

 public:
  __device__ GroupIndex(Group const& group, Storage& storage, Items const& items)
      : group_(group), items_(items), storage_(storage) {}

  // All threads; then the rest can be called.
  __device__ void prepare() const {
    int const lane = threadIdx.x;
    if (lane < kBuckets) {
      Sums own{};
      for_each(lane, own, [](int, Sums const&) { return false; });
      Sums all = own;
#pragma unroll
      for (int distance = 1; distance < kBuckets; distance *= 2) {
#pragma unroll
        for (int i = 0; i < kUsed; ++i) {
          int64_t const other = __shfl_up_sync(~0u, all.of[i], distance);
          if (lane >= distance) all.of[i] += other;
        }
      }
#pragma unroll
      for (int i = 0; i < kUsed; ++i) {
        storage_.before[lane].of[i] = all.of[i] - own.of[i];
        if (lane == kBuckets - 1) storage_.before[kBuckets].of[i] = all.of[i];
      }
    }
    __syncthreads();
  }

  __device__ int64_t items() const { return storage_.before[kBuckets].of[kItems]; }

  // The member that has work item `item` < items(): item less before.of[kItems] is its number there.
  __device__ Member find(int64_t item) const {
    int bucket = 0;  // the last one that does not begin behind the item
#pragma unroll
    for (int step = kBuckets / 2; step > 0; step /= 2) {
      if (storage_.before[bucket + step].of[kItems] <= item) bucket += step;
    }
    Sums sums = storage_.before[bucket];
    int found = 0;
    for_each(bucket, sums, [&](int number, Sums const& with) {
      found = number;
      return item < with.of[kItems];
    });
    return describe(found, sums);
  }

  // What a GroupedFP4Tensor knows of its members. kColumn: of the transposed result; its K is made of whole `unit`s.
  template <bool kColumn> __device__ void write(int64_t* index, int unit = 1) const {
    if (index == nullptr || threadIdx.x >= kBuckets) return;
    int64_t const stride = group_.members + 1;
    int const places[] = {kColumn ? kColumnBlocks : kRowBlocks, kColumn ? kColumnScales : kRowScales,
                          kColumn ? kColumns : kRows};
    auto const put = [&](int number, Sums const& before) {
      index[2 * stride + number] = before.of[places[0]] * (kBlock / 2);
      index[3 * stride + number] = before.of[places[1]];
      index[4 * stride + number] = before.of[places[2]];
    };
    Sums before = storage_.before[threadIdx.x];
    for (int number = first(threadIdx.x); number < first(threadIdx.x + 1); ++number) {
      Member const member = describe(number, before);
      index[number] = !member.fits ? -1 : kColumn ? member.columns : member.rows;
      index[stride + number] = !member.fits ? -1 : kColumn ? parts(member.rows, unit) * unit : member.columns;
      put(number, before);
      add(before, number);
    }
    if (threadIdx.x == 0) {
      put(group_.members, storage_.before[kBuckets]);
      index[group_.members] = index[stride + group_.members] = 0;
    }
  }

 private:
  struct Dims {
    int64_t rows, columns;
    bool valid;
  };

  __device__ int first(int bucket) const {
    int64_t const end = static_cast<int64_t>(bucket) * ceil_div(group_.members, kBuckets);
    return end < group_.members ? static_cast<int>(end) : group_.members;
  }

  // In elements; below 0 where that is not in x.
  __device__ int64_t offset(int number) const {
    int64_t const units = group_.offsets[number];
    return units < 0 || units > group_.units ? -1 : units * group_.unit;
  }

  // Sizes that no tensor in x can have are 0.
  __device__ Dims dims(int number) const {
    int64_t rows = group_.first_dims == nullptr ? group_.rows : group_.first_dims[number];
    int64_t const columns = group_.last_dims == nullptr ? group_.columns : group_.last_dims[number];
    bool valid = columns >= 0 && columns <= group_.column_bound && columns <= 0x7FFFFFFF;
    valid = valid && (group_.last_dims == nullptr || columns % kBlock == 0);
    // Units are rows then.
    if (rows < 0 && group_.first_dims == nullptr) rows = group_.offsets[number + 1] - group_.offsets[number];
    valid = valid && rows >= 0 && rows <= group_.row_bound;
    // In float64 first: the product may need more than 64 bits.
    valid =
        valid && static_cast<double>(rows) * static_cast<double>(columns) < 0x1p62 && rows * columns <= group_.elements;
    return valid ? Dims{rows, columns, true} : Dims{0, 0, false};
  }

  __device__ void add(Sums& sums, int number) const {
    auto const [rows, columns, valid] = dims(number);
    int const blocks = static_cast<int>(parts(columns, kBlock)), row_blocks = static_cast<int>(parts(rows, kBlock));
    sums.of[kElements] += rows * columns;
    sums.of[kRows] += rows;
    sums.of[kColumns] += columns;
    sums.of[kItems] += items_(rows, columns);
    sums.of[kRowBlocks] += rows * blocks;
    sums.of[kRowScales] += RowScales::bytes(rows, blocks);
    if constexpr (kUsed > kColumnBlocks) {
      sums.of[kColumnBlocks] += columns * row_blocks;
      sums.of[kColumnScales] += ColumnScales::bytes(columns, row_blocks);
      sums.of[kPartials] += at_least_one(parts(rows, 128)) * columns;
    }
  }

  // Adds the members of a bucket to what is before it, until stop(number, sums with it).
  template <class Stop> __device__ void for_each(int bucket, Sums& sums, Stop const& stop) const {
    for (int number = first(bucket); number < first(bucket + 1); ++number) {
      Sums with = sums;
      add(with, number);
      if (stop(number, with)) return;
      sums = with;
    }
  }

  __device__ Member describe(int number, Sums const& before) const {
    auto const [rows, columns, valid] = dims(number);
    int64_t const at = group_.offsets == nullptr ? before.of[kElements] : offset(number);
    int64_t const size = rows * columns;
    bool const inside = size == 0 || (at >= 0 && at <= group_.elements - size && at % kAlignment == 0);
    bool const fits = valid && inside && before.of[kElements] + size <= group_.elements &&
                      before.of[kRows] + rows <= group_.row_bound &&
                      before.of[kColumns] + columns <= group_.column_bound;
    return {number,
            fits,
            fits ? rows : 0,
            fits ? static_cast<int>(columns) : 0,
            fits && size != 0 ? at : 0,
            items_(rows, columns),
            before};
  }
};

}  // namespace fp4gemm
