"""The table of kernels: read, written, and asked for a measured shape."""

import json
import stat

import pytest

from fp4gemm import rates, select, table
from fp4gemm.table import Choice

MMA, WGMMA = ("mma", (1, 8, 4, 2, 2, 0, 0)), ("wgmma", (128, 2, 2, 1, 1, 1, 6))


def row(m, n=4096, k=4096, kernel=MMA):
    return Choice(m, n, k, *kernel)


ROWS = (row(1), row(16, kernel=WGMMA), row(1, 8192, 8192), row(64, 8192, 8192, kernel=WGMMA))


@pytest.fixture
def own(monkeypatch, tmp_path):
    """An empty cache folder, in which `tuned_path` is; the name of a GPU."""
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "cache"))
    forget = table.rows_for.cache_clear
    forget()
    yield "NVIDIA H200 (test)"
    forget()


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "table.json"
    table.write(path, ROWS, gpu="NVIDIA H200", note='with "quotes"')
    assert sorted(table.read(path), key=str) == sorted(ROWS, key=str)
    document = json.loads(path.read_text())
    assert (document["gpu"], document["note"]) == ("NVIDIA H200", 'with "quotes"')
    keys = [(r["n"], r["k"], r["m"]) for r in document["rows"]]
    assert keys == sorted(keys)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]  # nothing temporary is left
    assert path.stat().st_mode & stat.S_IROTH  # the packaged one is installed for others
    table.write(path, ROWS[:1])
    assert table.read(path) == ROWS[:1]


def test_an_empty_table(tmp_path):
    table.write(tmp_path / "table.json", [])
    assert table.read(tmp_path / "table.json") == ()


def entry(**changes):
    good = {"m": 1, "n": 64, "k": 64, "kernel": "mma", "config": [1, 8, 4, 2, 2, 0, 0]} | changes
    return {"schema": 1, "rows": [{name: value for name, value in good.items() if value is not None}]}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"text"', "{}", '{"schema": 2, "rows": []}', '{"schema": 1}',
        '{"schema": 1, "rows": [7]}', '{"schema": 1, "rows": 7}',
        *(json.dumps(entry(**{name: None})) for name in ("m", "n", "k", "kernel", "config")),
        *(json.dumps(entry(**{name: "many"})) for name in ("m", "n", "k", "config")),
    ],
)  # fmt: skip
def test_a_broken_table_is_named(tmp_path, text):
    path = tmp_path / "tuned-broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuned-broken\.json: not a table of kernels .*fp4gemm tune"):
        table.read(path)


def test_the_good_entry_of_that_test_is_good(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(entry()))
    assert table.read(path) == (Choice(1, 64, 64, "mma", (1, 8, 4, 2, 2, 0, 0)),)


def test_a_tuned_table_of_this_gpu_comes_first(own):
    assert table.rows_for(own) == table.read(table.PACKAGED)
    path = table.tuned_path(own)
    assert path.name == "tuned-h200-test.json"
    assert path != table.tuned_path("NVIDIA H200")
    table.write(path, ROWS)
    table.rows_for.cache_clear()
    assert set(table.rows_for(own)[: len(ROWS)]) == set(ROWS)
    assert table.rows_for(own)[len(ROWS) :] == table.read(table.PACKAGED)
    path.write_text("not JSON")
    table.rows_for.cache_clear()
    with pytest.raises(ValueError, match=str(path)):
        table.rows_for(own)


def test_own_rows_win():
    mine, theirs = row(16, kernel=WGMMA), row(16, kernel=MMA)
    for m in (9, 16, 32):
        assert table.measured((mine, theirs), m, 4096, 4096) == mine
        assert table.measured((theirs, mine), m, 4096, 4096) == theirs


def test_of_a_shape_the_least_m_that_covers_the_calls():
    rows = [row(m, n, k) for n, k in ((1024, 4096), (4096, 4096)) for m in (1, 2, 8, 64, 512)]

    def tokens(m, n=4096, k=4096):
        found = table.measured(rows, m, n, k)
        assert found is None or (found.n, found.k) == (n, k)
        return None if found is None else found.m

    assert [tokens(m) for m in (1, 2, 4, 5, 8, 64, 512)] == [1, 2, 8, 8, 8, 64, 512]
    assert tokens(3) == 2  # 8 are more than twice as many: the one that is nearest below
    assert tokens(9) == tokens(16) == 8
    assert tokens(17) is None  # neither 8 nor 64 says much of 17
    assert tokens(1024) == 512
    assert tokens(1025) is None
    assert tokens(8, 1024) == 8
    assert tokens(8, 4096, 4097) is None
    assert tokens(8, 4097) is None
    assert table.measured([row(4), row(6)], 8, 4096, 4096).m == 6


def test_the_packaged_table():
    rows = table.read(table.PACKAGED)
    assert len({(r.m, r.n, r.k) for r in rows}) == len(rows)
    assert {r.m for r in rows} >= {1, 8, 16, 32, 64, 128}
    assert {r.kernel for r in rows} <= {"mma", "wgmma", "collective", "stream_k"}


GPU = ("NVIDIA H200 (test)", 132)


def spec_of(m, n, k, *, source=False, **options):
    return select.packed_spec(GPU, m, n, k, "bf16", "bf16", None, source, **options)


def test_a_row_that_cannot_serve_is_not_taken(own, monkeypatch):
    rows, of_kernels = (row(1), row(16, kernel=WGMMA)), ()
    monkeypatch.setattr(table, "rows_for", lambda gpu: rows)
    monkeypatch.setattr(rates, "packaged", lambda: of_kernels)
    assert spec_of(1, 4096, 4096) == select.packed_of(*MMA, "bf16", "bf16", None, False)
    assert spec_of(1, 4096, 4096, source=True) == select.packed_of(*MMA, "bf16", "bf16", None, True)
    assert spec_of(8, 4096, 4096) == select.packed_of(*WGMMA, "bf16", "bf16", None, False)
    rows = (row(8),)
    assert spec_of(8, 4096, 4096) == select.packed_of(*MMA, "bf16", "bf16", None, False)
    fallback = select.packed_of(*select.FALLBACK, "bf16", "bf16", None, False)
    assert spec_of(9, 4096, 4096) == fallback  # the row does not serve nine tokens
    rows = (row(1, kernel=("mma", (1, 8, 12, 2, 2, 0, 0))),)
    assert spec_of(1, 4096, 4096) == fallback  # nor one that no CTA has the memory for
    other = ("wgmma", (16, 1, 1, 4, 1, 2, 16))
    of_kernels = (rates.Rate(*other, 1.0, 1.0, 1.0),)
    assert spec_of(1, 4096, 4096) == select.packed_of(*other, "bf16", "bf16", None, False)


def test_a_collective_only_where_its_epilogue_can_store(own, monkeypatch):
    rows = (row(512, kernel=("collective", (128, 256, 2))),)
    monkeypatch.setattr(table, "rows_for", lambda gpu: rows)
    monkeypatch.setattr(rates, "packaged", lambda: (rates.Rate(*WGMMA, 1.0, 1.0, 1.0),))
    assert spec_of(512, 4096, 4096).tile == (128, 256, 64)
    assert spec_of(512, 4096, 4096, tma_output=False) == select.packed_of(*WGMMA, "bf16", "bf16", None, False)


def test_every_problem_finds_a_kernel(own):
    for m in (1, 7, 16, 33, 512, 5000, 100000):
        for n in (1, 64, 4097, 28672, 150000):
            for k in (1, 64, 1000, 28672, 200000):
                for source in (False, True):
                    assert spec_of(m, n, k, source=source, tma_output=n % 8 == 0) is not None
