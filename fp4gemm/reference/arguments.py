"""What calls that quantize accept: the one place that checks arguments, for the reference and for the kernels
(product_arguments has those of products).

Nothing here reads tensor data (fake tensors pass), except :func:`check_finite_values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fp4gemm.formats import BLOCK, CONVENTIONS, PLAIN, SCALINGS, QuantizeOptions, padded_k, scale_layout
from fp4gemm.reference.options import (
    check_mask,
    check_name,
    check_options,
    check_producer,
    check_residual,
    check_scalar,
    check_seed,
)
from fp4gemm.tensor import FP4Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZABLE = (*FLOATS, torch.float8_e4m3fn)
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))
FLAGS = (torch.bool, torch.uint8, torch.int32, torch.float32)


class QuantizeArguments(NamedTuple):
    """Checked arguments of ``quantize``.

    ``source`` is x, or a view of its transpose for a transposed result; ``outer_scale`` and ``amax`` (one of them at
    the most) are None, [] or [rows of source]; ``seed`` is there where ``options`` say stochastic.
    """

    source: Tensor
    per_tensor: bool
    sf_layout: str
    convention: str
    block: tuple[int, int]
    outer_scale: Tensor | None
    amax: Tensor | None = None
    options: QuantizeOptions = PLAIN
    seed: Tensor | int | None = None
    channel_order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the result: a transformed tail is a whole block, companions add columns."""
        (m, k), options = self.source.shape, self.options
        if options is PLAIN:
            return m, k
        k = options.columns(k)
        return m, (k if options.hadamard is None else padded_k(k)) + options.residual


def check_quantize(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | None = None,
    transposed: bool = False,
    hadamard: int | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
    residual: int = 0,
    residual_side: str = "activation",
    channel_order: Tensor | None = None,
    amax: Tensor | None = None,
    producer: str | None = None,
) -> QuantizeArguments:
    """Checks and resolves the arguments of ``quantize``. Raises TypeError or ValueError that names the argument."""
    _check_matrix(x)
    check_name("scaling", scaling, SCALINGS)
    if convention is None:
        convention = "te" if scaling == "per_tensor" else "te_per_token"
    check_name("convention", convention, CONVENTIONS)
    scale_layout(sf_layout)
    block = _check_block(block)
    transposed = transposed or scaling == "per_column"
    source = x.t() if transposed else x
    per_tensor = scaling == "per_tensor"
    if outer_scale is not None:
        outer_scale = _resolve_outer("outer_scale", outer_scale, source, scaling)
        per_tensor = outer_scale.dim() == 0
    if amax is not None:
        if outer_scale is not None:
            raise ValueError("amax: expected None where outer_scale is given, which takes its place, got a tensor")
        amax = _resolve_outer("amax", amax, source, scaling)
        per_tensor = amax.dim() == 0
    if block == (BLOCK, BLOCK) and not per_tensor:
        raise ValueError(
            f"block: (16, 16) needs one outer scale for the whole tensor (scaling='per_tensor', or a scalar "
            f"outer_scale), got scaling={scaling!r}"
        )
    options = PLAIN
    if (
        hadamard is not None
        or seed is not None
        or adaptive is not None
        or residual != 0
        or residual_side != "activation"
        or channel_order is not None
        or producer is not None
    ):
        options = QuantizeOptions(hadamard, seed is not None, adaptive, residual, residual_side, producer)
        check_options(options, convention, block, transposed)
        check_producer(options, x, block, transposed, channel_order)
        check_seed(seed, source.device)
        check_residual(options, source, channel_order)
    return QuantizeArguments(
        source, per_tensor, sf_layout, convention, block, outer_scale, amax, options, seed, channel_order
    )


