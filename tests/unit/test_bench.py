"""The bench: tables, the way of measuring (with fakes), suites on the CPU, the command line."""

from __future__ import annotations

import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fp4gemm
from fp4gemm import provenance, report, select, tune
from fp4gemm.bench import cli, common, kernels, layers, overhead, peers, quantize, selection, tables, tiles, timing
from fp4gemm.formats import BLOCK


def quantize_row(**changes: Any) -> dict[str, Any]:
    row = {
        "bench": "quantize", "M": 8192, "K": 8192, "dtype": "bf16", "mode": "graph", "us": 50.0, "bytes": 171_966_464,
        "options": {"scaling": "per_row", "outer_scale": "amax", "sf_layout": "128x4"},
        "vs_us": {"copy_same_bytes": 45.0},
    }  # fmt: skip
    return row | changes


def gemm_row(**changes: Any) -> dict[str, Any]:
    row = {
        "bench": "gemm", "op": "gemm", "arch": "sm_90a", "layout": "tn", "M": 8192, "N": 8192, "K": 8192, "a": "nvfp4",
        "b": "nvfp4", "epilogue": "rowcol", "mode": "graph", "kernel": "gemm_x", "us": 1500.0, "bytes": 209_715_200,
        "vs_us": {"cublas_bf16": 1425.0}, "rel_error": 1.6e-3,
    }  # fmt: skip
    return row | changes


OTHER_ROWS = [
    quantize_row(bench="dequantize", options={"sf_layout": "128x4"}),
    {"bench": "overhead", "op": "gemm", "M": 16, "N": 256, "K": 256, "mode": "eager", "us": 8.5, "process_us": 9.0,
     "vs_us": {"torch_mm": 4.0, "driver_launch": 2.0}},
    {"bench": "grouped", "op": "gemm_grouped", "arch": "sm_90a", "experts": 8, "M": 128, "N": 14336, "K": 4096,
     "routing": "zipf", "options": {}, "mode": "graph", "kernel": "gemm_x", "us": 80.0, "bytes": 270_000_000,
     "tb_s": 3.4, "tflop_s": 190.0, "vs_us": {"loop": 120.0, "torch_grouped_bf16": 260.0}, "rel_error": 1.6e-3},
    {"bench": "quantize_grouped", "op": "quantize_grouped", "arch": "sm_90a", "experts": 64, "M": 32768, "K": 8192,
     "routing": "zipf", "options": {"both": True, "seed": 1}, "mode": "graph", "us": 400.0, "bytes": 1_375_731_712,
     "tb_s": 3.4, "vs_us": {"copy_same_bytes": 330.0, "dense": 390.0}},
    {"bench": "load", "kernel": "gemm_x", "arch": "sm_90a", "ms": 12.5, "max_ms": 14.0},
    {"bench": "compile", "kernel": "gemm_x", "arch": "sm_90a", "seconds": 22.0, "peak_mb": 3500, "registers": 168,
     "spill_bytes": 0, "smem_bytes": 214_016},
]  # fmt: skip


def document(rows: list[dict[str, Any]], date: str = "2026-11-20T10:00:00Z", **changes: Any) -> dict[str, Any]:
    environment = provenance.Environment("0123456789abcdef", False, "NVIDIA H200", "580.159", {"torch": "2.11.0"})
    tests = report.TestCounts(10, 0, 1, "pytest tests/gpu")
    return report.Report("all", "fp4gemm bench all", environment, 4.2, rows, tests, date).document() | changes


# --- tables and timing ------------------------------------------------------------------------------------------------


def test_every_row_kind_of_the_bench_has_a_table() -> None:
    for row in (quantize_row(), gemm_row(), *OTHER_ROWS):
        assert report.problems(document([row])) == []
        table = tables.table(row["bench"], [row])
        assert table is not None
        assert len(table.rows[0]) == len(table.columns)
    assert tables.table("gemm", [quantize_row()]) is None
    assert tables.table("quantize", [quantize_row(mode="eager")], summary=True) is None


