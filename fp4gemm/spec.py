"""What a kernel is: frozen dataclasses whose fields are all that its source may depend on, and ``check``, the one
predicate that says what is possible. ``name`` is the file name in ``generated/`` and begins a cache entry's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.formats import ADAPTIVE, CONVENTIONS, PACKED_BLOCK_BYTES, RESIDUAL_SIDES, SF_LAYOUTS

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
DTYPES = ("bf16", "fp16", "fp32")
INPUT_DTYPES = (*DTYPES, "e4m3")  # that a quantizer reads
KERNEL_SCALINGS = ("per_row", "per_tensor", "amaxes", "given")
SM90_SHARED_BYTES = 232448  # that a CTA can have
TILE = 128  # rows and columns of x that a CTA of a tile kernel has
TILE_THREADS = 256


def _short(arch: str) -> str:
    return arch.replace("_", "").rstrip("a")


def _thread_problem(threads: int) -> str | None:
    return None if threads in range(32, 1025, 32) else f"threads: got {threads}, expected whole warps, 32 to 1024"


def _tile_problem(ctas: int) -> str | None:
    return None if 1 <= ctas <= 8 else f"ctas: got {ctas}, expected 1 to 8 of {TILE_THREADS} threads on an SM"


@dataclass(frozen=True)
class QuantizeSpec:
    """Row-wise quantizer. ``scaling``: ``per_row`` reduces the row amax itself, ``per_tensor`` reads an amax,
    ``amaxes`` one for each row, ``given`` reads outer scales. A row has ``threads`` threads with ``blocks`` 16-value
    blocks each, a CTA ``rows`` rows; ``resident`` says that this covers the row, which is then read once;
    ``vectorized`` that rows are 16-byte aligned and K % 16 == 0. ``output``: ``packed`` NVFP4, or ``values``, code *
    block scale as exact bf16, for a GEMM that follows at once. ``stochastic``, ``adaptive`` (the error of 4/6) and
    ``residual`` (the side) are those of ``quantize``; ``gathered``: columns are taken in another order; ``noop``: a
    flag on the device may stop it."""

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

    @property
    def plain(self) -> bool:
        """Without any option."""
        return not (self.stochastic or self.adaptive or self.residual or self.gathered or self.noop)

    @property
    def name(self) -> str:
        shape = f"{self.threads}x{self.blocks}x{self.rows}"
        flags = ("" if self.vectorized else "_scalar") + ("" if self.resident else "_stream")
        flags += "" if self.output == "packed" else f"_{self.output}"
        flags += ("_stochastic" if self.stochastic else "") + (f"_{self.adaptive}" if self.adaptive else "")
        flags += f"_residual_{self.residual}" if self.residual else ""
        flags += ("_gathered" if self.gathered else "") + ("_noop" if self.noop else "")
        parts = (_short(self.arch), self.dtype, self.scaling, self.convention, self.sf_layout, shape)
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
        return (
            _unknown("scaling", self.scaling, KERNEL_SCALINGS)
            or (None if self.adaptive is None else _unknown("adaptive", self.adaptive, ADAPTIVE))
            or (None if self.residual is None else _unknown("residual", self.residual, RESIDUAL_SIDES))
            or _unknown("convention", self.convention, CONVENTIONS)
            or _unknown("output", self.output, ("packed", "values"))
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
class TileQuantizeSpec:
    """Quantizer of x, of its transpose, or of both from one read (templates/include/fp4gemm/quantize_tile.hpp).

    ``scaling``: it reads amaxes (``amax``) or decode multipliers (``given``). ``rows`` and ``columns`` are the scale
    layouts of the result and of the transposed one, None: not made. ``hadamard`` transforms the transposed one, with a
    mask given at launch; ``stochastic`` rounds both so; ``square``: one block scale for 16 x 16 values.
    ``vectorized``: rows of x are contiguous and 16-byte aligned. ``ctas``: that an SM has room for."""

    template: ClassVar[str] = "quantize_tile.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("quantize",)

    arch: str
    dtype: str
    scaling: str
    convention: str
    rows: str | None
    columns: str | None
    hadamard: bool = False
    stochastic: bool = False
    square: bool = False
    vectorized: bool = True
    ctas: int = 4

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
        options = [name for name in ("hadamard", "stochastic", "square") if getattr(self, name)]
        parts = (_short(self.arch), self.dtype, self.scaling, self.convention, *results, *options, str(self.ctas))
        return "quantize_tile_" + "_".join(parts) + ("" if self.vectorized else "_scalar")

    def why_not(self) -> str | None:
        if self.rows is None and self.columns is None:
            return "rows, columns: got None for both, expected a scale layout"
        if self.hadamard and (self.columns is None or self.square):
            return "hadamard: expected a transposed result, and a block scale for each of its blocks"
        return (
            _unknown("scaling", self.scaling, ("amax", "given"))
            or _unknown("convention", self.convention, CONVENTIONS)
            or _unknown("rows", self.row_scales, SF_LAYOUTS)
            or _unknown("columns", self.column_scales, SF_LAYOUTS)
            or _tile_problem(self.ctas)
        )


@dataclass(frozen=True)
class TileAmaxSpec:
    """Largest magnitudes of rows, of columns (of what they are transformed to, if ``hadamard``) and of the tensor, from
    one read of x, NaN ignored, into floats that are 0 before."""

    template: ClassVar[str] = "amax_tile.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("amax",)

    arch: str
    dtype: str
    rows: bool
    columns: bool
    hadamard: bool = False
    vectorized: bool = True
    ctas: int = 4

    @property
    def threads(self) -> int:
        return TILE_THREADS

    @property
    def name(self) -> str:
        wanted = [name for name in ("rows", "columns", "hadamard") if getattr(self, name)]
        parts = (_short(self.arch), self.dtype, *wanted, str(self.ctas))
        return "amax_tile_" + "_".join(parts) + ("" if self.vectorized else "_scalar")

    def why_not(self) -> str | None:
        if not self.rows and not self.columns:
            return "rows, columns: got False for both"
        if self.hadamard and not self.columns:
            return "hadamard: expected columns, which it transforms"
        return _tile_problem(self.ctas)


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


@dataclass(frozen=True)
class PackSpec:
    """Plain NVFP4 to the prepacked form of sm_90a (``direction`` pack), or back (unpack); 128 threads a block of it."""

    template: ClassVar[str] = "pack.cu.jinja"
    uses_cutlass: ClassVar[bool] = False

    arch: str
    sf_layout: str
    direction: str
    threads: int = 256

    @property
    def entry_points(self) -> tuple[str, ...]:
        return (self.direction,)

    @property
    def name(self) -> str:
        return f"{self.direction}_{_short(self.arch)}_{self.sf_layout}_{self.threads}"

    def why_not(self) -> str | None:
        if self.arch != "sm_90a":
            return f"arch: got {self.arch!r}, expected 'sm_90a'"
        if self.threads not in range(128, 1025, 128):
            return f"threads: got {self.threads}, expected a multiple of 128, at most 1024"
        return _unknown("direction", self.direction, ("pack", "unpack"))


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
        return f"gemm_{_short(self.arch)}_tn_{tile}_{cluster}_{self.schedule}_{self.out_dtype}_rowcol{bias}"

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
        return None if self.bias is None else _unknown("bias", self.bias, DTYPES)


@dataclass(frozen=True)
class PackedCollectiveSpec:
    """D[M, N] = cast(outer_a * (outer_b * (x . w^T)) [+ bias] [+ beta * C]) on sm_90a, w a prepacked NVFP4 weight.

    ``a_dtype`` is that of x, ``source`` that of C or None; ``tile`` counts weight rows, tokens and K, ``cluster`` CTAs
    along weight rows, which share their tokens, and along tokens."""

    template: ClassVar[str] = "gemm_packed_collective.cu.jinja"
    uses_cutlass: ClassVar[bool] = True
    entry_points: ClassVar[tuple[str, ...]] = ("gemm", "make_params")

    arch: str
    a_dtype: str
    out_dtype: str
    bias: str | None
    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    schedule: str
    source: str | None = None

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.tile))
        flags = (f"_bias_{self.bias}" if self.bias else "") + (f"_source_{self.source}" if self.source else "")
        parts = (tile, f"c{self.cluster[0]}x{self.cluster[1]}", self.schedule, self.a_dtype, self.out_dtype, "rowcol")
        return f"gemm_packed_collective_{_short(self.arch)}_" + "_".join(parts) + flags

    def why_not(self) -> str | None:
        rows = {"cooperative": 128, "pingpong": 64}.get(self.schedule)
        if self.arch != "sm_90a":
            return f"arch: got {self.arch!r}, expected 'sm_90a'"
        if rows is None:
            return f"schedule: got {self.schedule!r}, expected cooperative or pingpong"
        if self.tile not in ((rows, 64, 64), (rows, 128, 64), (rows, 256, 64)):
            return f"tile of {self.schedule}: got {self.tile}, expected ({rows}, 64, 128 or 256 tokens, 64)"
        if self.cluster[0] not in (1, 2, 4) or self.cluster[1] not in (1, 2):
            return f"cluster: got {self.cluster}, expected 1, 2 or 4 CTAs along weight rows, 1 or 2 along tokens"
        sources = (None, self.out_dtype) + (("fp32",) if self.tile[:2] != (128, 256) else ())  # else 3 stages remain
        if self.source not in sources:
            return f"source of {self.out_dtype}, tile {self.tile}: got {self.source!r}, expected one of {sources}"
        problem = _unknown("a_dtype", self.a_dtype, ("bf16", "fp16"))
        return problem or (None if self.bias is None else _unknown("bias", self.bias, DTYPES))


@dataclass(frozen=True)
class PackedMmaSpec:
    """The GEMM of PackedCollectiveSpec for a few tokens, by mma.sync (templates/include/fp4gemm/packed_mma.hpp).

    ``token_tiles`` of 8; ``warps`` of a CTA, each with a ring of ``stages`` of ``blocks`` 64 x 64 blocks of the weight;
    ``split``: CTAs of a cluster, which divide K; ``loaders``: further warps, which load tokens; ``pairs``: two warps
    share a panel, in parts that give the SM's schedulers equal work. ``quantize``: the dtype of x, where the kernel
    quantizes it on its way in, with the given outer scales; rows are then 16-byte aligned and K % 16 == 0."""

    template: ClassVar[str] = "gemm_packed_mma.cu.jinja"
    uses_cutlass: ClassVar[bool] = False
    entry_points: ClassVar[tuple[str, ...]] = ("gemm",)

    arch: str
    a_dtype: str
    out_dtype: str
    bias: str | None
    source: bool
    token_tiles: int
    warps: int
    stages: int
    blocks: int
    split: int
    loaders: int
    pairs: int
    quantize: str | None = None

    @property
    def config(self) -> tuple[int, ...]:
        return (self.token_tiles, self.warps, self.stages, self.blocks, self.split, self.loaders, self.pairs)

    @property
    def name(self) -> str:
        return _packed_name("mma", self) + (f"_quantize_{self.quantize}" if self.quantize else "")

    def why_not(self) -> str | None:
        if self.token_tiles not in (1, 2):
            return f"token_tiles: got {self.token_tiles}, expected 1 or 2"
        if not 1 <= self.warps <= 32 or self.warps * self.stages > 100 or self.stages < 1 or self.blocks < 1:
            return f"warps x stages: got {self.warps} x {self.stages}, expected at most 32 warps and 100 stages in all"
        if self.ring_bytes < 2048 * self.token_tiles:
            return f"stages x blocks: got {self.stages} x {self.blocks}, expected room for a warp's sums"
        if self.split not in (1, 2, 4):
            return f"split: got {self.split}, expected 1, 2 or 4"
        if not 0 <= self.loaders <= 32 - self.warps:
            return f"loaders: got {self.loaders}, expected at most {32 - self.warps} beside {self.warps} warps"
        if self.pairs not in (0, 1) or (self.pairs and self.blocks != 1):
            return f"pairs: got {self.pairs} with {self.blocks} blocks, expected 0, or 1 with 1 block"
        if self.quantize is not None and (self.a_dtype != "bf16" or self.quantize not in DTYPES):
            return f"quantize: got {self.quantize!r} to {self.a_dtype}, expected None, or one of {DTYPES} to bf16"
        return _packed_problem(self) or _shared_problem(self.shared_bytes)

    @property
    def ring_bytes(self) -> int:
        """Of one warp."""
        return self.stages * self.blocks * PACKED_BLOCK_BYTES

    @property
    def shared_bytes(self) -> int:
        """Shared memory without what depends on the problem: barriers and rings."""
        return 1024 + self.warps * self.ring_bytes


@dataclass(frozen=True)
class PackedWgmmaSpec:
    """The GEMM of PackedCollectiveSpec by WGMMA, K split inside a cluster (templates/include/fp4gemm/packed_wgmma.hpp).

    A CTA has ``tokens`` tokens and ``panels`` of 64 weight rows; ``row_groups`` x ``depth_groups`` warpgroups, which
    divide the panels and take turns along K; a cluster ``multicast`` row tiles that share tokens and ``split`` parts of
    K."""

    template: ClassVar[str] = "gemm_packed_wgmma.cu.jinja"
    uses_cutlass: ClassVar[bool] = True
    entry_points: ClassVar[tuple[str, ...]] = ("gemm",)

    arch: str
    a_dtype: str
    out_dtype: str
    bias: str | None
    source: bool
    tokens: int
    panels: int
    row_groups: int
    depth_groups: int
    multicast: int
    split: int
    stages: int

    @property
    def config(self) -> tuple[int, ...]:
        groups = (self.row_groups, self.depth_groups)
        return (self.tokens, self.panels, *groups, self.multicast, self.split, self.stages)

    @property
    def name(self) -> str:
        return _packed_name("wgmma", self)

    @property
    def accumulators(self) -> int:
        """Registers of a thread for sums."""
        return -(-self.panels // self.row_groups) * self.tokens // 2

    @property
    def roomy(self) -> bool:
        """Whether accumulators leave registers: for two k-steps in flight, and for row tiles with a panel less."""
        groups = self.row_groups * self.depth_groups
        launch, producer = 65536 // (128 * (groups + 1)) // 8 * 8, 32 if groups > 2 else 24
        consumer = (launch * (groups + 1) - producer) // groups // 8 * 8
        return self.accumulators + 56 <= consumer

    @property
    def uneven(self) -> bool:
        """Whether some row tiles may have a panel less than others."""
        return self.roomy and self.panels > self.row_groups and self.multicast == 1

    def why_not(self) -> str | None:
        if self.tokens not in WGMMA_TOKENS:
            return f"tokens: got {self.tokens}, expected one of {', '.join(map(str, WGMMA_TOKENS))}"
        if not 1 <= self.row_groups * self.depth_groups <= 4 or self.row_groups > self.panels:
            return (
                f"row_groups x depth_groups: got {self.row_groups} x {self.depth_groups} for {self.panels} panels, "
                "expected at most 4, and a panel for each row group"
            )
        more_terms = self.source or (self.bias is not None and self.out_dtype == "fp32")
        if more_terms and self.row_groups * self.depth_groups > 1 and self.accumulators > 64:
            terms = "C" if self.source else "a bias beside fp32 results"
            return f"source, bias: {self.panels} panels x {self.tokens} tokens leave no registers for {terms}"
        if self.multicast * self.split not in (1, 2, 4) or self.tokens // 8 % self.split:
            return f"multicast x split: got {self.multicast} x {self.split}, expected 1, 2 or 4 CTAs in all"
        if not 2 * self.depth_groups <= self.stages <= 60 or self.stages % self.depth_groups:
            return f"stages: got {self.stages}, expected a multiple of depth_groups, at least twice that, at most 60"
        return _packed_problem(self)


WGMMA_TOKENS = (16, 32, 64, 96, 128, 192, 256)
PackedSpec = PackedCollectiveSpec | PackedMmaSpec | PackedWgmmaSpec
KernelSpec = (
    QuantizeSpec | AmaxSpec | TileQuantizeSpec | TileAmaxSpec | DequantizeSpec | PackSpec | GemmSpec | PackedSpec
)


def _packed_name(engine: str, spec: PackedMmaSpec | PackedWgmmaSpec) -> str:
    flags = (f"_bias_{spec.bias}" if spec.bias else "") + ("_source" if spec.source else "")
    parts = (engine, _short(spec.arch), "x".join(map(str, spec.config)), spec.a_dtype, spec.out_dtype)
    return "gemm_packed_" + "_".join(parts) + flags


def _packed_problem(spec: PackedMmaSpec | PackedWgmmaSpec) -> str | None:
    if spec.arch != "sm_90a":
        return f"arch: got {spec.arch!r}, expected 'sm_90a'"
    problem = _unknown("a_dtype", spec.a_dtype, ("bf16", "fp16"))
    return problem or (None if spec.bias is None else _unknown("bias", spec.bias, DTYPES))


def _shared_problem(size: int) -> str | None:
    return None if size <= SM90_SHARED_BYTES else f"shared memory: {size} bytes, a CTA has {SM90_SHARED_BYTES} at most"


def _unknown(field: str, value: str, known: Iterable[str]) -> str | None:
    return None if value in known else f"{field}: got {value!r}, expected one of {', '.join(known)}"


def check(spec: KernelSpec) -> str | None:
    """Why this kernel cannot be, or None. Rendering, building and selection all ask here."""
    problem = _unknown("arch", spec.arch, ARCHS)
    if isinstance(spec, (QuantizeSpec, AmaxSpec, TileQuantizeSpec, TileAmaxSpec)):
        problem = problem or _unknown("dtype", spec.dtype, INPUT_DTYPES)
    elif isinstance(spec, DequantizeSpec):
        problem = problem or _unknown("dtype", spec.dtype, DTYPES)
    elif not isinstance(spec, PackSpec):
        problem = problem or _unknown("out_dtype", spec.out_dtype, DTYPES)
    if isinstance(spec, (QuantizeSpec, DequantizeSpec, PackSpec)):
        problem = problem or _unknown("sf_layout", spec.sf_layout, SF_LAYOUTS)
    return problem or spec.why_not()
