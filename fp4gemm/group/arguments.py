"""What ``quantize_grouped`` accepts. Nothing here reads tensor data but :func:`check_dims`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fp4gemm.formats import BLOCK, CONVENTIONS, GRADIENTS, SCALINGS, scale_layout
from fp4gemm.group.shape import GroupShape
from fp4gemm.reference.arguments import QUANTIZABLE, check_float
from fp4gemm.reference.options import check_mask, check_name, check_seed

MOST = 2**31 - 1  # members, and columns of one


@dataclass(frozen=True)
class Group:
    """A buffer and where its members are.

    ``x`` is contiguous; ``first_dims`` and ``last_dims`` are int64 [E] where rows or columns vary, ``offsets`` int64
    [E + 1] in ``units``, None for members without gaps. ``h``: an activation's input, of the size of x, or None.
    """

    x: Tensor
    shape: GroupShape
    first_dims: Tensor | None
    last_dims: Tensor | None
    offsets: Tensor | None
    h: Tensor | None = None

    @property
    def units(self) -> tuple[int, int]:
        """Elements of what ``offsets`` count, rows of x [T, K] or single ones, and how many of these x has."""
        shape = self.shape
        return (1, shape.elements) if shape.columns is None else (shape.columns, shape.row_bound)

    def sizes(self) -> list[tuple[int, int, int]]:
        """(rows, columns, first element) of each member; waits for the device. Raises ValueError that names a member
        that does not fit ``x`` or the bounds."""
        shape = self.shape
        firsts, lasts, offsets = (
            [] if t is None else t.tolist() for t in (self.first_dims, self.last_dims, self.offsets)
        )
        found: list[tuple[int, int, int]] = []
        at = rows = columns = 0
        for i in range(shape.members):
            k: int = lasts[i] if shape.columns is None else shape.columns
            begin: int = offsets[i] * self.units[0] if offsets else at
            if shape.rows is not None:
                m = shape.rows
            else:
                m = firsts[i] if firsts else offsets[i + 1] - offsets[i]
            _check_member(i, m, k, begin, self)
            at, rows, columns = at + m * k, rows + m, columns + k
            if at > shape.elements:
                raise ValueError(f"member {i}: the {at} elements up to its end are more than x has, {shape.elements}")
            for name, total, bound in (("rows", rows, shape.row_bound), ("columns", columns, shape.column_bound)):
                if total > bound:
                    raise ValueError(f"member {i}: {total} {name} up to its end, expected at most {bound}")
            found.append((m, k, begin if m * k else 0))
        return found

    @property
    def alignment(self) -> int:
        """Elements on which a member has to begin."""
        varies = self.last_dims is not None
        row = BLOCK if varies else self.shape.columns or 0
        size = self.x.element_size()
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (self.x, self.h))
        return 16 // size if aligned and row * size % 16 == 0 else 1


def _check_member(i: int, m: int, k: int, begin: int, group: Group) -> None:
    if m < 0 or k < 0:
        raise ValueError(f"member {i}: expected sizes of at least 0, got {m} x {k}")
    if k > MOST:
        raise ValueError(f"member {i}: expected at most {MOST} columns, got {k}")
    if group.last_dims is not None and k % BLOCK:
        raise ValueError(f"member {i}: expected a width that is a multiple of {BLOCK} where widths vary, got {k}")
    if m * k and not 0 <= begin <= group.shape.elements - m * k:
        raise ValueError(f"member {i}: {m} x {k} values at {begin} are not within the {group.shape.elements} of x")
    if m * k and begin % group.alignment:
        raise ValueError(f"member {i}: begins at element {begin}, expected a multiple of {group.alignment}")


class GroupedArguments(NamedTuple):
    """Checked arguments: for the row-wise result and for the transposed one, None where it is not wanted, the layout,
    and amaxes or decode multipliers: [], [E], or [lines] for one of each line."""

    group: Group
    layouts: tuple[str | None, str | None]
    per_tensor: bool
    shared: bool
    convention: str
    outer_scales: tuple[Tensor | None, Tensor | None]
    amaxes: tuple[Tensor | None, Tensor | None]
    hadamard: int | None
    seed: Tensor | int | None
    dbias: bool
    gradient: str | None = None

    def shape(self, transposed: bool) -> GroupShape:
        """Of a result."""
        return self.group.shape.transposed() if transposed else self.group.shape

    def per_member(self, transposed: bool) -> bool:
        """Whether a result has an outer scale for each member, not one for each line."""
        which = int(transposed)  # torch 2.11 does not trace an index that is a bool
        given = self.outer_scales[which] if self.outer_scales[which] is not None else self.amaxes[which]
        if given is None:
            return self.per_tensor
        return self.per_tensor or given.dim() == 0 or given.shape[0] != self.shape(transposed).row_bound

    @property
    def one_matrix(self) -> bool:
        """Whether the row-wise result is that of x as one matrix: the members' rows are whole tiles of the layout, and
        nothing is a member's own."""
        group, layout = self.group, self.layouts[0]
        rows, columns = group.shape.rows, group.shape.columns
        if layout is None or not rows or not columns or group.offsets is not None:
            return False
        own = (self.seed, self.outer_scales[0], self.amaxes[0], self.gradient)
        return not self.per_tensor and all(t is None for t in own) and rows % scale_layout(layout).row_tile == 0


