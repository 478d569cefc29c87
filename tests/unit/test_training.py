"""The training example, tiny and on the CPU: losses fall, and NVFP4 stays close to bf16."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp4gemm import provenance, report

ROOT = Path(__file__).resolve().parents[2]


def load_example():
    spec = importlib.util.spec_from_file_location("example_train", ROOT / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_train"] = module
    spec.loader.exec_module(module)
    return module


example = load_example()
TINY = example.Size(width=64, layers=2, heads=2, context=64, batch=8, steps=40, rate=3e-3)


@pytest.fixture(scope="module")
def rows():
    data = example.Data.of(example.text("topics")[:100_000], torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small take ten times as long where threads wait for each other
    try:
        return [
            row for name in ("bf16", "per_token", "per_token_rht_sr_2d") for row in example.train(name, 0, data, TINY)
        ]
    finally:
        torch.set_num_threads(threads)


def test_losses_fall_and_nvfp4_is_close_to_bf16(rows):
    bf16 = rows[0]
    for row in rows:
        assert row["curve"][0] > 5.3  # ln 256, and the noise of the head
        assert row["train_loss"] < 3.4
        assert abs(row["train_loss"] / bf16["train_loss"] - 1) < 0.02, row["recipe"]
        assert abs(row["val_loss"] / bf16["val_loss"] - 1) < 0.02, row["recipe"]
    assert len({row["train_loss"] for row in rows}) == 3


def test_the_last_steps_may_be_bf16():
    size = replace(TINY, steps=6)
    data = example.Data.of(example.text("topics")[:100_000], torch.device("cpu"))
    (bf16,) = example.train("bf16", 0, data, size)
    plain, half = example.train("per_token", 0, data, size, finish=0.5)
    alone, all_of_it = example.train("per_token", 0, data, size, finish=1.0)
    assert half["curve"][:3] == plain["curve"][:3]
    assert half["curve"][3] != plain["curve"][3]
    assert all_of_it["curve"] == bf16["curve"]
    assert alone["curve"] == plain["curve"]
    assert half["val_loss"] != plain["val_loss"]
    assert [row["recipe"] for row in (plain, half)] == ["per_token", "per_token, then bf16"]


def test_batches_see_every_window_once():
    values = torch.arange(8 * 10 * 64 + 1) % 251
    size = replace(TINY, batch=10)
    source = example.batches(values, size, seed=1)
    seen = torch.cat([next(source)[0][:, 0] for _ in range(8)])
    assert sorted(seen.tolist()) == sorted((64 * torch.arange(80) % 251).tolist())
    inputs, targets = next(source)
    assert torch.equal((inputs + 1) % 251, targets)
    with pytest.raises(ValueError, match="text: expected at least 10 windows of 64 bytes, got 1"):
        next(example.batches(values[:100], size, seed=1))


def test_the_default_has_25_million_parameters():
    with torch.device("meta"):
        model = example.Transformer(example.Size())
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 30e6


def test_every_recipe_starts_alike():
    a, b = (example.build(TINY, name, 3, torch.device("cpu")) for name in ("bf16", "w4a16"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    kinds = [type(m).__module__ for m in b.modules() if isinstance(m, torch.nn.Linear)]
    assert kinds == ["fp4gemm.nn.layer"] * 8 + ["torch.nn.modules.linear"]


def test_inner_recipes_leave_both_ends_in_bf16():
    three = dataclasses.replace(TINY, layers=3)
    model = example.build(three, "per_token_rht_sr_2d_inner", 3, torch.device("cpu"))
    kinds = [type(m).__module__ == "fp4gemm.nn.layer" for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert kinds == [False] * 4 + [True] * 4 + [False] * 5


def test_results_are_written_and_rendered(rows, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "training.md"
    page.write_text(f"above\n{example.BEGIN}\nold\n{example.END}\nbelow\n")
    document = report.Report("training", "examples/train.py", provenance.environment("abc"), 0.0, rows).document()
    report.write(document, tmp_path / "training-cpu-2026-01-01.json")
    assert example.main(["--render", "--folder", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert f"| `bf16` | 1 | {rows[0]['train_loss']:.4f} |  |" in text
    assert f"{rows[1]['train_loss'] / rows[0]['train_loss'] - 1:+.2%} ± 0.00%" in text
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert example.render(tmp_path, page) == text
    assert example.main(["--render", "--folder", str(tmp_path / "none")]) == 1


def test_an_interrupted_run_keeps_what_has_ended(rows, tmp_path, monkeypatch):
    def train(name, seed, *_):
        if (name, seed) == ("per_token", 1):
            raise KeyboardInterrupt
        yield {**rows[0 if name == "bf16" else 1], "seed": seed}

    monkeypatch.setattr(example, "train", train)
    wanted = ["--recipe", "bf16", "--recipe", "per_token", "--seeds", "3", "--device", "cpu", "--commit", "abc"]
    with pytest.raises(KeyboardInterrupt):
        example.main([*wanted, "--folder", str(tmp_path)])
    (path,) = tmp_path.glob("training-*.json")
    kept = [(row["recipe"], row["seed"]) for row in report.read(path)["rows"]]
    assert kept == [("bf16", 0), ("per_token", 0), ("bf16", 1)]


def test_gaps_pair_seeds():
    base = [{"seed": 0, "train_loss": 2.0}, {"seed": 1, "train_loss": 4.0}]
    mean, deviation = example.gap(
        [{"seed": 1, "train_loss": 4.4}, {"seed": 0, "train_loss": 2.0}, {"seed": 7, "train_loss": 9}],
        base,
        "train_loss",
    )
    assert mean == pytest.approx(0.05)
    assert deviation == pytest.approx(0.1 / 2**0.5)
    assert example.gap(base, [], "train_loss") is None


def test_the_page_is_what_the_measurements_say():
    page = ROOT / "docs" / "training.md"
    rendered = example.render(ROOT / "docs" / "measurements", page)
    assert rendered is None or rendered == page.read_text(encoding="utf-8"), "run: python examples/train.py --render"
