// What a WGMMA kernel on prepacked weights does with the sums of a tile: where several warpgroups or CTAs have parts of K, each
// hands its partial sums to the CTA that writes their tokens; then they are added in a fixed order, rescaled and stored.
#pragma once

#include "fp4gemm/packed_tiles.hpp"
#include "fp4gemm/packed_wgmma_config.hpp"

namespace fp4gemm {

template <class Config> class PackedWgmmaResults {
  static constexpr int kRegisters = Config::kRegisters;
  using Epilogue = PackedEpilogue<typename Config::Out, typename Config::Bias, Config::kSource>;
  using Tile = typename PackedTiles<Config>::Tile;

  PackedGemmArguments const& args_;
  uint32_t const barriers_, reduction_;
  int const rank_, split_;  // of this CTA in its cluster: which row tile, which part of K

  __device__ uint32_t summed() const { return barriers_; }
  __device__ uint32_t drained() const { return barriers_ + 8; }

 public:
  // barriers: room for two; reduction: for partial sums, and behind them for lines.
  __device__ PackedWgmmaResults(PackedGemmArguments const& args, uint32_t barriers, uint32_t reduction, int rank,
                                int split)
      : args_(args), barriers_(barriers), reduction_(reduction), rank_(rank), split_(split) {}

  // By one thread.
  __device__ void init_barriers() const {
    barrier_init(summed(), 1);
    barrier_init(drained(), (Config::kSplit - 1) * 4 * Config::kGroups + (Config::kSplit == 1));
  }

  // Of a tile, by all consumers. less: the row group lacks its last panel; round: tiles before this one; more: one follows.
  template <int kMine> __device__ __forceinline__ void finish(Tile at, int row_group, int depth, bool less,
                                                              float (&acc)[kMine][kRegisters], uint32_t round,
                                                              bool more) const {
    // Each depth group sums its part of the fragments. Its vectors are on their way while partial sums are.
    constexpr int kPart = (Config::kOwnFragments + Config::kDepthGroups - 1) / Config::kDepthGroups;
    Vectors<kMine> const vectors(*this, at, row_group, cute::make_integer_sequence<int, kMine>{});
    float2 outer_a[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i)
      outer_a[i] = Epilogue::outer_a(args_, own_token(at, depth + i * Config::kDepthGroups));
    if constexpr (Config::kPartials > 0) share<kMine>(at.panels, row_group, depth, less, acc, round);
    if constexpr (Config::kLines) {
      if (whole_lines()) {
#pragma unroll
        for (int p = 0; p < kMine; ++p) {
          if (foreign(at, row_group, p)) break;
          write_lines(at, row_group, p, vectors.panel[p], outer_a, acc[p]);
        }
        if (Config::kSplit > 1 && more) free_partials();
        return;
      }
    }
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      if (foreign(at, row_group, p)) break;
      Epilogue const write(args_, first_row(at, row_group, p), vectors.panel[p], at.end);
#pragma unroll
      for (int k = 0; k < kPart; ++k) {
        int const i = depth + k * Config::kDepthGroups;
        if (i >= Config::kOwnFragments) break;
        write(own_token(at, i), outer_a[k], sum(row_group, p, i, fragment(acc[p], k)));
      }
    }
    if (Config::kSplit > 1 && more) free_partials();
  }

