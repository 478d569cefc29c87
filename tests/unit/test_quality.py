"""The comparison of methods, on a small encoder: its figures are what an independent computation gives."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp4gemm import provenance, report
from fp4gemm.demo import encoder

ROOT = Path(__file__).resolve().parents[2]


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("example_quality", ROOT / "examples" / "quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_quality"] = module
    spec.loader.exec_module(module)
    return module


example = load_example()


class Words:
    """A tokenizer: a word's length."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, lines: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[3 + len(word) % 40 for word in line.split()] for line in lines]}


@pytest.fixture(scope="module")
def tiny() -> encoder.Encoder:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=example.TOKENS, initializer_range=0.2,
    )  # fmt: skip
    return encoder.Encoder("tiny", transformers.BertModel(config).eval(), Words())


@pytest.fixture(scope="module")
def text() -> str:
    from pydoc_data.topics import topics

    return topics["lambda"] + topics["class"] + topics["function"] + topics["assignment"]


@pytest.fixture(scope="module")
def rows(tiny: encoder.Encoder, text: str) -> list[dict[str, Any]]:
    return example.examine(tiny, text, SimpleNamespace(device="cpu", windows=8, held_out=3, layers=1))


def test_windows_hold_the_text_in_order(tiny: encoder.Encoder, text: str) -> None:
    got = example.windows(tiny, text, 11, torch.device("cpu"))
    ids = torch.cat([batch["input_ids"] for batch in got])
    assert [len(batch["input_ids"]) for batch in got] == [8, 3]
    assert ids.shape == (11, example.TOKENS)
    assert set(ids[:, 0].tolist()) == {1}
    assert set(ids[:, -1].tolist()) == {2}
    words = [3 + len(word) % 40 for word in text.split()]
    assert ids[:, 1:-1].flatten().tolist() == words[: 11 * (example.TOKENS - 2)]
    assert all(bool(batch["attention_mask"].all()) for batch in got)
    with pytest.raises(ValueError, match="--windows: the text has"):
        example.windows(tiny, text, 10_000, torch.device("cpu"))


def test_output_errors_are_those_of_outputs(tiny: encoder.Encoder, text: str, rows: list[dict[str, Any]]) -> None:
    """From Hessians as from the outputs themselves; with a layer's inputs captured by other means."""
    assert len(rows) == 6 * len(example.METHODS)
    linear = tiny.model.get_submodule("encoder.layer.0.output.dense")
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 80)))
    with torch.no_grad():
        for batch in example.windows(tiny, text, 11, torch.device("cpu")):
            tiny.model(**batch)
    hook.remove()
    used, held_out = seen[0].double(), seen[1].double()
    # A damped Hessian is that of further tokens, one for each column.
    used = used / len(used) ** 0.5
    used = torch.cat((used, torch.eye(80) * (0.01 * used.square().sum(0).mean()) ** 0.5))
    accumulator = example.HessianAccumulator(80, full=True)
    accumulator.add(seen[0])
    w = linear.weight.detach()
    for row in (row for row in rows if row["linear"] == "MLP down"):
        d = example.METHODS[row["method"]].quantize(w, accumulator).dequantize().double() - w.double()
        for error, x in (("output_error", held_out), ("hessian_error", used)):
            want = float((x @ d.T).square().sum() / (x @ w.double().T).square().sum())
            assert row[error] == pytest.approx(want, rel=1e-3), (row["method"], error)
        assert row["weight_error"] == pytest.approx(float(d.square().sum() / w.double().square().sum()), rel=1e-6)


def test_each_step_is_no_worse_in_its_own_metric(rows: list[dict[str, Any]]) -> None:
    for name in example.OWN:
        assert all(example.improved(rows, name)), name
    means = [sum(row["hessian_error"] for row in found) for found in example.by_method(rows).values()]
    assert means[-1] < 0.8 * means[-2] < 0.8 * means[0]


def test_results_are_written_and_rendered(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "search.md"
    page.write_text(f"above\n{example.BEGIN}\nold\n{example.END}\nbelow\n")
    document = report.Report("quality", "examples/quality.py", provenance.environment("abc"), 0.0, rows).document()
    report.write(document, tmp_path / "quality-cpu-2026-01-01.json")
    assert example.main(["--render", "--folder", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert "weight: 6 of 6 |" in text
    assert "Hessian: 6 of 6 |" in text
    first = [f"{example.snr(row['output_error']):.2f}" for row in rows if row["linear"] == "query"]
    assert f"| layer 0, query | {' | '.join(first)} |" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert example.main(["--render", "--folder", str(tmp_path / "none")]) == 1


def test_the_page_is_what_the_measurements_say() -> None:
    page = ROOT / "docs" / "search.md"
    rendered = example.render(ROOT / "docs" / "measurements", page)
    assert rendered is None or rendered == page.read_text(encoding="utf-8"), "run: python examples/quality.py --render"


def test_what_is_measured_keeps_the_promises() -> None:
    """In every layer each method has no more of what it minimizes than the one before, and of outputs in the mean."""
    found = report.newest(ROOT / "docs" / "measurements", "quality")
    assert found is not None
    rows = [row for row in found[1]["rows"] if row["bench"] == "quality"]
    assert len(rows) == 36 * len(example.METHODS)
    for name in example.OWN:
        assert all(example.improved(rows, name)), name
    means = [sum(example.snr(row["output_error"]) for row in each) for each in example.by_method(rows).values()]
    assert means == sorted(means)
