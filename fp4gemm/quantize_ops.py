"""The quantizers among the public operators; see ``ops``, from where they are imported.

A custom op passes plain tensors and names: ``_flat`` takes checked arguments apart, ``_arguments`` puts them together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fp4gemm import calls, reference, tile_calls
from fp4gemm.dispatch import direct, on_its_device, on_kernels
from fp4gemm.formats import BLOCK, PLAIN, QuantizeOptions, padded_k, scale_layout
from fp4gemm.reference.arguments import (
    QuantizeArguments,
    check_amax,
    check_finite_values,
    check_out,
    check_quantize,
    check_quantize_both,
    check_rmsnorm,
)
from fp4gemm.reference.quantize import quantize_checked, write
from fp4gemm.tensor import FP4Tensor, unchecked
from fp4gemm.tile_calls import Parts

_T = TypeVar("_T")


def quantize(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | None = None,
    check_finite: bool = False,
    transposed: bool = False,
    hadamard: int | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
    residual: int = 0,
    residual_side: str = "activation",
    channel_order: Tensor | None = None,
    amax: Tensor | None = None,
    producer: str | None = None,
    noop: Tensor | None = None,
    out: FP4Tensor | None = None,
) -> FP4Tensor:
    """Quantize ``x`` [M, K] (bf16, fp16, fp32 or e4m3, any strides) to NVFP4; bytes are the same on every device.

    docs/numerics.md describes every option to the bit, and the results for NaN and Inf.

    Args:
        scaling: ``per_row``, ``per_tensor``, or ``per_column``, which is ``per_row`` with ``transposed``.
        sf_layout: layout of the block scales: ``128x4``, ``8x4`` or ``linear``.
        convention: whose arithmetic; default ``te`` for ``per_tensor``, else ``te_per_token``.
        block: (1, 16), or (16, 16) for one block scale for 16 x 16 values (weights; needs a single outer scale).
        outer_scale: float32 decode multiplier, [], [1] or [rows of the result], in place of the amax: calibration.
        check_finite: raise for NaN and Inf; waits for the device.
        transposed: the result is the FP4Tensor of the transpose, [K, M].
        hadamard: transform 16 values at a time along K of the result first, which must be transposed and becomes [K,
            ceil16(M)]; a mask of 16 signs, 0..65535 (recipes take 0xACE1). Cancels where both operands have it.
        seed: round stochastically. An int 0..2**63-1, or an int64 tensor [] or [1] that the device reads.
        adaptive: ``mse`` or ``mae``: 4/6, each block scale takes the better of two (``te``, ``te_per_token``; not with
            hadamard, seed or residual).
        residual: KE, a multiple of 16 as K is then: each of the last KE/16 blocks of a row gets a companion, and the
            result K + KE columns (``te``, ``te_per_token``; 1 x 16 blocks; not with hadamard).
        residual_side: companions hold the error of their block (``activation``) or repeat it (``weight``).
        channel_order: int64 or int32 [K], a permutation: columns are put into this order first (only with residual).
        amax: float32, [], [1] or [rows of the result]: what :func:`amax` returned, so that x is read only once here.
        producer: what makes the quantized values of x, rounded to its dtype: ``silu_mul`` of [M, 2 K], gate and up,
            ``gelu_tanh`` or ``relu2`` (bf16, fp16, fp32; not transposed, nor with 16 x 16 blocks or channel_order).
        noop: bool, uint8, int32 or float32 tensor, [] or [1]: where it is nonzero, ``out`` stays as it is. The device
            reads it, so a captured graph can skip the work. Needs ``out``.
        out: an FP4Tensor of the shape, layout and outer scales of the result to write into; it is returned.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, a name or a device does not fit; the message says which argument.
        NotImplementedError: ``x`` is on a CUDA device for which there is no kernel.
    """
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, block=block, outer_scale=outer_scale,
        transposed=transposed, hadamard=hadamard, seed=seed, adaptive=adaptive, residual=residual,
        residual_side=residual_side, channel_order=channel_order, amax=amax, producer=producer,
    )  # fmt: skip
    if out is not None or noop is not None:
        check_out(args, out, noop)
    if check_finite:
        check_finite_values(x, args.outer_scale, args.amax)
    at_once = direct(x, args.outer_scale, args.amax)
    if out is None:
        if at_once:
            return unchecked(FP4Tensor, run(args), args.shape, sf_layout)
        data, block_scale, outer = torch.ops.fp4gemm.quantize(*_flat(args))
        return FP4Tensor(data, block_scale, outer, args.shape, sf_layout)
    if at_once:
        run_into(out, args, noop)
    else:
        torch.ops.fp4gemm.quantize_out(out.data, out.block_scale, out.outer_scale, noop, *_flat(args))
    return out


def quantize_rmsnorm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    outer_scale: Tensor | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
) -> tuple[FP4Tensor, Tensor]:
    """The FP4Tensor of RMSNorm(h) * weight, h = x + residual, and h: [M, K] both, in one launch.

    Bit for bit ``quantize`` of what ``reference.rmsnorm`` makes, which rounds h and the normalized rows to the dtype of
    ``x``; docs/numerics.md has the order of the sums.

    Args:
        x: [M, K], bf16, fp16 or fp32; ``weight`` [K] and ``residual`` [M, K] have its dtype.
        eps: added to the mean square of a row.
        residual: None: h is ``x`` itself.

    The other arguments, and what is raised, are those of :func:`quantize`.
    """
    check_rmsnorm(x, weight, eps, residual)
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, outer_scale=outer_scale, seed=seed,
        adaptive=adaptive,
    )  # fmt: skip
    if args.source is not x:
        raise ValueError(f"scaling: expected per_row or per_tensor, as rows are what is normalized, got {scaling!r}")
    if direct(x, weight, residual, args.outer_scale):
        parts = run_rmsnorm(args, weight, eps, residual)
    else:
        parts = torch.ops.fp4gemm.quantize_rmsnorm(weight, eps, residual, *_flat(args))
    data, block_scale, outer, h = parts
    return FP4Tensor(data, block_scale, outer, args.shape, sf_layout), x if residual is None else h


def quantize_both(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    transposed_sf_layout: str | None = None,
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | tuple[Tensor, Tensor] | None = None,
    hadamard: int | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
    amax: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[FP4Tensor, FP4Tensor]:
    """The FP4Tensors of ``x`` [M, K] and of its transpose [K, M], as a training step needs them.

    Bit for bit ``quantize(x, ...)`` and ``quantize(x, transposed=True, hadamard=hadamard, ...)``, with ``hadamard`` for
    the transposed one alone.

    Args:
        scaling: ``per_row``: an outer scale for each row of each result; ``per_tensor``: one for each result.
        transposed_sf_layout: that of the transposed result, default ``sf_layout``.
        outer_scale: float32 [] or [1] for both, or a pair, each [], [1] or [rows of its result].
        amax: the same, of amaxes that :func:`amax` returned, in place of ``outer_scale``.

    The other arguments, and what is raised, are those of :func:`quantize`.
    """
    rows, columns = check_quantize_both(
        x, scaling=scaling, sf_layout=sf_layout, transposed_sf_layout=transposed_sf_layout, convention=convention,
        block=block, outer_scale=outer_scale, hadamard=hadamard, seed=seed, adaptive=adaptive, amax=amax,
    )  # fmt: skip
    if direct(x, rows.outer_scale, columns.outer_scale, rows.amax, columns.amax):
        parts = run_both(rows, columns)
    else:
        parts = torch.ops.fp4gemm.quantize_both(*_flat_both(rows, columns))
    row_data, row_scales, row_outer, column_data, column_scales, column_outer = parts
    return (
        FP4Tensor(row_data, row_scales, row_outer, rows.shape, rows.sf_layout),
        FP4Tensor(column_data, column_scales, column_outer, columns.shape, columns.sf_layout),
    )


def amax(
    x: Tensor,
    *,
    rows: bool = True,
    columns: bool = False,
    tensor: bool = False,
    hadamard: int | None = None,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Largest magnitudes of ``x`` [M, K] (bf16, fp16, fp32 or e4m3), float32; NaN counts as 0.

    A tuple of those asked for, in this order: rows [M], columns [K], tensor []. ``hadamard``: columns are transformed
    16 values at a time first, as :func:`quantize` does for a transposed result. Passed to ``quantize(amax=)`` these are
    the first half of its two: the same bytes. ``sums``: behind them the sums of columns [K], which the transform does
    not touch: of dY, the gradient of a bias. They are float32 sums in an order of the device's, the same in each run.
    Raises TypeError or ValueError that names the argument.
    """
    check_amax(x, columns, hadamard)
    implementation = _amax if direct(x) else torch.ops.fp4gemm.amax
    return tuple(implementation(x, rows, columns, tensor, hadamard, sums))


