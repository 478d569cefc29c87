"""Public searches for block scales, beside which ours is measured where they are installed.

``pip install nvidia-modelopt qwantize``. Model Optimizer's takes one outer scale for the tensor and returns block
amaxes; qwantize's has none (its scales are e4m3 numbers themselves). Both get their own input formats ready made: what
is timed is the search. Ties go other ways there (Model Optimizer divides, qwantize rounds ties to zero), so choices are
compared by the error that they leave, in float64.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fp4gemm.bench.timing import Call
from fp4gemm.formats import BLOCK, decode_e2m1
from fp4gemm.reference.rounding import encode_e2m1

MODELOPT, QWANTIZE = "modelopt", "qwantize"  # in a row's vs_us
DISTRIBUTIONS = ("nvidia-modelopt", "qwantize")


@dataclass(frozen=True)
class Peer:
    """``calls`` on rotated weights; ``outer``: the decode multiplier that it searches under, ``scales`` [N, K/16] of
    the first weight, as multiples of it."""

    calls: list[Call]
    outer: torch.Tensor
    scales: torch.Tensor


def find(ws: Sequence[torch.Tensor], metric: str, hessian: torch.Tensor) -> dict[str, Peer]:
    """The peers that are installed, with their calls on bf16 weights [N, K]."""
    found = {}
    if importlib.util.find_spec("modelopt"):
        found[MODELOPT] = _modelopt(ws, metric, hessian)
    if importlib.util.find_spec("qwantize"):
        found[QWANTIZE] = _qwantize(ws, metric, hessian)
    return found


def _modelopt(ws: Sequence[torch.Tensor], metric: str, hessian: torch.Tensor) -> Peer:
    module = importlib.import_module("modelopt.torch.kernels.quantization.gemm.nvfp4_fp8_sweep")
    amaxes = [w.abs().amax().float() for w in ws]
    blocks = [w.reshape(-1, BLOCK) for w in ws]
    if metric == "sse":
        calls: list[Call] = [
            functools.partial(module.nvfp4_fp8_scale_sweep, x, amax)
            for x, amax in zip(blocks, amaxes, strict=True)
        ]  # fmt: skip
    else:
        calls = [
            functools.partial(module.nvfp4_fp8_scale_sweep_hessian, x, amax, hessian)
            for x, amax in zip(blocks, amaxes, strict=True)
        ]
    best: Any = calls[0]()
    scales = (best.float() * (448 / amaxes[0])).reshape(ws[0].shape[0], -1)
    return Peer(calls, amaxes[0] / 2688, scales)


def _qwantize(ws: Sequence[torch.Tensor], metric: str, hessian: torch.Tensor) -> Peer:
    """Its kernels, which its functions wrap in conversions and a division that take longer than they do."""
    module = importlib.import_module("qwantize.nvfp4.kernels")
    table = module.build_fp8_e4m3_scales(device=ws[0].device)
    units = ws[0].numel() // BLOCK
    out = torch.empty(units * BLOCK, dtype=torch.float32, device=ws[0].device)
    found = torch.empty(units, dtype=torch.float32, device=ws[0].device)
    inputs = [w.float().reshape(-1, BLOCK) for w in ws]

    def call(x: torch.Tensor) -> torch.Tensor:
        sizes = {"BLOCK_SIZE": BLOCK, "NUM_SCALES": table.shape[0]}
        if metric == "sse":
            module.nvfp4_optimal_kernel[(units,)](x, table, out, found, units, BLOCK, 1, **sizes)
        else:
            columns = hessian.shape[0]
            module.nvfp4_optimal_hessian_kernel[(units,)](
                x, table, hessian, out, found, units, columns, BLOCK, 1, **sizes
            )
        return found

    scales = call(inputs[0]).clone().reshape(ws[0].shape[0], -1)
    calls: list[Call] = [functools.partial(call, x) for x in inputs]
    return Peer(calls, torch.ones((), device=ws[0].device), scales)


def errors(
    w: torch.Tensor, scales: torch.Tensor, outer: torch.Tensor, hessian: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """float64 [rows, K/16]: the error of the first rows under these scales, in units of w."""
    x = w[:rows].double().reshape(rows, -1, BLOCK)
    step = (scales[:rows].double() * outer.double()).unsqueeze(-1)
    d = decode_e2m1(encode_e2m1((x / step).float())).double() * step - x
    if hessian is None:
        return d.square().sum(-1)
    return torch.einsum("rbi,bij,rbj->rb", d, hessian.double(), d)
