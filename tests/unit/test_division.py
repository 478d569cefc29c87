"""Division of GEMMs on prepacked weights: every panel and every block of K has one owner, and what it needs fits."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4gemm import select, table
from fp4gemm.division import SHARED_BYTES, SM_SHARED_BYTES, divide, room_for, wgmma_shared_bytes
from fp4gemm.spec import WGMMA_TOKENS, PackedMmaSpec, PackedWgmmaSpec, check

MMA = PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, 1, 8, 4, 2, 2, 0, 0)
PAIRS = PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, 2, 14, 2, 1, 2, 2, 1)
WGMMA = PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 128, 2, 2, 1, 1, 1, 6)
SMS = 132  # of an H200
ROUND = 32  # PackedMmaConfig::kRound
PIECES = 8  # PackedMmaConfig::kPieces


@dataclass(frozen=True)
class Warp:
    """Which panel of its cluster a warp has, and its share of K: what packed_mma.hpp makes of the numbers."""

    row_group: int
    depth: int
    blocks: list[int]


def warps_of(spec, numbers, cta_blocks):
    depth, depth_inverse, first_turn = numbers[3:6]
    each, extra = numbers[-2:]
    mixed = (each + (extra > 0)) // 2 * 4
    for warp in range(spec.warps):
        if spec.pairs:
            row_group = warp // 4 * 2 + warp % 2 if warp < mixed else warp // 2
            share = warp // 2 % 2 if warp < mixed else warp % 2
            turn = first_turn if 2 * row_group < mixed else ROUND // 2
            mine = [b for b in range(cta_blocks) if (b % ROUND >= turn) == share]
        else:
            row_group = warp * depth_inverse >> 16
            share = warp - row_group * depth
            assert (row_group, share) == divmod(warp, depth)
            mine = [b for b in range(cta_blocks) if b // spec.blocks % depth == share]
        yield Warp(row_group, share, mine)


def check_mma(spec, m, n, k, sms):
    division = divide(spec, m, n, k, sms)
    if division is None:
        return None
    panels, blocks = -(-n // 64), -(-k // 64)
    *_, depth, _, first_turn, piece_blocks, weights_first, launch_early, each, extra = division.numbers
    assert division.numbers[:3] == (0, 0, 0)
    assert m <= 8 * spec.token_tiles
    clusters, rest = divmod(division.ctas, spec.split)
    assert rest == 0
    # Every panel belongs to one cluster, and every cluster has one.
    begins = [c * each + min(c, extra) for c in range(clusters)]
    ends = [begin + each + (c < extra) for c, begin in enumerate(begins)]
    assert each >= 1
    assert (begins[0], ends[-1], begins[1:]) == (0, panels, ends[:-1])
    most = ends[0]
    assert most * 4 <= spec.warps * spec.split  # a warp writes 16 rows of what its CTA writes of a panel
    # Every block of K belongs to one warp of each panel.
    assert 1 <= depth <= spec.warps // most
    cta_blocks = [blocks * (rank + 1) // spec.split - blocks * rank // spec.split for rank in range(spec.split)]
    assert sum(cta_blocks) == blocks
    for count in set(cta_blocks):
        warps = [warp for warp in warps_of(spec, division.numbers, count) if warp.row_group < most]
        assert sorted((warp.row_group, warp.depth) for warp in warps) == [
            (r, d) for r in range(most) for d in range(depth)
        ]
        for row_group in range(most):
            assert sorted(b for warp in warps if warp.row_group == row_group for b in warp.blocks) == list(range(count))
    assert 0 < first_turn < ROUND
    # Tokens come in pieces, of which there are barriers.
    assert piece_blocks % 4 == 0
    assert max(cta_blocks) <= piece_blocks * PIECES
    assert weights_first == 0  # each launch says it
    # Tokens of a CTA, each row padded by 16 bytes, behind barriers, rings and the sums of peers.
    peers = most * (spec.split - 1) * (4 // spec.split) * spec.token_tiles * 512
    assert division.shared_bytes == spec.shared_bytes + peers + m * (max(cta_blocks) * 128 + 16)
    assert division.shared_bytes <= SHARED_BYTES
    assert launch_early == (2 * (division.shared_bytes + 1024) > SM_SHARED_BYTES)
    return division


mma_specs = st.builds(
    PackedMmaSpec, *map(st.just, ("sm_90a", "bf16", "bf16", None, False)),
    token_tiles=st.sampled_from((1, 2, 4)), warps=st.integers(1, 32), stages=st.integers(1, 8),
    blocks=st.integers(1, 3), split=st.sampled_from((1, 2, 4)), loaders=st.integers(0, 4), pairs=st.integers(0, 1),
).filter(lambda spec: check(spec) is None)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(mma_specs, st.integers(1, 40), st.integers(1, 40000), st.integers(1, 33000), st.integers(4, 160))
def test_mma_divides_all_of_it_once(spec, m, n, k, sms):
    check_mma(spec, m, n, k, sms)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 64 * 131, 64 * 132, 64 * 133, 64 * 66 * 3, 64 * 66 * 5, 100000])
@pytest.mark.parametrize("k", [1, 64, 65, 4096, 4160, 8200])
@pytest.mark.parametrize("spec", [MMA, PAIRS], ids=["alone", "pairs"])
def test_mma_at_the_edges(spec, n, k):
    assert check_mma(spec, 8, n, k, SMS) is not None


def test_mma_uses_as_many_clusters_as_there_are_panels_or_sms():
    assert divide(MMA, 1, 64 * 10, 4096, SMS).ctas == 20
    assert divide(MMA, 1, 64 * 66, 4096, SMS).ctas == 132
    assert divide(MMA, 1, 64 * 67, 4096, SMS).ctas == 132  # one has two panels
    assert divide(MMA, 1, 64 * 66 * 4, 4096, SMS).ctas == 132
    assert divide(MMA, 1, 64 * (66 * 4 + 1), 4096, SMS).ctas == 134  # 8 warps write 4 panels: there is a second wave


def test_what_mma_cannot_serve():
    assert divide(MMA, 9, 4096, 4096, SMS) is None  # more tokens than tiles
    served = [k for k in range(64, 40000, 64) if divide(MMA, 8, 4096, k, SMS) is not None]
    assert served == list(range(64, served[-1] + 1, 64))  # beyond that tokens do not fit
    assert 4096 <= served[-1] < 39000
    assert divide(MMA, 1, 4096, served[-1] + 64, SMS) is not None
    few = replace(MMA, warps=3, split=1)
    assert check(few) is None
    assert divide(few, 1, 64, 64, SMS) is None  # three warps cannot write four groups of 16 rows
    assert divide(replace(PAIRS, warps=2, split=2), 1, 64, 64, SMS) is not None
    assert divide(replace(PAIRS, warps=5, split=4), 1, 64 * 200, 64, 4) is None  # five panels want ten warps


def wgmma_tiles(spec, division):
    """(panel, token tile) -> how many CTAs compute it, as packed_tiles.hpp walks them."""
    row_tiles, token_tiles, raster, *rest, full_tiles = division.numbers
    assert rest == [0] * 7
    clusters = division.ctas // (spec.multicast * spec.split)
    seen: dict[tuple[int, int], int] = {}
    for first in range(clusters):
        assert first < row_tiles * token_tiles  # every cluster has work
        for index in range(first, row_tiles * token_tiles, clusters):
            group, rest_ = divmod(index, raster * row_tiles)
            width = min(raster, token_tiles - group * raster)
            row, column = divmod(rest_, width)
            for rank in range(spec.multicast):
                tile, panels = row * spec.multicast + rank, spec.panels
                begin = tile * panels
                if spec.uneven:
                    begin = tile * (panels - 1) + min(tile, full_tiles)
                    panels -= tile >= full_tiles
                for panel in range(begin, begin + panels):
                    at = (panel, group * raster + column)
                    seen[at] = seen.get(at, 0) + 1
    return seen


def check_wgmma(spec, m, n, k, sms):
    division = divide(spec, m, n, k, sms)
    if division is None:
        return None
    cluster = spec.multicast * spec.split
    assert division.ctas % cluster == 0
    assert cluster <= division.ctas <= sms
    assert division.shared_bytes is None  # as the kernel says
    assert wgmma_shared_bytes(spec) <= SHARED_BYTES
    seen, token_tiles = wgmma_tiles(spec, division), -(-m // spec.tokens)
    assert set(seen.values()) == {1}
    panels = -(-n // 64)
    needed = {(panel, token) for panel in range(panels) for token in range(token_tiles)}
    assert needed <= set(seen)
    # Past the last rows panels are computed that nobody stores: of one tile, or of each that shares its tokens.
    assert len(seen) - len(needed) < spec.panels * spec.multicast * token_tiles
    return division


wgmma_specs = st.builds(
    lambda depth_groups, **others: PackedWgmmaSpec(
        "sm_90a", "bf16", "bf16", None, False, depth_groups=depth_groups, stages=2 * depth_groups, **others
    ),
    tokens=st.sampled_from(WGMMA_TOKENS), panels=st.integers(1, 8), row_groups=st.integers(1, 4),
    depth_groups=st.integers(1, 4), multicast=st.sampled_from((1, 2, 4)), split=st.sampled_from((1, 2, 4)),
).filter(lambda spec: check(spec) is None)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(wgmma_specs, st.integers(1, 1500), st.integers(1, 12000), st.integers(1, 33000), st.integers(16, 160))
def test_wgmma_divides_all_of_it_once(spec, m, n, k, sms):
    check_wgmma(spec, m, n, k, sms)


@pytest.mark.parametrize("config", [(16, 7, 4, 1, 1, 2, 10), (64, 3, 2, 1, 1, 1, 8)])
@pytest.mark.parametrize("panels", [1, 6, 7, 8, 13, 64, 66, 132, 400, 448, 463, 1000])
def test_uneven_row_tiles(panels, config):
    spec = select.packed_of("wgmma", config, "bf16", "bf16", None, False)
    assert spec.uneven
    for m in (1, config[0], config[0] + 1, 9 * config[0]):
        assert check_wgmma(spec, m, 64 * panels, 4096, SMS) is not None


def test_what_wgmma_cannot_serve():
    fits = max(n for n in range(2, 20) if divide(replace(WGMMA, stages=n), 1, 64, 64, SMS) is not None)
    assert (
        wgmma_shared_bytes(replace(WGMMA, stages=fits))
        <= SHARED_BYTES
        < wgmma_shared_bytes(replace(WGMMA, stages=fits + 1))
    )


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 100000), st.integers(1, 100000), st.integers(1, 200000), st.integers(2, 160))
def test_the_fallback_serves_everything(m, n, k, sms):
    spec = select.packed_of(*select.FALLBACK, "bf16", "bf16", None, False)
    assert check(spec) is None
    assert divide(spec, m, n, k, sms).ctas >= 1


@pytest.mark.parametrize("row", table.read(table.PACKAGED), ids=str)
@pytest.mark.parametrize("bias", [None, "bf16"])
def test_every_row_of_the_packaged_table_serves_its_shape(row, bias):
    spec = select.packed_of(row.kernel, row.config, "bf16", "bf16", bias, False)
    assert check(spec) is None
    if isinstance(spec, PackedMmaSpec):
        assert check_mma(spec, row.m, row.n, row.k, SMS) is not None
    elif isinstance(spec, PackedWgmmaSpec):
        assert check_wgmma(spec, row.m, row.n, row.k, SMS) is not None


@pytest.mark.parametrize("ctas", range(1, 17))
def test_an_sm_has_room_for_so_many_ctas_and_no_more(ctas):
    """With up to 512 bytes of its own, and 1 KB that each takes beside that."""
    for own in (0, 1, 100, 384, 512):
        assert room_for(ctas) + own <= SHARED_BYTES
        taken = -(-(room_for(ctas) + own + 1024) // 128) * 128
        assert SM_SHARED_BYTES // taken == ctas