def run(args: QuantizeArguments) -> Parts:
    """Data, block scales and outer scales of checked arguments."""
    x = args.source
    if _has_kernels(args):
        made: Parts = on_its_device(x, _run_tiles if _by_tiles(args) else _run_rows, args, None, None)
        return made
    t = quantize_checked(args)
    return t.data, t.block_scale, t.outer_scale


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
    x = rows.source
    if not _has_kernels(rows) or rows.options.adaptive or rows.per_tensor != columns.per_tensor:
        return *run(rows), *run(columns)
    both = on_its_device(x, _run_both_tiles, rows, columns)
    return *both[0], *both[1]


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
    return o.hadamard is not None or _is_transposed(args.source) or args.block[0] == BLOCK


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


def _flat_seed(seed: Tensor | int | None) -> tuple[Tensor | None, int | None]:
    return (seed, None) if isinstance(seed, Tensor) else (None, seed)


def _flat(args: QuantizeArguments) -> tuple[Any, ...]:
    """Checked arguments as a custom op passes them."""
    o = args.options
    return (
        args.source, args.per_tensor, args.sf_layout, args.convention, args.block[0], args.outer_scale, args.amax,
        o.hadamard, *_flat_seed(args.seed), o.adaptive, o.residual, o.residual_side, args.channel_order,
        o.producer,
    )  # fmt: skip


