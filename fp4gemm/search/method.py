"""How a weight is quantized, as data: what calibrations, files and comparisons of methods share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fp4gemm import ops
from fp4gemm.reference.options import check_name
from fp4gemm.search.hessian import HessianAccumulator
from fp4gemm.search.scales import search_scales
from fp4gemm.tensor import FP4Tensor

CHOICES = ("amax", "4/6", "sse", "hessian")


@dataclass(frozen=True)
class Method:
    """A way to choose block scales, and codes.

    Attributes:
        metric: ``amax``: the largest magnitude of a block; ``4/6``: the better of two, by squares; ``sse`` and
            ``hessian``: the best of all, see :func:`fp4gemm.search_scales`.
        feedback: errors are made up for by later columns (``hessian``).
        damping: of a Hessian: this times its mean diagonal is added to its diagonal.
        block: values that share a scale, 16 or 32 (``sse``, ``hessian``).
        scaling: ``per_row`` or ``per_tensor``.
        outer: ``amax`` or ``search``, of the outer scale (``sse``, ``hessian``).

    Raises ValueError where a name is unknown or fields contradict each other.
    """

    metric: str = "sse"
    feedback: bool = False
    damping: float = 0.01
    block: int = 16
    scaling: str = "per_row"
    outer: str = "amax"

    def __post_init__(self) -> None:
        check_name("metric", self.metric, CHOICES)
        check_name("scaling", self.scaling, ("per_row", "per_tensor"))
        check_name("outer", self.outer, ("amax", "search"))
        if self.feedback and self.metric != "hessian":
            raise ValueError(f"feedback: expected metric='hessian', whose errors it feeds back, got {self.metric!r}")
        if self.block not in (16, 32):
            raise ValueError(f"block: expected 16 or 32, got {self.block!r}")
        if self.metric in ("amax", "4/6") and (self.block != 16 or self.outer != "amax"):
            raise ValueError(f"block, outer: expected 16 and 'amax' with metric={self.metric!r}, which has no choice")
        if not self.damping >= 0:
            raise ValueError(f"damping: expected 0 or more, got {self.damping!r}")

    @property
    def needs_hessian(self) -> bool:
        return self.metric == "hessian"

    def accumulator(self, k: int, device: Any = None) -> HessianAccumulator:
        """Of what a weight of ``k`` columns needs."""
        return HessianAccumulator(k, block=self.block, full=self.feedback, device=device)

    def hessian_bytes(self, k: int) -> int:
        """Of that accumulator's sums."""
        return 4 * (k * k if self.feedback else -(-k // self.block) * self.block**2)

    def quantize(self, w: Tensor, found: HessianAccumulator | None = None) -> FP4Tensor:
        """``w`` [N, K]; ``found``: of its inputs, where the metric is ``hessian``. Raises what the search raises."""
        if self.metric == "amax":
            return ops.quantize(w, scaling=self.scaling)
        if self.metric == "4/6":
            return ops.quantize(w, scaling=self.scaling, adaptive="mse")
        hessian = None
        if found is not None and self.needs_hessian:
            h = found.full_hessian if self.feedback else found.hessian
            hessian = h(damping=self.damping).to(w.device)
        return search_scales(
            w, self.metric, hessian=hessian, block=self.block, scaling=self.scaling, outer=self.outer,
            feedback=self.feedback,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON has it."""
        return asdict(self)
