"""What products accept: checked here for the reference and for the kernels. Nothing here reads tensor data."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm.reference.arguments import check_float
from fp4gemm.reference.options import check_columns
from fp4gemm.tensor import FP4Batch, FP4Tensor

ACTIVATIONS = (torch.bfloat16, torch.float16)


def check_gemm(
    a: FP4Tensor | Tensor,
    b: FP4Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    c: Tensor | None,
    out: Tensor | None,
) -> torch.dtype:
    """Checks the operands a [M, K], b [N, K], bias [N], c and out [M, N] of ``gemm``; returns the dtype of D.

    Raises TypeError or ValueError.
    """
    if not isinstance(a, (FP4Tensor, Tensor)):
        raise TypeError(f"a: expected an FP4Tensor, or a bf16 or fp16 tensor, got {type(a).__name__}")
    if isinstance(a, Tensor) and a.dtype not in ACTIVATIONS:
        raise TypeError(f"a: expected an FP4Tensor, or a bf16 or fp16 tensor, got dtype {a.dtype}")
    if not isinstance(b, FP4Tensor):
        raise TypeError(f"b: expected an FP4Tensor, got {type(b).__name__}")
    if len(a.shape) != 2 or a.shape[1] != b.k:
        raise ValueError(f"a: expected shape [M, K] with K = {b.k} (that of b, shape {b.shape}), got {tuple(a.shape)}")
    if a.device != b.device:
        raise ValueError(f"b: expected device {a.device} (that of a), got {b.device}")
    dtype = torch.bfloat16 if isinstance(a, FP4Tensor) else a.dtype
    return _check_terms((a.shape[0], b.rows), a.device, dtype, bias, out_dtype, c, out)


def check_bmm(
    a: FP4Batch,
    b: FP4Batch,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    c: Tensor | None,
    out: Tensor | None,
) -> torch.dtype:
    """Checks the operands a [L, M, K], b [L, N, K], bias [N] or [L, N], c and out [L, M, N] of ``bmm``; returns the
    dtype of D.

    Raises TypeError or ValueError.
    """
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, FP4Batch):
            raise TypeError(f"{name}: expected an FP4Batch, got {type(t).__name__}")
    if (len(a), a.k) != (len(b), b.k):
        raise ValueError(
            f"a: expected shape [L, M, K] with L = {len(b)}, K = {b.k} (those of b, shape {b.shape}), got {a.shape}"
        )
    if a.device != b.device:
        raise ValueError(f"b: expected device {a.device} (that of a), got {b.device}")
    return _check_terms((len(a), a.rows, b.rows), a.device, torch.bfloat16, bias, out_dtype, c, out)


def check_quantize_gemm(
    x: Tensor,
    w: FP4Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    residual: int = 0,
    producer: str | None = None,
) -> None:
    """Checks x [..., K], or [..., 2 K] for ``silu_mul``, the weight w [N, K + residual] and bias [N] of
    ``quantize_gemm``.

    Raises TypeError or ValueError.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if not isinstance(w, FP4Tensor):
        raise TypeError(f"w: expected an FP4Tensor, got {type(w).__name__}")
    check_float("x.dtype", x.dtype)
    if residual != 0:
        check_columns(residual)
    if residual > w.k:
        raise ValueError(f"residual: expected at most K of w, shape {w.shape}, got {residual}")
    columns = (w.k - residual) * (2 if producer == "silu_mul" else 1)
    if x.dim() < 2:
        raise ValueError(f"x: expected at least 2 dimensions [..., K], got shape {tuple(x.shape)}")
    if x.shape[-1] != columns:
        less = f" less the residual {residual}" if residual else ""
        twice = ", twice for silu_mul" if producer == "silu_mul" else ""
        raise ValueError(
            f"x: expected [..., K] with K = {columns} (that of w, shape {w.shape}{less}{twice}), "
            f"got shape {tuple(x.shape)}"
        )
    if x.device != w.device:
        raise ValueError(f"w: expected device {x.device} (that of x), got {w.device}")
    if out_dtype is not None:
        check_float("out_dtype", out_dtype)
    if bias is not None:
        _check_bias(bias, w.rows, x.device)


def check_output(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises TypeError or ValueError unless ``t`` can be the ``out`` or the ``c`` of such a product."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    check_float(f"{name}.dtype", t.dtype)
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of D), got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} (that of a), got {t.device}")


def _check_terms(
    shape: tuple[int, ...], device: torch.device, default: torch.dtype, bias: Tensor | None,
    out_dtype: torch.dtype | None, c: Tensor | None, out: Tensor | None,
) -> torch.dtype:  # fmt: skip
    """Checks what a GEMM of D [..., M, N] takes beside its operands; returns the dtype of D."""
    if out_dtype is not None:
        check_float("out_dtype", out_dtype)
    dtype = out_dtype or default
    if out is not None:
        dtype = out_dtype or out.dtype if isinstance(out, Tensor) else dtype
        check_output("out", out, shape, dtype, device)
        if 1 not in out.stride()[-2:] and out.numel() > 1:
            raise ValueError(f"out: expected contiguous rows or columns, got strides {out.stride()}")
    if c is not None:
        check_output("c", c, shape, dtype, device)
    if bias is not None:
        _check_bias(bias, shape[-1], device, shape[:-2])
    return dtype


def _check_bias(bias: Tensor, columns: int, device: torch.device, members: tuple[int, ...] = ()) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a torch.Tensor or None, got {type(bias).__name__}")
    check_float("bias.dtype", bias.dtype)
    shape = tuple(bias.shape)
    if shape != (columns,) and shape != (*members, columns):
        own = f" or {[*members, columns]}" if members else ""
        raise ValueError(f"bias: expected shape [{columns}]{own} (rows of b), got {list(bias.shape)}")
    if bias.device != device:
        raise ValueError(f"bias: expected device {device} (that of a), got {bias.device}")
