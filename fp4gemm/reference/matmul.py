"""GEMM of two NVFP4 operands in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4gemm.reference.arguments import check_gemm
from fp4gemm.reference.quantize import dequantize

if TYPE_CHECKING:
    from torch import Tensor

    from fp4gemm.tensor import FP4Tensor


@torch.no_grad()
def gemm(a: FP4Tensor, b: FP4Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """D[M, N] = a [M, K] times the transpose of b [N, K], plus bias [N]; bias is bfloat16, float16 or float32.

    ``D[i, j] = cast(outer_a[i] * (outer_b[j] * acc) + bias[j])``: float32, every operation rounded on its own, one
    rounding to ``out_dtype`` (bfloat16, float16 or float32). Products in acc are exact; only their float32 sum rounds.

    Raises:
        TypeError: an operand is not an FP4Tensor, or a dtype is not one of the above.
        ValueError: K, the shape of bias or the devices do not match.
    """
    check_gemm(a, b, bias, out_dtype)
    # Operands are exact in bfloat16, so a float32 product that torch is allowed to take through TF32 is exact too.
    acc = dequantize(a, outer=False) @ dequantize(b, outer=False).t()
    out = (acc * b.outer_scale.reshape(1, -1)) * a.outer_scale.reshape(-1, 1)
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)
