// What the packed GEMM kernels use of CUDA, on a CPU: each thread of a cluster is a fiber, and whatever waits yields.
//
// It is functional: copies and WGMMAs are done at once, so hazards of real asynchrony do not show. Indices, barriers'
// counts and phases, clusters, swizzles, layouts and arithmetic do. Warps run in a random order, some of them not at all
// in a round; a cluster in which nothing happens any more is a deadlock.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__
#define __align__(n)
#define __shared__ static

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  int x, y = 0;
};

// --- execution --------------------------------------------------------------------------------------------------------

struct Barrier {  // an mbarrier
  int count, pending, phase;
  long bytes;  // still to come
};
struct Meeting {  // of threads that wait for each other
  int arrived = 0, generation = 0;
};
struct Cluster;

struct Cta {
  Cluster* cluster;
  Index block;
  std::vector<uint8_t> memory;
  uint8_t* shared;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> named;
  struct {
    uint32_t words[32][8];
    Meeting meeting;
  } warps[32];
  struct {
    uint32_t words[128][4];
    Meeting meeting;
  } warpgroups[8];
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  Meeting meeting;
  int threads;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;  // where it goes on, once it has started
  bool started = false;
  Cta* cta;
  Index thread;
  int generation = 0;  // of the cluster's barrier at which it has arrived
  bool done = false;
};

inline Fiber* current;
inline jmp_buf scheduler;
inline Index gridDim;
inline int cta_threads;
inline long events;  // counts whatever may let another thread go on

#define threadIdx (current->thread)
#define blockIdx (current->cta->block)

// Contexts only start threads: to swap them costs a system call each time, a jump does not.
inline void yield() {
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}
inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Of the nth thread that runs at a time. Kept: the next cluster's threads find its pages there.
inline constexpr size_t kStackBytes = 96 << 10;
inline char* stack_of(size_t n) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= n) stacks.emplace_back(new char[kStackBytes]);
  return stacks[n].get();
}

// Ends the run: the scheduler finds the message when this thread waits.
inline char const* failure;
[[noreturn]] inline void fail(char const* what) {
  failure = what;
  for (;;) yield();
}

inline void arrive(Meeting& meeting, int threads) {
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.generation, ++events;
}
inline void meet(Meeting& meeting, int threads) {
  int const generation = meeting.generation;
  arrive(meeting, threads);
  while (meeting.generation == generation) yield();
}

inline int lane() { return threadIdx.x % 32; }
inline auto& warp() { return current->cta->warps[threadIdx.x / 32]; }
inline void __syncwarp() { meet(warp().meeting, 32); }
inline void sync_named(int id, int threads) { meet(current->cta->named[id], threads); }
inline void arrive_named(int id, int threads) { arrive(current->cta->named[id], threads); }
inline void __syncthreads() { sync_named(0, cta_threads); }

template <class T> T shuffle(T v, int from) {
  std::memcpy(warp().words[lane()], &v, sizeof(T));
  __syncwarp();
  std::memcpy(&v, warp().words[from], sizeof(T));
  __syncwarp();
  return v;
}
template <class T> T __shfl_sync(unsigned, T v, int from) { return shuffle(v, from); }
template <class T> T __shfl_up_sync(unsigned, T v, int step) {
  return shuffle(v, lane() < step ? lane() : lane() - step);
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return shuffle(v, lane() ^ mask); }
inline unsigned __reduce_min_sync(unsigned, unsigned v) {
  for (int mask = 16; mask > 0; mask /= 2) v = std::min(v, shuffle(v, lane() ^ mask));
  return v;
}

