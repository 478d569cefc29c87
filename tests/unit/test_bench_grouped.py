"""The bench of grouped products on the CPU: inputs, candidates, errors and rows, with invented times."""

import functools

import pytest
import torch

from fp4gemm import provenance, report, select
from fp4gemm.bench import gemm, grouped, groups, humming, tables, timing
from fp4gemm.bench.common import Config
from fp4gemm.bench.routing import ROUTINGS

US = {"gemm_grouped": 2.0, "quantize_gemm_grouped": 2.5, grouped.LOOP: 8.0, grouped.TORCH: 6.0, "humming": 4.0}
SHAPE = (4, 64, 48)  # experts, N, K


@pytest.fixture
def on_cpu(monkeypatch):
    """Every candidate runs once; the list tells which, and with dependent launches or without."""
    ran = []

    def times(candidates, repeats):
        for mode, by_name in candidates.items():
            for name, calls in by_name.items():
                assert len(calls) == 2
                for call in calls:
                    call()
                ran.append((mode, name))
        return {(mode, name): US[name] * (0.5 if mode == gemm.GRAPH_PDL else 1) for mode, name in ran}

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "rotation", lambda nbytes: 2)
    monkeypatch.setattr(gemm, "times", times)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(select, "gpu_of", lambda device: ("NVIDIA H200", 132))
    monkeypatch.setattr(humming, "available", lambda: False)
    return ran


def measured(name, tokens=16):
    return grouped._rows(name, tokens, functools.partial(grouped.make_weights, *SHAPE), 1)


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows(on_cpu, name):
    rows = measured(name)
    ours = ("gemm_grouped", "quantize_gemm_grouped")
    assert on_cpu == [*(("graph", n) for n in (*ours, grouped.LOOP, grouped.TORCH)), *(("graph_pdl", n) for n in ours)]
    assert [(row["mode"], row["op"], row["us"]) for row in rows] == [
        ("graph", ours[0], 2.0), ("graph", ours[1], 2.5), ("graph_pdl", ours[0], 1.0), ("graph_pdl", ours[1], 1.25)
    ]  # fmt: skip
    for row in rows:
        assert (row["experts"], row["M"], row["N"], row["K"]) == (4, 64, 64, 48)
        assert row["vs_us"] == {grouped.LOOP: 8.0, grouped.TORCH: 6.0}
        assert row["rel_error"] < 4e-3  # bf16's rounding of D
        assert row["kernel"].endswith("_grouped")
        assert row["bytes"] > 64 * 2 * (64 + 48)
    shown = tables.table("grouped", rows)
    assert shown is not None
    assert shown.rows[0][shown.columns.index("speed-up over it")] == "3.00x"


def test_every_candidate_computes_its_experts_products(on_cpu):
    """torch's on weights that nobody quantized: it differs by what NVFP4 loses."""
    problem = grouped.make_problem("zipf", 16, grouped.make_weights(*SHAPE))
    assert grouped.rel_error(problem.loop()[0](), problem) < 4e-3
    assert 0.05 < grouped.rel_error(problem.torch_grouped()[0](), problem) < 0.15
    wrong = problem.loop()[0]().flip(0)
    assert grouped.rel_error(wrong, problem) > 0.5
    with pytest.raises(RuntimeError, match="not finite"):
        grouped.rel_error(wrong * float("nan"), problem)


def test_empty_experts(on_cpu):
    (row, *_) = measured("balanced", tokens=1)
    assert row["options"] == {"most_tokens": 1, "empty_experts": 0}
    problem = grouped.make_problem("zipf", 1, grouped.make_weights(*SHAPE))
    assert problem.counts.count(0) > 0
    assert grouped.rel_error(problem.loop()[0](), problem) < 4e-3


class FakePeer:
    """humming's weights of experts: a loop's product times `wrong`."""

    wrong = 1.0

    def __init__(self, weights):
        self._weights = [w.prepack() for w in weights]

    def call(self, x, offsets):
        parts = torch.split(x, offsets.diff().tolist())
        out = x.new_empty(len(x), self._weights[0].rows)
        return lambda: grouped._loop(parts, self._weights, out) * self.wrong


def test_humming_beside_them_and_refused_where_it_is_called_wrongly(on_cpu, monkeypatch):
    monkeypatch.setattr(humming, "available", lambda: True)
    monkeypatch.setattr(humming, "takes", lambda N, K: True)
    monkeypatch.setattr(humming, "GroupedWeight", FakePeer)
    assert measured("balanced")[0]["vs_us"]["humming"] == 4.0
    monkeypatch.setattr(FakePeer, "wrong", 1.1)
    with pytest.raises(RuntimeError, match="humming: relative error"):
        measured("balanced")


def test_jobs_cover_decode_and_many_tokens(on_cpu):
    labels = [job.label for job in grouped.jobs(Config())]
    assert "grouped 8x14336x4096, 1 tokens, balanced" in labels
    assert "grouped 8x14336x4096, 4096 tokens, text" in labels
    assert any(label.startswith("grouped 64x") for label in labels)
    assert len(labels) == len(set(labels))
    assert 0 < len(list(grouped.jobs(Config(quick=True)))) < len(labels)


def test_a_row_is_a_document(on_cpu):
    environment = provenance.Environment("0123456789abcdef", False, "NVIDIA H200", "580.159", {"torch": "2.11.0"})
    written = report.Report("grouped", "fp4gemm bench grouped", environment, 4.2, measured("text")).document()
    assert report.problems(written) == []


@pytest.mark.parametrize("options", groups.OPTIONS, ids=str)
def test_rows_of_quantizing(options, monkeypatch):
    us = {"quantize_grouped": 4.0, "copy_same_bytes": 3.0, "dense": 3.5}

    def compare(candidates, mode, repeats):
        assert {name: len(calls) for name, calls in candidates.items()} == dict.fromkeys(us, 2)
        for calls in candidates.values():
            calls[0]()
        return dict(us)

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "rotation", lambda nbytes: 2)
    monkeypatch.setattr(timing, "compare", compare)
    (row,) = groups._rows(4, 64, 48, "zipf", options, 1)
    read = 64 * 48 * 2 * (2 if options else 1)
    assert row["bytes"] == read + 64 * 48 * 9 // 16 * (2 if options.get("both") else 1)
    assert (row["us"], row["vs_us"]) == (4.0, {"copy_same_bytes": 3.0, "dense": 3.5})
    shown = tables.table("quantize_grouped", [row])
    assert shown is not None
    assert shown.rows[0][shown.columns.index("of copy bandwidth")] == "75%"
    assert ("Hadamard" in shown.rows[0][3]) == ("hadamard" in options)
