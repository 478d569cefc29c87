"""The GEMM bench: candidates and rows (on the CPU, with invented times), roofline, tables, humming's adapter."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

import fp4gemm
from fp4gemm import launch, provenance, report, select
from fp4gemm.bench import common, gemm, humming, problem, sweep, tables, timing

US = {"cublas_bf16": 6.0, "dequantize_cublas": 12.0, "humming": 3.0, "gemm": 2.0}  # graphs; others 2.5
MODES = ("graph", "graph_pdl", "sustained", "eager")


def exact_product(x: torch.Tensor, w: fp4gemm.FP4Tensor) -> torch.Tensor:
    return (x.double() @ problem.exact_values(w.unpack()).t()).bfloat16()


def fake_gemm(
    a: torch.Tensor | fp4gemm.FP4Tensor,
    w: fp4gemm.FP4Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """What `fp4gemm.gemm` computes, whichever forms of operands it takes on this machine."""
    assert w.prepacked == "sm90"
    x = a.double() if isinstance(a, torch.Tensor) else problem.exact_values(a)
    D = x @ problem.exact_values(w.unpack()).t()
    return (D if bias is None else D + bias.double()).to(out_dtype)


def fake_quantize_gemm(
    x: torch.Tensor, w: fp4gemm.FP4Tensor, *, outer_scale: torch.Tensor | None = None
) -> torch.Tensor:
    return fake_gemm(fp4gemm.quantize(x, outer_scale=outer_scale), w)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Candidates run once on the CPU and get invented times; the list tells (kind of sample, dependent launches)."""
    sampled: list[tuple[str, bool]] = []
    dependent = [False]

    @contextlib.contextmanager
    def programmatic(enabled: bool) -> Iterator[None]:
        dependent[0] = enabled
        yield
        dependent[0] = False

    def sampler(mode: str, calls: Sequence[timing.Call]) -> timing.Sampler:
        sampled.append((mode, dependent[0]))
        assert len(calls) == 2
        for call in calls:
            call()
        return lambda: 0.0

    def interleave(samplers: Mapping[tuple[str, str], timing.Sampler], repeats: int) -> dict[tuple[str, str], float]:
        assert all(mode != "sustained" for mode, _ in samplers)
        return {
            (mode, name): US.get(name, 2.5) * (10 if mode == "eager" else 0.5 if mode == "graph_pdl" else 1)
            for mode, name in samplers
        }

    def in_turns(samplers: Mapping[tuple[str, str], timing.Sampler], repeats: int) -> dict[tuple[str, str], float]:
        assert all(mode == "sustained" for mode, _ in samplers)
        return {(mode, name): US.get(name, 2.5) * 3 for mode, name in samplers}

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "rotation", lambda nbytes: 2)
    monkeypatch.setattr(timing, "sampler", sampler)
    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(timing, "in_turns", in_turns)
    monkeypatch.setattr(launch, "programmatic", programmatic, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(select, "gpu_of", lambda device: ("NVIDIA H200", 132))
    monkeypatch.setattr(humming, "available", lambda: False)
    monkeypatch.setattr(fp4gemm, "gemm", fake_gemm)
    monkeypatch.setattr(fp4gemm, "quantize_gemm", fake_quantize_gemm)
    return sampled


class FakePeer:
    """humming's Weight: the exact product times `wrong`."""

    compiled: tuple[int, ...] = ()
    wrong = 1.0

    def __init__(self, w: fp4gemm.FP4Tensor) -> None:
        self._w = w

    def compile(self, sizes: Sequence[int]) -> None:
        FakePeer.compiled = tuple(sizes)

    def call(self, x: torch.Tensor) -> timing.Call:
        return lambda: exact_product(x, self._w) * self.wrong


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> type[FakePeer]:
    monkeypatch.setattr(humming, "available", lambda: True)
    monkeypatch.setattr(humming, "takes", lambda N, K: True)
    monkeypatch.setattr(humming, "Weight", FakePeer)
    return FakePeer


def document(rows: list[report.Row]) -> dict[str, Any]:
    environment = provenance.Environment("0123456789abcdef", False, "NVIDIA H200", "580.159", {"torch": "2.11.0"})
    return report.Report("gemm", "fp4gemm bench gemm", environment, 4.2, rows).document()


def rows_of(config: common.Config) -> list[report.Row]:
    rows = [row for job in gemm.jobs(config) for row in job.run()]
    sweep.add_limits(rows, 4.2)
    assert report.problems(document(rows)) == []
    return rows


def sweep_rows() -> list[report.Row]:
    return rows_of(common.Config(shapes=((48, 64), (64, 128)), sizes=(1, 96)))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_sweep(on_cpu: list[tuple[str, bool]], peer: type[FakePeer]) -> None:
    rows = sweep_rows()
    assert peer.compiled == (1, 96)
    ops = {
        (row["M"], row["op"], row.get("options", {}).get("outer_scale")): row for row in rows if row["mode"] == "graph"
    }
    assert list(ops) == [
        *((1, "gemm", None), (1, "quantize_gemm", "amax"), (1, "quantize_gemm", "given")),
        *((96, "gemm", None), (96, "quantize_gemm", "amax")),
    ]
    assert len(rows) == 2 * 4 * 5  # shapes, modes, the above
    assert all(0 < row["rel_error"] < 4e-3 for row in rows)  # the cast to bf16
    assert {row["mode"] for row in rows} == set(MODES)
    assert {row["mode"] for row in rows if "limit_ratio" not in row} == {"sustained"}  # the roof has another clock
    first = ops[1, "gemm", None]
    assert first["bytes"] == 128 * 2 + 2 * 2304 + 4 + 64 * 2  # x; two blocks of 64 x 64 and an outer scale; D
    assert first["tb_s"] == pytest.approx(first["bytes"] / 2.0 / 1e6)
    assert set(on_cpu) == {("graph", False), ("graph", True), ("eager", False)}


@pytest.mark.usefixtures("on_cpu", "peer")
def test_ratios_take_their_yardstick_from_the_right_mode() -> None:
    for row in sweep_rows():
        slower = {"eager": 10, "sustained": 3}.get(row["mode"], 1)
        assert row["vs_us"] == {
            name: US[name] * slower for name in ("cublas_bf16", "dequantize_cublas", "humming")
        }  # cuBLAS has no dependent launches: its plain graph time counts
        ours = (US["gemm"] if row["op"] == "gemm" else 2.5) * (0.5 if row["mode"] == "graph_pdl" else slower)
        assert row["us"] == ours
        assert row["ratio"] == pytest.approx(row["vs_us"]["cublas_bf16"] / ours)
        assert row.get("quantize_cost") == (None if row["op"] == "gemm" else 1.25)


@pytest.mark.usefixtures("on_cpu")
def test_without_humming_nothing_is_said_of_it() -> None:
    rows = rows_of(common.Config(shapes=((48, 64),), sizes=(1,)))
    assert all("humming" not in row["vs_us"] for row in rows)
    (speedup, costs, listed) = tables.of("gemm", rows)
    assert speedup.note == ""
    assert [cells[1] for cells in speedup.rows] == [sweep.OURS, sweep.OURS_PDL, sweep.OURS_SUSTAINED, sweep.LIMIT]
    assert [cells[1:] for cells in costs.rows] == [("amax", "+25%"), ("given", "+25%")]
    assert "humming-kernels, us" not in listed.columns


@pytest.mark.usefixtures("on_cpu")
def test_a_peer_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch, peer: type[FakePeer]) -> None:
    monkeypatch.setattr(peer, "wrong", 1.05)
    with pytest.raises(RuntimeError, match="humming: relative error"):
        sweep_rows()


