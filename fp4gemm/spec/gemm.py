"""Blackwell: GEMMs by block-scaled tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.spec.common import DTYPES, short, unknown


@dataclass(frozen=True)
class GemmSpec:
    """D[M, N] = cast(outer_a * (outer_b * (A . B^T)) [+ bias]) of packed NVFP4 with 128x4 block scales, on Blackwell.

    A and B are K-major ("tn"), D row-major."""

    template: ClassVar[str] = "gemm_blockscaled.cu.jinja"
    uses_cutlass: ClassVar[bool] = True
    entry_points: ClassVar[tuple[str, ...]] = ("gemm", "make_params")

    arch: str
    out_dtype: str
    bias: str | None
    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    schedule: str

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.tile))
        bias = f"_bias_{self.bias}" if self.bias else ""
        cluster = f"c{self.cluster[0]}x{self.cluster[1]}"
        return f"gemm_{short(self.arch)}_tn_{tile}_{cluster}_{self.schedule}_{self.out_dtype}_rowcol{bias}"

    def why_not(self) -> str | None:
        if self.arch == "sm_90a":
            return "arch: got 'sm_90a', which has no block-scaled tensor cores: expected sm_100a or sm_120a"
        if self.schedule != "static":
            return f"schedule on {self.arch}: got {self.schedule!r}, expected static"
        if self.tile[0] not in (128, 256):
            return f"tile M on {self.arch}: got {self.tile[0]}, expected 128 or 256"
        if self.arch == "sm_120a" and self.cluster != (1, 1):
            return f"cluster on sm_120a: got {self.cluster}, expected (1, 1)"
        if any(n not in (1, 2, 4) for n in self.cluster) or self.cluster[0] * self.cluster[1] > 8:
            return f"cluster: got {self.cluster}, expected 1, 2 or 4 each way, at most 8 CTAs"
        return None if self.bias is None else unknown("bias", self.bias, DTYPES)
