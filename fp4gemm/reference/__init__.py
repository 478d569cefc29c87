"""The numerics of fp4gemm in plain torch, on any device: the definition of right (docs/numerics.md)."""

from fp4gemm.reference.grouped import gemm_grouped
from fp4gemm.reference.matmul import bmm, gemm
from fp4gemm.reference.producers import produce, produce_gradient, rmsnorm
from fp4gemm.reference.quantize import amax, dequantize, quantize, quantize_both, quantize_operand, quantize_rmsnorm

__all__ = [
    "amax",
    "bmm",
    "dequantize",
    "gemm",
    "gemm_grouped",
    "produce",
    "produce_gradient",
    "quantize",
    "quantize_both",
    "quantize_operand",
    "quantize_rmsnorm",
    "rmsnorm",
]
