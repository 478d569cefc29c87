// cuTensorMapEncodeTiled exists on the host only. CuTe's own descriptor code, run on the device, calls record_tensor_map
// instead, which leaves the call's arguments in the 128 bytes of the descriptor; fp4gemm/launch.py finds and encodes them.
#pragma once

// The part of cuda.h that CuTe's descriptor code names, with the driver's values.
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1,
  CU_TENSOR_MAP_DATA_TYPE_UINT32 = 2,
  CU_TENSOR_MAP_DATA_TYPE_INT32 = 3,
  CU_TENSOR_MAP_DATA_TYPE_UINT64 = 4,
  CU_TENSOR_MAP_DATA_TYPE_INT64 = 5,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT64 = 8,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
  CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 = 11,
  CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B = 13,
  CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B = 14,
  CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B = 15
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE = 0,
  CU_TENSOR_MAP_L2_PROMOTION_L2_64B = 1,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B = 1,
  CU_TENSOR_MAP_SWIZZLE_64B = 2,
  CU_TENSOR_MAP_SWIZZLE_128B = 3
};
enum CUresult { CUDA_SUCCESS = 0 };

namespace fp4gemm {

// Read by fp4gemm/tensor_map.py: keep both alike.
struct alignas(64) TensorMapRequest {
  static constexpr uint32_t kMagic = 0xF4F4F4F4u;
  uint32_t magic, rank;
  uint8_t data_type, interleave, swizzle, l2_promotion;
  uint32_t oob_fill;
  uint64_t address;
  uint64_t dims[5], strides[4];
  uint16_t box[5], element_strides[5];
};
static_assert(sizeof(TensorMapRequest) == 128, "the request takes the place of the descriptor");

template <class Descriptor>
__device__ CUresult record_tensor_map(Descriptor* descriptor, CUtensorMapDataType type, int rank, void* address,
                                      uint64_t const* dims, uint64_t const* strides, uint32_t const* box,
                                      uint32_t const* element_strides, CUtensorMapInterleave interleave,
                                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                      CUtensorMapFloatOOBfill fill) {
  auto& request = *reinterpret_cast<TensorMapRequest*>(descriptor);
  request = {TensorMapRequest::kMagic,         static_cast<uint32_t>(rank),        static_cast<uint8_t>(type),
             static_cast<uint8_t>(interleave), static_cast<uint8_t>(swizzle),      static_cast<uint8_t>(promotion),
             static_cast<uint32_t>(fill),      reinterpret_cast<uint64_t>(address)};
  for (int i = 0; i < 5; ++i) {
    request.dims[i] = i < rank ? dims[i] : 1;
    request.box[i] = i < rank ? box[i] : 1;
    request.element_strides[i] = i < rank ? element_strides[i] : 1;
    if (i + 1 < rank) request.strides[i] = strides[i];
  }
  return CUDA_SUCCESS;
}

// CuTe prints a failed encoding to std::cerr; a request cannot fail.
struct NullStream {
  template <class T> __device__ NullStream const& operator<<(T const&) const { return *this; }
};

}  // namespace fp4gemm
