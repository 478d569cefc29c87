"""NVFP4 as data: the e2m1 grid, packing, scale-factor layouts and the names that calls accept.

A value is ``e2m1 code * e4m3 block scale (one per 16 values along K) * fp32 outer scale (one per row or per tensor)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK = 16
"""Values along K that share one block scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code; bit 3 is the sign."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_NORMAL = 2.0**-6
E4M3_MIN = 2.0**-9

SCALINGS = ("per_row", "per_tensor", "per_column")
CONVENTIONS = ("te_per_token", "te", "torchao", "modelopt")

PREPACKED_FORMS = ("sm90",)
PACKED_BLOCK = 64
"""Rows and columns of a block of the prepacked form "sm90" (templates/include/fp4gemm/packed.hpp)."""
PACKED_CODE_BYTES = 2048
PACKED_BLOCK_BYTES = PACKED_CODE_BYTES + 256

ADAPTIVE = ("mse", "mae")
METRICS = ("sse", "hessian")
SEARCH_BLOCKS = (BLOCK, 2 * BLOCK)
"""How many values can share a scale that a search chooses: the second stores it twice."""
RESIDUAL_SIDES = ("activation", "weight")
PRODUCERS = ("silu_mul", "gelu_tanh", "relu2")
NORMS = ("rmsnorm", "add_rmsnorm")
GRADIENTS = ("relu", "relu2", "silu", "gelu_tanh", "quick_gelu")
"""Activations whose derivative a quantizer can multiply by."""
RECIPE_SIGNS = 0xACE1
"""A sign mask of the 16-point Hadamard transform: both operands of a GEMM need the same one."""

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class QuantizeOptions:
    """What ``quantize`` does beyond a convention's plain rule; docs/numerics.md gives each option its arithmetic.

    Attributes:
        hadamard: None, or the sign mask (0..65535) of the Hadamard transform of each 16 values along K of the result.
        stochastic: round codes stochastically; the seed is data, and travels on its own.
        adaptive: None, or the error that chooses between a largest code of 6 and of 4: a name in ``ADAPTIVE``.
        residual: KE, a multiple of 16: how many columns at the end of K get a companion block.
        residual_side: a name in ``RESIDUAL_SIDES``: companions hold the error (activation), or repeat (weight).
        producer: what makes the quantized values of x: a name in ``PRODUCERS`` or ``NORMS``.
    """

    hadamard: int | None = None
    stochastic: bool = False
    adaptive: str | None = None
    residual: int = 0
    residual_side: str = "activation"
    producer: str | None = None

    def columns(self, x_columns: int) -> int:
        """K of what is quantized: a gated activation has two columns of x for each."""
        return x_columns // 2 if self.producer == "silu_mul" else x_columns


PLAIN = QuantizeOptions()
"""No option."""


def scale_columns(k: int) -> int:
    """Number of block scales that cover ``k`` values: ceil(k / 16)."""
    return (k + BLOCK - 1) // BLOCK


def padded_k(k: int) -> int:
    """``k`` rounded up to whole blocks: the number of 4-bit codes stored for a row."""
    return scale_columns(k) * BLOCK


