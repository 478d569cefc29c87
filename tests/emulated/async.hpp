// templates/include/fp4gemm/async.hpp on a CPU (cuda.hpp): the same functions, done at once.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

struct alignas(64) TensorMap {
  uint64_t words[16];  // here: address, columns, rows, elements between rows, rows of a box
};

// A shared address of a peer has its rank, plus 1, in the top byte.
inline constexpr uint32_t kOffset = 0xFFFFFF;
inline uint32_t map_to_rank(uint32_t address, uint32_t rank) { return (address & kOffset) | (rank + 1) << 24; }
inline Cta& cta_of(uint32_t address) {
  uint32_t const rank = address >> 24;
  return rank ? *current->cta->cluster->ctas.at(rank - 1) : *current->cta;
}
inline uint32_t shared_address(void const* p) {
  return static_cast<uint32_t>(static_cast<uint8_t const*>(p) - current->cta->shared);
}
inline uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  Cta& cta = cta_of(address);
  uint32_t const offset = address & kOffset;
  if (offset % std::min(bytes, 16u)) fail("a shared address is not aligned");
  if (cta.shared + offset + bytes > cta.memory.data() + cta.memory.size()) fail("past the end of shared memory");
  return cta.shared + offset;
}
inline void* __cvta_shared_to_generic(uint32_t address) { return shared_at(address, 1); }
template <class T> T load_shared(uint32_t address) {
  T v;
  std::memcpy(&v, shared_at(address, sizeof(T)), sizeof(T));
  return v;
}
template <class T> void store_shared(uint32_t address, T const& v) {
  std::memcpy(shared_at(address, sizeof(T)), &v, sizeof(T));
}

template <int kThreads> void named_sync(int id) { sync_named(id, kThreads); }
template <int kThreads> void named_arrive(int id) { arrive_named(id, kThreads); }
template <int kThreads> void named_sync_if(bool mine, int id) {
  if (mine) sync_named(id, kThreads);
}
template <int kThreads> void named_arrive_if(bool mine, int id) {
  if (mine) arrive_named(id, kThreads);
}

inline bool elect_one() {
  __syncwarp();
  return lane() == 0;
}