def test_of_experts_readme_shows_products_of_tokens_as_words_spread_them() -> None:
    (row,) = (row for row in OTHER_ROWS if row["bench"] == "grouped")
    spread = row | {"routing": "text"}
    fused = spread | {"op": "quantize_gemm_grouped"}
    table = tables.table("grouped", [row, spread, fused], summary=True)
    assert table is not None
    assert [cells[2:4] for cells in table.rows] == [("text", "`gemm_grouped`")]
    assert len(tables.table("grouped", [row, spread, fused]).rows) == 3


def test_tiles_table_keeps_the_best_distance_of_each_kernel() -> None:
    def row(kernel: str, kb: int, us: float) -> report.Row:
        return quantize_row(bench="tiles", kernel=kernel, us=us, options={"sf_layout": "linear", "prefetch_kb": kb})

    table = tables.table(
        "tiles", [row("slow", 0, 9.0), row("quick", 0, 5.0), row("quick", 64, 4.0), row("slow", 64, 9.5)]
    )
    assert table is not None
    assert [(cells[1], cells[2], cells[3]) for cells in table.rows] == [
        ("`quick`", "64", "4.00"),
        ("`slow`", "0", "9.00"),
    ]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1234.56, "1,235"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (2e-5, "2.0e-05")],
)
def test_numbers(value: float, text: str) -> None:
    assert tables.number(value) == text


def test_interleave_takes_turns_and_medians() -> None:
    order: list[str] = []

    def sampler(name: str, times: list[float]) -> timing.Sampler:
        def sample() -> float:
            order.append(name)
            return times.pop(0)

        return sample

    names = "abc"
    got = timing.interleave({name: sampler(name, [9.0, 1.0, 2.0, 2.5, 0.0]) for name in names}, 5, settle_s=0.0)
    assert got == {"a": 2.0, "b": 2.0, "c": 2.0}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len(set(rounds)) > 1  # not always after the same one


def test_interleave_forgets_what_it_saw_before_clocks_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sample() -> float:
        now[0] += 0.1
        return 18.0 if now[0] < 0.35 else 15.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.interleave({"a": sample}, 3, settle_s=0.3) == {"a": 15.0}
    assert now[0] == pytest.approx(0.6)  # three rounds that settle, three that count


