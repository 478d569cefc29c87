"""Hopper: packing a weight, and GEMMs on the prepacked form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp4gemm.formats import PACKED_BLOCK, PACKED_BLOCK_BYTES
from fp4gemm.spec.common import DTYPES, short, unknown

SM90_SHARED_BYTES = 232448  # that a CTA can have
WGMMA_TOKENS = (8, 16, 32, 48, 64, 96, 128, 192, 256)


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
        return f"{self.direction}_{short(self.arch)}_{self.sf_layout}_{self.threads}"

    def why_not(self) -> str | None:
        if self.arch != "sm_90a":
            return f"arch: got {self.arch!r}, expected 'sm_90a'"
        if self.threads not in range(128, 1025, 128):
            return f"threads: got {self.threads}, expected a multiple of 128, at most 1024"
        return unknown("direction", self.direction, ("pack", "unpack"))


@dataclass(frozen=True)
class PackedCollectiveSpec:
    """D[M, N] = cast(outer_a * (outer_b * (x . w^T)) [+ bias] [+ beta * C]) on sm_90a, w a prepacked NVFP4 weight.

    ``a_dtype`` is that of x, ``source`` that of C or None; ``tile`` counts weight rows, tokens and K, ``cluster`` CTAs
    along weight rows, which share their tokens, and along tokens. ``stream_k``: clusters share the K of tiles that are
    no whole round (templates/include/fp4gemm/pieces.hpp)."""

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
    stream_k: bool = False

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.tile))
        flags = (f"_bias_{self.bias}" if self.bias else "") + (f"_source_{self.source}" if self.source else "")
        flags += "_stream_k" if self.stream_k else ""
        parts = (tile, f"c{self.cluster[0]}x{self.cluster[1]}", self.schedule, self.a_dtype, self.out_dtype, "rowcol")
        return f"gemm_packed_collective_{short(self.arch)}_" + "_".join(parts) + flags

    def workspace_bytes(self, sms: int) -> int:
        """That a launch needs on a GPU of so many SMs: where a CTA leaves the sums of a part of a tile, and flags."""
        rows, tokens, _ = self.tile
        return sms * (4 * rows * tokens + 8 * rows // PACKED_BLOCK) if self.stream_k else 0

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
        if self.stream_k and self.schedule != "cooperative":
            return f"stream_k: got schedule {self.schedule!r}, expected 'cooperative'"
        if self.stream_k and self.cluster not in ((1, 1), (2, 1)):  # larger ones may not all be resident at once
            return f"cluster of stream_k: got {self.cluster}, expected one or two CTAs along weight rows"
        sources = (None, self.out_dtype) + (("fp32",) if self.tile[:2] != (128, 256) else ())  # else 3 stages remain
        if self.source not in sources:
            return f"source of {self.out_dtype}, tile {self.tile}: got {self.source!r}, expected one of {sources}"
        problem = unknown("a_dtype", self.a_dtype, ("bf16", "fp16"))
        return problem or (None if self.bias is None else unknown("bias", self.bias, DTYPES))


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
    divide the panels and take turns along K, or, two for one panel, have tiles in turn; a cluster ``multicast`` row
    tiles that share tokens and ``split`` parts of K. ``grouped``: tokens are sorted by expert, and each expert has a
    weight of its own."""

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
    grouped: bool = False

    @property
    def config(self) -> tuple[int, ...]:
        groups = (self.row_groups, self.depth_groups)
        return (self.tokens, self.panels, *groups, self.multicast, self.split, self.stages)

    @property
    def name(self) -> str:
        return _packed_name("wgmma", self) + ("_grouped" if self.grouped else "")

    @property
    def accumulators(self) -> int:
        """Registers of a thread for sums."""
        return -(-self.panels // self.row_groups) * self.tokens // 2

    @property
    def roomy(self) -> bool:
        """Whether accumulators leave registers: for two k-steps in flight, and for row tiles with fewer panels."""
        groups = self.row_groups * self.depth_groups
        launch, producer = 65536 // (128 * (groups + 1)) // 8 * 8, 32 if groups > 2 else 24
        consumer = (launch * (groups + 1) - producer) // groups // 8 * 8
        return self.accumulators + 56 <= consumer

    @property
    def turns(self) -> bool:
        """Whether two warpgroups have tiles of their own, so that one computes while the other writes."""
        return (self.panels, self.row_groups, self.depth_groups, self.split) == (1, 2, 1, 1)

    @property
    def lag(self) -> int:
        """Stages that the second of two row groups stays behind the first: one computes while the other writes.

        Only for tiles that take long to write: smaller ones became slower (docs/performance.md)."""
        alone = (self.row_groups, self.depth_groups, self.split) == (2, 1, 1) and not self.turns
        return self.stages // 2 - 1 if alone and self.accumulators >= 128 else 0

    @property
    def uneven(self) -> bool:
        """Whether some row tiles may have fewer panels: one less, or, cut on the device, down to ``least_panels``."""
        return self.roomy and self.panels > self.row_groups and (self.multicast == 1 or self.grouped)

    @property
    def least_panels(self) -> int:
        """That a tile computes: a warpgroup may skip its last panel, but not its only one."""
        return self.panels - (self.panels % self.row_groups or self.row_groups) if self.uneven else self.panels

    def why_not(self) -> str | None:
        if self.tokens not in WGMMA_TOKENS:
            return f"tokens: got {self.tokens}, expected one of {', '.join(map(str, WGMMA_TOKENS))}"
        if not 1 <= self.row_groups * self.depth_groups <= 4 or (self.row_groups > self.panels and not self.turns):
            return (
                f"row_groups x depth_groups: got {self.row_groups} x {self.depth_groups} for {self.panels} panels, "
                "expected at most 4, and a panel for each row group (or 2 x 1 for one panel, without a split)"
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


PackedSpec = PackedCollectiveSpec | PackedMmaSpec | PackedWgmmaSpec


def _packed_name(engine: str, spec: PackedMmaSpec | PackedWgmmaSpec) -> str:
    flags = (f"_bias_{spec.bias}" if spec.bias else "") + ("_source" if spec.source else "")
    parts = (engine, short(spec.arch), "x".join(map(str, spec.config)), spec.a_dtype, spec.out_dtype)
    return "gemm_packed_" + "_".join(parts) + flags


def _packed_problem(spec: PackedMmaSpec | PackedWgmmaSpec) -> str | None:
    if spec.arch != "sm_90a":
        return f"arch: got {spec.arch!r}, expected 'sm_90a'"
    problem = unknown("a_dtype", spec.a_dtype, ("bf16", "fp16"))
    return problem or (None if spec.bias is None else unknown("bias", spec.bias, DTYPES))


def _shared_problem(size: int) -> str | None:
    return None if size <= SM90_SHARED_BYTES else f"shared memory: {size} bytes, a CTA has {SM90_SHARED_BYTES} at most"
