"""What the demo prints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fp4gemm.demo.measure import LinearError

if TYPE_CHECKING:
    from fp4gemm.demo import Pair, Report


class Printer:
    """Prints the demo to a rich console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def start(self, folder: Path, backend: str, dtype: str) -> None:
        self.console.print(f"[bold]model[/]    {folder}")
        self.console.print(f"[bold]backend[/]  {backend}, {dtype} activations\n")

    def busy(self, what: str) -> AbstractContextManager[object]:
        return self.console.status(what)

    def tables(self, report: Report) -> None:
        for table in (_weights_and_outputs(report.linears), _pairs(report.pairs, self.console.width), _costs(report)):
            self.console.print(table)
            self.console.print()

    def end(self, picture: Path) -> None:
        self.console.print(f"Where the error lives: [bold]{picture}[/]")


def _weights_and_outputs(errors: Sequence[LinearError]) -> Table:
    kinds = list(dict.fromkeys(error.kind for error in errors))
    cells = {(error.layer, error.kind): f"{error.weight:.1f}→{error.output:.1f}" for error in errors}
    table = _table("Signal-to-noise in dB: weight → output on real activations")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for layer in sorted({error.layer for error in errors}):
        table.add_row(str(layer), *(cells.get((layer, kind), "") for kind in kinds))
    return table


def _pairs(pairs: Sequence[Pair], width: int) -> Table:
    table = _table("Cosine similarity of each pair")
    table.add_column("pair", no_wrap=True)
    for heading in ("fp32", "NVFP4", "change"):
        table.add_column(heading, justify="right", vertical="bottom")
    for group in dict.fromkeys(pair.group for pair in pairs):
        table.add_row(f"[bold]{group}[/]")
        for pair in (pair for pair in pairs if pair.group == group):
            sentences = "\n".join(escape(_cut(sentence, width - 26)) for sentence in (pair.first, pair.second))
            table.add_row(sentences, f"{pair.before:.3f}", f"{pair.after:.3f}", f"{pair.after - pair.before:+.3f}")
        table.add_section()
    return table


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _costs(report: Report) -> Table:
    table = _table("Size and time")
    for heading in ("", "fp32", "NVFP4", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        "weights of the Linears",
        f"{report.bytes_before / 1e6:.2f} MB",
        f"{report.bytes_after / 1e6:.2f} MB",
        f"{report.bytes_before / report.bytes_after:.2f}× smaller",
    )
    ratio = report.seconds_before / report.seconds_after
    table.add_row(
        f"one batch ({report.tokens} tokens)",
        f"{report.seconds_before * 1e3:.1f} ms",
        f"{report.seconds_after * 1e3:.1f} ms",
        f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower",
    )
    if "reference" in report.backend:
        table.caption = "The reference defines what is right; it is not built for speed."
        table.caption_justify = "left"
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
