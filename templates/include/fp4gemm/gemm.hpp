// What every CUTLASS GEMM variant shares: the arguments a launch gives, and CUTLASS's own arguments-to-params code run on the
// device, because there is no host compiler. The TMA descriptors in Params are requests that the host encodes
// (nvrtc/cute/atom/copy_traits_sm90_tma.hpp).
#pragma once

// CUTLASS's kernel layers take part in programmatic dependent launch: they wait before they load, and no sooner.
#define CUTLASS_ENABLE_GDC_FOR_SM90
#define CUTLASS_ENABLE_GDC_FOR_SM100

#include "nvrtc/std.hpp"

#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/gemm/gemm.h"
#include "cutlass/kernel_hardware_info.h"

namespace fp4gemm {

// Packed by fp4gemm/launch.py (GEMM_ARGUMENTS): keep both alike. The host patches every word up to lda.
struct GemmArguments {
  void const* a;  // [l, m, k], row stride lda elements
  void const* b;  // [l, n, k], row stride ldb elements
  void const* sfa;  // block scales, 128x4, those of a batch one after the other (block-scaled kernels only)
  void const* sfb;
  void const* c;  // [l, m, n], row stride ldc elements
  void* d;  // [l, m, n], row stride ldd elements
  uint8_t* sfd;  // block scales of an NVFP4 D
  float const* outer_a;  // [m] or [1]
  float const* outer_b;  // [n] or [1]
  float const* outer_d;  // [m] or [1]: those that an NVFP4 D is given
  void const* bias;  // [n]
  double beta;
  void* workspace;  // of kernels that share the K of a tile
  uint64_t launch_number;  // that no other launch has
  int64_t lda, ldb, ldc, ldd;
  // From one member of a batch to the next, in elements; 0 where it is the same for all.
  int64_t batch_a, batch_b, batch_c, batch_d, batch_sfd, batch_outer_a, batch_outer_b, batch_outer_d, batch_bias;
  int m, n, k, l;
  int sm_count;
  int outer_a_per_row;  // 1: outer_a[m]; 0: one value
  int outer_b_per_row;  // the same for outer_b[n]
  int outer_d_per_row;  // and for outer_d[m]
};

using PackedStride = cute::Stride<int64_t, cute::_1, int64_t>;
CUTLASS_HOST_DEVICE PackedStride packed_stride(int64_t ld, int64_t batch = 0) {
  return cute::make_stride(ld, cute::_1{}, batch);
}

// A vector along M or N, or one value for all: the stride is a run-time flag, so both are one kernel.
using AlongM = cute::Stride<bool, cute::_0, int64_t>;
using AlongN = cute::Stride<cute::_0, bool, int64_t>;

template <class Kernel> struct alignas(64) Launch {
  typename Kernel::Params params;
  alignas(64) int grid[3];
};

template <class Kernel>
CUTLASS_DEVICE Launch<Kernel> make_launch(typename Kernel::ProblemShape const& problem,
                                          typename Kernel::CollectiveMainloop::Arguments const& mainloop,
                                          typename Kernel::CollectiveEpilogue::Arguments const& epilogue, int sm_count,
                                          typename Kernel::TileSchedulerArguments const& scheduler = {}) {
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = sm_count;
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm, problem, mainloop, epilogue, hardware, scheduler};
  Launch<Kernel> launch;
  launch.params = Kernel::to_underlying_arguments(arguments, nullptr);
  dim3 const grid = Kernel::get_grid_shape(launch.params);
  launch.grid[0] = grid.x, launch.grid[1] = grid.y, launch.grid[2] = grid.z;
  return launch;
}

}  // namespace fp4gemm

// Read from the cubin by fp4gemm/compile.py: threads, cluster x, y, z, dynamic shared memory, bytes of the by-value argument,
// bytes of the whole Launch, offset of its grid.
#define FP4GEMM_META(Kernel, cluster_x, cluster_y) \
  extern "C" __device__ int fp4gemm_meta[8] = {static_cast<int>(Kernel::MaxThreadsPerBlock), \
                                               cluster_x, \
                                               cluster_y, \
                                               1, \
                                               Kernel::SharedStorageSize, \
                                               sizeof(typename Kernel::Params), \
                                               sizeof(fp4gemm::Launch<Kernel>), \
                                               sizeof(fp4gemm::Launch<Kernel>) - 64};
