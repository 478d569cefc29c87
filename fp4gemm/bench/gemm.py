"""GEMM of two packed operands and quantize_gemm, against cuBLAS bf16."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import fp4gemm
from fp4gemm import reference
from fp4gemm.bench import kernels, timing
from fp4gemm.bench.common import ARCH, Config, Job, nbytes, random_inputs
from fp4gemm.report import Row
from fp4gemm.tensor import FP4Tensor

SHAPES = (
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (1024, 8192, 8192),
    (16, 8192, 8192),
    (1, 8192, 8192),
)  # fmt: skip
QUICK_SHAPES = ((4096, 4096, 4096), (16, 8192, 8192))
_SAMPLED_ROWS = 64  # rows of D that are checked against float64


@dataclass(frozen=True)
class Problem:
    """Rotated inputs of one shape: bf16 activations and weights, and both of them quantized."""

    x: Sequence[torch.Tensor]
    w: Sequence[torch.Tensor]
    a4: Sequence[FP4Tensor]
    b4: Sequence[FP4Tensor]

    def cublas(self) -> list[timing.Call]:
        """`x @ w.T` into an output of its own for each input, as the other side's outputs are."""
        outs = [x.new_empty(x.shape[0], w.shape[0]) for x, w in zip(self.x, self.w, strict=True)]
        return [functools.partial(torch.mm, x, w.t(), out=out) for x, w, out in zip(self.x, self.w, outs, strict=True)]

    def calls(self, op: str) -> list[timing.Call]:
        """The calls of "gemm" (both operands packed) or "quantize_gemm" (bf16 activations)."""
        if op == "gemm":
            return [functools.partial(fp4gemm.gemm, a, b) for a, b in zip(self.a4, self.b4, strict=True)]
        return [functools.partial(fp4gemm.quantize_gemm, x, b) for x, b in zip(self.x, self.b4, strict=True)]


def make_problem(M: int, N: int, K: int) -> Problem:
    """As many copies as make the *packed* weights, the smallest large operand, exceed twice the L2."""
    first = fp4gemm.quantize(random_inputs(1, N, K)[0])
    count = timing.rotation(nbytes(first))
    x, w = random_inputs(count, M, K), random_inputs(count, N, K)
    return Problem(x, w, [fp4gemm.quantize(t) for t in x], [fp4gemm.quantize(t) for t in w])


def rel_error(D: torch.Tensor, a: FP4Tensor, b: FP4Tensor) -> float:
    """||D - A Bᵀ|| / ||A Bᵀ|| in float64 over evenly spaced rows, A and B being the exact values of the operands."""
    step = max(1, D.shape[0] // _SAMPLED_ROWS)
    exact = _exact(a)[::step] @ _exact(b).t()
    return float((D[::step].double() - exact).norm() / exact.norm())


def _exact(t: FP4Tensor) -> torch.Tensor:
    """float64 values: code · block scale is exact in float32, the product with the outer scale is taken in float64."""
    scaled = reference.dequantize(t, torch.float32, outer=False).double()
    return scaled * t.outer_scale.double().reshape(-1, 1)


def jobs(config: Config) -> Iterator[Job]:
    """Both operations at every shape, in both modes."""
    for M, N, K in QUICK_SHAPES if config.quick else SHAPES:
        yield Job(f"gemm {M}x{N}x{K}", functools.partial(_rows, M, N, K, config))


def _rows(M: int, N: int, K: int, config: Config) -> list[Row]:
    problem = make_problem(M, N, K)
    error = {op: rel_error(_first(problem, op), problem.a4[0], problem.b4[0]) for op in ("gemm", "quantize_gemm")}
    rows = []
    for mode in timing.MODES:
        candidates = {op: problem.calls(op) for op in error} | {"cublas_bf16": problem.cublas()}
        us = timing.compare(candidates, mode, config.repeats)
        rows += [_row(op, (M, N, K), mode, us[op], us["cublas_bf16"], error[op]) for op in error]
    return rows


def _first(problem: Problem, op: str) -> torch.Tensor:
    result = problem.calls(op)[0]()
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{op}: expected a tensor, got {type(result).__name__}")
    return result


def _row(op: str, shape: tuple[int, int, int], mode: str, us: float, cublas_us: float, error: float) -> Row:
    M, N, K = shape
    return {
        "bench": "gemm",
        "op": op,
        "arch": ARCH,
        "layout": "tn",
        "M": M,
        "N": N,
        "K": K,
        "a": "nvfp4" if op == "gemm" else "bf16",
        "b": "nvfp4",
        "epilogue": "rowcol",
        "mode": mode,
        "kernel": kernels.gemm_name(M, N),
        "us": us,
        "tflop_s": 2 * M * N * K / us / 1e6,
        "ratio": cublas_us / us,
        "vs_us": {"cublas_bf16": cublas_us},
        "rel_error": error,
    }
