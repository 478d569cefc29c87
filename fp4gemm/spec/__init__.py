"""What a kernel is: frozen dataclasses whose fields are all that its source may depend on, and ``check``, the one
predicate that says what is possible. ``name`` is the file name in ``generated/`` and begins a cache entry's."""

from __future__ import annotations

from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.spec.common import ARCHS, DTYPES, INPUT_DTYPES, unknown
from fp4gemm.spec.gemm import ACTIVATIONS, GemmSpec, GroupedGemmSpec
from fp4gemm.spec.group import GroupSpec, GroupSumsSpec
from fp4gemm.spec.packed import (
    SM90_SHARED_BYTES,
    WGMMA_TOKENS,
    PackedCollectiveSpec,
    PackedMmaSpec,
    PackedSpec,
    PackedWgmmaSpec,
    PackSpec,
)
from fp4gemm.spec.quantize import (
    ANY_SIGNS,
    KERNEL_SCALINGS,
    TILE,
    TILE_THREADS,
    AmaxSpec,
    DequantizeSpec,
    QuantizeSpec,
    TileAmaxSpec,
    TileQuantizeSpec,
)
from fp4gemm.spec.search import SearchSpec

__all__ = [
    "ACTIVATIONS",
    "ANY_SIGNS",
    "ARCHS",
    "DTYPES",
    "INPUT_DTYPES",
    "KERNEL_SCALINGS",
    "SM90_SHARED_BYTES",
    "TILE",
    "TILE_THREADS",
    "WGMMA_TOKENS",
    "AmaxSpec",
    "DequantizeSpec",
    "GemmSpec",
    "GroupSpec",
    "GroupSumsSpec",
    "GroupedGemmSpec",
    "KernelSpec",
    "PackSpec",
    "PackedCollectiveSpec",
    "PackedMmaSpec",
    "PackedSpec",
    "PackedWgmmaSpec",
    "QuantizeSpec",
    "SearchSpec",
    "TileAmaxSpec",
    "TileQuantizeSpec",
    "check",
]

KernelSpec = (
    QuantizeSpec
    | AmaxSpec
    | TileQuantizeSpec
    | TileAmaxSpec
    | GroupSpec
    | GroupSumsSpec
    | SearchSpec
    | DequantizeSpec
    | PackSpec
    | GemmSpec
    | PackedSpec
)


def check(spec: KernelSpec) -> str | None:
    """Why this kernel cannot be, or None. Rendering, building and selection all ask here."""
    if isinstance(spec, GroupSpec):
        return check(spec.kernel) or spec.why_not()
    problem = unknown("arch", spec.arch, ARCHS)
    if isinstance(spec, (QuantizeSpec, AmaxSpec, TileQuantizeSpec, TileAmaxSpec, SearchSpec)):
        problem = problem or unknown("dtype", spec.dtype, INPUT_DTYPES)
    elif isinstance(spec, DequantizeSpec):
        problem = problem or unknown("dtype", spec.dtype, DTYPES)
    elif not isinstance(spec, (PackSpec, GroupSumsSpec)):
        known = (*DTYPES, "fp4") if isinstance(spec, GemmSpec) else DTYPES
        problem = problem or unknown("out_dtype", spec.out_dtype, known)
    if isinstance(spec, (QuantizeSpec, SearchSpec, DequantizeSpec, PackSpec)):
        problem = problem or unknown("sf_layout", spec.sf_layout, SF_LAYOUTS)
    return problem or spec.why_not()
