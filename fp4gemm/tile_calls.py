"""The CUDA side of quantizing along columns, or both ways from one read of x, and of row and column amaxes.

As in ``calls``: allocate, select, launch; nothing waits for the GPU; ops has checked arguments. A tile kernel takes
outer scales from memory: amaxes, which another kernel has taken, or the decode multipliers that the caller gives.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.calls import NOOP_MASKS
from fp4gemm.formats import BLOCK, PREPACKED, VALUES, packed_shape, scale_columns, scale_layout
from fp4gemm.launch import Launcher
from fp4gemm.spec import TILE

# The structs of templates/include/fp4gemm/{quantize_tile,amax_tile}.hpp: keep both alike.
TILE_QUANTIZE_ARGUMENTS = struct.Struct("<2Q3q2iIi4Q4Q3Q8I2iI4x")
TILE_AMAX_ARGUMENTS = struct.Struct("<2Q3q2iIi5Q8I")

_ALIGNMENT = 16  # of results, bytes
_SEED = 2**64


def empty_codes(like: Tensor, lines: int, k: int, sf_layout: str) -> tuple[Tensor, Tensor]:
    """Data and block scales of a result [lines, k] to write into; ``sf_layout`` may be VALUES or PREPACKED."""
    blocks = scale_columns(k)
    if sf_layout == PREPACKED:
        packed = like.new_empty(packed_shape(lines, k), dtype=torch.uint8)
        return packed, like.new_empty(0, dtype=torch.float8_e4m3fn)
    if sf_layout == VALUES:
        values = like.new_empty((lines, blocks * BLOCK), dtype=torch.bfloat16)
        return values, like.new_empty(0, dtype=torch.float8_e4m3fn)
    block_scale = like.new_empty(scale_layout(sf_layout).shape(lines, k), dtype=torch.float8_e4m3fn)
    return like.new_empty((lines, blocks * BLOCK // 2), dtype=torch.uint8), block_scale


@dataclass(frozen=True)
class Output:
    """One result [lines, K] and what it needs: rows of x are its lines, or columns of x for a transposed result.
    ``sf_layout``: of its block scales, or VALUES or PREPACKED.

    Tensors are contiguous and 16-byte aligned; ``scale_in`` holds amaxes or decode multipliers, float32 [] or [1] for
    the tensor, [lines] for each line; ``outer_scale`` has its shape.
    """

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    sf_layout: str
    scale_in: Tensor

    @classmethod
    def allocate(cls, lines: int, k: int, sf_layout: str, scale_in: Tensor) -> Output:
        """A new result of shape (lines, k)."""
        if scale_in.dim() == 1 and lines > 1 and scale_in.shape[0] == 1:
            scale_in = scale_in.reshape(())
        data, block_scale = empty_codes(scale_in, lines, k, sf_layout)
        return cls(data, block_scale, torch.empty_like(scale_in), sf_layout, scale_in)

    @property
    def parts(self) -> Parts:
        """What an FP4Tensor of it holds."""
        return self.data, self.block_scale, self.outer_scale

    @property
    def stride(self) -> int:
        """Of ``scale_in`` and ``outer_scale``."""
        return self.scale_in.dim()

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        addresses = self.data.data_ptr(), self.block_scale.data_ptr(), self.outer_scale.data_ptr()
        if addresses[0] % _ALIGNMENT or addresses[1] % _ALIGNMENT:
            raise ValueError(f"out: expected data and block scales on {_ALIGNMENT}-byte boundaries")
        return (*addresses, self.scale_in.data_ptr())


Parts = tuple[Tensor, Tensor, Tensor]  # data, block scales, outer scales
_NO_OUTPUT = (0, 0, 0, 0)


def can_write(data: Tensor, block_scale: Tensor, outer_scale: Tensor) -> bool:
    """Whether a kernel can store to these tensors of a caller."""
    aligned = data.data_ptr() % _ALIGNMENT == 0 and block_scale.data_ptr() % _ALIGNMENT == 0
    return aligned and data.is_contiguous() and block_scale.is_contiguous() and outer_scale.is_contiguous()


def vectorized(x: Tensor) -> bool:
    """Whether rows of x are contiguous and 16-byte aligned, so that a tile is copied 16 bytes at a time."""
    rows_aligned = x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0
    return (x.stride(1) == 1 or x.shape[1] == 1) and x.data_ptr() % 16 == 0 and rows_aligned


def tiles(x: Tensor) -> int:
    """CTAs of a tile kernel."""
    count: int = -(-x.shape[0] // TILE) * -(-x.shape[1] // TILE)
    if count >= 2**31:
        raise ValueError(f"x: expected fewer than 2**31 tiles of {TILE} x {TILE} values, got shape {tuple(x.shape)}")
    return count


@lru_cache(maxsize=4096)
def _division(divisor: int) -> tuple[int, int]:
    """(magic, shift) with t // divisor == (t * magic >> 32) >> shift for 0 <= t < 2**31; magic 0 for divisor 1."""
    bits = (divisor - 1).bit_length()  # magic has 32 of them
    return (-(-(1 << (31 + bits)) // divisor), bits - 1) if bits else (0, 0)


def _source(x: Tensor) -> tuple[int, ...]:
    columns = -(-x.shape[1] // TILE)
    return (x.data_ptr(), 0, *x.stride(), *x.shape, columns, *_division(columns))


@lru_cache(maxsize=64)
def signs(mask: int) -> tuple[int, ...]:
    """The eight words of HadamardSigns (templates/include/fp4gemm/hadamard.hpp)."""
    return tuple((mask >> 2 * i & 1) << 15 | (mask >> 2 * i + 1 & 1) << 31 for i in range(BLOCK // 2))


def quantize_values(
    x: Tensor, rows: Output | None, columns: Output | None, hadamard: int | None, seed: Tensor | int | None,
    noop: Tensor | None,
) -> tuple[int, ...]:  # fmt: skip
    """The fields of ``TILE_QUANTIZE_ARGUMENTS``."""
    at, value = (seed.data_ptr(), 0) if isinstance(seed, Tensor) else (0, (seed or 0) % _SEED)
    return (
        *_source(x),
        *(_NO_OUTPUT if rows is None else rows.addresses),
        *(_NO_OUTPUT if columns is None else columns.addresses),
        0 if noop is None else noop.data_ptr(), at, value, *signs(hadamard or 0),
        0 if rows is None else rows.stride, 0 if columns is None else columns.stride,
        0 if noop is None else NOOP_MASKS[noop.dtype],
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _quantizer(
    device: int, dtype: torch.dtype, scaling: str, convention: str, rows: str | None, columns: str | None,
    hadamard: int | None, stochastic: bool, square: bool, vectorized: bool,
) -> Launcher:  # fmt: skip
    arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
    flags = (hadamard, stochastic, square, vectorized)
    spec = select.tile_quantize_spec(arch, name, scaling, convention, rows, columns, *flags)
    return Launcher(spec, TILE_QUANTIZE_ARGUMENTS)


def quantize_into(
    x: Tensor, rows: Output | None, columns: Output | None, *, given: bool, convention: str, square: bool = False,
    hadamard: int | None = None, seed: Tensor | int | None = None, noop: Tensor | None = None,
) -> None:  # fmt: skip
    """NVFP4 of x [M, K], M and K positive, into ``rows`` [M, K], of its transpose into ``columns`` [K, M], or both.

    ``given``: ``scale_in`` holds decode multipliers, else amaxes. ``square``: block=(16, 16). ``hadamard``: the sign
    mask of the transform of ``columns``. ``seed``: int, or int64 tensor of one value on the device; None: nearest even.
    ``noop``: bool, uint8, int32 or float32 tensor of one value; where it is not 0, nothing is written.
    """
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    launch = _quantizer(
        x.device.index, x.dtype, "given" if given else "amax", convention,
        None if rows is None else rows.sf_layout, None if columns is None else columns.sf_layout,
        select.known_signs(hadamard), seed is not None, square, vectorized(x),
    )  # fmt: skip
    launch((tiles(x), 1, 1), stream, *quantize_values(x, rows, columns, hadamard, seed, noop))


def amax_values(
    x: Tensor, results: tuple[Tensor | None, ...], hadamard: int | None, sums: Tensor | None = None
) -> tuple[int, ...]:
    """The fields of ``TILE_AMAX_ARGUMENTS``; ``results``: rows, columns, the tensor, the transformed one."""
    addresses = [0 if t is None else t.data_ptr() for t in (*results, sums)]
    return (*_source(x), *addresses, *signs(hadamard or 0))


@lru_cache(maxsize=64)
def _amax(
    device: int, dtype: torch.dtype, rows: bool, columns: bool, hadamard: int | None, vectorized: bool, sums: bool
) -> Launcher:  # fmt: skip
    arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
    return Launcher(select.tile_amax_spec(arch, name, rows, columns, hadamard, vectorized, sums), TILE_AMAX_ARGUMENTS)


def amax(
    x: Tensor, *, rows: bool = False, columns: bool = False, tensor: bool = False, transformed: bool = False,
    hadamard: int | None = None, sums: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Largest magnitudes of x [M, K], M and K positive, float32, those asked for in the order of the arguments:

    rows [M], columns [K], the tensor [], the tensor after the transform []. ``hadamard`` transforms columns. ``sums``:
    of columns [K], of what is not transformed, at the end.
    """
    m, k = x.shape
    sizes = (m * rows, k * columns, int(tensor), int(transformed))
    zeros = x.new_zeros(sum(sizes), dtype=torch.float32)  # one launch for all of them
    parts = torch.split(zeros, list(sizes))
    wanted = tuple(part if size else None for part, size in zip(parts, sizes, strict=True))
    by_column = columns or transformed or sums
    partial = x.new_empty((-(-m // TILE), k), dtype=torch.float32) if sums else None
    device, stream = x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index)
    transform = select.known_signs(hadamard) if by_column else None
    launch = _amax(device, x.dtype, rows or tensor, by_column, transform, vectorized(x), sums)
    launch((tiles(x), 1, 1), stream, *amax_values(x, wanted, hadamard, partial))
    shapes = ((m,), (k,), (), ())
    found = [part.view(shape) for part, shape in zip(wanted, shapes, strict=True) if part is not None]
    return found if partial is None else [*found, partial.sum(0)]


def quantize(
    x: Tensor, layouts: tuple[str | None, str | None], *, per_tensor: bool, convention: str, square: bool = False,
    outer_scales: tuple[Tensor | None, Tensor | None] | None = None,
    amaxes: tuple[Tensor | None, Tensor | None] | None = None,
    hadamard: int | None = None, seed: Tensor | int | None = None, noop: Tensor | None = None,
    into: tuple[Parts | None, Parts | None] = (None, None),
) -> tuple[Output | None, Output | None]:  # fmt: skip
    """NVFP4 of x [M, K], M and K positive, and of its transpose, by scale ``layouts``, None: not wanted.

    ``outer_scales`` or ``amaxes``, [] or a value for each line, for each result that is wanted; without either, amaxes
    are taken from x in a launch of their own. ``into``: tensors to write to, instead of new ones.
    """
    m, k = x.shape
    by_row, by_column = (layout is not None for layout in layouts)
    scales = outer_scales or amaxes
    if scales is None:
        scales = _amaxes(x, by_row, by_column, per_tensor, hadamard)
    shapes = ((m, k), (k, m if hadamard is None else scale_columns(m) * BLOCK))
    rows, columns = (
        None if layout is None or scale is None
        else Output.allocate(*shape, layout, scale) if parts is None
        else Output(*parts, layout, scale.reshape(parts[2].shape))
        for layout, scale, shape, parts in zip(layouts, scales, shapes, into, strict=True)
    )  # fmt: skip
    quantize_into(
        x, rows, columns, given=outer_scales is not None, convention=convention, square=square, hadamard=hadamard,
        seed=seed, noop=noop,
    )  # fmt: skip
    return rows, columns


def _amaxes(
    x: Tensor, by_row: bool, by_column: bool, per_tensor: bool, hadamard: int | None
) -> tuple[Tensor | None, Tensor | None]:
    if per_tensor:
        transformed = by_column and hadamard is not None
        plain = by_row or not transformed
        found = amax(x, tensor=plain, transformed=transformed, hadamard=hadamard)
        return found[0] if by_row else None, found[-1] if by_column else None
    found = amax(x, rows=by_row, columns=by_column, hadamard=hadamard)
    return found[0] if by_row else None, found[-1] if by_column else None
