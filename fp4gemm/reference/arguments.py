"""What the calls accept: the one place that checks arguments, for the reference and for the kernels.

Nothing here reads tensor data (fake tensors pass), except :func:`check_finite_values`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4gemm.formats import BLOCK, CONVENTIONS, SCALINGS, scale_layout
from fp4gemm.tensor import FP4Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = (torch.bfloat16, torch.float16)
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))


@dataclass(frozen=True)
class QuantizeArguments:
    """Checked arguments of ``quantize``.

    ``source`` is x, or a view of its transpose for ``per_column``; ``outer_scale`` is None, [] or [rows of source].
    """

    source: Tensor
    per_tensor: bool
    sf_layout: str
    convention: str
    block: tuple[int, int]
    outer_scale: Tensor | None


def check_quantize(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | None = None,
) -> QuantizeArguments:
    """Checks and resolves the arguments of ``quantize``. Raises TypeError or ValueError that names the argument."""
    _check_matrix(x)
    _check_name("scaling", scaling, SCALINGS)
    if convention is None:
        convention = "te" if scaling == "per_tensor" else "te_per_token"
    _check_name("convention", convention, CONVENTIONS)
    scale_layout(sf_layout)
    block = _check_block(block)
    source = x.t() if scaling == "per_column" else x
    if outer_scale is not None:
        outer_scale = _resolve_outer_scale(outer_scale, source, scaling)
    per_tensor = scaling == "per_tensor" if outer_scale is None else outer_scale.dim() == 0
    if block == (BLOCK, BLOCK) and not per_tensor:
        raise ValueError(
            f"block: (16, 16) needs one outer scale for the whole tensor (scaling='per_tensor', or a scalar "
            f"outer_scale), got scaling={scaling!r}"
        )
    return QuantizeArguments(source, per_tensor, sf_layout, convention, block, outer_scale)


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
    if out_dtype is not None:
        check_float("out_dtype", out_dtype)
    dtype = out_dtype or (torch.bfloat16 if isinstance(a, FP4Tensor) else a.dtype)
    if out is not None:
        dtype = out_dtype or out.dtype if isinstance(out, Tensor) else dtype
        _check_output("out", out, (a.shape[0], b.rows), dtype, a.device)
        if 1 not in out.stride() and out.numel() > 1:
            raise ValueError(f"out: expected contiguous rows or columns, got strides {out.stride()}")
    if c is not None:
        _check_output("c", c, (a.shape[0], b.rows), dtype, a.device)
    if bias is not None:
        _check_bias(bias, b.rows, a.device)
    return dtype


def _check_output(name: str, t: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    check_float(f"{name}.dtype", t.dtype)
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of D), got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} (that of a), got {t.device}")


def check_quantize_gemm(x: Tensor, w: FP4Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> None:
    """Checks x [..., K], the weight w [N, K] and bias [N] of ``quantize_gemm``. Raises TypeError or ValueError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if not isinstance(w, FP4Tensor):
        raise TypeError(f"w: expected an FP4Tensor, got {type(w).__name__}")
    if x.dim() < 2 or x.shape[-1] != w.k:
        raise ValueError(
            f"x: expected [..., K] with K = {w.k} (that of w, shape {w.shape}), got shape {tuple(x.shape)}"
        )
    if x.device != w.device:
        raise ValueError(f"w: expected device {x.device} (that of x), got {w.device}")
    if out_dtype is not None:
        check_float("out_dtype", out_dtype)
    if bias is not None:
        _check_bias(bias, w.rows, x.device)


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless ``dtype`` is bfloat16, float16 or float32."""
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {dtype}")


def check_finite_values(x: Tensor, outer_scale: Tensor | None) -> None:
    """Raises ValueError when ``x`` holds NaN or Inf, or ``outer_scale`` these or a negative value.

    Reads data: on a GPU this waits for the stream.
    """
    for name, values in (("x", x), ("outer_scale", outer_scale)):
        if values is not None and (count := int((~values.isfinite()).sum())):
            raise ValueError(f"{name}: expected finite values (check_finite=True), got {count} NaN or Inf")
    if outer_scale is not None and bool((outer_scale < 0).any()):
        raise ValueError(f"outer_scale: expected values >= 0 (check_finite=True), got {float(outer_scale.min())}")


def _check_matrix(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    check_float("x.dtype", x.dtype)
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions [M, K], got shape {tuple(x.shape)}")


def _check_name(argument: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")


def _check_block(block: tuple[int, int]) -> tuple[int, int]:
    for known in BLOCKS:
        if tuple(block) == known:
            return known
    raise ValueError(f"block: expected {' or '.join(map(str, BLOCKS))}, got {tuple(block)}")


def _resolve_outer_scale(outer: Tensor, source: Tensor, scaling: str) -> Tensor:
    """[] when one scale covers the tensor, else [rows]. Its shape decides; [1] is [rows] only when there is one row."""
    if not isinstance(outer, Tensor):
        raise TypeError(f"outer_scale: expected a torch.Tensor, got {type(outer).__name__}")
    if outer.dtype != torch.float32:
        raise TypeError(f"outer_scale: expected dtype torch.float32, got {outer.dtype}")
    if outer.device != source.device:
        raise ValueError(f"outer_scale: expected device {source.device} (that of x), got {outer.device}")
    rows = source.shape[0]
    shape = tuple(outer.shape)
    if scaling != "per_tensor" and shape == (rows,):
        return outer.contiguous()
    if shape in ((), (1,)):
        return outer.reshape(())
    expected = "[] or [1]" if scaling == "per_tensor" else f"[], [1] or [{rows}]"
    raise ValueError(f"outer_scale: expected shape {expected} for scaling={scaling!r}, got {list(shape)}")


def _check_bias(bias: Tensor, columns: int, device: torch.device) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a torch.Tensor or None, got {type(bias).__name__}")
    check_float("bias.dtype", bias.dtype)
    if tuple(bias.shape) != (columns,):
        raise ValueError(f"bias: expected shape [{columns}] (rows of b), got {list(bias.shape)}")
    if bias.device != device:
        raise ValueError(f"bias: expected device {device} (that of a), got {bias.device}")
