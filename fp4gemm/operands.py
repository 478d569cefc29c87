"""Operands of products, quantized to what GEMMs of their device read.

On Hopper these are values, code * block scale in bf16, on the left and the prepacked form on the right, which the
quantizer of both ways then writes itself: NVFP4 would be read again, by one more kernel. Elsewhere they are NVFP4.
A product has the same bits either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp4gemm.dispatch import direct
from fp4gemm.engine import Activations
from fp4gemm.formats import BLOCK, LEFT, PREPACKED
from fp4gemm.quantize_dispatch import run
from fp4gemm.quantize_library import flat
from fp4gemm.quantize_ops import quantize, run_or_call_both
from fp4gemm.reference.arguments import check_quantize, check_quantize_both
from fp4gemm.tensor import FP4Tensor

Operand = FP4Tensor | Activations
"""What :func:`fp4gemm.ops.product` takes; a RIGHT one is an FP4Tensor."""

_LAYOUT = "128x4"  # the default of quantizers


def quantize_operands(
    x: Tensor, rows: bool, columns: bool, *, scaling: str, block: tuple[int, int] = (1, BLOCK),
    hadamard: int | None = None, seed: Tensor | None = None, amax: tuple[Tensor | None, Tensor | None] = (None, None),
    sides: tuple[str, str] = (LEFT, LEFT),
) -> tuple[Operand | None, Operand | None]:  # fmt: skip
    """x [M, K] and its transpose, where they are asked for, from one pass; arguments are those of ``quantize_both``.

    ``sides``: of a product on which either stands, LEFT or RIGHT; a RIGHT one is an FP4Tensor. x alone, without its
    transpose, is always NVFP4.
    """
    if not columns:
        t = quantize(x, scaling=scaling, block=block, seed=seed, amax=amax[0]) if rows else None
        return t, None
    given: dict[str, Any] = {"scaling": scaling, "block": block, "hadamard": hadamard, "seed": seed}
    if not rows:
        alone = check_quantize(x, transposed=True, amax=amax[1], **given)._replace(sf_layout=sides[1])
        parts = run(alone) if direct(x, amax[1]) else torch.ops.fp4gemm.quantize(*flat(alone))
        return None, _operand(parts, alone.shape)
    by_row, by_column = check_quantize_both(
        x, sf_layout=_LAYOUT, transposed_sf_layout=None, convention=None, outer_scale=None, adaptive=None,
        amax=None if amax[0] is None or amax[1] is None else (amax[0], amax[1]),
        **given,
    )  # fmt: skip
    by_row, by_column = by_row._replace(sf_layout=sides[0]), by_column._replace(sf_layout=sides[1])
    parts = run_or_call_both(by_row, by_column)
    return _operand(parts[:3], by_row.shape), _operand(parts[3:], by_column.shape)


def _operand(parts: Sequence[Tensor], shape: tuple[int, int]) -> Operand:
    data, block_scale, outer = parts
    if data.dtype == torch.bfloat16:
        return Activations(data, outer)
    return FP4Tensor(data, block_scale, outer, shape, _LAYOUT, PREPACKED if data.dim() == 3 else None)