def check_group(
    x: Tensor, members: int | None, first_dims: Tensor | None, last_dims: Tensor | None, offsets: Tensor | None,
    rows: int | None, bounds: tuple[int, int] | None,
) -> Group:  # fmt: skip
    """The group that ``x`` holds. Raises TypeError or ValueError that names the argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in QUANTIZABLE:
        raise TypeError(f"x.dtype: expected one of {', '.join(map(str, QUANTIZABLE))}, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"x: expected a contiguous buffer, got strides {x.stride()}")
    count = _count(x, members, first_dims, last_dims, offsets)
    for name, dims, size in (
        ("first_dims", first_dims, count),
        ("last_dims", last_dims, count),
        ("offsets", offsets, count + 1),
    ):
        if dims is not None:
            _check_dims_tensor(name, dims, size, x.device)
    if bounds is not None and (last_dims is None or (first_dims is None and rows is not None)):
        raise ValueError("bounds: expected None unless rows and columns both vary")
    shape = _shape(x, count, first_dims, last_dims, offsets, rows, bounds)
    return Group(x.reshape(-1), shape, first_dims, last_dims, offsets)


def check_gradient(group: Group, gradient: str | None, h: Tensor | None, shape: torch.Size) -> Group:
    """The group with ``h``, which an activation's gradient needs. Raises TypeError or ValueError that names one."""
    if gradient is None:
        if h is not None:
            raise ValueError("h: expected None without a gradient, got a tensor")
        return group
    check_name("gradient", gradient, GRADIENTS)
    check_float("x.dtype", group.x.dtype)
    if not isinstance(h, Tensor):
        raise TypeError(f"h: expected a torch.Tensor, the input of the activation, got {type(h).__name__}")
    if h.dtype != group.x.dtype:
        raise TypeError(f"h: expected dtype {group.x.dtype} (that of x), got {h.dtype}")
    if h.shape != shape or not h.is_contiguous():
        raise ValueError(f"h: expected contiguous {list(shape)} (as x), got {list(h.shape)}, strides {h.stride()}")
    if h.device != group.x.device:
        raise ValueError(f"h: expected device {group.x.device} (that of x), got {h.device}")
    return replace(group, h=h.reshape(-1))


def _count(x: Tensor, members: int | None, *dims: Tensor | None) -> int:
    first_dims, last_dims, offsets = dims
    if members is not None:
        if not isinstance(members, int) or isinstance(members, bool):
            raise TypeError(f"members: expected an int, got {type(members).__name__}")
        count = members
    elif first_dims is not None or last_dims is not None:
        known = first_dims if first_dims is not None else last_dims
        count = known.shape[0] if isinstance(known, Tensor) and known.dim() == 1 else 1
    elif offsets is not None:
        count = offsets.shape[0] - 1 if isinstance(offsets, Tensor) and offsets.dim() == 1 else 1
    elif x.dim() == 3:
        count = x.shape[0]
    else:
        raise ValueError(f"members: expected how many tensors x [T, K] holds, or their dims, got x {tuple(x.shape)}")
    if not 1 <= count <= MOST:
        raise ValueError(f"members: expected 1 to {MOST}, got {count}")
    return count


def _check_dims_tensor(name: str, dims: Tensor, size: int, device: torch.device) -> None:
    if not isinstance(dims, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(dims).__name__}")
    if dims.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {dims.dtype}")
    if tuple(dims.shape) != (size,) or not dims.is_contiguous():
        raise ValueError(f"{name}: expected contiguous [{size}], got {list(dims.shape)}, strides {dims.stride()}")
    if dims.device != device:
        raise ValueError(f"{name}: expected device {device} (that of x), got {dims.device}")