 private:
  __device__ __forceinline__ static float4 fragment(float const (&acc)[kRegisters], int i) {
    return {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
  }

  // The first token of the i-th fragment that this CTA writes.
  __device__ int own_token(Tile at, int i) const { return at.token + (split_ * Config::kOwnFragments + i) * 8; }
  // A warp's first row of its i-th panel.
  __device__ int first_row(Tile at, int row_group, int i) const {
    return (at.panel + Config::panel_of(row_group, i)) * kPackedRows + threadIdx.x / 32 % 4 * 16;
  }
  // Where a thread's part of a panel's partial sum is, in every CTA.
  __device__ uint32_t partial(int row_group, int i, int index) const {
    return reduction_ + ((Config::panel_of(row_group, i) * Config::kPartials + index) * Config::kOwnFragments * 128 +
                         threadIdx.x % 128) *
                            16;
  }

  // Whether a panel is another tile's or nobody's: computed perhaps, but not stored.
  __device__ static bool foreign(Tile at, int row_group, int i) {
    return Config::kUneven && Config::panel_of(row_group, i) >= at.stored;
  }

  template <int kMine> struct Vectors {
    typename Epilogue::Rows panel[kMine];
    template <int... I>
    __device__ Vectors(PackedWgmmaResults const& results, Tile at, int row_group, cute::integer_sequence<int, I...>)
        : panel{typename Epilogue::Rows(results.args_, results.first_row(at, row_group, I), at.expert)...} {}
  };

  // Of a fragment that this CTA writes. Without depth groups its own part is where share() has left it.
  __device__ __forceinline__ float4 sum(int row_group, int p, int i, float4 own) const {
    float4 sum = kKeep ? own : load_shared_float4(partial(row_group, p, 0) + i * 2048);
#pragma unroll
    for (int j = kKeep ? 0 : 1; j < Config::kPartials; ++j) {
      float4 const v = load_shared_float4(partial(row_group, p, j) + i * 2048);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    return sum;
  }

  // Whether all panels are whole and stand in whole, aligned lines of D. The same for all threads.
  __device__ bool whole_lines() const {
    return args_.d_stride_n == 1 && args_.n % 64 == 0 && args_.d_stride_m % 8 == 0 &&
           reinterpret_cast<uint64_t>(args_.d) % 16 == 0;
  }

  // A panel, 16 tokens at a time: each warp transposes its 16 rows into shared memory, then 8 lanes write 64 rows of a token.
  template <int kPart>
  __device__ __forceinline__ void write_lines(Tile at, int row_group, int p, typename Epilogue::Rows const& rows,
                                              float2 const (&outer_a)[kPart], float const (&acc)[kRegisters]) const {
    using Out = typename Config::Out;
    Epilogue const write(args_, first_row(at, row_group, p), rows, at.end);
    uint32_t const buffer = reduction_ + Config::kReductionBytes + row_group * 4096;
    uint32_t const thread = threadIdx.x % 128, lane = thread % 32;
    // Chunks of 16 bytes swap places within a token's line, so that neither side meets bank conflicts.
    uint32_t const to = (lane / 16 * 8 + lane % 8) * 128 + ((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
    uint32_t const from = thread / 8 * 128 + (thread % 8 ^ thread / 8 % 8) * 16;
    int const row = (at.panel + Config::panel_of(row_group, p)) * kPackedRows + thread % 8 * 8;
    int token = own_token(at, 0) + thread / 8;
    auto* d = static_cast<uint16_t*>(args_.d) + token * args_.d_stride_m + row;
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
      uint32_t const half = buffer + i % 4 * 1024;
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float4 const v = sum(row_group, p, i + j, fragment(acc, i + j));
        float values[4] = {v.x, v.y, v.z, v.w};
        write.rescale(own_token(at, i + j), outer_a[i + j], values);
        matrices[2 * j] = Out::pack(values[0], values[1]), matrices[2 * j + 1] = Out::pack(values[2], values[3]);
      }
      store_transposed(half + to, matrices);
      named_sync<128>(2 + row_group);
      uint4 const line = load_shared_128(half + from);
      if (token < at.end && row < args_.n) *reinterpret_cast<uint4*>(d) = line;
      token += 16, d += 16 * args_.d_stride_m;
    }
    if (kPart % 4 != 0) named_sync<128>(2 + row_group);
  }

  __device__ static void sync_consumers() { named_sync<128 * Config::kGroups>(1); }

  static constexpr bool kKeep = Config::kDepthGroups == 1;  // own partial sums in registers

  // The partial sums of the tokens that CTA kTo of the split writes. If it is this one they are stored, or become the first
  // accumulators, which have been sent by then.
  template <int kTo, int kMine> __device__ __forceinline__ void hand_over(int row_group, int depth, bool less,
                                                                          float (&acc)[kMine][kRegisters]) const {
    constexpr int kOwn = kRegisters / Config::kSplit;
    bool const own = kTo == split_;
    uint32_t const rank = kTo * Config::kMulticast + rank_;
    uint32_t const peer_bar = own ? 0 : map_to_rank(summed(), rank);
#pragma unroll
    for (int p = 0; p < kMine; ++p) {
      if (p > 0 && p + 1 == kMine && less) break;
      uint32_t const here =
          partial(row_group, p, kKeep ? split_ - (split_ > kTo) : split_ * Config::kDepthGroups + depth);
      if (own && kKeep) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) acc[p][i] = acc[p][kTo * kOwn + i];
      } else if (own) {
#pragma unroll
        for (int i = 0; i < Config::kOwnFragments; ++i)
          store_shared_128(here + i * 2048, fragment(acc[p], kTo * Config::kOwnFragments + i));
      } else {
        uint32_t const there = map_to_rank(here, rank);
#pragma unroll
        for (int i = 0; i < Config::kOwnFragments; ++i)
          store_to_rank(there + i * 2048, fragment(acc[p], kTo * Config::kOwnFragments + i), peer_bar);
      }
    }
  }
  // Not a loop: the compiler would take an index that equals split_ for split_ and put accumulators into memory.
  template <int kMine, int... kTo>
  __device__ __forceinline__ void hand_over_all(int row_group, int depth, bool less, float (&acc)[kMine][kRegisters],
                                                cute::integer_sequence<int, kTo...>) const {
    (hand_over<kTo>(row_group, depth, less, acc), ...);
  }

  // Hands every partial sum to the CTA that writes its tokens, and waits for those of this CTA.
  template <int kMine> __device__ __forceinline__ void share(int panels, int row_group, int depth, bool less,
                                                             float (&acc)[kMine][kRegisters], uint32_t round) const {
    if constexpr (Config::kSplit > 1) {
      constexpr int kBytes = (Config::kSplit - 1) * Config::kDepthGroups * Config::kPartialBytes;  // of a panel
      if (threadIdx.x == 0) barrier_expect(summed(), panels * kBytes);
    }
    if (round > 0) {
      if constexpr (!kKeep) sync_consumers();
      if constexpr (Config::kSplit > 1) barrier_wait(drained(), round - 1 & 1);
    }
    hand_over_all(row_group, depth, less, acc, cute::make_integer_sequence<int, Config::kSplit>{});
    if constexpr (!kKeep) sync_consumers();
    if constexpr (Config::kSplit > 1) barrier_wait(summed(), round & 1);
  }

  // Tells the peers that their next partial sums may come.
  __device__ void free_partials() const {
    __syncwarp();
    uint32_t const peer = threadIdx.x % 32;
    if (peer < Config::kSplit && peer != split_)
      barrier_arrive_cluster(map_to_rank(drained(), peer * Config::kMulticast + rank_));
  }
};

}  // namespace fp4gemm
