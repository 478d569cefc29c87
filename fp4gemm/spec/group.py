"""Quantizers and amaxes of a group: the dense kernels, with members in the place of the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.formats import PREPACKED, VALUES
from fp4gemm.spec.common import short, thread_problem
from fp4gemm.spec.quantize import QuantizeSpec, TileAmaxSpec, TileQuantizeSpec

_TEMPLATES = {
    QuantizeSpec: "quantize_group.cu.jinja",
    TileQuantizeSpec: "quantize_tile_group.cu.jinja",
    TileAmaxSpec: "amax_tile_group.cu.jinja",
}


@dataclass(frozen=True)
class GroupSpec:
    """``kernel`` by persistent CTAs that go through the members of a group, whose sizes they find in memory
    (templates/include/fp4gemm/work_items.hpp)."""

    uses_cutlass: ClassVar[bool] = False

    kernel: QuantizeSpec | TileQuantizeSpec | TileAmaxSpec
    uniform: bool = False  # members of one shape, which together are one matrix with a CTA for each part of its rows

    @property
    def arch(self) -> str:
        return self.kernel.arch

    @property
    def template(self) -> str:
        return _TEMPLATES[type(self.kernel)]

    @property
    def entry_points(self) -> tuple[str, ...]:
        return self.kernel.entry_points

    @property
    def name(self) -> str:
        return f"group_{self.kernel.name}{'_uniform' if self.uniform else ''}"

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.kernel.threads * (self.kernel.rows if isinstance(self.kernel, QuantizeSpec) else 1)

    @property
    def ctas(self) -> int:
        """That an SM has room for."""
        if not isinstance(self.kernel, QuantizeSpec):
            return self.kernel.ctas
        # Noise takes registers.
        return (768 if self.kernel.stochastic and self.threads <= 256 else 1024) // self.threads

    @property
    def alignment(self) -> int:
        """Elements on which a member must begin."""
        sizes = {"bf16": 2, "fp16": 2, "fp32": 4, "e4m3": 1}
        return 16 // sizes[self.kernel.dtype] if self.kernel.vectorized else 1

    def why_not(self) -> str | None:
        kernel = self.kernel
        if problem := kernel.why_not():
            return problem
        if isinstance(kernel, TileQuantizeSpec):
            if kernel.square:
                return "square: got True, expected 1 x 16 blocks in a group"
            for way, form in (("rows", kernel.rows), ("columns", kernel.columns)):
                if form in (VALUES, PREPACKED):
                    return f"{way}: got {form!r}, expected a scale layout or None in a group"
        if isinstance(kernel, QuantizeSpec):
            options = (kernel.adaptive, kernel.residual, kernel.gathered, kernel.noop, kernel.producer)
            if any(options) or kernel.output != "packed":
                return "kernel: expected a packed result and no option but stochastic in a group"
        if self.uniform and not (isinstance(kernel, QuantizeSpec) and kernel.scaling == "per_row" and kernel.plain):
            return "uniform: got True, expected rows with an amax each, rounded to nearest"
        return None


@dataclass(frozen=True)
class GroupSumsSpec:
    """Sums of the columns of each member from those of each 128 rows; members begin on ``alignment`` elements."""

    template: ClassVar[str] = "sum_group.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("sum",)

    arch: str
    alignment: int
    threads: int = 256

    @property
    def ctas(self) -> int:
        """That run at once on an SM."""
        return 1024 // self.threads

    @property
    def name(self) -> str:
        return f"group_sum_{short(self.arch)}_{self.threads}_{self.alignment}"

    def why_not(self) -> str | None:
        if self.alignment not in (1, 4, 8, 16):
            return f"alignment: got {self.alignment}, expected 1, 4, 8 or 16 elements"
        return thread_problem(self.threads)
