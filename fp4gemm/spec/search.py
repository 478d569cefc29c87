"""Kernels that choose block scales by error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.formats import METRICS, SEARCH_BLOCKS
from fp4gemm.spec.common import short, unknown


@dataclass(frozen=True)
class SearchSpec:
    """Quantizer whose block scales have the lowest error (templates/include/fp4gemm/search.hpp).

    ``scaling``: outer scales come from amaxes (``amax``) or are ``given``; ``block``: values that share a scale;
    ``four_six``: of two scales, else of all; ``audit``: it also searches exhaustively, and counts."""

    template: ClassVar[str] = "search.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("search",)

    arch: str
    dtype: str
    scaling: str
    metric: str
    sf_layout: str
    block: int = 16
    vectorized: bool = True
    four_six: bool = False
    audit: bool = False

    @property
    def name(self) -> str:
        flags = ("_four_six" if self.four_six else "") + ("_audit" if self.audit else "")
        flags += "" if self.vectorized else "_scalar"
        parts = (short(self.arch), self.dtype, self.scaling, self.metric, str(self.block), self.sf_layout)
        return "search_" + "_".join(parts) + flags

    def why_not(self) -> str | None:
        if self.block not in SEARCH_BLOCKS:
            return f"block: got {self.block}, expected 16 or 32 values"
        return unknown("scaling", self.scaling, ("amax", "given")) or unknown("metric", self.metric, METRICS)