// Runs kernel() in `ctas` CTAs, in `layers` of them along y; what went wrong, or null.
inline char const* run_grid(void (*kernel)(), int ctas, int cluster_size, int threads, int shared_bytes, unsigned seed,
                            int layers = 1) {
  static void (*body)();
  body = kernel, gridDim = {ctas, layers}, cta_threads = threads, failure = nullptr;
  std::mt19937 random(seed);
  for (int at = 0; at < ctas * layers; at += cluster_size) {
    int const first = at % ctas, layer = at / ctas;
    Cluster cluster;
    cluster.threads = cluster_size * threads;
    std::vector<std::vector<std::unique_ptr<Fiber>>> warps;
    for (int i = 0; i < cluster_size; ++i) {
      auto cta = std::make_unique<Cta>();
      cta->cluster = &cluster, cta->block = {first + i, layer};
      cta->memory.assign(shared_bytes + 1024, 0xA5);
      cta->shared = cta->memory.data() + (1024 - reinterpret_cast<uintptr_t>(cta->memory.data()) % 1024) % 1024;
      for (int thread = 0; thread < threads; ++thread) {
        if (thread % 32 == 0) warps.emplace_back();
        auto fiber = std::make_unique<Fiber>();
        fiber->cta = cta.get(), fiber->thread = {thread};
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = stack_of(i * threads + thread);
        fiber->start.uc_stack.ss_size = kStackBytes;
        void (*start)() = [] {
          body();
          current->done = true, ++events;
          yield();
        };
        makecontext(&fiber->start, start, 0);
        warps.back().push_back(std::move(fiber));
      }
      cluster.ctas.push_back(std::move(cta));
    }
    for (int alive = 1, idle = 0; alive;) {
      long const before = events;
      alive = 0;
      std::shuffle(warps.begin(), warps.end(), random);
      for (auto& warp : warps) {
        bool const runs = random() % 4 != 0;
        for (auto& fiber : warp) {
          if (fiber->done) continue;
          if (runs) {
            resume(*fiber);
            if (failure) return failure;
          }
          alive += !fiber->done;
        }
      }
      idle = events == before ? idle + 1 : 0;
      if (idle > 400) return "deadlock";
    }
  }
  return nullptr;
}

