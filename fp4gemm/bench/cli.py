"""`fp4gemm bench`: quantize · gemm · sweep · grouped · overhead · load · compile · selection · tiles · search · all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fp4gemm import provenance, report
from fp4gemm.bench import tables
from fp4gemm.bench.timing import DEFAULT_REPEATS, MIN_REPEATS

if TYPE_CHECKING:
    from fp4gemm.bench.common import Config, Job

app = typer.Typer(
    help="Measure the kernels on this machine's GPU and write docs/measurements/<bench>-<gpu>-<date>.json.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
ALL = ("quantize", "gemm", "overhead", "load", "compile")
MEASUREMENTS = Path("docs/measurements")
# A log has no width of its own: one that holds the widest table.
_console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)

OutOption = Annotated[Path | None, typer.Option("--out", help="File to write; default: a new one in --out-dir.")]
OutDirOption = Annotated[Path, typer.Option("--out-dir", help="Folder for a file named <bench>-<gpu>-<date>.json.")]
RepeatsOption = Annotated[int, typer.Option(min=MIN_REPEATS, help="Samples of each candidate; their median is kept.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="One or two shapes of each suite.")]
TestsOption = Annotated[
    Path | None,
    typer.Option(
        "--tests-json", help="Test counts to put in the file (`pytest tests/gpu --tests-json FILE`, or JUnit XML)."
    ),
]
CommitOption = Annotated[str | None, typer.Option(help="Commit of the sources, where they come without git history.")]
ShapeOption = Annotated[
    list[str] | None, typer.Option("--shape", metavar="NxK", help="Weights of the sweep; may be repeated.")
]
SizeOption = Annotated[
    list[int] | None, typer.Option("--m", min=1, help="Rows of the activations in the sweep; may be repeated.")
]


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    out: OutOption = None,
    out_dir: OutDirOption = MEASUREMENTS,
    repeats: RepeatsOption = DEFAULT_REPEATS,
    quick: QuickOption = False,
    tests_json: TestsOption = None,
    commit: CommitOption = None,
) -> None:
    """Measure the kernels on this machine's GPU; without a subcommand, all of it."""
    if context.invoked_subcommand is None:
        run("all", ALL, out, out_dir, repeats, quick, tests_json, commit)
        return
    given = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(f"options go behind the subcommand: fp4gemm bench {context.invoked_subcommand} ...")


def _add(name: str, suites: Sequence[str], about: str) -> None:
    def command(
        out: OutOption = None,
        out_dir: OutDirOption = MEASUREMENTS,
        repeats: RepeatsOption = DEFAULT_REPEATS,
        quick: QuickOption = False,
        tests_json: TestsOption = None,
        commit: CommitOption = None,
    ) -> None:
        run(name, suites, out, out_dir, repeats, quick, tests_json, commit)

    app.command(name, help=about)(command)


_add("quantize", ("quantize",), "Quantize and dequantize against a copy of the same bytes.")
_add(
    "grouped", ("groups", "grouped"), "Experts: quantizing, and products beside torch's grouped bf16 (not part of all)."
)
_add("search", ("search",), "The search for block scales, beside qwantize and nvidia-modelopt (not part of all).")
_add("overhead", ("overhead",), "CPU time of a warm Python call.")
_add("load", ("load",), "Load of a cached kernel in a new process.")
_add("compile", ("compile",), "What compiling the cached kernels took.")
_add("tiles", ("tiles",), "The per-row quantizer, however it can divide its work (minutes; not part of all).")
_add("all", ALL, "Everything else, in one file.")


def _add_sized(name: str, about: str) -> None:
    """A suite of products, of which shapes and sizes may be chosen."""

    def command(
        out: OutOption = None,
        out_dir: OutDirOption = MEASUREMENTS,
        repeats: RepeatsOption = DEFAULT_REPEATS,
        quick: QuickOption = False,
        tests_json: TestsOption = None,
        commit: CommitOption = None,
        shape: ShapeOption = None,
        m: SizeOption = None,
    ) -> None:
        run(name, (name,), out, out_dir, repeats, quick, tests_json, commit, shape or (), m or ())

    app.command(name, help=about)(command)


_add_sized("gemm", "NVFP4 weights at every M: beside cuBLAS bf16, dequantize + cuBLAS, and humming-kernels.")
_add_sized("sweep", "The parts of a training step by shape and layout, both passes of a layer beside bf16.")
_add_sized("selection", "The chosen kernel beside all candidates, at shapes not in its table (not part of all).")


