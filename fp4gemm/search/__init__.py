"""Weights in NVFP4 whose block scales have the lowest error: searched, not taken from the amax."""

from fp4gemm.search.factor import Factor, factor
from fp4gemm.search.hessian import HessianAccumulator
from fp4gemm.search.method import Method
from fp4gemm.search.scales import Audit, audit, search_scales

__all__ = ["Audit", "Factor", "HessianAccumulator", "Method", "audit", "factor", "search_scales"]