def check_out(args: QuantizeArguments, out: FP4Tensor | None, noop: Tensor | None) -> None:
    """Checks ``out`` and ``noop`` of ``quantize`` against its other arguments. Raises TypeError or ValueError."""
    if out is None:
        if noop is not None:
            raise ValueError("noop: expected None where out is None: a call that may do nothing needs a result to keep")
        return
    if not isinstance(out, FP4Tensor):
        raise TypeError(f"out: expected an FP4Tensor or None, got {type(out).__name__}")
    if out.prepacked is not None:
        raise ValueError(f"out: expected a tensor that is not prepacked, got prepacked={out.prepacked!r}")
    if tuple(out.shape) != args.shape:
        raise ValueError(f"out: expected shape {args.shape}, got {tuple(out.shape)}")
    if out.sf_layout != args.sf_layout:
        raise ValueError(f"out: expected sf_layout {args.sf_layout!r}, got {out.sf_layout!r}")
    outer = () if args.per_tensor else (args.shape[0],)
    if tuple(out.outer_scale.shape) != outer:
        raise ValueError(f"out: expected outer scales of shape {list(outer)}, got {list(out.outer_scale.shape)}")
    if out.device != args.source.device:
        raise ValueError(f"out: expected device {args.source.device} (that of x), got {out.device}")
    if noop is not None:
        check_scalar("noop", noop, FLAGS, args.source.device)


def check_quantize_both(
    x: Tensor,
    *,
    scaling: str,
    sf_layout: str,
    transposed_sf_layout: str | None,
    convention: str | None,
    block: tuple[int, int],
    outer_scale: Tensor | tuple[Tensor, Tensor] | None,
    hadamard: int | None,
    seed: Tensor | int | None,
    adaptive: str | None,
    amax: Tensor | tuple[Tensor, Tensor] | None,
) -> tuple[QuantizeArguments, QuantizeArguments]:
    """The arguments of the row-wise and of the transposed result of ``quantize_both``, checked and resolved.

    Raises TypeError or ValueError that names the argument.
    """
    check_name("scaling", scaling, SCALINGS[:2])
    outer_rows, outer_columns = _pair("outer_scale", outer_scale)
    amax_rows, amax_columns = _pair("amax", amax)
    shared = {"scaling": scaling, "convention": convention, "block": block, "seed": seed, "adaptive": adaptive}
    rows = check_quantize(x, sf_layout=sf_layout, outer_scale=outer_rows, amax=amax_rows, **shared)  # type: ignore[arg-type]
    columns = check_quantize(
        x,
        transposed=True,
        sf_layout=transposed_sf_layout or sf_layout,
        outer_scale=outer_columns,
        amax=amax_columns,
        hadamard=hadamard,
        **shared,  # type: ignore[arg-type]
    )
    return rows, columns


def check_amax(x: Tensor, columns: bool, hadamard: int | None) -> None:
    """Checks the arguments of ``amax``. Raises TypeError or ValueError."""
    _check_matrix(x)
    if hadamard is not None:
        check_mask(hadamard)
        if not columns:
            raise ValueError(f"hadamard: needs columns=True, as only columns are transformed, got {hadamard}")


def check_quantize_batch(x: Tensor, scaling: str, outer_scale: Tensor | None) -> Tensor | None:
    """Checks what ``quantize_batch`` does not leave to ``quantize``; returns the outer scale, [L] or [L, M]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[0] < 1:
        raise ValueError(f"x: expected 3 dimensions [L, M, K], L >= 1, got shape {tuple(x.shape)}")
    check_name("scaling", scaling, SCALINGS[:2])
    if outer_scale is None:
        return None
    return check_batch_scale(outer_scale, x.shape[: 2 if scaling == "per_row" else 1], x.device)


def check_batch_scale(outer: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """The ``outer_scale`` that results of a batch are given: [L] or of ``shape`` ([L] or [L, M]).

    Raises TypeError or ValueError.
    """
    if not isinstance(outer, Tensor):
        raise TypeError(f"outer_scale: expected a torch.Tensor, got {type(outer).__name__}")
    if outer.dtype != torch.float32:
        raise TypeError(f"outer_scale: expected dtype torch.float32, got {outer.dtype}")
    if outer.device != device:
        raise ValueError(f"outer_scale: expected device {device}, got {outer.device}")
    got = tuple(outer.shape)
    if got != tuple(shape) and got != tuple(shape[:1]):  # torch.compile takes no "in" for sizes
        expected = " or ".join(f"{[*shape[:count]]}" for count in range(1, len(shape) + 1))
        raise ValueError(f"outer_scale: expected shape {expected}, got {list(outer.shape)}")
    return outer.contiguous()


def check_rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    """Checks x and the residual [M, K], and the weight [K], of ``quantize_rmsnorm``. Raises TypeError or ValueError."""
    _check_matrix(x)
    check_float("x.dtype", x.dtype)
    for name, t, shape in (("weight", weight, x.shape[1:]), ("residual", residual, x.shape)):
        if t is None and name == "residual":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: expected dtype {x.dtype} (that of x), got {t.dtype}")
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (that of x), got {t.device}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless ``dtype`` is bfloat16, float16 or float32."""
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {dtype}")