def _arguments(
    x: Tensor, per_tensor: bool, sf_layout: str, convention: str, block_rows: int, outer_scale: Tensor | None,
    amax: Tensor | None = None, hadamard: int | None = None, seed: Tensor | None = None,
    seed_value: int | None = None, adaptive: str | None = None, residual: int = 0, residual_side: str = "activation",
    channel_order: Tensor | None = None, producer: str | None = None,
) -> QuantizeArguments:  # fmt: skip
    """Inverse of ``_flat``."""
    either = seed_value if seed is None else seed
    options = QuantizeOptions(hadamard, either is not None, adaptive, residual, residual_side, producer)
    return QuantizeArguments(
        x, per_tensor, sf_layout, convention, (block_rows, BLOCK), outer_scale, amax,
        PLAIN if options == PLAIN else options, either, channel_order,
    )  # fmt: skip


# What ``_arguments`` takes, of which a caller of the operator may leave out the end.
_SCHEMA = (
    "Tensor x, bool per_tensor, str sf_layout, str convention, SymInt block_rows, Tensor? outer_scale, "
    "Tensor? amax=None, SymInt? hadamard=None, Tensor? seed=None, SymInt? seed_value=None, str? adaptive=None, "
    'SymInt residual=0, str residual_side="activation", Tensor? channel_order=None, str? producer=None'
)


def _quantize(*flat: Any) -> Parts:
    return run(_arguments(*flat))


def _quantize_out(data: Tensor, block_scale: Tensor, outer: Tensor, noop: Tensor | None, *flat: Any) -> None:
    args = _arguments(*flat)
    run_into(FP4Tensor(data, block_scale, outer, args.shape, args.sf_layout), args, noop)


def _fake_quantize(*flat: Any) -> Parts:
    return _empty_parts(_arguments(*flat))


