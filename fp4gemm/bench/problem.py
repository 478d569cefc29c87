"""The inputs of one GEMM problem, rotated, and the calls of every candidate on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

import fp4gemm
from fp4gemm import reference
from fp4gemm.bench import humming, timing
from fp4gemm.bench.common import nbytes, random_inputs
from fp4gemm.bench.timing import Call
from fp4gemm.tensor import FP4Tensor

FORM = "sm90"  # what weights are prepacked to
_SAMPLED_ROWS = 64  # rows of D that are checked against float64
_W = TypeVar("_W")


@dataclass(frozen=True)
class Weights:
    """Weights [N, K]: random bf16; those quantized, prepacked, in humming's form; float64 values of the first."""

    bf16: Sequence[torch.Tensor]
    nvfp4: Sequence[FP4Tensor]
    packed: Sequence[FP4Tensor]
    humming: Sequence[humming.Weight]
    exact: torch.Tensor


def make_weights(N: int, K: int) -> Weights:
    """As many copies as make the *packed* weights, the smallest large operand, exceed twice the L2."""
    first = fp4gemm.quantize(random_inputs(1, N, K)[0], scaling="per_tensor")
    bf16 = [random_inputs(1, N, K)[0] for _ in range(timing.rotation(nbytes(first)))]
    nvfp4 = [fp4gemm.quantize(w, scaling="per_tensor") for w in bf16]  # one outer scale, as checkpoints have it
    peers = [humming.Weight(w) for w in nvfp4] if humming.available() and humming.takes(N, K) else []
    return Weights(bf16, nvfp4, [w.prepack(FORM) for w in nvfp4], peers, exact_values(nvfp4[0]))


@dataclass(frozen=True)
class Problem:
    """Activations [M, K], as many as there are copies of the weights, and those weights."""

    x: Sequence[torch.Tensor]
    weights: Weights

    def gemm(self, **arguments: Any) -> list[Call]:
        """bf16 activations, packed weights."""
        return [functools.partial(fp4gemm.gemm, x, w, **arguments) for x, w in self._with(self.weights.packed)]

    def packed_gemm(self) -> list[Call]:
        """Both operands packed."""
        return [functools.partial(fp4gemm.gemm, fp4gemm.quantize(x), w) for x, w in self._with(self.weights.packed)]

    def quantize_gemm(self, outer_scale: torch.Tensor | None) -> list[Call]:
        """Activations quantized on the way, by the amax of each row or with the given outer scale."""
        call = functools.partial(fp4gemm.quantize_gemm, outer_scale=outer_scale)
        return [functools.partial(call, x, w) for x, w in self._with(self.weights.packed)]

    def cublas(self) -> list[Call]:
        """`x @ w.T` into an output of its own for each input, as the other side's outputs are."""
        return [functools.partial(torch.mm, x, w.t(), out=_output(x, w)) for x, w in self._with(self.weights.bf16)]

    def dequantize_cublas(self) -> list[Call]:
        """What runs where no kernel takes NVFP4: the weight to bf16 scratch, then cuBLAS."""
        return [functools.partial(_dequantize_mm, x, w, _output(x, w)) for x, w in self._with(self.weights.nvfp4)]

    def humming(self) -> list[Call]:
        """bf16 activations, NVFP4 weights; no call where humming is not installed or does not take the shape."""
        return [w.call(x) for x, w in zip(self.x, self.weights.humming, strict=False)]

    def _with(self, weights: Sequence[_W]) -> Iterator[tuple[torch.Tensor, _W]]:
        return zip(self.x, weights, strict=True)


def make_problem(M: int, weights: Weights) -> Problem:
    """Random activations [M, K] for these weights."""
    return Problem(random_inputs(len(weights.bf16), M, weights.exact.shape[1]), weights)


def _output(x: torch.Tensor, w: torch.Tensor | FP4Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _dequantize_mm(x: torch.Tensor, w: FP4Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, fp4gemm.dequantize(w, x.dtype).t(), out=out)


# --- against float64 --------------------------------------------------------------------------------------------------


def exact_values(t: FP4Tensor) -> torch.Tensor:
    """float64 values: code · block scale is exact in float32, the product with the outer scale is taken in float64."""
    scaled = reference.dequantize(t, torch.float32, outer=False).double()
    return scaled * t.outer_scale.double().reshape(-1, 1)


def rel_error(D: object, a: torch.Tensor | FP4Tensor, weights: Weights, bias: torch.Tensor | None = None) -> float:
    """||D - A Bᵀ - bias|| / ||A Bᵀ + bias|| in float64 over evenly spaced rows of D, what the first call returned.

    Raises RuntimeError where it is not finite: no file could hold such a row.
    """
    if not isinstance(D, torch.Tensor):
        raise TypeError(f"D: expected a tensor, got {type(D).__name__}")
    step = max(1, D.shape[0] // _SAMPLED_ROWS)
    values = exact_values(a) if isinstance(a, FP4Tensor) else a.double()
    exact = values[::step] @ weights.exact.t()
    exact = exact if bias is None else exact + bias.double()
    error = float((D[::step].double() - exact).norm() / exact.norm())
    if not math.isfinite(error):
        raise RuntimeError(f"D is not finite: relative error {error}")
    return error
