#!/usr/bin/env python3
"""Draws docs/measurements/{quantize,gemm}.png from the newest docs/measurements/*.json: beside copy, beside cuBLAS.

Usage: python tools/plot.py [--folder docs/measurements] [--out-dir docs/measurements]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fp4gemm import report  # noqa: E402

Row = dict[str, Any]
_OURS, _PEER = "#76b900", "#9aa0a6"
_LARGE_M = 1024  # below, time is a launch and bandwidth says nothing


def _graph_rows(rows: Sequence[Row], bench: str) -> list[Row]:
    return [row for row in rows if row["bench"] == bench and row["mode"] == "graph"]


def _bars(
    title: str, unit: str, labels: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], path: Path
) -> None:
    """Grouped horizontal bars, one group a label; `series`: (name, colour, values), the first one with its numbers."""
    height = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(labels)), layout="constrained")
    for index, (name, colour, values) in enumerate(series):
        places = [place + index * height for place in range(len(labels))]
        bars = axes.barh(places, values, height=height, label=name, color=colour)
        if index == 0:
            axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set_yticks([place + (len(series) - 1) * height / 2 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_quantize(document: dict[str, Any], path: Path) -> bool:
    """Bandwidth of quantizers and dequantizers beside a copy of the same bytes, large M. False: no such rows."""
    rows = _graph_rows(document["rows"], "quantize") + _graph_rows(document["rows"], "dequantize")
    rows = [row for row in rows if row["M"] >= _LARGE_M]
    if not rows:
        return False
    labels = [
        " ".join(filter(None, (row["bench"], f"{row['M']}x{row['K']}", _options(row["options"])))) for row in rows
    ]
    ours = [row["bytes"] / row["us"] / 1e3 for row in rows]
    copy = [row["bytes"] / row["vs_us"]["copy_same_bytes"] / 1e3 for row in rows]
    title = f"Bytes read + written, {document['gpu']}, {document['date'][:10]}"
    _bars(title, "GB/s", labels, (("fp4gemm", _OURS, ours), ("copy", _PEER, copy)), path)
    return True


def _options(options: dict[str, Any]) -> str:
    given = "given" if options.get("outer_scale") == "given" else ""
    return " ".join(filter(None, (options.get("scaling", ""), given, options.get("sf_layout", ""))))


def plot_gemm(document: dict[str, Any], path: Path) -> bool:
    """TFLOP/s of every GEMM row beside cuBLAS bf16. False: no such rows."""
    rows = _graph_rows(document["rows"], "gemm")
    if not rows:
        return False
    work = [2 * row["M"] * row["N"] * row["K"] / 1e6 for row in rows]
    ours = [flop / row["us"] for flop, row in zip(work, rows, strict=True)]
    cublas = [flop / row["vs_us"]["cublas_bf16"] for flop, row in zip(work, rows, strict=True)]
    labels = [f"{row.get('op', 'gemm')} {row['M']}x{row['N']}x{row['K']}" for row in rows]
    title = f"GEMM, {document['gpu']}, {document['date'][:10]}"
    _bars(title, "TFLOP/s", labels, (("fp4gemm", _OURS, ours), ("cuBLAS bf16", _PEER, cublas)), path)
    return True


PLOTS = {"quantize": plot_quantize, "gemm": plot_gemm}


def main(arguments: list[str] | None = None) -> int:
    """0: at least one plot was drawn; 1: no document has rows to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "measurements", help="where the JSON files are")
    parser.add_argument("--out-dir", type=Path, help="where the PNG files go; default: the same folder")
    options = parser.parse_args(arguments)
    out_dir = options.out_dir or options.folder
    out_dir.mkdir(parents=True, exist_ok=True)
    documents = report.read_all(options.folder)
    drawn = 0
    for bench, plot in PLOTS.items():
        path = out_dir / f"{bench}.png"
        if any(
            plot(document, path) for _, document in documents
        ):  # newest first; any() stops at the first that has rows
            print(path)
            drawn += 1
    if not drawn:
        print(f"tools/plot.py: no quantize or gemm rows in {options.folder}", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
