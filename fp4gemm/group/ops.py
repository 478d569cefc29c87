"""``quantize_grouped``: checks, and the way to the kernels or to the reference."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fp4gemm.dispatch import direct, on_its_device
from fp4gemm.group import calls
from fp4gemm.group.arguments import (
    Group,
    GroupedArguments,
    check_gradient,
    check_group,
    check_quantize_grouped,
)
from fp4gemm.group.shape import GroupShape
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.reference import group as reference
from fp4gemm.reference.group import GroupedResults


class _Options(TypedDict, total=False):
    members: int | None
    first_dims: Tensor | None
    last_dims: Tensor | None
    offsets: Tensor | None
    rows: int | None
    bounds: tuple[int, int] | None
    scaling: str
    shared: bool
    sf_layout: str
    transposed_sf_layout: str | None
    convention: str | None
    transposed: bool
    hadamard: int | None
    seed: Tensor | int | None
    outer_scale: Tensor | tuple[Tensor, Tensor] | None
    amax: Tensor | tuple[Tensor, Tensor] | None
    gradient: str | None
    h: Tensor | None
    check_dims: bool


@overload
def quantize_grouped(
    x: Tensor, *, both: Literal[False] = ..., dbias: Literal[False] = ..., **options: Unpack[_Options]
) -> GroupedFP4Tensor: ...
@overload
def quantize_grouped(
    x: Tensor, *, both: Literal[True], dbias: Literal[False] = ..., **options: Unpack[_Options]
) -> tuple[GroupedFP4Tensor, GroupedFP4Tensor]: ...
@overload
def quantize_grouped(
    x: Tensor, *, both: Literal[False] = ..., dbias: Literal[True], **options: Unpack[_Options]
) -> tuple[GroupedFP4Tensor, Tensor]: ...
@overload
def quantize_grouped(
    x: Tensor, *, both: Literal[True], dbias: Literal[True], **options: Unpack[_Options]
) -> tuple[GroupedFP4Tensor, GroupedFP4Tensor, Tensor]: ...
def quantize_grouped(
    x: Tensor,
    *,
    members: int | None = None,
    first_dims: Tensor | None = None,
    last_dims: Tensor | None = None,
    offsets: Tensor | None = None,
    rows: int | None = None,
    bounds: tuple[int, int] | None = None,
    scaling: str = "per_row",
    shared: bool = False,
    sf_layout: str = "128x4",
    transposed_sf_layout: str | None = None,
    convention: str | None = None,
    transposed: bool = False,
    both: bool = False,
    hadamard: int | None = None,
    seed: Tensor | int | None = None,
    outer_scale: Tensor | tuple[Tensor, Tensor] | None = None,
    amax: Tensor | tuple[Tensor, Tensor] | None = None,
    gradient: str | None = None,
    h: Tensor | None = None,
    dbias: bool = False,
    check_dims: bool = False,
) -> Any:
    """Quantize E matrices, the members of a group that ``x`` holds one after another, in one launch or two.

    Each member becomes, byte for byte, what :func:`fp4gemm.quantize` makes of it alone. Sizes are read by the device: a
    captured graph can be replayed with others. docs/grouped.md has the arithmetic of offsets and bounds.

    Args:
        x: contiguous, bf16, fp16, fp32 or e4m3. Members of one shape: [E * M, K] or [E, M, K]. Where rows vary:
            [T, K]; where columns do: [elements].
        members: E; needed for [E * M, K], else that of the other arguments.
        first_dims: int64 [E] on the device of x: rows of each member.
        last_dims: the same for columns, multiples of 16.
        offsets: int64 [E + 1], places in the first dimension of x (rows of [T, K]) where members begin, and the end;
            default: without gaps. Multiples of 16 bytes. Where rows vary and without first_dims, all rows in between.
        rows: those of each member where only columns vary.
        bounds: at most so many rows and columns of all members together, where both vary: what results have room for.
            Default: (elements / 16, elements).
        scaling: ``per_row``, or ``per_tensor``: an amax for each member.
        shared: one amax for all members (``per_tensor``).
        transposed: the result is that of the transposes [k_i, m_i]. ``both``: a pair, of the members and of these.
        hadamard: transform the transposes first, as :func:`fp4gemm.quantize` does.
        seed: round stochastically; member i has the seed (seed + i * 0x9E3779B97F4A7C15) mod 2**63.
        outer_scale: float32 decode multipliers, in place of amaxes: [] or [E], or [lines] of all members for
            ``per_row``; for ``both`` a tensor for both results, or a pair. ``amax``: the same, of amaxes.
        gradient: ``relu``, ``relu2``, ``silu``, ``gelu_tanh`` or ``quick_gelu``: x is the gradient of what this
            activation returned; x times its derivative at ``h``, rounded to the dtype of x, is quantized (not e4m3).
        h: the input of that activation, of the shape and dtype of x.
        dbias: also return the sums over rows of each member, of what is quantized: float32 [E, K], or [columns of all].
        check_dims: read sizes on the host, which waits for the device, and raise for what does not fit.

    sf_layout, transposed_sf_layout and convention are those of :func:`fp4gemm.quantize_both`.

    Returns:
        A GroupedFP4Tensor; a tuple of (rows, transposes) and the sums where these are asked for. A member whose sizes
        or place do not fit x and the bounds is left out, and says so when it is asked for.

    Raises:
        TypeError: a dtype or the type of an argument does not fit.
        ValueError: a shape, a name or a device does not fit, rows do not divide, or, with check_dims, a member.
    """
    group = check_group(x, members, first_dims, last_dims, offsets, rows, bounds)
    group = check_gradient(group, gradient, h, x.shape)
    args = check_quantize_grouped(
        group, scaling=scaling, shared=shared, sf_layout=sf_layout, transposed_sf_layout=transposed_sf_layout,
        convention=convention, transposed=transposed, both=both, hadamard=hadamard, seed=seed, outer_scale=outer_scale,
        amax=amax, dbias=dbias, gradient=gradient,
    )  # fmt: skip
    if check_dims:
        group.sizes()
    if direct(x, h, *args.outer_scales, *args.amaxes):
        result = _run(args)
    else:
        result = _from_tensors(args, torch.ops.fp4gemm.quantize_grouped(*_flat(args)))
    parts = [part for part in result[:2] if part is not None]
    if not dbias:
        return tuple(parts) if both else parts[0]
    assert result.dbias is not None
    shape = group.shape
    sums = result.dbias if shape.columns is None else result.dbias.view(shape.members, shape.columns)
    return (*parts, sums)


def _run(args: GroupedArguments) -> GroupedResults:
    if args.group.x.is_cuda:
        return on_its_device(args.group.x, calls.quantize, args)
    return reference.quantize_grouped(args)


# --- as a custom op, which passes plain tensors ---


def _flat(args: GroupedArguments) -> tuple[Any, ...]:
    group, shape = args.group, args.group.shape
    sizes = [-1 if n is None else n for n in (shape.rows, shape.columns)]
    seeds = (args.seed, None) if isinstance(args.seed, Tensor) else (None, args.seed)
    return (
        group.x, [shape.members, *sizes, shape.elements, shape.row_bound, shape.column_bound],
        group.first_dims, group.last_dims, group.offsets, *args.layouts, args.per_tensor, args.shared, args.convention,
        *args.outer_scales, *args.amaxes, args.hadamard, *seeds, args.dbias, args.gradient, group.h,
    )  # fmt: skip


def _arguments(
    x: Tensor, sizes: list[int], first_dims: Tensor | None, last_dims: Tensor | None, offsets: Tensor | None,
    sf_layout: str | None, transposed_sf_layout: str | None, per_tensor: bool, shared: bool, convention: str,
    outer_scale: Tensor | None, transposed_outer_scale: Tensor | None, amax: Tensor | None,
    transposed_amax: Tensor | None, hadamard: int | None, seed: Tensor | None, seed_value: int | None, dbias: bool,
    gradient: str | None, h: Tensor | None,
) -> GroupedArguments:  # fmt: skip
    """Inverse of ``_flat``."""
    members, rows, columns, *rest = sizes
    shape = GroupShape(members, None if rows < 0 else rows, None if columns < 0 else columns, *rest)
    return GroupedArguments(
        Group(x, shape, first_dims, last_dims, offsets, h), (sf_layout, transposed_sf_layout), per_tensor, shared,
        convention, (outer_scale, transposed_outer_scale), (amax, transposed_amax), hadamard,
        seed_value if seed is None else seed, dbias, gradient,
    )  # fmt: skip


def _tensors(result: GroupedResults) -> list[Tensor]:
    parts = [part for part in result[:2] if part is not None]
    found = [t for part in parts for t in (part.data, part.block_scale, part.outer_scale, part.index)]
    return found if result.dbias is None else [*found, result.dbias]


def _from_tensors(args: GroupedArguments, tensors: list[Tensor]) -> GroupedResults:
    rest = iter(tensors)
    parts: list[GroupedFP4Tensor | None] = []
    for transposed, layout in zip((False, True), args.layouts, strict=True):
        scaling = "per_tensor" if args.per_member(transposed) else "per_row"
        parts.append(
            None if layout is None
            else GroupedFP4Tensor(next(rest), next(rest), next(rest), next(rest), layout, scaling)
        )  # fmt: skip
    return GroupedResults(parts[0], parts[1], tensors[-1] if args.dbias else None)


def _quantize_grouped(*flat: Any) -> list[Tensor]:
    return _tensors(_run(_arguments(*flat)))


def _fake_quantize_grouped(*flat: Any) -> list[Tensor]:
    args = _arguments(*flat)
    dbias = args.group.x.new_empty(args.group.shape.column_bound, dtype=torch.float32) if args.dbias else None
    return _tensors(GroupedResults(calls.allocate(args, False), calls.allocate(args, True), dbias))


_op = torch.library.custom_op(
    "fp4gemm::quantize_grouped",
    _quantize_grouped,
    mutates_args=(),
    schema="(Tensor x, SymInt[] sizes, Tensor? first_dims, Tensor? last_dims, Tensor? offsets, str? sf_layout, "
    "str? transposed_sf_layout, bool per_tensor, bool shared, str convention, Tensor? outer_scale, "
    "Tensor? transposed_outer_scale, Tensor? amax, Tensor? transposed_amax, SymInt? hadamard, Tensor? seed, "
    "SymInt? seed_value, bool dbias, str? gradient, Tensor? h) -> Tensor[]",
)
_op.register_fake(_fake_quantize_grouped)