def check_finite_values(x: Tensor, outer_scale: Tensor | None, amax: Tensor | None = None) -> None:
    """Raises ValueError when ``x`` holds NaN or Inf, or ``outer_scale`` or ``amax`` these or a negative value.

    Reads data: on a GPU this waits for the stream.
    """
    for name, values in (("x", x), ("outer_scale", outer_scale), ("amax", amax)):
        if values is None:
            continue
        values = values.float() if values.dtype == torch.float8_e4m3fn else values
        if count := int((~values.isfinite()).sum()):
            raise ValueError(f"{name}: expected finite values (check_finite=True), got {count} NaN or Inf")
        if name != "x" and bool((values < 0).any()):
            raise ValueError(f"{name}: expected values >= 0 (check_finite=True), got {float(values.min())}")


def _check_matrix(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in QUANTIZABLE:
        raise TypeError(f"x.dtype: expected one of {', '.join(map(str, QUANTIZABLE))}, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions [M, K], got shape {tuple(x.shape)}")


def _check_block(block: tuple[int, int]) -> tuple[int, int]:
    for known in BLOCKS:
        if isinstance(block, (tuple, list)) and tuple(block) == known:
            return known
    raise ValueError(f"block: expected {' or '.join(map(str, BLOCKS))}, got {block}")


def check_output_scale(outer: Tensor, rows: int, device: torch.device) -> Tensor:
    """The ``outer_scale`` that an NVFP4 result [rows, N] on ``device`` is given: [] or [rows].

    Raises TypeError or ValueError.
    """
    return _resolve_outer("outer_scale", outer, torch.empty((rows, 0), device=device), "per_row")


def _resolve_outer(name: str, outer: Tensor, source: Tensor, scaling: str) -> Tensor:
    """[] when one scale covers the tensor, else [rows]. Its shape decides; [1] is [rows] only when there is one row."""
    if not isinstance(outer, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(outer).__name__}")
    if outer.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {outer.dtype}")
    if outer.device != source.device:
        raise ValueError(f"{name}: expected device {source.device} (that of x), got {outer.device}")
    rows = source.shape[0]
    shape = tuple(outer.shape)
    if scaling != "per_tensor" and shape == (rows,):
        return outer.contiguous()
    if shape == ():
        return outer
    if shape == (1,):
        return outer.reshape(())
    expected = "[] or [1]" if scaling == "per_tensor" else f"[], [1] or [{rows}]"
    raise ValueError(f"{name}: expected shape {expected} for scaling={scaling!r}, got {list(shape)}")


def _pair(name: str, given: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """For the row-wise and for the transposed result."""
    if given is None:
        return None, None
    if isinstance(given, Tensor):
        if tuple(given.shape) not in ((), (1,)):
            raise ValueError(f"{name}: expected shape [] or [1], or a pair (rows, columns), got {list(given.shape)}")
        return given.reshape(()), given.reshape(())
    if isinstance(given, (tuple, list)) and len(given) == 2:
        return given[0], given[1]
    raise TypeError(f"{name}: expected a torch.Tensor, a pair of them (rows, columns) or None, got {given!r}")