def _empty_parts(args: QuantizeArguments) -> Parts:
    x, (m, k) = args.source, args.shape
    return (
        x.new_empty((m, padded_k(k) // 2), dtype=torch.uint8),
        x.new_empty(scale_layout(args.sf_layout).shape(m, k), dtype=torch.float8_e4m3fn),
        x.new_empty(() if args.per_tensor else (m,), dtype=torch.float32),
    )


def _quantize_rmsnorm(weight: Tensor, eps: float, residual: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    return run_rmsnorm(_arguments(*flat), weight, eps, residual)


def _fake_quantize_rmsnorm(weight: Tensor, eps: float, residual: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    args = _arguments(*flat)
    return *_empty_parts(args), args.source.new_empty(0 if residual is None else args.shape)


def _flat_both(rows: QuantizeArguments, columns: QuantizeArguments) -> tuple[Any, ...]:
    """The arguments of both results as a custom op passes them."""
    return (
        rows.source, rows.per_tensor, columns.per_tensor, rows.sf_layout, columns.sf_layout, rows.convention,
        rows.block[0], rows.outer_scale, columns.outer_scale, rows.amax, columns.amax, columns.options.hadamard,
        *_flat_seed(rows.seed), rows.options.adaptive,
    )  # fmt: skip


def _both_arguments(
    x: Tensor, per_tensor: bool, transposed_per_tensor: bool, sf_layout: str, transposed_sf_layout: str,
    convention: str, block_rows: int, outer_scale: Tensor | None, transposed_outer_scale: Tensor | None,
    amax: Tensor | None, transposed_amax: Tensor | None, hadamard: int | None, seed: Tensor | None,
    seed_value: int | None, adaptive: str | None,
) -> tuple[QuantizeArguments, QuantizeArguments]:  # fmt: skip
    """Inverse of ``_flat_both``."""
    shared = seed, seed_value, adaptive
    rows = _arguments(x, per_tensor, sf_layout, convention, block_rows, outer_scale, amax, None, *shared)
    columns = _arguments(
        x.t(), transposed_per_tensor, transposed_sf_layout, convention, block_rows, transposed_outer_scale,
        transposed_amax, hadamard, *shared,
    )  # fmt: skip
    return rows, columns


_SCHEMA_BOTH = (
    "Tensor x, bool per_tensor, bool transposed_per_tensor, str sf_layout, str transposed_sf_layout, "
    "str convention, SymInt block_rows, Tensor? outer_scale, Tensor? transposed_outer_scale, "
    "Tensor? amax, Tensor? transposed_amax, SymInt? hadamard, Tensor? seed, SymInt? seed_value, str? adaptive"
)


def _quantize_both(*flat: Any) -> tuple[Tensor, ...]:
    return run_both(*_both_arguments(*flat))


def _fake_quantize_both(*flat: Any) -> tuple[Tensor, ...]:
    rows, columns = _both_arguments(*flat)
    return *_empty_parts(rows), *_empty_parts(columns)


def _amax(x: Tensor, rows: bool, columns: bool, tensor: bool, hadamard: int | None, sums: bool = False) -> list[Tensor]:
    if not on_kernels(x):
        return list(reference.amax(x, rows=rows, columns=columns, tensor=tensor, hadamard=hadamard, sums=sums))

    def found() -> list[Tensor]:
        return tile_calls.amax(x, rows=rows, columns=columns, tensor=tensor, hadamard=hadamard, sums=sums)

    return on_its_device(x, found)


def _separate_amax(*args: Any) -> list[Tensor]:
    """What an operator may return: tensors that share no memory."""
    return [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in _amax(*args)]


def _fake_amax(
    x: Tensor, rows: bool, columns: bool, tensor: bool, hadamard: int | None, sums: bool = False
) -> list[Tensor]:
    by_column = x.shape[1:]
    asked = ((rows, x.shape[:1]), (columns, by_column), (tensor, ()), (sums, by_column))
    shapes = [shape for wanted, shape in asked if wanted]
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


_SCHEMA_AMAX = "(Tensor x, bool rows, bool columns, bool tensor, SymInt? hadamard, bool sums=False) -> Tensor[]"

for _name, _implementation, _fake, _schema in (
    ("quantize", _quantize, _fake_quantize, f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)"),
    ("quantize_both", _quantize_both, _fake_quantize_both, f"({_SCHEMA_BOTH}) -> ({', '.join(['Tensor'] * 6)})"),
    (
        "quantize_rmsnorm",
        _quantize_rmsnorm,
        _fake_quantize_rmsnorm,
        f"(Tensor weight, float eps, Tensor? residual, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    ("amax", _separate_amax, _fake_amax, _SCHEMA_AMAX),
):
    _op = torch.library.custom_op(f"fp4gemm::{_name}", _implementation, mutates_args=(), schema=_schema)
    _op.register_fake(_fake)
torch.library.custom_op(  # returns nothing: needs no fake
    "fp4gemm::quantize_out",
    _quantize_out,
    mutates_args=("data", "block_scale", "outer"),
    schema=f"(Tensor(a!) data, Tensor(b!) block_scale, Tensor(c!) outer, Tensor? noop, {_SCHEMA}) -> ()",
)
