"""How long a product takes by the rates of its kernel, and what selection makes of that where no shape was measured."""

import itertools
import json
import math

import pytest

from fp4gemm import rates, select, table, tune
from fp4gemm.division import Sequence, longest_sequence
from fp4gemm.rates import Rate
from fp4gemm.spec import check

SMS = 132
GPU = ("NVIDIA H200", SMS)
COLLECTIVE, STREAM_K = ("collective", (128, 256, 2)), ("stream_k", (128, 256, 2))
WGMMA, SMALL = ("wgmma", (128, 2, 2, 1, 1, 2, 8)), ("wgmma", (16, 1, 1, 4, 1, 2, 24))
UNEVEN = ("wgmma", (32, 7, 4, 1, 1, 2, 9))
MMA, FEW_WARPS = ("mma", (1, 16, 3, 1, 2, 0, 0)), ("mma", (1, 2, 8, 1, 2, 0, 0))


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    """Whatever the cache folder of this machine has."""
    monkeypatch.setattr(table, "rows_for", lambda gpu: table.read(table.PACKAGED))


def spec_of(kernel, terms=("bf16", "bf16", None, False)):
    return select.packed_of(*kernel, *terms)


def chosen(m, n, k):
    return select.packed_spec(GPU, m, n, k, "bf16", "bf16", None, False)


def test_times_are_sums():
    rate = Rate(*STREAM_K, launch=3.0, tile=2.0, block=0.5, sharing=1.25)
    assert rate.microseconds(Sequence(4, 100)) == 3.0 + 8.0 + 50.0
    assert rate.microseconds(Sequence(1, 10, 2.0)) == 3.0 + 2.0 + 5.0 + 2.5


