"""What a kernel is: frozen dataclasses whose fields are all that its source may depend on, and ``check``, the one
predicate that says what is possible. ``name`` is the file name in ``generated/`` and begins a cache entry's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.formats import CONVENTIONS, SF_LAYOUTS

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
DTYPES = ("bf16", "fp16", "fp32")
KERNEL_SCALINGS = ("per_row", "per_tensor", "given")


def _short(arch: str) -> str:
    return arch.replace("_", "").rstrip("a")


def _thread_problem(threads: int) -> str | None:
    return None if threads in range(32, 1025, 32) else f"threads: got {threads}, expected whole warps, 32 to 1024"


@dataclass(frozen=True)
class QuantizeSpec:
    """Row-wise quantizer. ``scaling``: ``per_row`` reduces the row amax itself, ``per_tensor`` reads an amax, ``given``
    reads outer scales. A row has ``threads`` threads with ``blocks`` 16-value blocks each, a CTA ``rows`` rows;
    ``resident`` says that this covers the row, which is then read once; ``vectorized`` that rows are 16-byte aligned
    and K % 16 == 0."""

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

    @property
    def name(self) -> str:
        shape = f"{self.threads}x{self.blocks}x{self.rows}"
        flags = ("" if self.vectorized else "_scalar") + ("" if self.resident else "_stream")
        parts = (_short(self.arch), self.dtype, self.scaling, self.convention, self.sf_layout, shape)
        return "quantize_" + "_".join(parts) + flags

    def why_not(self) -> str | None:
        if self.threads % 32 or not 32 <= self.threads * self.rows <= 1024:
            return f"threads x rows: got {self.threads} x {self.rows}, expected whole warps and at most 1024 in all"
        if not 1 <= self.blocks <= 8:
            return f"blocks: got {self.blocks}, expected 1 to 8 (they live in registers)"
        if self.rows not in (1, 2, 4, 8):
            return f"rows: got {self.rows}, expected 1, 2, 4 or 8 (they share a tile of the scale layout)"
        return _unknown("scaling", self.scaling, KERNEL_SCALINGS) or _unknown(
            "convention", self.convention, CONVENTIONS
        )


@dataclass(frozen=True)
class AmaxSpec:
    """max(|x|) of a whole tensor, NaN ignored, into one fp32 that is 0 before."""

    template: ClassVar[str] = "amax.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("amax",)

    arch: str
    dtype: str
    vectorized: bool = True
    threads: int = 256

    @property
    def name(self) -> str:
        return f"amax_{_short(self.arch)}_{self.dtype}_{self.threads}" + ("" if self.vectorized else "_scalar")

    def why_not(self) -> str | None:
        return _thread_problem(self.threads)


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
        return f"dequantize_{_short(self.arch)}_{self.dtype}_{self.sf_layout}_{outer}_{self.threads}x{self.units}"

    def why_not(self) -> str | None:
        if self.units < 1:
            return f"units: got {self.units}, expected at least 1"
        return _thread_problem(self.threads)


# Tile rules of CUTLASS's collectives for each arch: (schedule, M of the tile) that exist.
_TILE_M = {
    "sm_90a": {"cooperative": (128, 256), "pingpong": (64, 128)},
    "sm_100a": {"static": (128, 256)},
    "sm_120a": {"static": (128, 256)},
}


@dataclass(frozen=True)
class GemmSpec:
    """D[M, N] = cast(outer_a * (outer_b * (A . B^T)) [+ bias]), A and B K-major ("tn"), D row-major.

    On sm_90a operands are NVFP4 values as exact bf16; on sm_100a and sm_120a packed NVFP4 with 128x4 block scales."""

    uses_cutlass: ClassVar[bool] = True
    entry_points: ClassVar[tuple[str, ...]] = ("gemm", "make_params")

    arch: str
    out_dtype: str
    bias: str | None
    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    schedule: str

    @property
    def template(self) -> str:
        return "gemm_sm90.cu.jinja" if self.arch == "sm_90a" else "gemm_blockscaled.cu.jinja"

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.tile))
        bias = f"_bias_{self.bias}" if self.bias else ""
        cluster = f"c{self.cluster[0]}x{self.cluster[1]}"
        return f"gemm_{_short(self.arch)}_tn_{tile}_{cluster}_{self.schedule}_{self.out_dtype}_rowcol{bias}"

    def why_not(self) -> str | None:
        schedules = _TILE_M[self.arch]
        if self.schedule not in schedules:
            return f"schedule on {self.arch}: got {self.schedule!r}, expected one of {', '.join(schedules)}"
        if self.tile[0] not in schedules[self.schedule]:
            return f"tile M of {self.schedule} on {self.arch}: got {self.tile[0]}, expected {schedules[self.schedule]}"
        if self.arch == "sm_120a" and self.cluster != (1, 1):
            return f"cluster on sm_120a: got {self.cluster}, expected (1, 1)"
        if any(n not in (1, 2, 4) for n in self.cluster) or self.cluster[0] * self.cluster[1] > 8:
            return f"cluster: got {self.cluster}, expected 1, 2 or 4 each way, at most 8 CTAs"
        return None if self.bias is None else _unknown("bias", self.bias, DTYPES)


KernelSpec = QuantizeSpec | AmaxSpec | DequantizeSpec | GemmSpec


def _unknown(field: str, value: str, known: Iterable[str]) -> str | None:
    return None if value in known else f"{field}: got {value!r}, expected one of {', '.join(known)}"


def check(spec: KernelSpec) -> str | None:
    """Why this kernel cannot be, or None. Rendering, building and selection all ask here."""
    problem = _unknown("arch", spec.arch, ARCHS)
    problem = problem or _unknown("dtype", spec.out_dtype if isinstance(spec, GemmSpec) else spec.dtype, DTYPES)
    if isinstance(spec, (QuantizeSpec, DequantizeSpec)):
        problem = problem or _unknown("sf_layout", spec.sf_layout, SF_LAYOUTS)
    return problem or spec.why_not()


def sm90_gemms(out_dtype: str, bias: str | None) -> tuple[GemmSpec, GemmSpec]:
    """The two Hopper GEMMs that ``select`` chooses from: large tiles, and small ones for what would leave SMs idle."""
    return (
        GemmSpec("sm_90a", out_dtype, bias, (128, 256, 64), (2, 1), "cooperative"),
        GemmSpec("sm_90a", out_dtype, bias, (64, 128, 64), (1, 1), "pingpong"),
    )


def _default_gemms(arch: str) -> list[KernelSpec]:
    if arch == "sm_100a":
        return [GemmSpec(arch, "bf16", None, (128, 128, 256), (1, 1), "static")]
    if arch == "sm_120a":
        return [GemmSpec(arch, "bf16", None, (128, 128, 128), (1, 1), "static")]
    return [spec for out, bias in (*((d, None) for d in DTYPES), ("bf16", "bf16")) for spec in sm90_gemms(out, bias)]


def default_variants(archs: Iterable[str] = ARCHS) -> list[KernelSpec]:
    """For each arch a bf16 kernel of each kind, and the GEMMs: what ``generated/`` shows, ``build --all`` builds."""
    specs: list[KernelSpec] = []
    for arch in archs:
        specs += [
            QuantizeSpec(
                arch, "bf16", scaling, convention, layout, *((256, 2, 1) if layout == "linear" else (128, 4, 4))
            )
            for scaling, convention in (("per_row", "te_per_token"), ("per_tensor", "te"), ("given", "te_per_token"))
            for layout in SF_LAYOUTS
        ]
        specs.append(AmaxSpec(arch, "bf16"))
        specs += [DequantizeSpec(arch, "bf16", layout, False) for layout in SF_LAYOUTS]
        specs += _default_gemms(arch)
    return specs
