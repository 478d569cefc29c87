"""GEMM of two NVFP4 operands in torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from fp4gemm.reference.activation import activate, check_activation
from fp4gemm.reference.product_arguments import check_bmm, check_gemm
from fp4gemm.reference.quantize import dequantize

if TYPE_CHECKING:
    from torch import Tensor

    from fp4gemm.tensor import FP4Batch, FP4Tensor


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Where torch.autocast is on it would round a product."""
    available = torch.amp.is_autocast_available(device_type)  # not on meta
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


@torch.no_grad()
def gemm(
    a: FP4Tensor | Tensor,
    b: FP4Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    c: Tensor | None = None,
    beta: float = 1.0,
    activation: str | None = None,
) -> Tensor:
    """D[M, N] = a [M, K] times the transpose of b [N, K], plus bias [N], plus beta * c [M, N]; see ``fp4gemm.gemm``.

    ``D[i, j] = cast(activation(outer_a[i] * (outer_b[j] * acc) + bias[j] + beta * c[i, j]))``: float32,
    every operation rounded on its own, one rounding to ``out_dtype``; a plain ``a`` has no outer_a. Products in acc are
    exact where a is NVFP4; only their float32 sum rounds.

    Raises:
        TypeError: an operand is not of the accepted types, or a dtype is not one of the above.
        ValueError: K, the shape of bias or c, or the devices do not match, or the activation is unknown.
    """
    dtype = check_gemm(a, b, bias, out_dtype, c, None)
    check_activation(activation)
    # Operands are exact in bfloat16 or float16, so a float32 product that torch is allowed to take through TF32, whose
    # significand holds both, is exact too.
    left = a.float() if isinstance(a, torch.Tensor) else dequantize(a, outer=False)
    with _without_autocast(left.device.type):
        out = (left @ dequantize(b, outer=False).t()) * b.outer_scale.reshape(1, -1)
    if not isinstance(a, torch.Tensor):
        out = out * a.outer_scale.reshape(-1, 1)
    if bias is not None:
        out = out + bias.float()
    if c is not None:
        out = out + c.float() * beta
    return activate(activation, out).to(dtype)


def bmm(
    a: FP4Batch,
    b: FP4Batch,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    c: Tensor | None = None,
    beta: float = 1.0,
    activation: str | None = None,
) -> Tensor:
    """D [L, M, N] of a [L, M, K] and b [L, N, K]: :func:`gemm` of each pair of members, bias [N] or [L, N]; see
    ``fp4gemm.bmm``. Raises what :func:`gemm` raises."""
    dtype = check_bmm(a, b, bias, out_dtype, c, None)
    out = a.data.new_empty((len(a), a.rows, b.rows), dtype=dtype)
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        own_bias = bias if bias is None or bias.dim() == 1 else bias[i]
        own_c = None if c is None else c[i]
        out[i] = gemm(left, right, own_bias, dtype, c=own_c, beta=beta, activation=activation)
    return out