def packed_shape(rows: int, k: int) -> tuple[int, int, int]:
    """Shape of the uint8 data of a (rows, k) tensor in the prepacked form: whole blocks of 64 x 64, 2304 bytes each."""
    return -(-rows // PACKED_BLOCK), -(-k // PACKED_BLOCK), PACKED_BLOCK_BYTES


def pack_e2m1(codes: Tensor) -> Tensor:
    """Packs uint8 codes 0..15 of shape [..., 2n] into uint8 [..., n]: element 2j is the low nibble of byte j."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(data: Tensor) -> Tensor:
    """Inverse of :func:`pack_e2m1`: uint8 [..., n] to uint8 codes [..., 2n]."""
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values of uint8 codes 0..15 as float32, same shape; code 8 is -0.0."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    return values[codes.int()]


def decode_packed(data: Tensor) -> Tensor:
    """``decode_e2m1(unpack_e2m1(data))``: uint8 [..., n] to float32 [..., 2n], two values by one look-up."""
    pairs = decode_e2m1(unpack_e2m1(torch.arange(256, dtype=torch.uint8, device=data.device)))
    words = pairs.view(torch.int64).index_select(0, data.flatten().int())
    return words.view(torch.float32).reshape(*data.shape[:-1], 2 * data.shape[-1])


@dataclass(frozen=True)
class ScaleLayout:
    """Where block scale (m, kb) of a [rows, K] operand is stored.

    Memory is a row-major grid of tiles of ``row_tile x col_tile`` scales. Inside a tile row m is stored at lane
    ``m % lanes``, and the ``row_tile / lanes`` rows that share a lane stand side by side. A new layout is
    three numbers.
    """

    name: str
    row_tile: int
    col_tile: int
    lanes: int

    @property
    def swizzled(self) -> bool:
        """False when the storage is simply the row-major matrix of scales."""
        return self.row_tile * self.col_tile > 1

    def _tiles(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows + self.row_tile - 1) // self.row_tile, (columns + self.col_tile - 1) // self.col_tile

    def numel(self, rows: int, k: int) -> int:
        """Number of scale bytes of a [rows, k] operand, padding included."""
        tiles_m, tiles_k = self._tiles(rows, scale_columns(k))
        return tiles_m * tiles_k * self.row_tile * self.col_tile

    def shape(self, rows: int, k: int) -> tuple[int, ...]:
        """Shape of the stored tensor: [rows, ceil(k/16)] for ``linear``, [numel] for a swizzled layout."""
        return (self.numel(rows, k),) if self.swizzled else (rows, scale_columns(k))

    def offset(self, m: Index, kb: Index, k: int) -> Index:
        """Byte offset of the scale of row ``m``, block ``kb`` (ints, or integer tensors) of a [rows, k] operand."""
        _, tiles_k = self._tiles(0, scale_columns(k))
        tile = (m // self.row_tile) * tiles_k + kb // self.col_tile
        lane, group = m % self.lanes, (m % self.row_tile) // self.lanes
        in_tile = lane * (self.row_tile // self.lanes) * self.col_tile + group * self.col_tile + kb % self.col_tile
        return tile * (self.row_tile * self.col_tile) + in_tile

    def from_linear(self, scales: Tensor) -> Tensor:
        """Stores row-major scales [rows, ceil(K/16)] of any one-byte dtype in this layout; padding bytes are 0.

        Returns a contiguous tensor of the same dtype (``scales`` itself, if it already is what is asked for).
        """
        if not self.swizzled:
            return scales.contiguous()
        rows, columns = scales.shape
        tiles_m, tiles_k = self._tiles(rows, columns)
        # F.pad has no float8 kernel: move bytes.
        padding = (0, tiles_k * self.col_tile - columns, 0, tiles_m * self.row_tile - rows)
        padded = F.pad(scales.view(torch.uint8), padding)
        grid = padded.reshape(tiles_m, self.row_tile // self.lanes, self.lanes, tiles_k, self.col_tile)
        return grid.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)

    def to_linear(self, flat: Tensor, rows: int, k: int) -> Tensor:
        """Inverse of :meth:`from_linear`: row-major scales [rows, ceil(k/16)], contiguous."""
        columns = scale_columns(k)
        if not self.swizzled:
            return flat.reshape(rows, columns)
        tiles_m, tiles_k = self._tiles(rows, columns)
        grid = flat.view(torch.uint8).reshape(tiles_m, tiles_k, self.lanes, self.row_tile // self.lanes, self.col_tile)
        padded = grid.permute(0, 3, 2, 1, 4).reshape(tiles_m * self.row_tile, tiles_k * self.col_tile)
        return padded[:rows, :columns].contiguous().view(flat.dtype)


SF_LAYOUTS: Mapping[str, ScaleLayout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            ScaleLayout("linear", row_tile=1, col_tile=1, lanes=1),
            ScaleLayout("128x4", row_tile=128, col_tile=4, lanes=32),
            ScaleLayout("8x4", row_tile=8, col_tile=4, lanes=8),
        )
    }
)
"""``linear`` is row-major, ``128x4`` what cuBLASLt, CUTLASS and torch (SWIZZLE_32_4_4) read, ``8x4`` for small M."""

VALUES = "values"
"""In place of a layout, inside of the package: not NVFP4 but code * block scale, exact bf16 [M, ceil16(K)], zeros past
K; block scales are empty then. What GEMMs on Hopper read of activations."""

PREPACKED = "sm90"
"""The same: the prepacked form of a weight, with its block scales."""

LEFT, RIGHT = "left", "right"
"""The same, of an operand of ``gemm``: VALUES and PREPACKED on Hopper, else ``128x4``."""


def scale_layout(name: str) -> ScaleLayout:
    """The layout called ``name``. Raises ValueError with the known names otherwise."""
    if name not in SF_LAYOUTS:
        raise ValueError(f"sf_layout: expected one of {', '.join(SF_LAYOUTS)}, got {name!r}")
    return SF_LAYOUTS[name]
