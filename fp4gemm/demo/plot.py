"""The picture of the demo: which Linear, which depth and channel, and which sentence pair the error reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp4gemm.demo.measure import LinearError

if TYPE_CHECKING:
    from fp4gemm.demo import Pair, Report

INK, QUIET, GRID = "#1f2430", "#6b7280", "#e5e7eb"
HEAT = ["#7a0c2e", "#c2334d", "#ee7b51", "#f9c784", "#fdf0d5", "#e3efe9"]  # much error … little error
GROUPS = {"same meaning": "#1f77b4", "related": "#e08214", "unrelated": "#7b6888"}
DOTS = "#c2334d"


def draw(report: Report, path: Path) -> None:
    """Write the picture of `report` to `path` (the suffix picks the format, PNG by default)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": QUIET,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(14, 10), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, width_ratios=[1.3, 1], height_ratios=[1, 0.92], left=0.065, right=0.975, top=0.84, bottom=0.07,
            wspace=0.16, hspace=0.36,
        )  # fmt: skip
        _headline(figure, report)
        _heat_map(figure, figure.add_subplot(grid[0, 0]), report.linears)
        _similarities(figure.add_subplot(grid[0, 1]), report.pairs)
        _channels(figure.add_subplot(grid[1, :]), report.channels, report.depth_db)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _headline(figure: Any, report: Report) -> None:
    figure.text(
        0.02, 0.955, f"Where the NVFP4 error lives in {report.model}", fontsize=19, fontweight="bold", va="center"
    )
    text = (
        f"{len(report.linears)} Linears, weights and activations in NVFP4 · {report.tokens} tokens of "
        f"{2 * len(report.pairs)} sentences · weights {report.bytes_before / report.bytes_after:.1f}× smaller · "
        f"{report.backend}"
    )
    figure.text(0.02, 0.917, text, fontsize=11, color=QUIET, va="center")


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", pad=24)
    axes.text(0, 1.025, note, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="bottom")


def _heat_map(figure: Any, axes: Any, errors: Sequence[LinearError]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    layers = sorted({error.layer for error in errors})
    kinds = list(dict.fromkeys(error.kind for error in errors))
    table = torch.full((len(layers), len(kinds)), float("nan"))
    for error in errors:
        table[layers.index(error.layer), kinds.index(error.kind)] = error.output
    low = min(error.output for error in errors)
    high = max(low + 1, min(max(error.output for error in errors), low + 9))
    image = axes.imshow(
        table.numpy(), cmap=LinearSegmentedColormap.from_list("error", HEAT), vmin=low, vmax=high, aspect="auto"
    )
    for row, column in torch.cartesian_prod(torch.arange(len(layers)), torch.arange(len(kinds))).tolist():
        value = float(table[row, column])
        dark = (value - low) / (high - low) < 0.35
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=11, color="white" if dark else INK)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(kinds))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.035, extend="max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9)
    weights = [error.weight for error in errors]
    _title(
        axes,
        "Each Linear on its own: signal-to-noise of the output, dB",
        f"same fp32 inputs for both; the weights themselves: {min(weights):.1f} to {max(weights):.1f} dB",
    )


def _similarities(axes: Any, pairs: Sequence[Pair]) -> None:
    low = min(min(pair.before, pair.after) for pair in pairs) - 0.06
    high = max(max(pair.before, pair.after) for pair in pairs) + 0.06
    axes.plot([low, high], [low, high], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for group in dict.fromkeys(pair.group for pair in pairs):
        members = [pair for pair in pairs if pair.group == group]
        color = GROUPS.get(group, INK)
        axes.vlines(
            [pair.before for pair in members], [pair.before for pair in members], [pair.after for pair in members],
            color=color, linewidth=1.6, alpha=0.6, zorder=2,
        )  # fmt: skip
        axes.scatter(
            [pair.before for pair in members], [pair.after for pair in members],
            s=64, color=color, edgecolor="white", linewidth=1, label=group, zorder=3,
        )  # fmt: skip
    worst = max(pairs, key=lambda pair: abs(pair.after - pair.before))
    _note(axes, f"{worst.after - worst.before:+.3f}", (worst.before, worst.after), offset=(-7, 5), ha="right")
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="fp32 model", ylabel="NVFP4 model")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", frameon=False, handletextpad=0.2)
    mean = sum(abs(pair.after - pair.before) for pair in pairs) / len(pairs)
    _title(
        axes,
        "Cosine similarity of each sentence pair",
        f"on the dashed line nothing changed; mean absolute change {mean:.3f}",
    )


def _channels(axes: Any, channels: Tensor, depth_db: Sequence[float]) -> None:
    # Row 0 is the embeddings, which hold no Linear and no error.
    shown = (channels[1:] * 100).cpu()
    generator = torch.Generator().manual_seed(0)
    for depth, errors in enumerate(shown):
        spread = (torch.rand(errors.numel(), generator=generator) - 0.5) * 0.62
        axes.scatter(depth + spread, errors, s=9, color=DOTS, alpha=0.38, linewidth=0, zorder=2)
        median = float(errors.median())
        axes.hlines(median, depth - 0.36, depth + 0.36, color=INK, linewidth=2, zorder=3)
        axes.text(depth + 0.375, median, f"{median:.0f} %", va="center", fontsize=9.5, fontweight="bold", zorder=4)
        _name_outlier(axes, depth, errors, spread)
    axes.set_xticks(range(len(shown)), [f"after layer {depth}\n{db:.1f} dB" for depth, db in enumerate(depth_db[1:])])
    axes.set_xlim(-0.5, len(shown) - 0.42)
    axes.set_ylim(0, float(shown.max()) * 1.1)
    axes.set_ylabel("error, % of the state's RMS")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    _title(
        axes,
        "All of them together: how the error builds up in the hidden state, channel by channel",
        f"one dot is one of {shown.shape[1]} channels (RMS over tokens, against the fp32 model); bar: median; "
        "below each layer: signal-to-noise of the whole state",
    )


def _name_outlier(axes: Any, depth: int, errors: Tensor, spread: Tensor) -> None:
    """Label the worst channel where it stands clearly apart from the others."""
    values, order = errors.sort(descending=True)
    if float(values[0]) > 1.25 * float(values[1]):
        at = (depth + float(spread[order[0]]), float(values[0]))
        _note(axes, f"channel {int(order[0])}", at, offset=(7, 0), ha="left", va="center")


def _note(axes: Any, text: str, at: tuple[float, float], offset: tuple[int, int], **alignment: str) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=9.5, color=QUIET, **alignment)
