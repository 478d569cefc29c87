"""Which kernels quantize, or the reference where there are none: for arguments that are checked."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fp4gemm import calls, reference, select, tile_calls
from fp4gemm.dispatch import on_its_device, on_kernels
from fp4gemm.formats import BLOCK, LEFT, PREPACKED, RIGHT, VALUES
from fp4gemm.reference.arguments import QuantizeArguments
from fp4gemm.reference.quantize import quantize_checked, write
from fp4gemm.tensor import FP4Tensor
from fp4gemm.tile_calls import Parts

_T = TypeVar("_T")


def run(args: QuantizeArguments) -> Parts:
    """Data, block scales and outer scales of checked arguments."""
    x, args = args.source, resolved(args)
    if _has_kernels(args):
        made: Parts = on_its_device(x, _run_tiles if _by_tiles(args) else _run_rows, args, None, None)
        return made
    if args.sf_layout in (VALUES, PREPACKED):
        return reference.quantize_operand(args)
    t = quantize_checked(args)
    return t.data, t.block_scale, t.outer_scale


def resolved(args: QuantizeArguments) -> QuantizeArguments:
    """``args`` with what LEFT and RIGHT stand for on their device."""
    if args.sf_layout not in (LEFT, RIGHT):
        return args
    device, form = args.source.device, VALUES if args.sf_layout == LEFT else PREPACKED
    real = device.type == "cuda" and torch.cuda.is_available()  # a fake tensor's may be on another machine
    return args._replace(sf_layout=form if real and select.arch_of(device.index) == "sm_90a" else "128x4")


def run_into(out: FP4Tensor, args: QuantizeArguments, noop: Tensor | None) -> None:
    """The same, written into ``out`` where ``noop`` is None or zero."""
    parts = out.data, out.block_scale, out.outer_scale
    if _has_kernels(args) and tile_calls.can_write(*parts):
        on_its_device(args.source, _run_tiles if _by_tiles(args) else _run_rows, args, parts, noop)
    else:
        write(out, FP4Tensor(*run(args), args.shape, args.sf_layout), noop)


def run_rmsnorm(
    args: QuantizeArguments, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data, block scales and outer scales of the norm of the source, and the sum, empty without a residual."""
    x = args.source
    producer = "rmsnorm" if residual is None else "add_rmsnorm"
    options = replace(args.options, producer=producer)
    scaling = "given" if args.outer_scale is not None else "per_tensor" if args.per_tensor else "per_row"
    key = (x.dtype, x.shape[1], scaling, args.convention, args.sf_layout, options)
    if on_kernels(x) and calls.can_quantize(x.device.index, *key):
        h = x.new_empty(0 if residual is None else x.shape)
        norm = calls.Norm(weight, residual, None if residual is None else h, eps)
        return *on_its_device(x, _run_rows, args._replace(options=options), None, None, norm), h
    normalized, h = reference.rmsnorm(x, weight, eps, residual)
    return *run(args._replace(source=normalized)), x.new_empty(0) if residual is None else h


def run_both(rows: QuantizeArguments, columns: QuantizeArguments) -> tuple[Tensor, ...]:
    """The three of each result."""
    x, rows, columns = rows.source, resolved(rows), resolved(columns)
    if not _has_kernels(rows) or rows.options.adaptive or rows.per_tensor != columns.per_tensor:
        return *run(rows), *run(columns)
    both = on_its_device(x, _run_both_tiles, rows, columns)
    return *both[0], *both[1]


def run_amax(
    x: Tensor, rows: bool, columns: bool, tensor: bool, hadamard: int | None, sums: bool = False
) -> list[Tensor]:
    """Those asked for of rows, columns, the tensor, and the sums of columns."""
    if not on_kernels(x):
        return list(reference.amax(x, rows=rows, columns=columns, tensor=tensor, hadamard=hadamard, sums=sums))

    def found() -> list[Tensor]:
        return tile_calls.amax(x, rows=rows, columns=columns, tensor=tensor, hadamard=hadamard, sums=sums)

    return on_its_device(x, found)


def _has_kernels(args: QuantizeArguments) -> bool:
    """Whether kernels make this result: all but 4/6 of 16 x 16 blocks, for which the reference runs on the device."""
    return on_kernels(args.source) and not (args.options.adaptive and args.block[0] == BLOCK)


def _is_transposed(x: Tensor) -> bool:
    """Whether columns are what is contiguous."""
    return x.stride(0) == 1 and x.stride(1) != 1


def _by_tiles(args: QuantizeArguments) -> bool:
    """Whether the tile kernel makes this result: a transposed one, or one of 16 x 16 blocks.

    It has neither 4/6 nor companions nor producers: the row kernel quantizes a copy then.
    """
    o = args.options
    if o.adaptive is not None or o.residual or o.producer is not None:
        return False
    as_tiles = args.block[0] == BLOCK or args.sf_layout in (VALUES, PREPACKED)
    return as_tiles or o.hadamard is not None or _is_transposed(args.source)


def _run_rows(
    args: QuantizeArguments, into: Parts | None, noop: Tensor | None, norm: calls.Norm | None = None
) -> Parts:
    out = None if into is None else calls.Packed(*into, args.sf_layout)
    return calls.quantize(
        args.source, args.per_tensor, args.sf_layout, args.convention, args.outer_scale, args.amax, args.options,
        args.seed, args.channel_order, noop, out, norm,
    )[:3]  # fmt: skip


def _run_tiles(args: QuantizeArguments, into: Parts | None, noop: Tensor | None) -> Parts:
    o = args.options
    by_column = o.hadamard is not None or _is_transposed(args.source)

    def placed(value: _T) -> tuple[_T | None, _T | None]:
        return (None, value) if by_column else (value, None)

    result = tile_calls.quantize(
        args.source.t() if by_column else args.source, placed(args.sf_layout), per_tensor=args.per_tensor,
        convention=args.convention, square=args.block[0] == BLOCK,
        outer_scales=None if args.outer_scale is None else placed(args.outer_scale),
        amaxes=None if args.amax is None else placed(args.amax),
        hadamard=o.hadamard, seed=args.seed, noop=noop, into=placed(into),
    )[by_column]  # fmt: skip
    assert result is not None
    return result.parts


def _run_both_tiles(rows: QuantizeArguments, columns: QuantizeArguments) -> tuple[Parts, Parts]:
    by_row, by_column = tile_calls.quantize(
        rows.source, (rows.sf_layout, columns.sf_layout), per_tensor=rows.per_tensor, convention=rows.convention,
        square=rows.block[0] == BLOCK,
        outer_scales=None if rows.outer_scale is None else (rows.outer_scale, columns.outer_scale),
        amaxes=None if rows.amax is None else (rows.amax, columns.amax),
        hadamard=columns.options.hadamard, seed=rows.seed,
    )  # fmt: skip
    assert by_row is not None
    assert by_column is not None
    return by_row.parts, by_column.parts
