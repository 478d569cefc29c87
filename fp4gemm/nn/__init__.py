"""Layers: Linear, GroupedLinear for experts, linear with its gradients, recipes, and the conversion of models."""

from fp4gemm.nn.context import autocast
from fp4gemm.nn.convert import convert
from fp4gemm.nn.functional import linear
from fp4gemm.nn.grouped import GroupedLinear
from fp4gemm.nn.layer import Linear
from fp4gemm.nn.quantized import FP4Linear
from fp4gemm.nn.recipes import Recipe, per_tensor, per_token, w4a16
from fp4gemm.nn.weights import micro_batches

__all__ = [
    "FP4Linear",
    "GroupedLinear",
    "Linear",
    "Recipe",
    "autocast",
    "convert",
    "linear",
    "micro_batches",
    "per_tensor",
    "per_token",
    "w4a16",
]
