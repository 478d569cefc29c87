"""How a GEMM on a prepacked weight divides a problem among CTAs: plain numbers, known without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from fp4gemm.formats import PACKED_BLOCK
from fp4gemm.spec import SM90_SHARED_BYTES, PackedMmaSpec, PackedWgmmaSpec

_RASTER = 8  # token tiles that pass over the rows together


@dataclass(frozen=True)
class Division:
    """CTAs of a launch, their shared memory, and the eight numbers that tell each its part."""

    ctas: int
    shared_bytes: int
    numbers: tuple[int, int, int, int, int, int, int, int]


def divide(spec: PackedMmaSpec | PackedWgmmaSpec, m: int, n: int, k: int, sms: int) -> Division | None:
    """How ``spec`` divides x [m, k] . w [n, k]^T on a GPU of ``sms`` SMs; None where it cannot."""
    panels, blocks = -(-n // PACKED_BLOCK), -(-k // PACKED_BLOCK)
    if isinstance(spec, PackedMmaSpec):
        return _divide_mma(spec, m, panels, blocks, sms)
    return _divide_wgmma(spec, m, panels, sms)


def _divide_mma(spec: PackedMmaSpec, m: int, panels: int, blocks: int, sms: int) -> Division | None:
    """One cluster an SM pair (or SM) where panels allow, warps first along panels, then along K."""
    clusters = min(sms // spec.split, panels)
    most = spec.warps * spec.split // 4  # panels of a cluster: a warp writes one 16-row group at most
    if most == 0:
        return None
    clusters = max(clusters, -(-panels // most))
    row_groups = -(-panels // clusters)
    cta_blocks = -(-blocks // spec.split)
    depth_log2 = min(spec.warps // row_groups, cta_blocks).bit_length() - 1
    shared = spec.shared_bytes + m * (cta_blocks * 128 + 16)
    if m > 8 * spec.token_tiles or shared > SM90_SHARED_BYTES:
        return None
    warp_blocks = -(-cta_blocks // (1 << depth_log2))
    each, extra = divmod(panels, clusters)
    return Division(clusters * spec.split, shared, (0, 0, 0, row_groups, depth_log2, warp_blocks, each, extra))


def _divide_wgmma(spec: PackedWgmmaSpec, m: int, panels: int, sms: int) -> Division:
    """A persistent grid: as many clusters as fit."""
    row_tiles = -(-panels // (spec.row_groups * spec.multicast))
    token_tiles = -(-m // spec.tokens)
    cluster = spec.multicast * spec.split
    clusters = min(sms // cluster, row_tiles * token_tiles)
    raster = min(token_tiles, _RASTER)
    return Division(clusters * cluster, -1, (row_tiles, token_tiles, raster, 0, 0, 0, 0, 0))