@pytest.mark.usefixtures("on_cpu")
def test_results_that_are_not_finite_fail_their_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp4gemm, "gemm", lambda x, w, **more: torch.full((x.shape[0], w.rows), float("nan")))
    job = next(gemm.jobs(common.Config(shapes=((48, 64),), sizes=(1,))))
    with pytest.raises(RuntimeError, match="not finite"):
        job.run()


@pytest.mark.usefixtures("on_cpu")
def test_weights_are_made_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def make_weights(N: int, K: int) -> problem.Weights:
        made.append((N, K))
        return problem.make_weights(N, K)

    monkeypatch.setattr(gemm, "make_weights", make_weights)
    sweep_rows()
    assert made == [(48, 64), (64, 128)]


@pytest.mark.usefixtures("on_cpu")
def test_packed_operands_and_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "SHAPES", ((48, 64),))
    monkeypatch.setattr(gemm, "SIZES", (1,))
    monkeypatch.setattr(gemm, "PACKED", ((96, 48, 64),))
    monkeypatch.setattr(gemm, "VARIED", ((16, 48, 64),))
    rows = rows_of(common.Config())
    packed = [row for row in rows if row["a"] == "nvfp4"]
    assert [(row["mode"], row["ratio"]) for row in packed] == [(mode, 3.0) for mode in ("graph", "sustained", "eager")]
    assert packed[0]["bytes"] == 96 * 32 + 128 * 4 + 96 * 4 + 2304 + 4 + 2 * 96 * 48  # 128x4 scales: 128 rows
    varied = {row["epilogue"]: row for row in rows if row["epilogue"] != "rowcol"}
    assert set(varied) == {"rowcol_bias", "rowcol_fp32"}
    assert varied["rowcol_fp32"]["rel_error"] < 1e-5
    assert varied["rowcol_bias"]["rel_error"] < 4e-3
    assert varied["rowcol_bias"]["bytes"] == 16 * 128 + 2304 + 4 + 16 * 96 + 96
    calls = [cells[1] for cells in tables.of("gemm", rows)[-1].rows]
    assert "`gemm`, bias" in calls
    assert "`quantize_gemm`, given scale" in calls
    assert [job.label for job in gemm.jobs(common.Config(quick=True))] == [f"gemm {M}x4096x4096" for M in (1, 64, 1024)]