def test_long_calls_make_short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls last what the test says; a sample of millisecond calls has few of them."""
    ran: list[int] = []

    def timed(run: Callable[[], None]) -> float:
        before = len(ran)
        run()
        return 10.0 + us * (len(ran) - before)  # a gap of 10 us

    monkeypatch.setattr(timing, "_timed", timed)
    for us, expected in ((1.0, 200), (100.0, 20), (1500.0, 6), (6000.0, 2), (20000.0, 1)):
        ran.clear()
        sampler = timing.EagerSampler([lambda: ran.append(1)])
        ran.clear()
        assert sampler() == pytest.approx(us, abs=10.0 / expected + 1e-6)
        assert len(ran) == expected


def test_rotation_exceeds_twice_the_l2() -> None:
    l2 = 60 << 20
    for nbytes in (1, 16384, 37 << 20, 2 * l2, 300 << 20):
        count = timing.rotation(nbytes, l2)
        assert count >= 2
        assert count * nbytes > 2 * l2
    assert timing.rotation(100 << 20, 200 << 20) == 5


def test_sampler_names_the_modes() -> None:
    with pytest.raises(ValueError, match="graph, eager"):
        timing.sampler("lazy", [])


# --- the suites, on the CPU ------------------------------------------------------------------------------------------


def test_a_turn_begins_with_samples_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate is slower just after the other, as it is where the other took more power."""
    now, last, order = [0.0], [("", 0.0)], []

    def sampler(name: str, us: float) -> timing.Sampler:
        def sample() -> float:
            if last[0][0] != name:
                last[0] = (name, now[0])
                order.append(name)
            now[0] += 0.03
            return us if now[0] - last[0][1] > 0.15 else 2 * us

        return sample

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.in_turns({"a": sampler("a", 15.0), "b": sampler("b", 10.0)}, 9) == {"a": 15.0, "b": 10.0}
    assert set(order) == {"a", "b"}
    assert 3 < len(order) <= 6


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites run their calls once on the CPU and report invented times: 2 us for what is measured, 1 us for others."""

    def compare(
        candidates: dict[str, list[timing.Call]], mode: str, repeats: int, settle_s: float = 0
    ) -> dict[str, float]:
        for calls in candidates.values():
            assert len(calls) == 2
            for call in calls:
                call()
        return {name: 1.0 if name in ("copy_same_bytes", "cublas_bf16") else 2.0 for name in candidates}

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "rotation", lambda nbytes: 2)
    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def rows_of(jobs: Iterator[common.Job]) -> list[report.Row]:
    rows = [row for job in jobs for row in job.run()]
    assert report.problems(document(rows)) == []
    return rows


@pytest.mark.usefixtures("on_cpu")
def test_quantize_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "LARGE", ((128, 512),))
    monkeypatch.setattr(quantize, "SMALL", ((1, 512),))
    monkeypatch.setattr(quantize, "OF_MODELS", ())
    monkeypatch.setattr(quantize, "DEQUANTIZED", ((128, 256),))
    rows = rows_of(quantize.jobs(common.Config()))
    both = [variant for variant in quantize.VARIANTS if variant.outputs != "row"]
    assert len(rows) == 2 * (2 * len(quantize.VARIANTS) - len(both) + 1)
    plain = 128 * 256 + 128 * 32 + 128 * 4  # codes, block and outer scales
    assert rows[0]["bytes"] == 128 * 512 * 2 + plain  # bf16 in
    assert rows[0]["copy_fraction"] == 0.5
    (training,) = (r for r in rows if r["options"].get("outputs") == "both" and not r["options"]["rht"]
                   and not r["options"]["sr"] and r["mode"] == "graph")  # fmt: skip
    assert training["bytes"] == 2 * 128 * 512 * 2 + plain + 512 * 64 + 512 * 8 + 512 * 4  # x is read twice
    shown = {tables.options_text(row) for row in rows if row["bench"] == "quantize"}
    assert len(shown) == len(quantize.VARIANTS) - 2  # two of them differ in the layout alone
    assert "per_row, row + transposed, Hadamard, stochastic" in shown


@pytest.mark.usefixtures("on_cpu")
def test_sweep_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SIZES", (128, 256))
    monkeypatch.setattr(layers, "WIDTHS", (64, 96))
    monkeypatch.setattr(layers, "DECODE", (16,))
    monkeypatch.setattr(layers, "_SCALE_LAYOUTS_AT", (128, 64))
    monkeypatch.setattr(layers, "_post_scale", lambda: (layers._rescale_in_two, 2))
    rows = rows_of(layers.jobs(common.Config()))
    count = {op: sum(row["op"] == op and row["mode"] == "graph" for row in rows) for op in layers._OPS}
    assert count == {"quantize": 8, "amax": 4, "swizzle": 8, "gemm": 14, "forward": 12, "backward": 8}
    assert all(set(row["vs_us"]) == {"post_scale", "cublas_bf16"} for row in rows if row["op"] == "gemm")
    table = tables.table("sweep", rows)
    assert table is not None
    assert table.columns[0] == "shape"
    assert tables.table("sweep", rows, summary=True) is None  # none of the shapes that README shows
    (shape,) = {layers.product_shape(layout, 5, 5, 5) for layout in layers.LAYOUTS}
    assert shape == (5, 5, 5)
    chosen = layers.jobs(common.Config(shapes=((32, 64),), sizes=(48,)))
    assert {job.label.split()[-1] for job in chosen} == {"48x32x64"}


@pytest.mark.parametrize("layout", layers.LAYOUTS)
def test_sweep_products_agree(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rescaling in the epilogue and afterwards, and torch's product of the same layout, are one product."""
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    m, n, k = layers.product_shape(layout, 32, 48, 64)
    (call,) = layers._torch_product(layout, 32, 48, 64, 1)
    assert call().shape == (m, n)
    a, b = fp4gemm.quantize(torch.randn(m, k)), fp4gemm.quantize(torch.randn(n, k))
    product = fp4gemm.gemm(layers._unscaled(a), layers._unscaled(b), out_dtype=torch.float32)
    rescaled = layers._rescale(product, a.outer_scale, b.outer_scale)
    assert torch.equal(rescaled, fp4gemm.gemm(a, b))
    assert torch.equal(layers._rescale_in_two(product.clone(), a.outer_scale, b.outer_scale), rescaled)
    scaled = product * b.outer_scale * a.outer_scale[:, None]
    torch.testing.assert_close(scaled, fp4gemm.gemm(a, b, out_dtype=torch.float32))


