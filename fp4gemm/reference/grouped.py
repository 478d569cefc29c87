"""Grouped GEMM in torch: a loop over experts. The one place that checks its arguments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fp4gemm.grouped import MAX_EXPERTS, GroupedWeight
from fp4gemm.reference.arguments import check_float
from fp4gemm.reference.matmul import gemm
from fp4gemm.reference.product_arguments import ACTIVATIONS, check_output
from fp4gemm.tensor import FP4Batch, FP4Tensor


def check_grouped(
    x: FP4Tensor | Tensor, w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype | None, c: Tensor | None = None, out: Tensor | None = None, tokens: int | None = None,
) -> torch.dtype:  # fmt: skip
    """Checks x [T, K], offsets [E + 1], bias [E, N], c and out [T, N] of ``gemm_grouped``; returns the dtype of D.

    Raises TypeError or ValueError. Values of ``offsets`` are not read.
    """
    if not isinstance(x, (FP4Tensor, Tensor)) or (isinstance(x, Tensor) and x.dtype not in ACTIVATIONS):
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected an FP4Tensor, or a bf16 or fp16 tensor, got {got}")
    check_weight(w)
    if len(x.shape) != 2 or x.shape[1] != w.k:
        raise ValueError(f"x: expected shape [T, K] with K = {w.k} (that of w, shape {w.shape}), got {tuple(x.shape)}")
    if x.device != w.device:
        raise ValueError(f"w: expected device {x.device} (that of x), got {w.device}")
    check_rest(w, offsets, bias, out_dtype, tokens)
    dtype = out_dtype or (torch.bfloat16 if isinstance(x, FP4Tensor) else x.dtype)
    if isinstance(out, Tensor):
        dtype = out_dtype or out.dtype
    for name, t in (("out", out), ("c", c)):
        if t is not None:
            check_output(name, t, (x.shape[0], w.rows), dtype, x.device)
    if out is not None and out.stride(1) != 1 and out.numel() > 1:
        raise ValueError(f"out: expected contiguous rows, got strides {out.stride()}")
    return dtype


def check_weight(w: GroupedWeight | FP4Batch) -> None:
    """Raises TypeError unless ``w`` is a GroupedWeight or an FP4Batch, ValueError where that has too many members."""
    if not isinstance(w, (GroupedWeight, FP4Batch)):
        raise TypeError(
            f"w: expected a GroupedWeight, as stack_weights makes it, or an FP4Batch, got {type(w).__name__}"
        )
    if w.shape[0] > MAX_EXPERTS:
        raise ValueError(f"w: expected at most {MAX_EXPERTS} experts, got {w.shape[0]}")


def check_rest(
    w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, tokens: int | None
) -> None:
    """What all grouped calls have beside x and w. Raises TypeError or ValueError."""
    for name, t, shape in (("offsets", offsets, (w.shape[0] + 1,)), ("bias", bias, w.shape[:2])):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)} (w has shape {w.shape}), got {list(t.shape)}")
        if t.device != w.device:
            raise ValueError(f"{name}: expected device {w.device} (that of w), got {t.device}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected dtype torch.int64, got {offsets.dtype}")
    if bias is not None:
        check_float("bias.dtype", bias.dtype)
    if out_dtype is not None:
        check_float("out_dtype", out_dtype)
    if tokens is not None and not (isinstance(tokens, int) and tokens >= 1):
        raise ValueError(f"tokens: expected None or an int >= 1, got {tokens!r}")


def members(offsets: Tensor, total: int) -> list[slice]:
    """The rows of each expert. Raises ValueError unless offsets do not decrease and lie in 0..total."""
    ends: list[int] = offsets.tolist()
    if ends[0] < 0 or ends[-1] > total or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"offsets: expected values that do not decrease, from 0 to T = {total}, got {ends}")
    return [slice(a, b) for a, b in pairwise(ends)]


@torch.no_grad()
def gemm_grouped(
    x: FP4Tensor | Tensor, w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None, *, c: Tensor | None = None, beta: float = 1.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``reference.gemm`` of the rows of each expert; see ``fp4gemm.gemm_grouped``. Rows of no expert are 0 without
    ``out``."""
    dtype = check_grouped(x, w, offsets, bias, out_dtype, c, out)
    x = x.unpack() if isinstance(x, FP4Tensor) else x
    d = x_tensor(x).new_zeros((x.shape[0], w.rows), dtype=dtype) if out is None else out
    for e, rows in enumerate(members(offsets, x.shape[0])):
        bias_e, c_e = (None if bias is None else bias[e]), (None if c is None else c[rows])
        d[rows] = gemm(take_rows(x, rows), expert(w, e), bias_e, dtype, c=c_e, beta=beta)
    return d


def expert(w: GroupedWeight | FP4Batch, index: int) -> FP4Tensor:
    return w[index] if isinstance(w, FP4Batch) else w.expert(index)


def x_tensor(x: FP4Tensor | Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else x.data


def take_rows(x: FP4Tensor | Tensor, rows: slice) -> FP4Tensor | Tensor:
    """These rows of activations that are not prepacked."""
    if isinstance(x, Tensor):
        return x[rows]
    outer = x.outer_scale[rows] if x.outer_scale.dim() else x.outer_scale
    scales = x.linear_block_scale()[rows].contiguous()
    return FP4Tensor(x.data[rows], scales, outer, (rows.stop - rows.start, x.k), "linear")
