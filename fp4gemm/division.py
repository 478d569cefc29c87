"""How a GEMM on a prepacked weight divides a problem among CTAs: plain numbers, known without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fp4gemm.formats import PACKED_BLOCK, PACKED_BLOCK_BYTES
from fp4gemm.spec import PackedMmaSpec, PackedSpec, PackedWgmmaSpec

SM_SHARED_BYTES = 228 << 10
SHARED_BYTES = 232448  # that a CTA of sm_90 can have
_SYSTEM_BYTES = 1 << 10  # of shared memory that every CTA takes beside its own
ALONE_BYTES = SM_SHARED_BYTES // 2 - _SYSTEM_BYTES + 16  # the least of which no two CTAs fit on an SM
_STATIC_BYTES = 512  # at most, that a CTA has beside what a launch asks for
_UNIT = 128  # of shared memory: what a CTA takes is a multiple of it
_ONE_PIECE = 256  # rows times blocks of tokens up to which they come in one piece
# The most token tiles that pass over the rows together, and the most tokens of these.
_RASTER, _RASTER_TOKENS = 8, 1024
_LEAST_PART = 8  # blocks of K that a cluster has at least of tiles that are shared, if that makes a part for each


def room_for(ctas: int) -> int:
    """Shared memory, in bytes, of a launch of which so many CTAs (1 to 16) fit on an SM, and no more."""
    return SM_SHARED_BYTES // ctas // _UNIT * _UNIT - _SYSTEM_BYTES - _STATIC_BYTES


@dataclass(frozen=True)
class Division:
    """CTAs of a launch, their shared memory (None: as the kernel says), and the numbers that tell each its part."""

    ctas: int
    shared_bytes: int | None
    numbers: tuple[int, ...]  # from row_tiles to panels_extra of PackedGemmArguments


def divide(
    spec: PackedMmaSpec | PackedWgmmaSpec, m: int, n: int, k: int, sms: int, experts: int = 0
) -> Division | None:
    """How ``spec`` divides x [m, k] . w [n, k]^T on a GPU of ``sms`` SMs; None where it cannot.

    ``experts``: of a grouped kernel, the weights [n, k] that the m tokens share.
    """
    panels, blocks = -(-n // PACKED_BLOCK), -(-k // PACKED_BLOCK)
    if isinstance(spec, PackedMmaSpec):
        return _divide_mma(spec, m, panels, blocks, sms)
    return _divide_grouped(spec, m, panels, sms, experts) if spec.grouped else _divide_wgmma(spec, m, panels, sms)


def _divide_mma(spec: PackedMmaSpec, m: int, panels: int, blocks: int, sms: int) -> Division | None:
    """As many clusters as are resident at once, or as panels allow; all warps of a CTA at work, several to a panel."""
    most = spec.warps * spec.split // 4  # panels of a cluster: a warp writes one 16-row group at most
    if most == 0 or m > 8 * spec.token_tiles:
        return None
    clusters = max(min(sms // spec.split, panels), -(-panels // most))
    each, extra = divmod(panels, clusters)
    cluster_panels, cta_blocks = each + (extra > 0), -(-blocks // spec.split)
    depth = 2 if spec.pairs else min(spec.warps // cluster_panels, -(-cta_blocks // spec.blocks))
    if depth * cluster_panels > spec.warps:
        return None
    shared = mma_shared_bytes(spec, cluster_panels) + m * (cta_blocks * 128 + 16)
    if shared > SHARED_BYTES:
        return None
    # Pairs of warps, an odd number of them: shares that give the four schedulers equal work.
    first_turn = 16 if cluster_panels % 2 == 0 or cluster_panels == 1 else 16 - 16 // (cluster_panels - 1)
    pieces = 1 if m * cta_blocks <= _ONE_PIECE else 4
    piece_blocks = -(-cta_blocks // (4 * pieces)) * 4
    # Where two CTAs fit on an SM, an early dependent one would take the place of another of its own grid.
    launch_early = int(shared >= ALONE_BYTES)
    numbers = (0, 0, 0, depth, 65536 // depth + 1, first_turn, piece_blocks, 0, launch_early, each, extra)
    return Division(clusters * spec.split, shared, numbers)


def mma_shared_bytes(spec: PackedMmaSpec, panels: int) -> int:
    """Without the tokens: barriers, rings and the sums of peers, as in packed_mma.hpp."""
    peers = (spec.split - 1) * (4 // spec.split) * spec.token_tiles * 512
    return 1024 + spec.warps * spec.stages * spec.blocks * PACKED_BLOCK_BYTES + panels * peers


def _divide_wgmma(spec: PackedWgmmaSpec, m: int, panels: int, sms: int) -> Division | None:
    """A persistent grid: as many clusters as fit. Uneven row tiles share the panels so that no round is half empty."""
    if wgmma_shared_bytes(spec) > SHARED_BYTES:
        return None
    cluster = spec.multicast * spec.split
    row_tiles, token_tiles = -(-panels // (spec.panels * spec.multicast)), -(-m // spec.tokens)
    clusters = min(_resident(cluster, sms), row_tiles * token_tiles)
    full_tiles = row_tiles * spec.multicast
    if spec.uneven:
        rounds = -(-row_tiles * token_tiles // clusters)
        row_tiles = max(row_tiles, min(rounds * clusters // token_tiles, panels // (spec.panels - 1)))
        full_tiles = max(0, panels - row_tiles * (spec.panels - 1))
        clusters = min(clusters, -(-row_tiles * token_tiles // rounds))
    numbers = (row_tiles, token_tiles, min(token_tiles, _raster(spec)), *(0,) * 7, full_tiles)
    return Division(clusters * cluster, None, numbers)


def _divide_grouped(spec: PackedWgmmaSpec, m: int, panels: int, sms: int, experts: int) -> Division | None:
    """The same where the device alone knows how many tiles there are: at most one more per expert that has tokens.

    The device also cuts the rows into tiles, where the kernel's may be uneven.
    """
    shared = wgmma_shared_bytes(spec) + 16 + 8 * (experts + 1)
    if shared > SHARED_BYTES:
        return None
    cluster = spec.multicast * spec.split
    row_tiles = -(-panels // (spec.panels * spec.multicast))
    most = -(-panels // (spec.least_panels * spec.multicast)) * (m // spec.tokens + min(experts, m))
    numbers = (row_tiles, 0, _raster(spec), *(0,) * 8)
    return Division(min(_resident(cluster, sms), most) * cluster, shared, numbers)


def _raster(spec: PackedWgmmaSpec) -> int:
    return min(_RASTER, _RASTER_TOKENS // spec.tokens)


def _resident(cluster: int, sms: int) -> int:
    """How many clusters of so many CTAs run at once, one CTA on an SM."""
    # GPCs are whole pairs of SMs, but not whole fours.
    return max(1, sms // cluster if cluster <= 2 else sms * 9 // (10 * cluster))


def wgmma_shared_bytes(spec: PackedWgmmaSpec) -> int:
    """As in packed_wgmma_config.hpp: alignment and barriers, stages, partial sums, lines of results."""
    stage = -(-spec.tokens // 8) * 1024 + spec.panels * PACKED_BLOCK_BYTES
    fragments = spec.tokens // 8 // spec.split
    partials = spec.depth_groups * spec.split if spec.depth_groups > 1 else spec.split - 1
    lines = spec.row_groups * 4096 if spec.out_dtype != "fp32" and spec.depth_groups == 1 and fragments % 2 == 0 else 0
    return 2048 + spec.stages * stage + spec.panels * partials * fragments * 2048 + lines


class Sequence(NamedTuple):
    """What the CTA that has the most to do does, one after the other."""

    tiles: int  # or pieces of them
    blocks: int  # of K, of all these tiles; by mma.sync, of the weight
    sharing: float = 0.0  # clusters to a tile of which they share the K


def longest_sequence(spec: PackedSpec, m: int, n: int, k: int, sms: int) -> Sequence | None:
    """Of x [m, k] . w [n, k]^T on a GPU of ``sms`` SMs; None where ``spec`` cannot divide it."""
    panels, blocks = -(-n // PACKED_BLOCK), -(-k // PACKED_BLOCK)
    if isinstance(spec, PackedMmaSpec):
        division = _divide_mma(spec, m, panels, blocks, sms)
        if division is None:
            return None
        clusters = division.ctas // spec.split
        rounds = -(-clusters // _resident(spec.split, sms))
        return Sequence(rounds, rounds * -(-panels // clusters) * -(-blocks // spec.split))
    if isinstance(spec, PackedWgmmaSpec):
        division = _divide_wgmma(spec, m, panels, sms)
        if division is None:
            return None
        clusters = division.ctas // (spec.multicast * spec.split)
        rounds = -(-division.numbers[0] * division.numbers[1] // clusters)
        return Sequence(rounds, rounds * -(-blocks // spec.split))
    rows, tokens = spec.tile[0] * spec.cluster[0], spec.tile[1] * spec.cluster[1]
    tiles, clusters = -(-n // rows) * -(-m // tokens), _resident(spec.cluster[0] * spec.cluster[1], sms)
    if not spec.stream_k or tiles % clusters == 0:
        rounds = -(-tiles // clusters)
        return Sequence(rounds, rounds * blocks)
    rest = tiles % clusters  # as in pieces.hpp, whose parts end at the border of a tile where there is one nearby
    cut = rest + clusters if 2 * rest < clusters < tiles else rest
    parts = max(1, min(clusters, max(cut, cut * blocks // _LEAST_PART)))
    rounds = (tiles - cut) // clusters
    return Sequence(rounds + -(-cut // parts), rounds * blocks + -(-cut * blocks // parts), parts / cut)