def test_sweep_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tools import plot

    row = {"bench": "sweep", "K": 64, "N": 64, "dtype": "bf16", "mode": "graph", "us": 2.0}
    kinds = (("gemm", "TN", "post_scale"), ("forward", "TN", "cublas_bf16"), ("backward", "NN+NT", "cublas_bf16"))
    rows = [
        {**row, "op": op, "layout": layout, "M": M, "options": {"recipe": "per_token"}, "vs_us": {other: 3.0}}
        for op, layout, other in kinds
        for M in (64, 128)
    ]
    path = tmp_path / "sweep.png"
    assert plot.plot_sweep(document(rows), path)
    assert path.stat().st_size > 10_000
    assert not plot.plot_sweep(document([]), path)


@pytest.mark.usefixtures("on_cpu")
def test_peers_stand_beside_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "VARIANTS", quantize.VARIANTS[:2])
    monkeypatch.setattr(quantize, "LARGE", ((128, 512),))
    monkeypatch.setattr(quantize, "SMALL", ())
    monkeypatch.setattr(quantize, "OF_MODELS", ())
    monkeypatch.setattr(quantize, "DEQUANTIZED", ())
    monkeypatch.setattr(quantize, "PEERS_AT", (128, 512))
    monkeypatch.setattr(peers, "calls", lambda xs: {peers.MODELOPT: [lambda: None] * len(xs)})
    rows = rows_of(quantize.jobs(common.Config()))
    assert [peers.MODELOPT in row["vs_us"] for row in rows] == [True, True, False, False]


def test_a_peer_that_computes_something_else_is_refused() -> None:
    x = torch.randn(4, 16)
    peers._check("peer", x, x * 1.05)
    with pytest.raises(RuntimeError, match=r"peer: relative error 1\.00"):
        peers._check("peer", x, x * 2)


@pytest.mark.usefixtures("on_cpu")
def test_selection_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    launched: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(select, "gpu_of", lambda device: ("NVIDIA H200", 132))
    monkeypatch.setattr(tune, "build", lambda specs: built.extend(spec.name for spec in specs))
    monkeypatch.setattr(tune, "launch_spec", lambda spec, a, *rest: launched.append((spec.name, a.values.shape[0])))
    config = common.Config(shapes=((96, 128), (100, 256)), sizes=(1, 40))
    rows = rows_of(selection.jobs(config))
    assert [(row["M"], row["N"], row["K"]) for row in rows] == [
        (1, 96, 128),
        (40, 96, 128),
        (1, 100, 256),
        (40, 100, 256),
    ]
    for row in rows:
        m, n, k = row["M"], row["N"], row["K"]
        chosen = select.packed_spec(("NVIDIA H200", 132), m, n, k, "bf16", "bf16", None, False, n % 8 == 0)
        assert row["kernel"] == chosen.name
        timed = {chosen.name, *(spec.name for spec in tune.candidates(m, n, k, 132))}
        assert {name for name, tokens in launched if tokens == m} >= timed
        assert timed <= set(built)
        assert set(row["vs_us"]) == {"fastest", "cublas_bf16"}
    table = tables.table(
        "selection",
        [*rows, rows[0] | {"options": {"fastest": "another"}, "vs_us": {"fastest": 1.6, "cublas_bf16": 4.0}}],
    )
    assert table is not None
    assert table.rows[-1][3:] == ("`another`", "1.60", "25.0%", "2.00x")
    assert tables.table("selection", rows, summary=True) is None