inline Barrier& barrier_at(uint32_t bar) {
  auto& barriers = cta_of(bar).barriers;
  if (auto const found = barriers.find(bar & kOffset); found != barriers.end()) return found->second;
  fail("a barrier that nobody has made");
}
inline void change(Barrier& barrier, int arrivals, long bytes) {
  barrier.pending -= arrivals, barrier.bytes += bytes;
  if (barrier.pending < 0) fail("more arrivals than a barrier expects");
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.count, ++events;
}
inline void barrier_init(uint32_t bar, uint32_t arrivals) {
  int const count = static_cast<int>(arrivals);
  current->cta->barriers[bar] = {count, count, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t bar) { change(barrier_at(bar), 1, 0); }
inline void barrier_expect(uint32_t bar, uint32_t bytes) { change(barrier_at(bar), 1, bytes); }
inline void barrier_complete(uint32_t bar, long bytes) { change(barrier_at(bar), 0, -bytes); }
inline void barrier_wait(uint32_t bar, uint32_t phase) {
  while (barrier_at(bar).phase == static_cast<int>(phase)) yield();
}
inline void barrier_arrive_after_copies(uint32_t bar) { barrier_arrive(bar); }
inline void barrier_arrive_cluster(uint32_t bar) { barrier_arrive(bar); }

inline void cluster_arrive() {
  Cluster& cluster = *current->cta->cluster;
  current->generation = cluster.meeting.generation;
  if (++cluster.meeting.arrived == cluster.threads) cluster.meeting.arrived = 0, ++cluster.meeting.generation, ++events;
}
inline void cluster_wait() {
  while (current->cta->cluster->meeting.generation == current->generation) yield();
}
inline void store_to_rank(uint32_t to, float4 v, uint32_t bar) {
  store_shared(to, v);
  barrier_complete(bar, 16);
}

inline uint64_t evict_first_policy() { return 0; }
inline void copy_bulk(uint32_t to, void const* from, uint32_t bytes, uint32_t bar, uint64_t) {
  if (bytes % 16 || reinterpret_cast<uint64_t>(from) % 16) fail("a bulk copy is not aligned");
  std::memcpy(shared_at(to, bytes), from, bytes);
  barrier_complete(bar, bytes);
}
inline void copy_tensor(uint32_t to, TensorMap const& map, int x, int y, uint32_t bar) {
  auto const [address, columns, rows, stride, box] =
      std::tuple(map.words[0], map.words[1], map.words[2], map.words[3], map.words[4]);
  if ((to & kOffset) % 1024) fail("a swizzled box is not aligned");
  for (uint64_t row = 0; row < box; ++row) {
    for (uint64_t column = 0; column < 64; ++column) {
      bool const inside = y + row < rows && x + column < columns;
      uint32_t const at = to + row * 128 + column * 2;
      auto const* const values = reinterpret_cast<uint16_t const*>(address) + (y + row) * stride + x;
      store_shared<uint16_t>(at ^ (at >> 7 & 7) << 4, inside ? values[column] : 0);
    }
  }
  barrier_complete(bar, box * 128);
}
inline void copy_tensor_multicast(uint32_t to, TensorMap const& map, int x, int y, uint32_t bar, uint16_t ranks) {
  for (uint32_t rank = 0; rank < 16; ++rank)
    if (ranks >> rank & 1) copy_tensor(map_to_rank(to, rank), map, x, y, map_to_rank(bar, rank));
}
inline void copy_16_bytes(uint32_t to, void const* from, int valid) {
  if (reinterpret_cast<uint64_t>(from) % 16) fail("an asynchronous copy is not aligned");
  uint4 v{};
  std::memcpy(&v, from, valid);
  store_shared(to, v);
}

inline void copy_16_bytes(uint32_t to, void const* from) { copy_16_bytes(to, from, 16); }
inline void wait_for_copies() {}

inline void launch_dependents() {}
inline void wait_for_inputs() {}

inline uint4 load_shared_128(uint32_t address) { return load_shared<uint4>(address); }
inline uint32_t load_shared_32(uint32_t address) { return load_shared<uint32_t>(address); }
inline uint2 load_shared_64(uint32_t address) { return load_shared<uint2>(address); }
inline float4 load_shared_float4(uint32_t address) { return load_shared<float4>(address); }
inline void store_shared_32(uint32_t address, uint32_t v) { store_shared(address, v); }
template <class T> void store_shared_128(uint32_t address, T const& v) {
  static_assert(sizeof(T) == 16);
  store_shared(address, v);
}
inline uint4 load_matrices(uint32_t address) {
  auto& words = warp().words;
  words[lane()][0] = address;
  __syncwarp();
  uint32_t v[4];
  for (int i = 0; i < 4; ++i) v[i] = load_shared<uint32_t>(words[8 * i + lane() / 4][0] + lane() % 4 * 4);
  __syncwarp();
  return {v[0], v[1], v[2], v[3]};
}
inline uint4 load_matrices_transposed(uint32_t address) {
  uint4 const v = load_matrices(address);
  return {transpose_matrix(v.x), transpose_matrix(v.y), transpose_matrix(v.z), transpose_matrix(v.w)};
}
inline void store_transposed(uint32_t address, uint32_t const (&v)[4]) {
  auto& words = warp().words;
  words[lane()][0] = address;
  __syncwarp();
  for (int i = 0; i < 8; ++i) {
    uint32_t const row = words[8 * (i / 2) + lane() % 4 * 2 + i % 2][0];
    store_shared(row + lane() / 4 * 2, static_cast<uint16_t>(v[i / 2] >> (i % 2 * 16)));
  }
  __syncwarp();
}

}  // namespace fp4gemm