# --- the roofline and the tables --------------------------------------------------------------------------------------


def row(M: int, N: int, K: int, us: float, cublas: float, peer: float, mode: str = "graph", **more: Any) -> report.Row:
    return {
        "bench": "gemm", "op": "gemm", "arch": "sm_90a", "layout": "tn", "M": M, "N": N, "K": K, "a": "bf16",
        "b": "nvfp4", "epilogue": "rowcol", "mode": mode, "kernel": "gemm_x", "us": us, "rel_error": 1.6e-3,
        "bytes": N * K * 9 // 16 + 2 * M * (N + K), "vs_us": {"cublas_bf16": cublas, "humming": peer}, **more,
    }  # fmt: skip


H200 = [
    row(1, 28672, 8192, 34.0, 106.7, 51.7),
    row(1, 28672, 8192, 32.0, 106.7, 51.7, "graph_pdl"),
    row(1, 28672, 8192, 40.0, 120.0, 90.0, "eager"),
    row(4096, 28672, 8192, 2600.0, 2617.5, 3108.0),
]


def test_the_roof_is_the_best_of_the_run() -> None:
    roof = sweep.roof(H200, 4.22)
    assert roof is not None
    assert roof.tb_s == pytest.approx(2 * (28672 * 8192 + 28672 + 8192) / 106.7e6)  # cuBLAS reads faster than a copy
    assert roof.tflop_s == pytest.approx(2 * 4096 * 28672 * 8192 / 2617.5e6)
    assert sweep.roof(H200, 4.9) == sweep.Roof(4.9, roof.tflop_s)
    assert sweep.roof([H200[2]], 4.22) is None
    rows = [dict(one) for one in H200]
    sweep.add_limits(rows, 4.22)
    assert [round(one["limit_ratio"], 2) for one in rows] == [3.55, 3.55, 4.0, 1.0]