@pytest.mark.usefixtures("on_cpu")
def test_tiles_suite_launches_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int]] = []
    monkeypatch.setattr(tiles, "SHAPES", ((256, 2048),))
    monkeypatch.setattr(tiles, "_sms", lambda: 10)
    monkeypatch.setattr(tiles, "_launcher", lambda spec: lambda grid, *rest: launched.append((grid[0], rest[-7])))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    rows = rows_of(tiles.jobs(common.Config()))
    assert {row["options"]["sf_layout"] for row in rows} == {"linear", "128x4"}
    assert {row["options"]["prefetch_kb"] for row in rows} == set(tiles.PREFETCH_KB)
    assert all(BLOCK * spec.threads * spec.blocks == 2048 for spec in tiles.candidates(2048, "linear"))
    assert {grid for grid, _ in launched} == {256 // spec.rows for spec in tiles.candidates(2048, "linear")}
    assert {ahead for grid, ahead in launched if grid == 256} == {0, 80, 160, 320}  # 10 SMs, rows of 4 KB


@pytest.mark.usefixtures("on_cpu")
def test_overhead_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_CALLS", 2)
    monkeypatch.setattr(overhead, "_WARM", 1)
    monkeypatch.setattr(overhead, "_driver_launch", lambda: lambda: None)
    rows = rows_of(overhead.jobs(common.Config(quick=True)))
    calls = ["gemm", "quantize", "dequantize", "quantize_gemm", "quantize_gemm, given scale"]
    assert [row["op"] for row in rows] == calls


def test_load_suite_asks_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        probes.append(command)
        assert options["env"]["FP4GEMM_DISABLE_JIT"] == "1"
        return subprocess.CompletedProcess(command, 0, 'a warning\n{"ms": 12.5}\n', "")

    monkeypatch.setattr(kernels.cache, "get", lambda spec: None)
    monkeypatch.setattr(kernels.subprocess, "run", run)
    (row,) = rows_of(kernels.load_jobs(common.Config(repeats=7)))
    assert row["ms"] == 12.5
    assert len(probes) == 7
    assert probes[0][1:] == ["-m", "fp4gemm.bench.load_probe", row["kernel"]]


def test_load_probe_fails_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cache, "get", lambda spec: None)
    monkeypatch.setattr(kernels, "_PROBE", "fp4gemm.bench.no_such_module")
    with pytest.raises(RuntimeError, match="No module named"):
        rows_of(kernels.load_jobs(common.Config()))


def test_compile_suite_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = {"seconds": 0.3, "peak_mb": 322, "registers": 45, "spill_bytes": 0, "smem_bytes": 0, "threads": 256}
    entry = types.SimpleNamespace(meta=meta)
    monkeypatch.setattr(kernels.cache, "lookup", lambda spec: entry if spec.arch == "sm_90a" else None)
    rows = rows_of(kernels.compile_jobs(common.Config()))
    assert {row["arch"] for row in rows} == {"sm_90a"}
    assert rows[0]["registers"] == 45


# --- fp4gemm bench ----------------------------------------------------------------------------------------------------


def test_bench_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["gemm"], ["all", "--quick"]):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2
        assert "compute capability 9.0" in " ".join(result.output.split())


def test_bench_refuses_misplaced_options_and_few_repeats() -> None:
    result = CliRunner().invoke(cli.app, ["--quick", "gemm"])
    assert result.exit_code == 2
    assert "behind the subcommand" in " ".join(result.output.split())
    assert CliRunner().invoke(cli.app, ["gemm", "--repeats", "3"]).exit_code == 2


