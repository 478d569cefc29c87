// Stands in for the driver API's header: kernels need none of it but the tensor-map enumerators (fp4gemm/tensor_map.hpp).
#pragma once
