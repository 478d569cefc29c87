"""NVFP4 matrix multiplication from PyTorch."""

from fp4gemm import nn
from fp4gemm.batch import bmm, bmm_fp4, quantize_batch
from fp4gemm.calibration import calibrate, collect_hessians, save_hessians
from fp4gemm.checkpoint import load_quantized, save_quantized
from fp4gemm.formats import CONVENTIONS, SCALINGS, SF_LAYOUTS
from fp4gemm.group.ops import quantize_grouped
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.grouped import GroupedWeight, stack_weights
from fp4gemm.nn import autocast, convert
from fp4gemm.ops import (
    amax,
    dequantize,
    gemm,
    gemm_fp4,
    gemm_grouped,
    quantize,
    quantize_both,
    quantize_gemm,
    quantize_gemm_grouped,
    quantize_rmsnorm,
)
from fp4gemm.search import search_scales
from fp4gemm.tensor import FP4Batch, FP4Tensor

__version__ = "0.1.0"
__all__ = [
    "CONVENTIONS",
    "SCALINGS",
    "SF_LAYOUTS",
    "FP4Batch",
    "FP4Tensor",
    "GroupedFP4Tensor",
    "GroupedWeight",
    "amax",
    "autocast",
    "bmm",
    "bmm_fp4",
    "calibrate",
    "collect_hessians",
    "convert",
    "dequantize",
    "gemm",
    "gemm_fp4",
    "gemm_grouped",
    "load_quantized",
    "nn",
    "quantize",
    "quantize_batch",
    "quantize_both",
    "quantize_gemm",
    "quantize_gemm_grouped",
    "quantize_grouped",
    "quantize_rmsnorm",
    "save_hessians",
    "save_quantized",
    "search_scales",
    "stack_weights",
]