// --- numbers ----------------------------------------------------------------------------------------------------------

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __vimax3_u32(uint32_t a, uint32_t b, uint32_t c) { return std::max(a, std::max(b, c)); }
inline uint32_t __vimin3_u32(uint32_t a, uint32_t b, uint32_t c) { return std::min(a, std::min(b, c)); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int n) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (n % 32) >> 32);
}
inline bool __isGlobal(void const*) { return true; }
inline void __builtin_assume(bool) {}
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(a); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t const bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t const choice = selector >> (4 * i) & 15, byte = bytes >> (8 * (choice & 7)) & 255;
    v |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return v;
}
template <class T> T atomicMax(T* p, T v) {
  T const old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T, class U> T atomicAdd(T* p, U v) {
  T const old = *p;
  *p += v;
  return old;
}
template <class T> T __ldcs(T const* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
inline uint64_t __cvta_generic_to_global(void const* p) { return reinterpret_cast<uint64_t>(p); }

inline float bf16_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
inline uint32_t float_to_bf16(float v) {
  uint32_t const bits = __float_as_uint(v);
  return v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float half_bits_to_float(uint32_t bits) {
  auto const half = static_cast<uint16_t>(bits);
  _Float16 v;
  std::memcpy(&v, &half, 2);
  return static_cast<float>(v);
}
inline uint32_t float_to_half(float v) {
  auto const half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t float_to_half_rz(float v) {
  uint32_t const bits = float_to_half(v);
  return bits - (std::fabs(static_cast<float>(half_bits_to_float(bits))) > std::fabs(v));
}
inline float to_float(uint32_t bits, bool bf16) {
  return bf16 ? bf16_to_float(bits & 0xFFFF) : half_bits_to_float(bits);
}
template <class Operation> uint32_t each_half(uint32_t a, uint32_t b, Operation const& operation) {
  return operation(a & 0xFFFF, b & 0xFFFF) | operation(a >> 16, b >> 16) << 16;
}
inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return each_half(a, b, [](uint32_t x, uint32_t y) { return float_to_bf16(bf16_to_float(x) * bf16_to_float(y)); });
}
inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  return each_half(a, b,
                   [](uint32_t x, uint32_t y) { return float_to_half(half_bits_to_float(x) * half_bits_to_float(y)); });
}
// max.NaN.xorsign.abs of two pairs whose infinity is `infinity`, or of two floats.
inline uint32_t max_xorsign(uint32_t a, uint32_t b, uint32_t infinity) {
  return each_half(a, b, [infinity](uint32_t x, uint32_t y) {
    uint32_t const magnitude = std::max(x & 0x7FFF, y & 0x7FFF);
    return magnitude > infinity ? 0x7FFFu : magnitude | ((x ^ y) & 0x8000u);
  });
}
inline float max_xorsign(float a, float b) {
  if (a != a || b != b) return NAN;
  return std::copysign(std::max(std::fabs(a), std::fabs(b)), std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f);
}
inline float e4m3_to_float(uint32_t byte) {
  int const exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return NAN;
  float const v = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return byte & 128 ? -v : v;
}
inline uint8_t to_e4m3_byte(float v) {  // nearest, ties to even, at most 448
  if (v != v) return 127;
  if (std::signbit(v)) return 128 | to_e4m3_byte(-v);
  uint8_t nearest = 0;
  for (int byte = 1; byte < 127; ++byte) {
    float const step = std::fabs(e4m3_to_float(byte) - v), best = std::fabs(e4m3_to_float(nearest) - v);
    if (step < best || (step == best && byte % 2 == 0)) nearest = byte;
  }
  return v > 448 ? 126 : nearest;
}

inline uint32_t e2m1_to_half(uint32_t code) {  // its lowest four bits
  static constexpr float values[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return float_to_half(code & 8 ? -values[code & 7] : values[code & 7]);
}

// --- matrices ---------------------------------------------------------------------------------------------------------

// Of words that the lanes of a warp hold as MMAs do: row = lane / 4, columns 2 * (lane % 4) and the next.
template <class Words> uint32_t matrix_half(Words const& words, int row, int column, int word) {
  return words[row * 4 + column / 2][word] >> (column % 2 * 16) & 0xFFFF;
}

inline uint32_t transpose_matrix(uint32_t pair) {
  auto& words = warp().words;
  words[lane()][0] = pair;
  __syncwarp();
  int const row = lane() / 4, column = lane() % 4 * 2;
  uint32_t const v = matrix_half(words, column, row, 0) | matrix_half(words, column + 1, row, 0) << 16;
  __syncwarp();
  return v;
}

// mma.m16n8k16.
inline void multiply_matrices(float4& c, uint32_t const* a, uint32_t b0, uint32_t b1, bool bf16) {
  auto& words = warp().words;
  std::memcpy(words[lane()], a, 16);
  words[lane()][4] = b0, words[lane()][5] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    int const row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
    double sum = (&c.x)[i];
    for (int k = 0; k < 16; ++k)
      sum += static_cast<double>(to_float(matrix_half(words, row, k % 8, half + k / 8 * 2), bf16)) *
             to_float(matrix_half(words, column, k % 8, 4 + k / 8), bf16);
    (&c.x)[i] = static_cast<float>(sum);
  }
  __syncwarp();
}

// wgmma.m64nNk16, A from registers, B in shared memory: K-major, swizzled by 128 bytes.
template <int kTokens, bool kBf16> void multiply_warpgroup(uint32_t const* a, uint64_t descriptor, float* acc) {
  auto& group = current->cta->warpgroups[threadIdx.x / 128];
  int const thread = threadIdx.x % 128, row = lane() / 4;
  std::memcpy(group.words[thread], a, 16);
  meet(group.meeting, 128);
  auto const* const words = group.words + thread / 32 * 32;
  uint32_t const base = (descriptor & 0x3FFF) << 4;
  for (int token = 0; token < kTokens; ++token) {
    if (token % 8 / 2 != lane() % 4) continue;
    double sums[2] = {};
    for (int k = 0; k < 16; ++k) {
      uint32_t address = base + token * 128 + k * 2;
      address ^= (address >> 7 & 7) << 4;
      uint16_t b;
      std::memcpy(&b, current->cta->shared + address, 2);
      for (int half = 0; half < 2; ++half)
        sums[half] +=
            static_cast<double>(to_float(matrix_half(words, row, k % 8, half + k / 8 * 2), kBf16)) * to_float(b, kBf16);
    }
    for (int half = 0; half < 2; ++half) {
      float& sum = acc[token / 8 * 4 + half * 2 + token % 2];
      sum = static_cast<float>(sum + sums[half]);
    }
  }
  meet(group.meeting, 128);
}