def _shape(
    x: Tensor, count: int, first_dims: Tensor | None, last_dims: Tensor | None, offsets: Tensor | None,
    rows: int | None, bounds: tuple[int, int] | None,
) -> GroupShape:  # fmt: skip
    size = x.numel()
    if last_dims is None:
        if rows is not None:
            raise ValueError(f"rows: expected None where x has the columns of all members, got {rows}")
        if first_dims is None and offsets is None:
            return _same_shape(x, count)
        if x.dim() != 2:
            raise ValueError(f"x: expected [T, K] where rows vary, got shape {tuple(x.shape)}")
        return GroupShape(count, None, x.shape[1], size, x.shape[0], count * x.shape[1])
    if x.dim() != 1:
        raise ValueError(f"x: expected one dimension where columns vary, got shape {tuple(x.shape)}")
    if first_dims is not None:
        if rows is not None:
            raise ValueError(f"rows: expected None beside first_dims, got {rows}")
        row_bound, column_bound = _check_bounds(bounds) if bounds is not None else (size // BLOCK, size)
        return GroupShape(count, None, None, size, row_bound, column_bound)
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise TypeError(f"rows: expected an int, the rows of each member, beside last_dims alone, got {rows!r}")
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    return GroupShape(count, rows, None, size, count * rows, size // rows)


def _same_shape(x: Tensor, count: int) -> GroupShape:
    if x.dim() == 3:
        if x.shape[0] != count:
            raise ValueError(f"members: expected {x.shape[0]} (that of x {tuple(x.shape)}), got {count}")
        rows, columns = x.shape[1:]
    elif x.dim() == 2:
        if x.shape[0] % count:
            raise ValueError(f"x: {x.shape[0]} rows are not {count} members of as many rows each")
        rows, columns = x.shape[0] // count, x.shape[1]
    else:
        raise ValueError(f"x: expected [members * M, K] or [members, M, K], got shape {tuple(x.shape)}")
    return GroupShape(count, rows, columns, x.numel(), count * rows, count * columns)


def _check_bounds(bounds: tuple[int, int]) -> tuple[int, int]:
    if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(b, int) for b in bounds)):
        raise TypeError(f"bounds: expected a pair of ints or None, got {bounds!r}")
    if min(bounds) < 0:
        raise ValueError(f"bounds: expected at least 0, got {tuple(bounds)}")
    return bounds[0], bounds[1]


def check_quantize_grouped(
    group: Group, *, scaling: str, shared: bool, sf_layout: str, transposed_sf_layout: str | None,
    convention: str | None, transposed: bool, both: bool, hadamard: int | None, seed: Tensor | int | None,
    outer_scale: Tensor | tuple[Tensor, Tensor] | None, amax: Tensor | tuple[Tensor, Tensor] | None, dbias: bool,
    gradient: str | None,
) -> GroupedArguments:  # fmt: skip
    """The other arguments. Raises TypeError or ValueError that names one."""
    check_name("scaling", scaling, SCALINGS[:2])
    per_tensor = scaling == "per_tensor"
    if shared and not per_tensor:
        raise ValueError(f"shared: expected False unless scaling is per_tensor, got scaling={scaling!r}")
    if convention is None:
        convention = "te" if per_tensor else "te_per_token"
    check_name("convention", convention, CONVENTIONS)
    scale_layout(sf_layout)
    second = transposed_sf_layout or sf_layout
    scale_layout(second)
    if hadamard is not None:
        check_mask(hadamard)
        if not (transposed or both):
            raise ValueError("hadamard: needs a transposed result, as only that is transformed, got neither")
    check_seed(seed, group.x.device)
    if outer_scale is not None and amax is not None:
        raise ValueError("amax: expected None where outer_scale is given, which takes its place, got both")
    layouts = (None if transposed and not both else sf_layout, second if transposed or both else None)
    args = GroupedArguments(
        group, layouts, per_tensor, shared, convention, (None, None), (None, None), hadamard, seed, dbias, gradient
    )
    return args._replace(
        outer_scales=_given("outer_scale", outer_scale, args), amaxes=_given("amax", amax, args)
    )  # fmt: skip


def _given(
    name: str, given: Tensor | tuple[Tensor, Tensor] | None, args: GroupedArguments
) -> tuple[Tensor | None, Tensor | None]:
    """For each result, what covers it: [], [E] or, where scaling is per_row, [lines]."""
    if given is None:
        return None, None
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a tensor or a pair (rows, columns), got {len(pair)} of them")
    return _given_to(name, pair[0], args, False), _given_to(name, pair[1], args, True)


def _given_to(name: str, t: Tensor, args: GroupedArguments, transposed: bool) -> Tensor | None:
    if args.layouts[int(transposed)] is None:
        return None
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {t.dtype}")
    if t.device != args.group.x.device:
        raise ValueError(f"{name}: expected device {args.group.x.device} (that of x), got {t.device}")
    lines = args.shape(transposed).row_bound
    shapes = ((), (args.group.shape.members,), *(() if args.per_tensor else ((lines,),)))
    if tuple(t.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(t.shape)}")
    return t.contiguous()
