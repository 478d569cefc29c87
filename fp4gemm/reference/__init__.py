"""The numerics of fp4gemm in plain torch, on any device: the definition of right (docs/numerics.md)."""

from fp4gemm.reference.matmul import gemm
from fp4gemm.reference.quantize import dequantize, quantize

__all__ = ["dequantize", "gemm", "quantize"]
