#!/usr/bin/env python3
"""Draws docs/measurements/{quantize,gemm,sweep}.png from the newest docs/measurements/*.json: quantizers beside copy,
GEMMs beside cuBLAS, humming-kernels and the roofline, the parts of a layer's passes beside bf16.

Usage: python tools/plot.py [--folder docs/measurements] [--out-dir docs/measurements]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt
from matplotlib import ticker

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fp4gemm import report  # noqa: E402
from fp4gemm.bench import sweep, tables  # noqa: E402

Row = dict[str, Any]
_OURS, _PEER = "#76b900", "#9aa0a6"
_LARGE_M = 1024  # below, time is a launch and bandwidth says nothing
_SHOWN = (16384, 8192)  # M, K of quantizers, where a run has it


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
    large = [row for row in rows if row["M"] >= _LARGE_M]
    rows = [row for row in large if (row["M"], row["K"]) == _SHOWN] or large
    if not rows:
        return False
    labels = [" ".join((row["bench"], f"{row['M']}x{row['K']}", _options(row))) for row in rows]
    ours = [row["bytes"] / row["us"] / 1e3 for row in rows]
    copy = [row["bytes"] / row["vs_us"]["copy_same_bytes"] / 1e3 for row in rows]
    title = f"Bytes read + written, {document['gpu']}, {document['date'][:10]}"
    _bars(title, "GB/s", labels, (("fp4gemm", _OURS, ours), ("copy", _PEER, copy)), path)
    return True


def _options(row: Row) -> str:
    return ", ".join(filter(None, (tables.options_text(row), row["options"].get("sf_layout", ""))))


_LINES = {  # colour, line style and marker of each curve
    sweep.OURS: (_OURS, "-", "o"),
    sweep.OURS_PDL: (_OURS, "--", ""),
    sweep.OURS_SUSTAINED: (_OURS, ":", "x"),
    sweep.PEER: ("#d55e00", "-", "s"),
    sweep.LIMIT: ("black", ":", ""),
}


def plot_gemm(document: dict[str, Any], path: Path) -> bool:
    """The sweep, one column a shape of weights: speed-up, bandwidth, TFLOP/s over M. False: no such rows."""
    rows = document["rows"]
    speedups, roof = sweep.speedups(rows), sweep.roof(rows, document["copy_tb_s"])
    if not speedups or roof is None:
        return False
    products = sweep.products(rows)
    bandwidth = _achieved(products, lambda row, us: row["bytes"] / us / 1e6, roof.tb_s)
    rate = _achieved(products, lambda row, us: sweep.flop(row) / us / 1e6, roof.tflop_s)
    figures = (("speed-up over cuBLAS bf16", speedups), ("TB/s", bandwidth), ("TFLOP/s", rate))
    size = (0.6 + 3.2 * len(speedups), 8)
    figure, grid = plt.subplots(3, len(speedups), figsize=size, layout="constrained", sharey="row", squeeze=False)
    for axes_row, (unit, curves) in zip(grid, figures, strict=True):
        axes_row[0].set_ylabel(unit)
        for axes, by_name in zip(axes_row, curves.values(), strict=True):
            _curves(axes, by_name)
    for axes, (N, K) in zip(grid[0], speedups, strict=True):
        axes.set_title(f"{N} x {K}", fontsize=10)
        axes.axhline(1, color=_PEER, linewidth=1)
    for axes in grid[-1]:
        axes.set_xlabel("M")
    labels = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"bf16 activations · NVFP4 weights [N x K] in CUDA graphs, {document['gpu']}, {document['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def _achieved(products: Sequence[Row], figure: Callable[[Row, float], float], limit: float) -> sweep.Curves:
    """What each candidate reached at every M, and the limit: all do the same work on the bytes that ours moves."""
    curves: sweep.Curves = {}
    for row in products:
        by_name = curves.setdefault((row["N"], row["K"]), {})
        us = {sweep.OURS: row["us"], sweep.PEER: row["vs_us"].get(sweep.PEER_KEY)}
        for name, value in us.items():
            if value:
                by_name.setdefault(name, {})[row["M"]] = figure(row, value)
        by_name.setdefault(sweep.LIMIT, {})[row["M"]] = limit
    return curves


def _curves(axes: Any, by_name: dict[str, sweep.Curve]) -> None:
    for name, curve in by_name.items():
        colour, style, marker = _LINES[name]
        points = sorted(curve.items())
        axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_sweep(document: dict[str, Any], path: Path) -> bool:
    """Layers: heat maps of three ratios over M and K, and lines of the parts' times at the largest K.

    False: no such rows.
    """
    rows = [
        row for row in _graph_rows(document["rows"], "sweep") if row["options"].get("sf_layout", "128x4") == "128x4"
    ]
    maps = (
        ("forward, over bf16", "forward", "TN", "cublas_bf16"),
        ("backward, over bf16", "backward", "NN+NT", "cublas_bf16"),
        ("fused rescaling, over two launches", "gemm", "TN", "post_scale"),
    )
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(16, 4), layout="constrained")
    drawn = False
    for at, (title, op, layout, other) in zip(axes, maps, strict=False):
        ratios = {
            (row["M"], row["K"]): row["vs_us"][other] / row["us"]
            for row in rows
            if (row["op"], row["layout"]) == (op, layout) and row["options"].get("recipe", "per_token") == "per_token"
        }
        drawn = bool(ratios) or drawn
        _heat_map(at, title, ratios)
    widest = max((row["K"] for row in rows), default=0)
    lines: dict[str, sweep.Curve] = {}
    for row in rows:
        if row["K"] == widest and row["options"].get("recipe", "per_token") == "per_token":
            lines.setdefault(" ".join((row["op"], row["layout"].replace("none", ""))), {})[row["M"]] = row["us"]
    for name, curve in lines.items():
        axes[-1].plot(*zip(*sorted(curve.items()), strict=True), marker="o", markersize=3, label=name)
    axes[-1].set(xscale="log", yscale="log", xlabel="M", title=f"us, K = N = {widest}")
    if lines:
        axes[-1].legend(frameon=False, fontsize=7)
    figure.suptitle(f"Layers in CUDA graphs, {document['gpu']}, {document['date'][:10]}", fontsize=11)
    if drawn:
        figure.savefig(path, dpi=140)
    plt.close(figure)
    return drawn


def _heat_map(axes: Any, title: str, ratios: dict[tuple[int, int], float]) -> None:
    rows, columns = (sorted({key[index] for key in ratios}) for index in (0, 1))
    values = [[ratios.get((M, K), float("nan")) for K in columns] for M in rows]
    axes.set_title(title, fontsize=10)
    if not ratios:
        return
    axes.imshow(values, cmap="RdYlGn", vmin=0.5, vmax=1.5, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="K = N", ylabel="M")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)


PLOTS = {"quantize": plot_quantize, "gemm": plot_gemm, "sweep": plot_sweep}


def main(arguments: list[str] | None = None) -> int:
    """0: at least one plot was drawn; 1: no document has rows to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "measurements", help="where the JSON files are")
    parser.add_argument("--out-dir", type=Path, help="where the PNG files go; default: the same folder")
    options = parser.parse_args(arguments)
    out_dir = options.out_dir or options.folder
    out_dir.mkdir(parents=True, exist_ok=True)
    documents = [item for item in report.read_all(options.folder) if report.is_whole(item[1])]
    drawn = 0
    for bench, plot in PLOTS.items():
        path = out_dir / f"{bench}.png"
        if any(
            plot(document, path) for _, document in documents
        ):  # newest first; any() stops at the first that has rows
            print(path)
            drawn += 1
    if not drawn:
        print(f"tools/plot.py: no quantize, gemm or sweep rows in {options.folder}", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
