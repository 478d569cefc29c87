"""Left operands of products that follow at once, quantized to what GEMMs of their device multiply.

On Hopper that is values, code * block scale in bf16, which the quantizer then writes itself: NVFP4 would be read again,
to make them, by one more kernel. Elsewhere it is NVFP4. A product of either has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp4gemm.dispatch import direct
from fp4gemm.engine import Activations
from fp4gemm.formats import BLOCK, OPERAND
from fp4gemm.quantize_dispatch import run
from fp4gemm.quantize_library import flat
from fp4gemm.quantize_ops import quantize, run_or_call_both
from fp4gemm.reference.arguments import check_quantize, check_quantize_both
from fp4gemm.tensor import FP4Tensor

Operand = FP4Tensor | Activations
"""What :func:`fp4gemm.ops.product` takes."""

_LAYOUT = "128x4"


def quantize_operands(
    x: Tensor, rows: bool, columns: bool, *, scaling: str, hadamard: int | None = None, seed: Tensor | None = None,
    amax: tuple[Tensor | None, Tensor | None] = (None, None), keep_transpose: bool = False,
) -> tuple[Operand | None, Operand | None]:  # fmt: skip
    """x [M, K] and its transpose, where they are asked for, from one pass; arguments are those of ``quantize_both``.

    ``keep_transpose``: the transpose waits for a product of its own, and is an FP4Tensor.
    """
    if not columns:
        return (quantize(x, scaling=scaling, sf_layout=_LAYOUT, seed=seed, amax=amax[0]) if rows else None), None
    waiting = _LAYOUT if keep_transpose else OPERAND
    given: dict[str, Any] = {"scaling": scaling, "sf_layout": _LAYOUT, "hadamard": hadamard, "seed": seed}
    if not rows:
        alone = check_quantize(x, transposed=True, amax=amax[1], **given)._replace(sf_layout=waiting)
        parts = run(alone) if direct(x, amax[1]) else torch.ops.fp4gemm.quantize(*flat(alone))
        return None, _operand(parts, alone.shape)
    by_row, by_column = check_quantize_both(
        x, transposed_sf_layout=_LAYOUT, convention=None, block=(1, BLOCK), outer_scale=None, adaptive=None,
        amax=None if amax[0] is None or amax[1] is None else (amax[0], amax[1]),
        **given,
    )  # fmt: skip
    by_row, by_column = by_row._replace(sf_layout=OPERAND), by_column._replace(sf_layout=waiting)
    parts = run_or_call_both(by_row, by_column)
    return _operand(parts[:3], by_row.shape), _operand(parts[3:], by_column.shape)


def _operand(parts: Sequence[Tensor], shape: tuple[int, int]) -> Operand:
    data, block_scale, outer = parts
    if data.dtype == torch.bfloat16:
        return Activations(data, outer)
    return FP4Tensor(data, block_scale, outer, shape, _LAYOUT)
