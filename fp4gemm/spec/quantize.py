"""Quantizers, amaxes, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.formats import (
    ADAPTIVE,
    CONVENTIONS,
    GRADIENTS,
    NORMS,
    PREPACKED,
    PRODUCERS,
    RECIPE_SIGNS,
    RESIDUAL_SIDES,
    SF_LAYOUTS,
    VALUES,
)
from fp4gemm.spec.common import short, thread_problem, unknown

KERNEL_SCALINGS = ("per_row", "per_tensor", "amaxes", "given")
TILE = 128  # rows and columns of x that a CTA of a tile kernel has
TILE_THREADS = 256
_TILE_FORMS = (*SF_LAYOUTS, VALUES, PREPACKED)  # of a tile kernel's result
ANY_SIGNS = -1  # of a transform: its mask is an argument of the launch


def _tile_problem(ctas: int) -> str | None:
    return None if 1 <= ctas <= 8 else f"ctas: got {ctas}, expected 1 to 8 of {TILE_THREADS} threads on an SM"


def _flags(vectorized: bool, gradient: str | None) -> str:
    return ("" if vectorized else "_scalar") + (f"_d_{gradient}" if gradient else "")


def _transform(hadamard: int | None) -> list[str]:
    """What the name of a kernel says of its transform."""
    return [] if hadamard is None else ["hadamard" if hadamard == ANY_SIGNS else f"hadamard_{hadamard:04x}"]


def _transform_problem(hadamard: int | None) -> str | None:
    if hadamard in (None, ANY_SIGNS, RECIPE_SIGNS):
        return None
    return f"hadamard: got {hadamard}, expected None, {ANY_SIGNS} (a mask given at launch) or {RECIPE_SIGNS}"


def _gradient_problem(gradient: str | None, dtype: str) -> str | None:
    if gradient is None:
        return None
    if dtype == "e4m3":
        return "gradient: got one of e4m3, expected bf16, fp16 or fp32"
    return unknown("gradient", gradient, GRADIENTS)


@dataclass(frozen=True)
class QuantizeSpec:
    """Row-wise quantizer. ``scaling``: ``per_row`` reduces the row amax itself, ``per_tensor`` reads an amax,
    ``amaxes`` one for each row, ``given`` reads outer scales. A row has ``threads`` threads with ``blocks`` 16-value
    blocks each, a CTA ``rows`` rows; ``resident`` says that this covers the row, which is then read once;
    ``vectorized`` that rows are 16-byte aligned and K % 16 == 0. ``output``: ``packed`` NVFP4, or ``values``, code *
    block scale as exact bf16, for a GEMM that follows at once. ``stochastic``, ``adaptive`` (the error of 4/6) and
    ``residual`` (the side) are those of ``quantize``; ``gathered``: columns are taken in another order; ``noop``: a
    flag on the device may stop it; ``producer``: what makes the values of x that are quantized."""

    template: ClassVar[str] = "quantize.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("quantize",)

    arch: str
    dtype: str
    scaling: str
    convention: str
    sf_layout: str
    threads: int
    blocks: int
    rows: int
    vectorized: bool = True
    resident: bool = True
    output: str = "packed"
    stochastic: bool = False
    adaptive: str | None = None
    residual: str | None = None
    gathered: bool = False
    noop: bool = False
    producer: str | None = None

    @property
    def plain(self) -> bool:
        """Without any option."""
        return not (self.stochastic or self.adaptive or self.residual or self.gathered or self.noop or self.producer)

    @property
    def least_ctas(self) -> int | None:
        """Of an SM, that the compiler leaves registers for; only where it would take too many, or spill a few."""
        cta = self.threads * self.rows
        tight = self.plain or (self.adaptive and self.scaling == "per_row" and not self.producer)
        if self.arch == "sm_90a" and (cta == 512 or (tight and (self.blocks, cta) == (4, 256))):
            return 1024 // cta
        return 1 if self.arch == "sm_120a" and self.stochastic and cta == 512 else None

    @property
    def name(self) -> str:
        shape = f"{self.threads}x{self.blocks}x{self.rows}"
        flags = ("" if self.vectorized else "_scalar") + ("" if self.resident else "_stream")
        flags += "" if self.output == "packed" else f"_{self.output}"
        flags += ("_stochastic" if self.stochastic else "") + (f"_{self.adaptive}" if self.adaptive else "")
        flags += f"_residual_{self.residual}" if self.residual else ""
        flags += ("_gathered" if self.gathered else "") + ("_noop" if self.noop else "")
        flags += f"_{self.producer}" if self.producer else ""
        parts = (short(self.arch), self.dtype, self.scaling, self.convention, self.sf_layout, shape)
        return "quantize_" + "_".join(parts) + flags

    def why_not(self) -> str | None:
        if self.threads % 32 or not 32 <= self.threads * self.rows <= 1024:
            return f"threads x rows: got {self.threads} x {self.rows}, expected whole warps and at most 1024 in all"
        if not 1 <= self.blocks <= 8:
            return f"blocks: got {self.blocks}, expected 1 to 8 (they live in registers)"
        if self.rows not in (1, 2, 4, 8):
            return f"rows: got {self.rows}, expected 1, 2, 4 or 8 (they share a tile of the scale layout)"
        if self.output == "values" and self.sf_layout != "linear":
            return f"sf_layout of values: got {self.sf_layout!r}, expected 'linear' (they have no block scales)"
        if (self.adaptive or self.residual) and self.convention not in ("te", "te_per_token"):
            return f"convention of adaptive or residual: got {self.convention!r}, expected te or te_per_token"
        if self.adaptive and (self.stochastic or self.residual):
            return "adaptive: expected neither stochastic nor residual with it"
        if self.gathered and not self.residual:
            return "gathered: expected a residual with it"
        if self.producer and (self.gathered or self.dtype == "e4m3"):
            return f"producer: got {self.producer!r} of {self.dtype}, expected bf16, fp16 or fp32, columns in order"
        whole = self.resident and self.output == "packed" and not self.residual
        if self.producer in NORMS and (not whole or self.scaling == "per_tensor"):
            return f"producer: got {self.producer!r}, expected packed rows in registers, no residual or tensor amax"
        return (
            unknown("scaling", self.scaling, KERNEL_SCALINGS)
            or (None if self.adaptive is None else unknown("adaptive", self.adaptive, ADAPTIVE))
            or (None if self.residual is None else unknown("residual", self.residual, RESIDUAL_SIDES))
            or (None if self.producer is None else unknown("producer", self.producer, (*PRODUCERS, *NORMS)))
            or unknown("convention", self.convention, CONVENTIONS)
            or unknown("output", self.output, ("packed", "values"))
        )


@dataclass(frozen=True)
class AmaxSpec:
    """max(|x|) of a whole tensor, or of what ``producer`` makes of it, NaN ignored, into one fp32 that is 0 before."""

    template: ClassVar[str] = "amax.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("amax",)

    arch: str
    dtype: str
    vectorized: bool = True
    producer: str | None = None
    threads: int = 256

    @property
    def name(self) -> str:
        flags = ("" if self.vectorized else "_scalar") + (f"_{self.producer}" if self.producer else "")
        return f"amax_{short(self.arch)}_{self.dtype}_{self.threads}{flags}"

    def why_not(self) -> str | None:
        if self.producer is not None:
            return unknown("producer", self.producer, PRODUCERS) or thread_problem(self.threads)
        return thread_problem(self.threads)


@dataclass(frozen=True)
class TileQuantizeSpec:
    """Quantizer of x, of its transpose, or of both from one read (templates/include/fp4gemm/quantize_tile.hpp).

    ``scaling``: it reads amaxes (``amax``) or decode multipliers (``given``). ``rows`` and ``columns`` are the scale
    layouts of the result and of the transposed one, or VALUES, code * block scale as exact bf16, or PREPACKED; None:
    not made. ``hadamard``: the mask with which the transposed one is transformed, RECIPE_SIGNS, or ANY_SIGNS, one that
    is given at launch; ``stochastic`` rounds both so; ``square``: one block scale for 16 x 16 values.
    ``vectorized``: rows of x are contiguous and 16-byte aligned. ``ctas``: that an SM has room for. ``gradient``: x is
    multiplied by the derivative of this activation first."""

    template: ClassVar[str] = "quantize_tile.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("quantize",)

    arch: str
    dtype: str
    scaling: str
    convention: str
    rows: str | None
    columns: str | None
    hadamard: int | None = None
    stochastic: bool = False
    square: bool = False
    vectorized: bool = True
    ctas: int = 4
    gradient: str | None = None

    @property
    def row_scales(self) -> str:
        return self.rows or "linear"

    @property
    def column_scales(self) -> str:
        return self.columns or "linear"

    @property
    def threads(self) -> int:
        return TILE_THREADS

    @property
    def name(self) -> str:
        results = [f"{way}_{layout}" for way, layout in (("rows", self.rows), ("columns", self.columns)) if layout]
        options = [name for name in ("stochastic", "square") if getattr(self, name)]
        options = [*_transform(self.hadamard), *options, str(self.ctas)]
        parts = (short(self.arch), self.dtype, self.scaling, self.convention, *results, *options)
        return "quantize_tile_" + "_".join(parts) + _flags(self.vectorized, self.gradient)

    def why_not(self) -> str | None:
        if self.rows is None and self.columns is None:
            return "rows, columns: got None for both, expected a scale layout"
        if self.hadamard is not None and (self.columns is None or self.square):
            return "hadamard: expected a transposed result, and a block scale for each of its blocks"
        return (
            unknown("scaling", self.scaling, ("amax", "given"))
            or unknown("convention", self.convention, CONVENTIONS)
            or unknown("rows", self.row_scales, _TILE_FORMS)
            or unknown("columns", self.column_scales, _TILE_FORMS)
            or _transform_problem(self.hadamard)
            or _gradient_problem(self.gradient, self.dtype)
            or _tile_problem(self.ctas)
        )


@dataclass(frozen=True)
class TileAmaxSpec:
    """Largest magnitudes of rows, of columns (of what they are transformed to, with ``hadamard``) and of the tensor,
    from one read of x, NaN ignored, into floats that are 0 before. ``sums``: also those of columns, of 128 rows each.
    ``hadamard`` and ``gradient``: as in TileQuantizeSpec."""

    template: ClassVar[str] = "amax_tile.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("amax",)

    arch: str
    dtype: str
    rows: bool
    columns: bool
    hadamard: int | None = None
    vectorized: bool = True
    ctas: int = 4
    sums: bool = False
    gradient: str | None = None

    @property
    def threads(self) -> int:
        return TILE_THREADS

    @property
    def name(self) -> str:
        wanted = [name for name in ("rows", "columns") if getattr(self, name)]
        wanted += [*_transform(self.hadamard), *(["sums"] if self.sums else [])]
        parts = (short(self.arch), self.dtype, *wanted, str(self.ctas))
        return "amax_tile_" + "_".join(parts) + _flags(self.vectorized, self.gradient)

    def why_not(self) -> str | None:
        if not self.rows and not self.columns:
            return "rows, columns: got False for both"
        if (self.hadamard is not None or self.sums) and not self.columns:
            return f"{'sums' if self.hadamard is None else 'hadamard'}: expected columns, which it is of"
        return (
            _transform_problem(self.hadamard)
            or _gradient_problem(self.gradient, self.dtype)
            or _tile_problem(self.ctas)
        )


@dataclass(frozen=True)
class DequantizeSpec:
    """Packed NVFP4 to ``dtype``, with the outer scale or without it; ``units`` half blocks a thread."""

    template: ClassVar[str] = "dequantize.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("dequantize",)

    arch: str
    dtype: str
    sf_layout: str
    outer: bool
    threads: int = 256
    units: int = 4

    @property
    def name(self) -> str:
        outer = "outer" if self.outer else "exact"
        return f"dequantize_{short(self.arch)}_{self.dtype}_{self.sf_layout}_{outer}_{self.threads}x{self.units}"

    def why_not(self) -> str | None:
        if self.units < 1:
            return f"units: got {self.units}, expected at least 1"
        return thread_problem(self.threads)