def run(
    bench: str,
    suites: Sequence[str],
    out: Path | None,
    out_dir: Path,
    repeats: int,
    quick: bool,
    tests_json: Path | None,
    commit: str | None,
    shapes: Sequence[str] = (),
    sizes: Sequence[int] = (),
) -> None:
    """Measures the suites, prints tables, writes one file. Exit code 1 when a job failed; the others are written."""
    chosen = tuple(_read_shape(text) for text in shapes)
    _need_gpu()
    tests = _read_tests(tests_json)  # before the minutes of measuring, not after
    from fp4gemm.bench import sweep
    from fp4gemm.bench.common import Config
    from fp4gemm.bench.timing import copy_tb_s

    environment = provenance.environment(commit)
    copy = copy_tb_s(repeats)
    _console.print(f"[bold]{environment.gpu}[/], driver {environment.driver}, copy {copy:.2f} TB/s (read + written)")
    rows, errors = _measure(suites, Config(repeats, quick, chosen, tuple(sizes)))
    sweep.add_limits(rows, copy)
    _show(rows)
    words = ["fp4gemm bench", bench, f"--repeats {repeats}", *(["--quick"] if quick else [])]
    words += [*(f"--shape {text}" for text in shapes), *(f"--m {size}" for size in sizes)]
    document = report.Report(bench, " ".join(words), environment, copy, rows, tests).document()
    if errors:
        document["errors"] = errors
    path = report.write(document, out or report.free_path(out_dir, report.file_name(document)))
    _console.print(f"{len(rows)} rows in {path}")
    if errors:
        _console.print(f"[red]{len(errors)} jobs failed[/]")
        raise typer.Exit(1)


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        _fail("needs a CUDA GPU of compute capability 9.0; torch sees none (fp4gemm doctor says why)")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        found = f"{torch.cuda.get_device_name()} ({capability[0]}.{capability[1]})"
        _fail(f"needs a CUDA GPU of compute capability 9.0, the one with kernels; found {found}")


def _fail(message: str) -> NoReturn:
    _console.print(f"[red]fp4gemm bench[/] {escape(message)}")
    raise typer.Exit(2)


def _read_tests(path: Path | None) -> report.TestCounts:
    try:
        return report.read_tests(path) if path else report.TestCounts()
    except (OSError, report.ReportError) as error:
        raise typer.BadParameter(f"--tests-json: {error}") from error


def _read_shape(text: str) -> tuple[int, int]:
    sizes = [int(word) if word.isdecimal() else 0 for word in text.split("x")]
    if len(sizes) != 2 or min(sizes) < 1:
        raise typer.BadParameter(f"--shape: expected NxK, such as 4096x14336, got {text!r}")
    return sizes[0], sizes[1]


def _suite_jobs(suite: str, config: Config) -> list[Job]:
    from fp4gemm.bench import gemm, grouped, groups, kernels, layers, overhead, quantize, search, selection, tiles

    found: dict[str, Any] = {
        "quantize": quantize.jobs,
        "gemm": gemm.jobs,
        "grouped": grouped.jobs,
        "groups": groups.jobs,
        "overhead": overhead.jobs,
        "load": kernels.load_jobs,
        "compile": kernels.compile_jobs,
        "selection": selection.jobs,
        "tiles": tiles.jobs,
        "sweep": layers.jobs,
        "search": search.jobs,
    }
    return list(found[suite](config))


def _measure(suites: Sequence[str], config: Config) -> tuple[list[report.Row], list[str]]:
    """Rows of all jobs, and one line for each job that failed: a late failure must not lose the minutes before it."""
    import torch

    jobs = [job for suite in suites for job in _suite_jobs(suite, config)]
    rows: list[report.Row] = []
    errors: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=job.label)
            try:
                rows += job.run()
            except Exception as error:  # whatever it is, it is shown, recorded and makes the exit code 1
                errors.append(f"{job.label}: {type(error).__name__}: {error}")
                progress.console.print(f"[red]{escape(errors[-1])}[/]")
            torch.cuda.empty_cache()  # a finished job's graphs and inputs must not crowd the next one
            progress.advance(task)
    return rows, errors


def _show(rows: Sequence[report.Row]) -> None:
    for bench in tables.TABLES:
        for shown in tables.of(bench, rows):
            table = Table(title=shown.title, title_justify="left", caption=shown.note or None, caption_justify="left")
            for index, name in enumerate(shown.columns):
                table.add_column(name.replace("`", ""), justify="right" if index else "left")
            for cells in shown.rows:
                table.add_row(*(escape(cell.replace("`", "")) for cell in cells))
            _console.print(table)


if __name__ == "__main__":
    app(prog_name="fp4gemm bench")