def test_what_is_written_is_read(tmp_path):
    path, some = tmp_path / "rates.json", [Rate(*COLLECTIVE, 1.0, 0.5, 0.25), Rate(*STREAM_K, 3.0, 2.0, 0.5, 1.25)]
    rates.write(path, some, gpu="one", commit="abc", date="2026-01-01")
    assert rates.read(path) == tuple(some)
    assert json.loads(path.read_text())["gpu"] == "one"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 2, "rates": []}',
        '{"schema": 1}',
        '{"schema": 1, "rates": [{"kernel": "collective", "config": [128, 256, 2], "launch": 1}]}',
        '{"schema": 1, "rates": [{"kernel": "collective", "config": [128], "launch": 1, "tile": 1, "block": 1}]}',
    ],
)
def test_a_file_without_rates_is_named(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rates\.json: no rates of kernels"):
        rates.read(path)


def test_the_packaged_rates():
    packaged = rates.packaged()
    assert len({(rate.kernel, rate.config) for rate in packaged}) == len(packaged)
    known = {(kernel, config) for kernel, configs in tune.CONFIGS.items() for config in configs}
    for rate in packaged:
        assert (rate.kernel, rate.config) in known
        assert check(spec_of((rate.kernel, rate.config))) is None
        assert min(rate.launch, rate.tile, rate.sharing) >= 0.0
        assert rate.block > 0.0
        assert rate.sharing == 0.0 or rate.kernel == "stream_k"
    assert set(select.chosen_kernels()) >= {(rate.kernel, rate.config) for rate in packaged}


# By hand, on 132 SMs. 5120 x 25600: 80 panels, 400 blocks; tiles of 256 rows by 256 tokens: 20 for each 256 tokens.
@pytest.mark.parametrize(
    "kernel, m, expected",
    [
        (COLLECTIVE, 512, (1, 400, 0.0)),  # 40 tiles, 66 clusters
        (COLLECTIVE, 1024, (2, 800, 0.0)),  # 80 tiles
        (STREAM_K, 512, (1, 243, 66 / 40)),  # 40 * 400 / 66 = 242.4
        (STREAM_K, 1024, (2, 485, 66 / 80)),  # the 14 that are left, and a round
        (STREAM_K, 2048, (3, 970, 66 / 94)),  # 160: one round whole, 94 shared
        (WGMMA, 128, (1, 200, 0.0)),  # 40 row tiles, 66 clusters of two, which split K
        (WGMMA, 256, (2, 400, 0.0)),
        (UNEVEN, 32, (1, 200, 0.0)),  # 12 row tiles of seven panels, or 16 of six: 13 of both
        (MMA, 1, (1, 400, 0.0)),  # two panels to each of 66 clusters of two, which split K: 2 * 200
        (FEW_WARPS, 1, (2, 400, 0.0)),  # two warps in each of two CTAs write one panel: two rounds
    ],
    ids=str,
)
def test_what_the_busiest_cta_does(kernel, m, expected):
    assert longest_sequence(spec_of(kernel), m, 5120, 25600, SMS) == pytest.approx(expected)


@pytest.mark.parametrize(
    "kernel", [(kind, config) for kind in tune.CONFIGS if kind != "mma" for config in tune.CONFIGS[kind]], ids=str
)
def test_as_much_as_the_busiest_does_is_enough_from_all(kernel):
    spec = spec_of(kernel)
    rows = spec.tile[0] if kernel[0] != "wgmma" else 64 * spec.panels
    split = spec.split if kernel[0] == "wgmma" else 1
    for m, n, k in ((17, 64, 64), (300, 5120, 25600), (512, 10240, 8192), (5000, 1536, 7168), (64, 57344, 520)):
        tiles, blocks, sharing = longest_sequence(spec, m, n, k, SMS)
        work = -(-m // select.token_tile(spec)) * (n / rows) * -(-k // 64) / split
        assert blocks * SMS / split >= 0.99 * work
        assert tiles >= 1
        assert (sharing > 0) <= (kernel[0] == "stream_k")


def test_shapes_that_were_not_measured_get_what_takes_least(monkeypatch):
    fast, slow = Rate(*COLLECTIVE, 0.0, 1.0, 0.1), Rate(*WGMMA, 0.0, 1.0, 10.0)
    monkeypatch.setattr(rates, "packaged", lambda: (slow, fast))
    for m in (128, 256, 100000):
        assert chosen(m, 5120, 25600) == spec_of(COLLECTIVE)
    assert chosen(100, 5120, 25600) == spec_of(WGMMA)  # of so few no tiles of 256
    monkeypatch.setattr(rates, "packaged", lambda: (Rate(*COLLECTIVE, 0.0, 1.0, 10.0), Rate(*WGMMA, 0.0, 1.0, 0.1)))
    assert chosen(256, 5120, 25600) == spec_of(WGMMA)
    assert chosen(100000, 5120, 25600) == spec_of(COLLECTIVE)  # of so many tokens no tiles of 128
    monkeypatch.setattr(rates, "packaged", lambda: (fast,))
    assert select.packed_spec(GPU, 256, 5121, 25600, "bf16", "bf16", None, False, False) != spec_of(COLLECTIVE)


def test_measured_shapes_do_not_ask_for_rates(monkeypatch):
    def refuse():
        raise AssertionError("asked")

    monkeypatch.setattr(rates, "packaged", refuse)
    for row in table.read(table.PACKAGED):
        chosen(row.m, row.n, row.k)
    with pytest.raises(AssertionError, match="asked"):
        chosen(8, 8192, 8193)
    with pytest.raises(AssertionError, match="asked"):
        chosen(9000, 8192, 8192)


def test_uneven_row_tiles_fill_a_round():
    """37888 x 3584: 592 panels are 85 tiles of seven, two rounds for 66 clusters, or 98 of six and seven for 49."""
    assert longest_sequence(spec_of(UNEVEN), 32, 37888, 3584, SMS) == (2, 56, 0.0)


def test_a_short_k_is_not_shared_by_all():
    assert longest_sequence(spec_of(STREAM_K), 256, 256, 512, SMS) == (1, 8, 1.0)  # as in pieces.hpp: 8 blocks at least
    assert longest_sequence(spec_of(STREAM_K), 256, 256, 2048, SMS) == (1, 8, 4.0)


def test_tiles_are_for_about_as_many_tokens():
    for m, n, k in itertools.product((1, 8, 9, 40, 100, 300, 5000), (8, 64, 4608, 28672), (1, 64, 520, 200000)):
        spec = chosen(m, n, k)
        tokens = spec.tile[1] if hasattr(spec, "tile") else getattr(spec, "tokens", None) or 8 * spec.token_tiles
        assert min(256, m // 8) <= tokens <= max(16, 2 * m), (m, n, k)


def test_a_row_counts_where_there_are_as_many_tiles(monkeypatch):
    own = (table.Choice(1024, 5120, 25600, *WGMMA),)
    monkeypatch.setattr(table, "rows_for", lambda gpu: own)
    assert chosen(1024, 5120, 25600) == chosen(897, 5120, 25600) == spec_of(WGMMA)
    assert spec_of(WGMMA) not in (chosen(896, 5120, 25600), chosen(1025, 5120, 25600))


def test_own_rows_for_few_tokens_leave_the_rest_to_rates(monkeypatch):
    own = (table.Choice(16, 5120, 25600, *SMALL),)
    monkeypatch.setattr(table, "rows_for", lambda gpu: own + table.read(table.PACKAGED))
    assert chosen(16, 5120, 25600) == chosen(9, 5120, 25600) == spec_of(SMALL)
    assert chosen(512, 5120, 25600) == spec_of(STREAM_K)


def measured(true, products):
    """What the rates say of products, as a tuner reports them."""
    return [
        {
            table.Choice(*product, rate.kernel, rate.config): rate.microseconds(
                longest_sequence(spec_of((rate.kernel, rate.config)), *product, SMS)
            )
            for rate in true
        }
        for product in products
    ]


PRODUCTS = [(m, n, k) for m in (64, 256, 512, 1024, 4096) for n, k in ((1536, 7168), (5120, 25600), (28672, 4096))]


def test_rates_are_found_again():
    true = [Rate(*COLLECTIVE, 2.0, 1.5, 0.75), Rate(*STREAM_K, 4.0, 1.25, 0.76, 1.5), Rate(*WGMMA, 0.0, 2.5, 0.36)]
    times = measured(true, PRODUCTS)
    found = tune.fit_rates(times, SMS)
    assert {(rate.kernel, rate.config) for rate in found} <= {COLLECTIVE, STREAM_K, WGMMA}
    assert len(found) >= 2
    for rate in found:
        (same,) = (each for each in true if (each.kernel, each.config) == (rate.kernel, rate.config))
        for term in ("launch", "tile", "block", "sharing"):
            assert getattr(rate, term) == pytest.approx(getattr(same, term), abs=2e-3)


def test_no_rate_is_below_zero():
    """Times that a negative launch would explain best."""
    (times,) = [measured([Rate(*COLLECTIVE, 0.0, 1.0, 0.5)], PRODUCTS)]
    (found,) = tune.fit_rates([{choice: us - 3.0 for choice, us in of.items()} for of in times], SMS)
    assert min(found.launch, found.tile, found.block, found.sharing) == 0.0
    assert all(math.isfinite(term) for term in (found.launch, found.tile, found.block))


def test_kernels_that_are_never_the_first_choice_have_no_rates():
    true = [Rate(*COLLECTIVE, 2.0, 1.5, 0.75), Rate("collective", (128, 256, 1), 3.0, 2.0, 1.0)]
    assert [rate.config for rate in tune.fit_rates(measured(true, PRODUCTS), SMS)] == [COLLECTIVE[1]]
