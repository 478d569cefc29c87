"""The CUDA side of groups: allocate, select, launch. Nothing waits for the GPU; arguments have been checked."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.formats import BLOCK, scale_columns, scale_layout
from fp4gemm.group.arguments import Group, GroupedArguments
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.launch import NO_OPTIONS, QUANTIZE_ARGUMENTS, Launcher
from fp4gemm.reference.group import GroupedResults
from fp4gemm.spec import TILE, GroupSpec, GroupSumsSpec, QuantizeSpec
from fp4gemm.tile_calls import signs

# The structs of templates/include/fp4gemm/{group,quantize_group,amax_group}.hpp: keep both alike.
GROUP = "5Q7qi4x"
GROUP_OUTPUT = "5Q2i"
GROUP_ROWS_ARGUMENTS = struct.Struct(f"<{GROUP}{GROUP_OUTPUT}2Q")
UNIFORM_ROWS_ARGUMENTS = struct.Struct(f"{QUANTIZE_ARGUMENTS.format}3Q2i")
GROUP_TILE_ARGUMENTS = struct.Struct(f"<{GROUP}{GROUP_OUTPUT * 2}3Q8I2iI4x")
GROUP_AMAX_ARGUMENTS = struct.Struct(f"<{GROUP}5Q8Ii4x")
GROUP_SUMS_ARGUMENTS = struct.Struct(f"<{GROUP}2Q")

_SEED = 2**64
_NO_OUTPUT = (0,) * 7


def group_values(group: Group) -> tuple[int, ...]:
    """The fields of a Group."""
    shape = group.shape
    dims = (0 if t is None else t.data_ptr() for t in (group.h, group.first_dims, group.last_dims, group.offsets))
    return (
        group.x.data_ptr(), *dims, shape.elements, -1 if shape.rows is None else shape.rows,
        0 if shape.columns is None else shape.columns, *group.units, shape.row_bound, shape.column_bound,
        shape.members,
    )  # fmt: skip


def seed_values(seed: Tensor | int | None) -> tuple[int, int]:
    """Where the seed is, or 0, and the seed."""
    return (seed.data_ptr(), 0) if isinstance(seed, Tensor) else (0, (seed or 0) % _SEED)


def allocate(args: GroupedArguments, transposed: bool) -> GroupedFP4Tensor | None:
    """A result as large as the bounds allow, None where it is not wanted."""
    sf_layout, shape, x = args.layouts[transposed], args.shape(transposed), args.group.x
    if sf_layout is None:
        return None
    per_member = args.per_member(transposed)
    scales = shape.scale_bytes(scale_layout(sf_layout))
    return GroupedFP4Tensor(
        x.new_empty(shape.data_bytes(), dtype=torch.uint8),
        x.new_empty(scales, dtype=torch.float8_e4m3fn),
        x.new_empty(shape.members if per_member else shape.row_bound, dtype=torch.float32),
        x.new_empty((5, shape.members + 1), dtype=torch.int64),
        sf_layout,
        "per_tensor" if per_member else "per_row",
    )


def output_values(out: GroupedFP4Tensor | None, scale_in: Tensor | None) -> tuple[int, ...]:
    """The fields of a GroupOutput. ``scale_in``: [], [E] or [lines]; None for rows that take their own amax."""
    if out is None:
        return _NO_OUTPUT
    by_line = out.scaling == "per_row"
    by_member = not by_line and scale_in is not None and scale_in.dim() == 1
    addresses = (t.data_ptr() for t in (out.data, out.block_scale, out.outer_scale))
    return *addresses, 0 if scale_in is None else scale_in.data_ptr(), out.index.data_ptr(), by_line, by_member


class _Kernel:
    """A kernel of a group, and how many CTAs run at once."""

    def __init__(self, device: int, spec: GroupSpec | GroupSumsSpec, arguments: struct.Struct) -> None:
        self.launch = Launcher(spec, arguments)
        self.spec = spec
        self._ctas = select.gpu_of(device)[1] * spec.ctas

    def __call__(self, items: int, stream: int, *values: int) -> None:
        self.launch((max(1, min(items, self._ctas)), 1, 1), stream, *values)


class _UniformKernel:
    """A kernel of members that are one matrix, and how it divides that among CTAs."""

    def __init__(
        self, device: int, dtype: torch.dtype, k: int, convention: str, sf_layout: str, vectorized: bool
    ) -> None:
        arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
        spec = select.uniform_rows_spec(arch, name, k, convention, sf_layout, vectorized)
        assert isinstance(spec.kernel, QuantizeSpec)
        self.launch = Launcher(spec, UNIFORM_ROWS_ARGUMENTS)
        self.rows = spec.kernel.rows
        self.prefetch = select.prefetch_ctas(spec.kernel, k, device)


_uniform_kernel = lru_cache(maxsize=1024)(_UniformKernel)


@lru_cache(maxsize=1024)
def _rows_kernel(
    device: int, dtype: torch.dtype, k: int | None, scaling: str, convention: str, sf_layout: str, vectorized: bool,
    stochastic: bool,
) -> tuple[_Kernel, int]:  # fmt: skip
    """The kernel, and the rows of an item."""
    arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
    spec = select.group_rows_spec(arch, name, k, scaling, convention, sf_layout, vectorized, stochastic)
    assert isinstance(spec.kernel, QuantizeSpec)
    return _Kernel(device, spec, GROUP_ROWS_ARGUMENTS), spec.kernel.rows


@lru_cache(maxsize=1024)
def _tile_kernel(
    device: int, dtype: torch.dtype, scaling: str, convention: str, rows: str | None, columns: str | None,
    hadamard: int | None, stochastic: bool, vectorized: bool, gradient: str | None,
) -> _Kernel:  # fmt: skip
    arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
    flags = (hadamard, stochastic, vectorized, gradient)
    spec = select.group_tile_spec(arch, name, scaling, convention, rows, columns, *flags)
    return _Kernel(device, spec, GROUP_TILE_ARGUMENTS)


@lru_cache(maxsize=64)
def _amax_kernel(
    device: int, dtype: torch.dtype, rows: bool, columns: bool, hadamard: int | None, vectorized: bool, sums: bool,
    gradient: str | None,
) -> _Kernel:  # fmt: skip
    arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
    spec = select.group_amax_spec(arch, name, rows, columns, hadamard, vectorized, sums, gradient)
    return _Kernel(device, spec, GROUP_AMAX_ARGUMENTS)


@lru_cache(maxsize=16)
def _sums_kernel(device: int, alignment: int) -> _Kernel:
    return _Kernel(device, select.group_sums_spec(select.arch_of(device), alignment), GROUP_SUMS_ARGUMENTS)


def _tiles(group: Group) -> int:
    """At most so many tiles of 128 x 128; a member without values is one."""
    return group.shape.area(TILE, TILE) // TILE**2 + group.shape.members


def _wanted(args: GroupedArguments) -> tuple[bool, bool]:
    return args.layouts[0] is not None, args.layouts[1] is not None


def _reduce(
    args: GroupedArguments, rows: bool, columns: bool, stream: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Amaxes that each result needs, [], [E] or [lines], None where it needs none, and the sums of columns."""
    group, shape, hadamard = args.group, args.group.shape, args.hadamard
    transformed = columns and hadamard is not None
    one = 1 if args.shared else shape.members
    # Amaxes of members are those of lines; the transform has amaxes of its own.
    sizes = [
        shape.row_bound if rows and not args.per_tensor else 0,
        shape.column_bound if columns and not args.per_tensor else 0,
        one if args.per_tensor and (rows or (columns and not transformed)) else 0,
        one if args.per_tensor and transformed else 0,
    ]
    zeros = group.x.new_zeros(sum(sizes), dtype=torch.float32)
    parts = [part if size else None for part, size in zip(torch.split(zeros, sizes), sizes, strict=True)]
    partial = group.x.new_empty(shape.partial_sums(), dtype=torch.float32) if args.dbias else None
    vectorized = group.alignment > 1
    by_column = bool(sizes[1] or sizes[3]) or args.dbias
    launch = _amax_kernel(
        group.x.device.index, group.x.dtype, bool(sizes[0] or sizes[2]), by_column,
        select.known_signs(hadamard) if transformed else None, vectorized, args.dbias, args.gradient,
    )  # fmt: skip
    addresses = (0 if t is None else t.data_ptr() for t in (*parts, partial))
    launch(_tiles(group), stream, *group_values(group), *addresses, *signs(hadamard or 0), not args.shared)
    by_member = parts[2] if not args.shared or parts[2] is None else parts[2].reshape(())
    by_member_after = parts[3] if not args.shared or parts[3] is None else parts[3].reshape(())
    of_columns = by_member_after if transformed else by_member
    if partial is not None:
        dbias = group.x.new_empty(shape.column_bound, dtype=torch.float32)
        values = (*group_values(group), partial.data_ptr(), dbias.data_ptr())
        kernel = _sums_kernel(group.x.device.index, group.alignment)
        kernel(shape.column_bound // kernel.spec.threads + shape.members, stream, *values)
        partial = dbias
    if args.per_tensor:
        return by_member if rows else None, of_columns if columns else None, partial
    return parts[0], parts[1], partial


def quantize(args: GroupedArguments) -> GroupedResults:
    """What ``reference.group.quantize_grouped`` makes, on the device: nothing is written behind the last member."""
    stream = torch._C._cuda_getCurrentRawStream(args.group.x.device.index)
    rows, columns = _wanted(args)
    given = args.outer_scales if any(t is not None for t in args.outer_scales) else args.amaxes
    scales: list[Tensor | None] = list(given)
    dbias = None
    # Rows alone take their own amaxes, in the kernel that encodes. It has no gradients.
    by_row = not columns and args.gradient is None
    alone = by_row and not args.per_tensor
    missing = [want and t is None for want, t in zip((rows, columns), given, strict=True)]
    if args.dbias or (any(missing) and not alone):
        found = _reduce(args, missing[0] and not alone, missing[1], stream)
        scales = [t if t is not None else amax for t, amax in zip(given, found[:2], strict=True)]
        dbias = found[2]
    out = allocate(args, False), allocate(args, True)
    if by_row and out[0] is not None and args.one_matrix:
        _quantize_one_matrix(args, out[0], stream)
    elif by_row and out[0] is not None:
        _quantize_rows(args, out[0], scales[0], stream)
    else:
        _quantize_tiles(args, out, scales, stream)
    return GroupedResults(*out, dbias)


def _quantize_one_matrix(args: GroupedArguments, out: GroupedFP4Tensor, stream: int) -> None:
    group, shape = args.group, args.group.shape
    assert shape.columns is not None
    rows, k, columns = shape.row_bound, shape.columns, scale_columns(shape.columns)
    vectorized = group.alignment > 1 and k % BLOCK == 0
    kernel = _uniform_kernel(group.x.device.index, group.x.dtype, k, args.convention, out.sf_layout, vectorized)
    kernel.launch(
        (-(-rows // kernel.rows), 1, 1), stream,
        group.x.data_ptr(), out.data.data_ptr(), out.block_scale.data_ptr(), out.outer_scale.data_ptr(), 0,
        k, 0, rows, rows, k, columns, 0, kernel.prefetch, *NO_OPTIONS,
        out.index.data_ptr(), shape.data_bytes() // shape.members, out.block_scale.numel() // shape.members,
        shape.members, rows // shape.members,
    )  # fmt: skip


def _quantize_rows(args: GroupedArguments, out: GroupedFP4Tensor, scale_in: Tensor | None, stream: int) -> None:
    group = args.group
    if args.outer_scales[0] is not None:
        scaling = "given"
    elif scale_in is None:
        scaling = "per_row"
    else:
        scaling = "per_tensor" if out.scaling == "per_tensor" else "amaxes"
    k, stochastic = group.shape.columns, args.seed is not None
    k = None if k is None else max(1, k)
    vectorized = group.alignment > 1 and (k is None or k % BLOCK == 0)
    key = (group.x.device.index, group.x.dtype, k, scaling, args.convention, out.sf_layout, vectorized, stochastic)
    kernel, rows = _rows_kernel(*key)
    values = (*group_values(group), *output_values(out, scale_in), *seed_values(args.seed))
    kernel(_row_items(group, out.sf_layout, rows), stream, *values)


def _row_items(group: Group, sf_layout: str, rows: int) -> int:
    """At most so many CTAs' worth of rows, padding of the layout included; a member without rows is one."""
    shape, tile = group.shape, scale_layout(sf_layout).row_tile
    return (shape.row_bound + shape.members * (tile - 1)) // rows + shape.members


def _quantize_tiles(
    args: GroupedArguments, out: tuple[GroupedFP4Tensor | None, GroupedFP4Tensor | None],
    scales: list[Tensor | None], stream: int,
) -> None:  # fmt: skip
    group = args.group
    kernel = _tile_kernel(
        group.x.device.index, group.x.dtype, "given" if any(t is not None for t in args.outer_scales) else "amax",
        args.convention, *args.layouts, select.known_signs(args.hadamard), args.seed is not None, group.alignment > 1,
        args.gradient,
    )  # fmt: skip
    outputs = [output_values(t, scale_in) for t, scale_in in zip(out, scales, strict=True)]
    by_line = [t is not None and t.scaling == "per_row" for t in out]
    values = (
        *group_values(group), *outputs[0], *outputs[1], 0, *seed_values(args.seed), *signs(args.hadamard or 0),
        *by_line, 0,
    )  # fmt: skip
    kernel(_tiles(group), stream, *values)
