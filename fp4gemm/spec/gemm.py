"""Blackwell: GEMMs by block-scaled tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.spec.common import DTYPES, short, unknown

ACTIVATIONS = ("relu", "gelu", "silu")
FP4_LAYOUTS = ("128x4", "linear")  # of the block scales that an epilogue writes

_Tile = tuple[int, int, int]
# Tiles of one MMA. Two SMs share one of 256 rows on sm_100a; on sm_120a they are those of a CTA.
SM100_TILES = ((128, 64, 256), (128, 128, 256), (128, 192, 256), (128, 256, 256), (256, 128, 256), (256, 256, 256))
SM100_CLUSTERS = ((1, 1), (2, 1), (2, 2), (4, 2))
SM100_SCHEDULES = ("static", "clc")
GROUPED_TILES = {
    "sm_100a": ((128, 128, 256), (128, 256, 256)),
    "sm_120a": ((128, 128, 128),),
}
SM120_TILES: dict[str, tuple[_Tile, ...]] = {
    "cooperative": ((128, 128, 128), (256, 128, 128), (128, 128, 256)),
    "pingpong": ((128, 128, 128), (128, 128, 256)),  # a warpgroup has no registers for 256 x 128 sums
}


@dataclass(frozen=True)
class GemmSpec:
    """D[M, N] = cast(activation(outer_a * (outer_b * (A . B^T)) [+ bias] [+ beta * C])) of packed NVFP4 with 128x4
    block scales, on Blackwell, by CUTLASS's collectives.

    A [M, K] and B [N, K] are K-major ("tn"). D is row-major, or column-major: then the operands change places, and the
    kernel computes the rows of D^T. ``out_dtype`` "fp4" is NVFP4 with block scales in ``sf_layout`` under given outer
    scales (convention ``te_per_token``). ``tile`` is that of one MMA. ``schedule`` on sm_100a: how tiles are handed
    out, ``static`` (round robin) or ``clc`` (cluster launch control); on sm_120a, where that is always static: whether
    two warpgroups share a tile (``cooperative``) or take turns (``pingpong``). ``gelu`` is the form with erf."""

    template: ClassVar[str] = "gemm_blockscaled.cu.jinja"
    uses_cutlass: ClassVar[bool] = True
    entry_points: ClassVar[tuple[str, ...]] = ("gemm", "make_params")

    arch: str
    out_dtype: str
    bias: str | None
    tile: _Tile
    cluster: tuple[int, int]
    schedule: str
    source: str | None = None
    activation: str | None = None
    column_major: bool = False
    sf_layout: str | None = None

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.tile))
        out = self.out_dtype + (f"_{self.sf_layout}" if self.sf_layout else "")
        flags = (
            (f"_bias_{self.bias}" if self.bias else "")
            + (f"_source_{self.source}" if self.source else "")
            + (f"_{self.activation}" if self.activation else "")
            + ("_column" if self.column_major else "")
        )
        cluster = f"c{self.cluster[0]}x{self.cluster[1]}"
        return f"gemm_{short(self.arch)}_tn_{tile}_{cluster}_{self.schedule}_{out}_rowcol{flags}"

    @property
    def two_sm(self) -> bool:
        """Whether the two SMs of a pair share an MMA."""
        return self.arch == "sm_100a" and self.tile[0] == 256

    @property
    def cta_tile(self) -> _Tile:
        """What one CTA computes of D, and its step along K."""
        m, n, k = self.tile
        return (m // 2 if self.two_sm else m, n, k)

    def why_not(self) -> str | None:
        if self.arch == "sm_90a":
            return "arch: got 'sm_90a', which has no block-scaled tensor cores: expected sm_100a or sm_120a"
        problem = self._shape_problem()
        problem = problem or (None if self.bias is None else unknown("bias", self.bias, DTYPES))
        problem = problem or (None if self.activation is None else unknown("activation", self.activation, ACTIVATIONS))
        return problem or self._output_problem()

    def _shape_problem(self) -> str | None:
        on_sm100 = self.arch == "sm_100a"
        schedules = SM100_SCHEDULES if on_sm100 else tuple(SM120_TILES)
        if problem := unknown(f"schedule on {self.arch}", self.schedule, schedules):
            return problem
        tiles = SM100_TILES if on_sm100 else SM120_TILES[self.schedule]
        if self.tile not in tiles:
            which = self.arch if on_sm100 else f"{self.schedule} on {self.arch}"
            return f"tile of {which}: got {self.tile}, expected one of {', '.join(map(str, tiles))}"
        if not on_sm100 and self.cluster != (1, 1):
            return f"cluster on sm_120a: got {self.cluster}, expected (1, 1)"
        if on_sm100 and self.cluster not in SM100_CLUSTERS:
            return f"cluster: got {self.cluster}, expected one of {', '.join(map(str, SM100_CLUSTERS))}"
        if self.two_sm and self.cluster[0] % 2:
            return f"cluster of tile {self.tile}: got {self.cluster}, expected pairs of CTAs along M"
        return None

    def _output_problem(self) -> str | None:
        if self.out_dtype != "fp4":
            if self.sf_layout is not None:
                return f"sf_layout of {self.out_dtype}: got {self.sf_layout!r}, expected None"
            if self.source not in (None, self.out_dtype):
                return f"source of {self.out_dtype}: got {self.source!r}, expected None or {self.out_dtype!r}"
            if self.source == "fp32" and self.tile[1] == 256:  # C's tiles leave the main loop a single stage
                return f"tile with an fp32 source: got {self.tile}, expected at most 192 columns"
            return None
        if self.sf_layout not in FP4_LAYOUTS:
            return f"sf_layout of fp4: got {self.sf_layout!r}, expected one of {', '.join(FP4_LAYOUTS)}"
        if self.source is not None or self.column_major:
            return "source, column_major: expected neither for an fp4 D"
        return None


@dataclass(frozen=True)
class GroupedGemmSpec(GemmSpec):
    """The same for rows of A and D that are sorted by expert, each of which has a B: one launch, which reads on the
    device where an expert's rows begin (grouped.hpp). A CTA has a tile of 128 rows; D is row-major."""

    template: ClassVar[str] = "gemm_grouped.cu.jinja"

    @property
    def name(self) -> str:
        return f"{super().name}_grouped"

    def why_not(self) -> str | None:
        tiles = GROUPED_TILES.get(self.arch, ())
        if self.arch in GROUPED_TILES and self.tile not in tiles:
            return f"tile of a grouped GEMM: got {self.tile}, expected one of {', '.join(map(str, tiles))}"
        if self.cluster != (1, 1) or self.schedule not in ("static", "cooperative"):
            got = f"{self.cluster}, {self.schedule!r}"
            return f"cluster, schedule of a grouped GEMM: got {got}, expected (1, 1), static or cooperative"
        if self.out_dtype == "fp4" or self.column_major or self.activation is not None:
            return "out_dtype, column_major, activation of a grouped GEMM: expected a row-major D that is none of these"
        return super().why_not()