@pytest.mark.parametrize("text", ["4096", "4096x", "0x64", "4096x64x1", "4096X64"])
def test_bench_refuses_shapes_that_are_none(text: str) -> None:
    result = CliRunner().invoke(cli.app, ["gemm", "--shape", text])
    assert result.exit_code == 2
    assert "expected NxK" in " ".join(result.output.split())


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[common.Job]]:
    """A bench that runs here: jobs by suite are what a test puts in the dictionary."""
    jobs: dict[str, list[common.Job]] = {}
    environment = provenance.Environment("abc", False, "NVIDIA H200", "1", {"torch": "2"})
    monkeypatch.setattr(cli, "_need_gpu", lambda: None)
    monkeypatch.setattr(cli.provenance, "environment", lambda commit: environment)
    monkeypatch.setattr(timing, "copy_tb_s", lambda repeats: 4.2)
    monkeypatch.setattr(cli, "_suite_jobs", lambda suite, config: jobs.get(suite, []))
    return jobs


def test_bench_gemm_measures_chosen_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[common.Config] = []
    environment = provenance.Environment("abc", False, "NVIDIA H200", "1", {"torch": "2"})
    monkeypatch.setattr(cli, "_need_gpu", lambda: None)
    monkeypatch.setattr(cli.provenance, "environment", lambda commit: environment)
    monkeypatch.setattr(timing, "copy_tb_s", lambda repeats: 4.2)
    monkeypatch.setattr(cli, "_suite_jobs", lambda suite, config: configs.append(config) or [])
    out = tmp_path / "x.json"
    options = ["--shape", "4096x14336", "--shape", "64x128", "--m", "1", "--m", "16"]
    result = CliRunner().invoke(cli.app, ["gemm", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert configs == [common.Config(shapes=((4096, 14336), (64, 128)), sizes=(1, 16))]
    assert report.read(out)["command"] == "fp4gemm bench gemm --repeats 9 " + " ".join(options)


def test_bench_writes_rows_tables_and_test_counts(fake_gpu: dict[str, list[common.Job]], tmp_path: Path) -> None:
    fake_gpu["quantize"] = [common.Job("one", lambda: [quantize_row()])]
    fake_gpu["gemm"] = [common.Job("two", lambda: [gemm_row()])]
    tests = tmp_path / "tests.json"
    tests.write_text('{"passed": 7, "failed": 0, "skipped": 1, "command": "pytest tests/gpu"}')
    result = CliRunner().invoke(cli.app, ["--out-dir", str(tmp_path / "m"), "--tests-json", str(tests), "--quick"])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "m").glob("all-h200-*.json")
    written = report.read(path)
    assert [row["bench"] for row in written["rows"]] == ["quantize", "gemm"]
    assert written["tests"]["passed"] == 7
    assert written["command"] == "fp4gemm bench all --repeats 9 --quick"
    assert "errors" not in written
    assert "0.95x" in result.output


def test_bench_keeps_the_other_rows_when_a_job_fails(fake_gpu: dict[str, list[common.Job]], tmp_path: Path) -> None:
    def fail() -> list[report.Row]:
        raise RuntimeError("launch failed [700]")

    fake_gpu["gemm"] = [common.Job("bad", fail), common.Job("good", lambda: [gemm_row()])]
    result = CliRunner().invoke(cli.app, ["gemm", "--out", str(tmp_path / "x.json")])
    assert result.exit_code == 1
    written = report.read(tmp_path / "x.json")
    assert len(written["rows"]) == 1
    assert written["errors"] == ["bad: RuntimeError: launch failed [700]"]
    assert "launch failed [700]" in " ".join(result.output.split())


def test_bench_refuses_bad_test_counts_before_it_measures(
    fake_gpu: dict[str, list[common.Job]], tmp_path: Path
) -> None:
    def fail() -> list[report.Row]:
        raise AssertionError("measured")

    fake_gpu["gemm"] = [common.Job("job", fail)]
    result = CliRunner().invoke(cli.app, ["gemm", "--tests-json", str(tmp_path / "absent.json")])
    assert result.exit_code == 2
    assert "absent.json" in "".join(c for c in result.output if c not in "│ \n")  # a long path is broken in its box
