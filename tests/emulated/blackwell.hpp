// Blackwell's NVFP4 instructions in software, for sm_90a: overlay.py puts calls of these functions where CUTLASS's wrappers
// hold the PTX. Everything here is synchronous, so it shows layouts, descriptors, indices, barrier counts and phases; it
// shows neither the order of the asynchronous proxies nor the width of the hardware's accumulator.
#pragma once

#include <cuda/std/cstdint>
#include <cuda/std/type_traits>

#include "fp4gemm/tensor_map.hpp"

namespace cute {
struct SM100_TMA_2SM_LOAD;
struct SM100_TMA_2SM_LOAD_MULTICAST;
}  // namespace cute

namespace fp4gemm::emulation {

// Tensor memory of a CTA, in global memory: 512 columns of 128 lanes of a word. A launch has at most kCtas CTAs.
inline constexpr uint32_t kLanes = 128, kColumns = 512, kTmemWords = kLanes * kColumns, kCtas = 256;

// Which clusters a launch leaves to cluster launch control: those whose CTAs have blockIdx.x from gridDim.x up to full_x.
// With full_x = 0 there are none, as when all of a grid runs at once.
struct LaunchControl {
  uint32_t full_x, next, granted, declined;
};

// What an instruction was given that it does not take; tests/emulated/emulation.py knows the names from here.
enum Fault : uint32_t {
  kTooManyCtas = 1,  // blockIdx
  kTmemColumns = 2,  // columns, address
  kTmemSubpartition = 3,  // address, threadIdx.x
  kDescriptorVersion = 4,  // high word of the descriptor
  kDescriptorOffset = 5,  // high word of the descriptor
  kDescriptorSwizzle = 6,  // layout
  kScaleSwizzle = 7,  // layout
  kInstructionFormat = 8,  // instruction descriptor
  kInstructionShape = 9,  // M, N
  kScaleIds = 10,  // instruction descriptor, address
  kTmaDescriptor = 11,  // magic, rank
};

}  // namespace fp4gemm::emulation

extern "C" {
__device__ uint32_t fp4gemm_emulation_tmem[fp4gemm::emulation::kCtas * fp4gemm::emulation::kTmemWords];
__device__ uint32_t fp4gemm_emulation_allocations[fp4gemm::emulation::kCtas];
__device__ fp4gemm::emulation::LaunchControl fp4gemm_emulation_launch_control;
__device__ uint32_t fp4gemm_emulation_faults[6];  // how many; of the first: Fault, two details, blockIdx.x, threadIdx.x
}