def test_speedup_table() -> None:
    rows = [dict(one) for one in H200]
    sweep.add_limits(rows, 4.22)
    for summary in (True, False):
        shown = tables.of("gemm", rows, summary)[0]
        assert shown.columns == ("N x K", "", "M = 1", "M = 4096")
        assert shown.rows == (
            ("28672 x 8192", "fp4gemm", "3.14", "1.01"),
            ("28672 x 8192", "fp4gemm, dependent launches", "3.33", ""),
            ("28672 x 8192", "humming-kernels", "2.06", "0.84"),
            ("28672 x 8192", "limit", "3.55", "1.00"),
        )
        assert "1.35x as fast in the geometric mean of 2 products, 1.20x at least" in shown.note
    assert len(tables.of("gemm", rows, summary=True)) == 1  # the rows themselves are for the docs
    assert len(tables.of("gemm", rows)[-1].rows) == 4


def test_rows_from_before_the_sweep_are_listed_as_they_were() -> None:
    old = {key: value for key, value in row(16, 64, 64, 2.0, 1.0, 1.0, op="quantize_gemm").items() if key != "bytes"}
    old["vs_us"] = {"cublas_bf16": 1.0}
    (listed,) = tables.of("gemm", [old], summary=True)
    assert listed.columns == (
        *("shape", "call", "A", "B", "mode", "us", "TFLOP/s", "cuBLAS bf16, us", "speed-up over cuBLAS"),
        "relative error",
    )


# --- the adapter of humming-kernels -----------------------------------------------------------------------------------


class FakeConfig:
    def to_str(self) -> str:
        return "{}"


def fake_humming(monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any]) -> None:
    """Modules named as humming-kernels 0.1.19 has them, whose product is computed from what the adapter passes."""

    def transform(tensors: dict[str, torch.Tensor], N: int, K: int, schema: dict[str, Any], **options: Any) -> Any:
        seen.update(schema=schema, options=options, tensors=tensors)
        return FakeConfig(), {"weight": tensors["weight"], "weight_scale": tensors["weight_scale"]}

    def forward(config: FakeConfig, *, inputs: torch.Tensor, outputs: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.update(rest)
        return outputs.fill_(1)

    def prepare_kernels(layer: str, compute: None, tuning: str) -> None:
        seen["prepared"] = json.loads(tuning)

    fakes = {
        "schema": {"HummingWeightSchema": dict},
        "transform": {"prepare_and_transform_humming_tensors": transform},
        "forward": {"humming_forward": forward},
        "tune": {"get_heuristics_config": lambda config, shape_m: {"block": min(shape_m, 64)}},
        "kernel.humming": {"HummingKernel": types.SimpleNamespace(prepare_kernels=prepare_kernels)},
    }
    for name, content in fakes.items():
        monkeypatch.setitem(sys.modules, f"humming.{name}", types.SimpleNamespace(**content))  # type: ignore[misc]
    for name in ("humming", "humming.kernel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_humming_gets_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    fake_humming(monkeypatch, seen)
    w = fp4gemm.quantize(torch.randn(256, 128), scaling="per_tensor")
    weight = humming.Weight(w)
    assert seen["schema"]["weight_scale_group_size"] == 16
    assert seen["tensors"]["weight"].dtype == torch.int32
    assert torch.equal(seen["tensors"]["weight"].view(torch.uint8), w.data)
    assert torch.equal(seen["tensors"]["weight_scale"].view(torch.uint8), w.linear_block_scale().view(torch.uint8))
    assert seen["tensors"]["weight_scale_2"].shape == (1,)
    D = weight.call(torch.zeros(32, 128, dtype=torch.bfloat16))()
    assert isinstance(D, torch.Tensor)
    assert D.shape == (32, 256)
    assert json.loads(seen["tuning_config"]) == {"block": 32}
    assert seen["locks"].numel() == 2048
    weight.compile((1, 64, 128))  # 64 and 128 share a schedule
    assert [schedule for _, _, schedule in seen["prepared"]] == [{"block": 1}, {"block": 64}]


def test_humming_takes_one_outer_scale_and_whole_tiles() -> None:
    with pytest.raises(ValueError, match="per_tensor"):
        humming.Weight(fp4gemm.quantize(torch.randn(256, 128)))
    assert humming.takes(28672, 8192)
    assert not humming.takes(28672, 8192 + 64)
    assert not humming.takes(128, 8192)
