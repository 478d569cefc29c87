// Stands in for CUTLASS's header of this name, whose queries need the CUDA runtime on a host. Launch code fills it in.
#pragma once

#include <cute/int_tuple.hpp>
#include "cutlass/device_kernel.h"

namespace cutlass {

struct KernelHardwareInfo {
  int device_id = 0;
  int sm_count = 0;
  int max_active_clusters = 0;
  dim3 cluster_shape = {0, 0, 0};
  dim3 cluster_shape_fallback = {0, 0, 0};

  CUTLASS_HOST_DEVICE static int query_device_multiprocessor_count(int = 0) { return 0; }
};

}  // namespace cutlass