namespace fp4gemm::emulation {

__device__ __noinline__ void fault(Fault code, uint32_t detail = 0, uint32_t more = 0) {
  uint32_t* faults = fp4gemm_emulation_faults;
  if (atomicAdd(faults, 1u) != 0) return;
  faults[1] = code, faults[2] = detail, faults[3] = more, faults[4] = blockIdx.x, faults[5] = threadIdx.x;
}

// --- what sm_90 has -------------------------------------------------------------------------------------------------

__device__ inline uint32_t lane_id() { return threadIdx.x % 32; }

#define FP4GEMM_SPECIAL_REGISTER(function, name) \
  __device__ inline uint32_t function() { \
    uint32_t value; \
    asm volatile("mov.u32 %0, %%" name ";" : "=r"(value)); \
    return value; \
  }
FP4GEMM_SPECIAL_REGISTER(cta_rank, "cluster_ctarank")
FP4GEMM_SPECIAL_REGISTER(cluster_ctas, "cluster_nctarank")
FP4GEMM_SPECIAL_REGISTER(cluster_x, "cluster_nctaid.x")
FP4GEMM_SPECIAL_REGISTER(cluster_y, "cluster_nctaid.y")
#undef FP4GEMM_SPECIAL_REGISTER

// Where a shared-memory address of this CTA is in CTA `rank` of the cluster; every address below is such a one.
__device__ inline uint32_t in_cta(uint32_t rank, uint32_t address) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ inline uint32_t shared_address(void const* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ inline void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ inline void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void complete_bytes(uint32_t barrier, uint32_t bytes) {
  fence_cluster();  // the instruction itself orders nothing
  asm volatile("mbarrier.complete_tx.shared::cluster.relaxed.cluster.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// --- numbers --------------------------------------------------------------------------------------------------------

// Four e2m1 codes, the first one lowest: four signed bytes, each twice the value.
__device__ inline int doubled(uint32_t codes) {
  uint32_t const magnitudes = __byte_perm(0x03020100u, 0x0C080604u, codes & 0x7777u);
  uint32_t const signs = __byte_perm(0x0000FF00u, 0, (codes >> 3) & 0x1111u);
  return static_cast<int>(__vsub4(magnitudes ^ signs, signs));
}

__device__ inline float ue4m3(uint32_t word, int byte) {
  uint32_t const code = (word >> (8 * byte)) & 0x7F;
  // The bits of a float whose exponent is 120 too small; 0x7F is NaN.
  return code == 0x7F ? __uint_as_float(0x7FC00000u) : __uint_as_float(code << 20) * 0x1p120f;
}

// Sixteen products of four times their value, and their scales: exact in float.
__device__ inline float scaled(int quadrupled, float scale_a, float scale_b) {
  return 0.25f * static_cast<float>(quadrupled) * (scale_a * scale_b);
}

// --- sm_120: mma.sync.m16n8k64 of e2m1 with four ue4m3 scales along K ----------------------------------------------------

// Lane 4g + t has of A, eight codes a register, rows g and g + 8 at k = 8t, then both at k = 32 + 8t; of B column g at the
// same two k; of C and D rows g, then g + 8, columns 2t and 2t + 1. Scales of A's row g are in lane 4g, of row g + 8 in lane
// 4g + 1; of B's column n in lane 4n (the selectors that CUTLASS passes are zero). PTX ISA, "Block Scaling for mma.sync".
__device__ __noinline__ void mma_m16n8k64(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2],
                                          float const (&c)[4], uint32_t scales_a, uint32_t scales_b) {
  uint32_t constexpr all = 0xFFFFFFFFu;
  uint32_t const g = lane_id() / 4, t = lane_id() % 4;
  uint32_t const row_scales[2] = {__shfl_sync(all, scales_a, 4 * g), __shfl_sync(all, scales_a, 4 * g + 1)};
  uint32_t const column_scales[2] = {__shfl_sync(all, scales_b, 8 * t), __shfl_sync(all, scales_b, 8 * t + 4)};
  float sum[2][2] = {};
#pragma unroll
  for (int block = 0; block < 4; ++block) {  // of 16 values: what lanes 2 (block % 2) and the next have of a half of K
    int const half = block / 2;
    int dot[2][2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t const owner = 2 * (block % 2) + i;
      uint32_t rows[2], columns[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rows[j] = __shfl_sync(all, a[2 * half + j], 4 * g + owner);
        columns[j] = __shfl_sync(all, b[half], 4 * (2 * t + j) + owner);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t const x = rows[j / 2], y = columns[j % 2];
        int& to = dot[j / 2][j % 2];
        to = __dp4a(doubled(x), doubled(y), __dp4a(doubled(x >> 16), doubled(y >> 16), to));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float const scale_a = ue4m3(row_scales[j / 2], block), scale_b = ue4m3(column_scales[j % 2], block);
      sum[j / 2][j % 2] += scaled(dot[j / 2][j % 2], scale_a, scale_b);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) d[j] = c[j] + sum[j / 2][j % 2];
}

// --- cluster launch control -----------------------------------------------------------------------------------------

// One thread. The 16 bytes of the answer are opaque to CUTLASS, but all zeros must mean "nothing": here, word 0 says whether
// there is a cluster and the others where its first CTA is.
__device__ inline void try_cancel(void const* answer, uint32_t barrier) {
  LaunchControl& control = fp4gemm_emulation_launch_control;
  uint4 cluster = {0, 0, 0, 0};
  if (control.full_x > gridDim.x) {
    uint32_t const across = (control.full_x - gridDim.x) / cluster_x(), down = gridDim.y / cluster_y();
    uint32_t const index = atomicAdd(&control.next, 1u);
    if (index < across * down * gridDim.z)
      cluster = {1, gridDim.x + index % across * cluster_x(), index / across % down * cluster_y(),
                 index / (across * down)};
  }
  atomicAdd(cluster.x ? &control.granted : &control.declined, 1u);
  for (uint32_t rank = 0; rank < cluster_ctas(); ++rank) {
    store_shared(in_cta(rank, shared_address(answer)), cluster);
    complete_bytes(in_cta(rank, barrier), sizeof(cluster));
  }
}

template <class Index> __device__ void query_cancel(uint32_t answer, Index& x, Index& y, Index& z, uint32_t& valid) {
  uint4 const cluster = load_shared(in_cta(cta_rank(), answer));
  valid = cluster.x;
  if (valid) x = cluster.y, y = cluster.z, z = cluster.w;
}

// --- sm_100: tensor memory ------------------------------------------------------------------------------------------

// A group of two CTAs is a pair along x, and its first CTA is even: ranks count along x first.
__device__ inline uint32_t linear_cta(uint32_t block_x) {
  uint32_t const cta = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + block_x;
  if (cta >= kCtas) fault(kTooManyCtas, blockIdx.x, blockIdx.y);
  return cta % kCtas;
}
__device__ inline uint32_t* tmem_of(uint32_t block_x) {
  return fp4gemm_emulation_tmem + linear_cta(block_x) * kTmemWords;
}

// An address has a lane in its high half and a column in its low half.
__device__ inline uint32_t tmem_word(uint32_t address, uint32_t lane, uint32_t column) {
  return ((address & 0xFFFF) + column) % kColumns * kLanes + ((address >> 16) + lane) % kLanes;
}
__device__ inline uint32_t tmem_read(uint32_t const* tmem, uint32_t word) { return __ldcg(tmem + word); }
__device__ inline void tmem_write(uint32_t* tmem, uint32_t word, uint32_t value) { __stcg(tmem + word, value); }

// A warp. Memory that was not written yet holds NaN; a pair gets it when both have asked, as on the hardware.
template <int Ctas> __device__ void tmem_allocate(void* destination, uint32_t columns) {
  if (columns != kColumns) fault(kTmemColumns, columns);
  uint32_t* tmem = tmem_of(blockIdx.x);
  for (uint32_t i = lane_id(); i < kTmemWords; i += 32) tmem_write(tmem, i, 0xFFFFFFFFu);
  __threadfence();
  __syncwarp();
  if (lane_id() == 0) {
    *static_cast<uint32_t*>(destination) = 0;
    uint32_t volatile* allocations = fp4gemm_emulation_allocations;
    uint32_t const mine = atomicAdd(&fp4gemm_emulation_allocations[linear_cta(blockIdx.x)], 1u) + 1;
    while (Ctas == 2 && allocations[linear_cta(blockIdx.x ^ 1)] < mine) {
    }
  }
  __threadfence();
  __syncwarp();
}
__device__ inline void tmem_free(uint32_t address, uint32_t columns) {
  if (columns != kColumns || address != 0) fault(kTmemColumns, columns, address);
}

// tcgen05.ld.32x32b: lane i of a warp reads the lane i of the address, one column a register; a warp reaches the quarter of
// the lanes that its place in its warpgroup gives it.
template <class... Words> __device__ void tmem_load(uint32_t address, Words&... words) {
  if ((address >> 16) % kLanes != 32 * (threadIdx.x / 32 % 4)) fault(kTmemSubpartition, address, threadIdx.x);
  uint32_t const* tmem = tmem_of(blockIdx.x);
  uint32_t column = 0;
  ((words = tmem_read(tmem, tmem_word(address, lane_id(), column++))), ...);
  __syncwarp();
}

// A shared-memory descriptor of a K-major matrix: rows in groups of eight, 16-byte chunks along K.
struct Matrix {
  uint32_t start, leading, stride, layout, swizzle_bits;

  __device__ explicit Matrix(uint64_t descriptor)
      : start(bytes(descriptor)),
        leading(bytes(descriptor >> 16)),
        stride(bytes(descriptor >> 32)),
        layout(static_cast<uint32_t>(descriptor >> 61)),
        swizzle_bits(layout == 0 ? 0 : 4 - layout / 2) {  // 2: 128 bytes, 4: 64 bytes, 6: 32 bytes
    uint32_t const high = static_cast<uint32_t>(descriptor >> 32);
    if ((high >> 14 & 3) != 1) fault(kDescriptorVersion, high);
    if ((high >> 17 & 15) != 0) fault(kDescriptorOffset, high);
    if (layout % 2 != 0) fault(kDescriptorSwizzle, layout);
  }
  __device__ static uint32_t bytes(uint64_t field) { return (static_cast<uint32_t>(field) & 0x3FFF) * 16; }

  // Where a chunk is, as an offset in the CTA's shared memory. Swizzling moves address bits 7.. into bits 4...
  __device__ uint32_t at(uint32_t row, uint32_t chunk) const {
    uint32_t const along_k = chunk * (layout == 0 ? leading : 16);
    uint32_t const address = start + row / 8 * stride + row % 8 * (16u << swizzle_bits) + along_k;
    return address ^ ((address >> 7 & ((1u << swizzle_bits) - 1)) << 4);
  }
};

// tcgen05.cp.32x128b.warpx4, one thread: 32 rows of 16 bytes go to four columns, and to each quarter of the lanes.
template <int Ctas> __device__ __noinline__ void copy_scales(uint64_t descriptor, uint32_t to) {
  Matrix const scales(descriptor);
  if (scales.layout != 0) fault(kScaleSwizzle, scales.layout);
  uint32_t const first_rank = cta_rank() / Ctas * Ctas, first_x = blockIdx.x / Ctas * Ctas;
  for (uint32_t cta = 0; cta < Ctas; ++cta) {
    uint32_t const base = in_cta(first_rank + cta, 0);
    uint32_t* tmem = tmem_of(first_x + cta);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      uint4 const words = load_shared(base + scales.at(lane % 32, 0));
      tmem_write(tmem, tmem_word(to, lane, 0), words.x), tmem_write(tmem, tmem_word(to, lane, 1), words.y);
      tmem_write(tmem, tmem_word(to, lane, 2), words.z), tmem_write(tmem, tmem_word(to, lane, 3), words.w);
    }
  }
  __threadfence();
}

// 64 codes of a row as bytes for __dp4a.
struct Codes {
  int words[16];

  __device__ Codes(uint32_t base, Matrix const& matrix, uint32_t row) {
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      uint4 const v = load_shared(base + matrix.at(row, chunk));
      uint32_t const packed[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) words[8 * chunk + i] = doubled(packed[i / 2] >> (16 * (i % 2)));
    }
  }
};

// What an instruction descriptor of kind::mxf4nvf4 may say: e2m1 by e2m1 with ue4m3 scales, dense, K-major, K = 64.
__device__ inline void check_instruction(uint32_t descriptor, uint32_t rows) {
  uint32_t constexpr kExpected = 1u << 7 | 1u << 10, kIds = 3u << 4 | 3u << 29;
  uint32_t constexpr kShape = 63u << 17 | 31u << 24;
  if ((descriptor & ~(kShape | kIds)) != kExpected) fault(kInstructionFormat, descriptor);
  if ((descriptor & kIds) != 0) fault(kScaleIds, descriptor);
  if ((descriptor >> 24 & 31) * 16 != rows) fault(kInstructionShape, (descriptor >> 24 & 31) * 16, rows);
}

// tcgen05.mma.kind::mxf4nvf4.block_scale.block16, a warp: D[m, n] (+)= A . B^T over K = 64. Each CTA of a pair has 128 rows of
// A and D, half of B's rows, and all of B's scales. Row r's four scales are word r / 32 of lane r % 32, or of its replicas.
template <int Ctas> __device__ __noinline__ void mma(uint32_t to, uint64_t a_descriptor, uint64_t b_descriptor,
                                                     uint32_t instruction, uint32_t accumulate, uint32_t scales_a,
                                                     uint32_t scales_b) {
  __syncwarp();
  check_instruction(instruction, Ctas * kLanes);
  Matrix const a(a_descriptor), b(b_descriptor);
  uint32_t const columns = (instruction >> 17 & 63) * 8, share = columns / Ctas;
  uint32_t const first_rank = cta_rank() / Ctas * Ctas, first_x = blockIdx.x / Ctas * Ctas;
  for (uint32_t cta = 0; cta < Ctas; ++cta) {
    uint32_t* tmem = tmem_of(first_x + cta);
    for (uint32_t quarter = 0; quarter < 4; ++quarter) {
      uint32_t const row = 32 * quarter + lane_id();
      Codes const left(in_cta(first_rank + cta, 0), a, row);
      uint32_t const row_scales = tmem_read(tmem, tmem_word(scales_a, row, quarter));
      for (uint32_t n = 0; n < columns; ++n) {
        Codes const right(in_cta(first_rank + n / share, 0), b, n % share);
        uint32_t const column_scales = tmem_read(tmem, tmem_word(scales_b, 32 * quarter + n % 32, n / 32));
        float sum = 0;
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          int dot = 0;
#pragma unroll
          for (int i = 4 * block; i < 4 * block + 4; ++i) dot = __dp4a(left.words[i], right.words[i], dot);
          sum += scaled(dot, ue4m3(row_scales, block), ue4m3(column_scales, block));
        }
        uint32_t const word = tmem_word(to, row, n);
        float const before = accumulate ? __uint_as_float(tmem_read(tmem, word)) : 0.0f;
        tmem_write(tmem, word, __float_as_uint(before + sum));
      }
    }
  }
  __threadfence();
  __syncwarp();
}

// tcgen05.commit, a warp: what it waits for is done, so it only arrives, in this CTA or in each of a mask.
__device__ inline void commit(void const* barrier, uint32_t ctas) {
  __threadfence();
  __syncwarp();
  if (lane_id() == 0)
    for (uint32_t rank = 0; rank < cluster_ctas(); ++rank)
      if (ctas >> rank & 1) arrive(in_cta(rank, shared_address(barrier)));
  __syncwarp();
}
__device__ inline void commit(void const* barrier) { commit(barrier, 1u << cta_rank()); }

// Every thread that calls it arrives, in the first CTA of its pair.
__device__ inline void arrive_at_leader(void const* barrier) {
  arrive(in_cta(cta_rank() & ~1u, shared_address(barrier)));
}

// --- TMA ------------------------------------------------------------------------------------------------------------

// Hopper's TMA knows no 4-bit types. The same bytes go as bytes: CuTe then halves extents and coordinates itself.
template <int Bits, class T> using TmaType = cuda::std::conditional_t<Bits == 4, uint8_t, T>;

// Nor can it signal the barrier of another CTA, as loads for a pair do. Those are copies in software: the request that
// describes the descriptor is left in its place, with a magic number that the host does not look for. Its address word is
// then one of the pointers in Params that a launch writes.
inline constexpr uint32_t kSoftwareMagic = 0xF4F4F4F5u;

template <class Operation, class Descriptor> __device__ void keep_request_of_pair_load(Descriptor& descriptor) {
  if constexpr (cuda::std::is_same_v<Operation, cute::SM100_TMA_2SM_LOAD> ||
                cuda::std::is_same_v<Operation, cute::SM100_TMA_2SM_LOAD_MULTICAST>)
    reinterpret_cast<TensorMapRequest&>(descriptor).magic = kSoftwareMagic;
}

__device__ inline uint32_t element_bytes(uint32_t type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

// Sixteen bytes of a row of `end` bytes, zeros where they are outside.
__device__ inline uint4 load_chunk(uint8_t const* row, int64_t at, int64_t end) {
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i)
    if (at + i >= 0 && at + i < end) words[i / 4] |= static_cast<uint32_t>(row[at + i]) << (8 * (i % 4));
  return {words[0], words[1], words[2], words[3]};
}

// cp.async.bulk.tensor.cta_group::2, one thread: a box goes to this CTA, or to each of a mask, and its bytes are counted by
// the barrier of the first CTA of the pair that gets it.
template <class... Coordinates> __device__ __noinline__ void load_for_pair(void const* descriptor, void const* barrier,
                                                                           uint32_t ctas, void const* destination,
                                                                           Coordinates... coordinates) {
  TensorMapRequest const& map = *static_cast<TensorMapRequest const*>(descriptor);
  uint32_t constexpr kRank = sizeof...(Coordinates);
  if (map.magic != kSoftwareMagic || map.rank != kRank) return fault(kTmaDescriptor, map.magic, map.rank);
  int const first[kRank] = {coordinates...};
  uint32_t const size = element_bytes(map.data_type), row_bytes = map.box[0] * size;
  uint32_t rows = 1;
  for (uint32_t i = 1; i < kRank; ++i) rows *= map.box[i];

  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t address = map.address;
    bool inside = true;
    for (uint32_t i = 1, rest = row; i < kRank; rest /= map.box[i], ++i) {
      int64_t const x = int64_t(first[i]) + rest % map.box[i];
      inside &= x >= 0 && x < static_cast<int64_t>(map.dims[i]);
      address += x * static_cast<int64_t>(map.strides[i - 1]);
    }
    int64_t const end = inside ? static_cast<int64_t>(map.dims[0] * size) : 0;
    for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
      uint4 const chunk = load_chunk(reinterpret_cast<uint8_t const*>(address), int64_t(first[0]) * size + byte, end);
      uint32_t to = shared_address(destination) + row * row_bytes + byte;
      to ^= (to >> 7 & ((1u << map.swizzle) - 1)) << 4;  // none, 32, 64, 128 bytes: 0..3 bits
      for (uint32_t rank = 0; rank < cluster_ctas(); ++rank)
        if (ctas >> rank & 1) store_shared(in_cta(rank, to), chunk);
    }
  }
  for (uint32_t rank = 0; rank < cluster_ctas(); ++rank)
    if (ctas >> rank & 1) complete_bytes(in_cta(rank & ~1u, shared_address(barrier)), rows * row_bytes);
}

}  // namespace fp4gemm::emulation
