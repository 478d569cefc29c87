"""Measured rows as tables of text: the terminal, README and docs all show these."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fp4gemm.bench import grouped, peers, search_peers, sweep
from fp4gemm.report import Row


@dataclass(frozen=True)
class Table:
    """A title, column names and rows of text; `note` is a sentence below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


Column = tuple[str, Callable[[Row], str]]


def number(value: float) -> str:
    """Three significant digits, or all digits before the point: 1234.5 -> '1,234', 12.34 -> '12.3', 0.5 -> '0.500'."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, ""))


def _number(name: str) -> Callable[[Row], str]:
    return lambda row: number(row[name]) if name in row else ""


def _versus(name: str) -> Callable[[Row], str]:
    return lambda row: number(row["vs_us"][name]) if name in row["vs_us"] else ""


def _factor(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['vs_us'][name] / row['us']:.2f}x" if name in row["vs_us"] else ""


def _share_of_copy(row: Row) -> str:
    copy = row["vs_us"].get("copy_same_bytes")
    return f"{copy / row['us']:.0%}" if copy else ""


def _grouped_options(row: Row) -> str:
    """What `quantize_grouped` was asked for, in words."""
    o = row["options"]
    words = ["row + transposed" if o.get("both") else "transposed" if o.get("transposed") else "row"]
    names = {"hadamard": "Hadamard", "seed": "stochastic", "dbias": "sums of columns"}
    return ", ".join([*words, *(text for name, text in names.items() if name in o)])


def _gb_s(row: Row) -> str:
    return f"{row['bytes'] / row['us'] / 1e3:,.0f}"


def _tflop_s(row: Row) -> str:
    return number(2 * row["M"] * row["N"] * row["K"] / row["us"] / 1e6)


def options_text(row: Row) -> str:
    """Scaling and options of a quantizer's row, in words."""
    options = row["options"]
    words = {
        "given scale": options.get("outer_scale") == "given",
        "transposed": options.get("outputs") == "transposed",
        "row + transposed": options.get("outputs") == "both",
        "16 x 16 blocks": options.get("block"),
        "Hadamard": options.get("rht"),
        "stochastic": options.get("sr"),
        f"4/6 ({options.get('adaptive')})": options.get("adaptive"),
        f"residual {options.get('residual')}": options.get("residual"),
        str(options.get("producer")).replace("_", " "): options.get("producer"),
    }
    return ", ".join([str(options.get("scaling", "")), *(word for word, given in words.items() if given)])


def _layout(row: Row) -> str:
    return str(row["options"].get("sf_layout", ""))


def _call(row: Row) -> str:
    given = ", given scale" if row.get("options", {}).get("outer_scale") == "given" else ""
    extra = row["epilogue"].removeprefix("rowcol").replace("_", ", ")
    return f"`{row.get('op', 'gemm')}`{given}{extra}"


def _shape(row: Row) -> str:
    return " x ".join(str(row[name]) for name in "MNK" if name in row)


_SHAPE: Column = ("shape", _shape)
_MODE: Column = ("mode", _field("mode"))
_US: Column = ("us", _number("us"))
_KERNEL: Column = ("kernel", lambda row: f"`{row['kernel']}`")


def _quoted(row: Row) -> str:
    return f"`{row['options']['fastest']}`"


_COMPILED: tuple[Column, ...] = (
    _KERNEL,
    ("arch", _field("arch")),
    ("seconds", _number("seconds")),
    ("peak MB", _number("peak_mb")),
    ("registers", _field("registers")),
    ("spill bytes", _field("spill_bytes")),
    ("shared memory, bytes", _field("smem_bytes")),
)


def _timed_call(row: Row) -> str:
    """A function, and how it is called where that differs."""
    name, *how = str(row["op"]).split(", ")
    return ", ".join([f"`{name}`", *how])


TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "quantize": (
        "Quantize (M x K, bf16)",
        (
            _SHAPE,
            ("scaling, options", options_text),
            ("scale layout", _layout),
            _MODE,
            _US,
            ("GB/s", _gb_s),
            ("copy of the same bytes, us", _versus("copy_same_bytes")),
            ("of copy bandwidth", _share_of_copy),
            ("Model Optimizer fake-quant, us", _versus(peers.MODELOPT)),
            ("torchao, compiled, us", _versus(peers.TORCHAO)),
            ("torch's kernels, then quantize, us", _versus("unfused")),
        ),
    ),
    "dequantize": (
        "Dequantize (M x K, to bf16)",
        (
            _SHAPE,
            ("scale layout", _layout),
            _MODE,
            _US,
            ("GB/s", _gb_s),
            ("copy of the same bytes, us", _versus("copy_same_bytes")),
            ("of copy bandwidth", _share_of_copy),
        ),
    ),
    "gemm": (
        "GEMM (M x N x K, bf16 out)",
        (
            _SHAPE,
            ("call", _call),
            ("A", _field("a")),
            ("B", _field("b")),
            _MODE,
            _US,
            ("TB/s", _number("tb_s")),
            ("TFLOP/s", _tflop_s),
            ("cuBLAS bf16, us", _versus("cublas_bf16")),
            ("dequantize + cuBLAS, us", _versus("dequantize_cublas")),
            ("humming-kernels, us", _versus(sweep.PEER_KEY)),
            ("speed-up over cuBLAS", _factor("cublas_bf16")),
            ("relative error", lambda row: f"{row['rel_error']:.1e}"),
        ),
    ),
    "sweep": (
        "Layers (M x N x K, bf16): the parts of a training step",
        (
            _SHAPE,
            ("part", lambda row: f"`{row['op']}`" + ("" if row["layout"] == "none" else f" {row['layout']}")),
            ("recipe, scale layout", lambda row: ", ".join(str(value) for value in row["options"].values())),
            _MODE,
            _US,
            ("cuBLAS bf16, us", _versus("cublas_bf16")),
            ("speed-up over cuBLAS", _factor("cublas_bf16")),
            ("GEMM, then rescaling, us", _versus("post_scale")),
            ("speed-up over that", _factor("post_scale")),
            ("quantize, then rearranging, us", _versus("pair")),
            ("speed-up over it", _factor("pair")),
        ),
    ),
    "quantize_grouped": (
        "Quantizing groups (rows of all members x K, bf16)",
        (
            _SHAPE,
            ("members", _field("experts")),
            ("rows by member", _field("routing")),
            ("options", _grouped_options),
            _US,
            ("TB/s", _number("tb_s")),
            ("copy of the same bytes, us", _versus("copy_same_bytes")),
            ("of copy bandwidth", _share_of_copy),
            ("one matrix, us", _versus("dense")),
        ),
    ),
    "grouped": (
        "Experts (tokens in all x N x K, bf16)",
        (
            _SHAPE,
            ("experts", _field("experts")),
            ("tokens by expert", _field("routing")),
            ("call", lambda row: f"`{row['op']}`"),
            _MODE,
            _US,
            ("TB/s", _number("tb_s")),
            ("TFLOP/s", _number("tflop_s")),
            ("torch's grouped bf16, us", _versus(grouped.TORCH)),
            ("speed-up over it", _factor(grouped.TORCH)),
            ("loop of `gemm`, us", _versus(grouped.LOOP)),
            ("speed-up over the loop", _factor(grouped.LOOP)),
            ("humming-kernels, us", _versus(sweep.PEER_KEY)),
            ("speed-up over humming-kernels", _factor(sweep.PEER_KEY)),
            ("relative error", lambda row: f"{row['rel_error']:.1e}"),
        ),
    ),
    "overhead": (
        "CPU time of a warm Python call (weights prepacked)",
        (
            ("call", _timed_call),
            _SHAPE,
            _US,
            ("process CPU, us", _number("process_us")),
            ("`torch.mm`, us", _versus("torch_mm")),
            ("one bare launch, us", _versus("driver_launch")),
        ),
    ),
    "load": (
        "Load of a cached kernel in a new process",
        (_KERNEL, ("ms", _number("ms")), ("slowest, ms", _number("max_ms"))),
    ),
    "search": (
        "Search for block scales (N x K, bf16)",
        (
            _SHAPE,
            ("error", _field("metric")),
            ("block", lambda row: str(row.get("options", {}).get("block", ""))),
            ("weights", lambda row: str(row.get("options", {}).get("weights", "")).replace("_", " ")),
            _US,
            ("10^9 values/s", _number("g_values_s")),
            ("Model Optimizer, us", _versus(search_peers.MODELOPT)),
            ("speed-up over Model Optimizer", _factor(search_peers.MODELOPT)),
            ("qwantize, us", _versus(search_peers.QWANTIZE)),
            ("speed-up over qwantize", _factor(search_peers.QWANTIZE)),
            ("candidates tried", _number("tried_per_scale")),
            ("as exhaustive", lambda row: "yes" if row["identical_to_exhaustive"] else "NO"),
        ),
    ),
    "tiles": (
        "Per-row quantizer by threads x blocks x rows of a CTA (M x K, bf16)",
        (
            _SHAPE,
            _KERNEL,
            ("fetched ahead, KB per SM", lambda row: str(row["options"]["prefetch_kb"])),
            _US,
            ("of copy bandwidth", _share_of_copy),
        ),
    ),
    "selection": (
        "The kernel that is chosen where no shape was measured, beside the fastest candidate (M x N x K, bf16)",
        (
            _SHAPE,
            _KERNEL,
            _US,
            ("fastest", lambda row: "" if row["options"]["fastest"] == row["kernel"] else _quoted(row)),
            ("us of it", _versus("fastest")),
            ("over it", lambda row: f"{row['us'] / row['vs_us']['fastest'] - 1:.1%}"),
            ("speed-up over cuBLAS bf16", _factor("cublas_bf16")),
        ),
    ),
    "compile": ("Compilation", _COMPILED),
    "emulated": ("Kernels with their Blackwell instructions in software, compiled beside their tests", _COMPILED),
}


_SUMMARY_SHAPES = ((16384, 8192), (128, 8192))  # M, K of quantizers

_SUMMARY_SWEEP = ((8192, 8192), (16, 8192))  # M, K of layers


def _in_summary(row: Row) -> bool:
    """The rows that README shows: CUDA-graph time in the default scale layout, experts' tokens as words spread them.

    The rest is for the docs."""
    if row["bench"] == "quantize" and (row["M"], row["K"]) not in _SUMMARY_SHAPES:
        return False
    if row["bench"] == "sweep" and (row["M"], row["K"]) not in _SUMMARY_SWEEP:
        return False
    if row["bench"] in ("grouped", "quantize_grouped") and (
        row["routing"] != "text" or row["op"] == "quantize_gemm_grouped"
    ):
        return False
    in_graph = row["bench"] == "overhead" or row.get("mode", "graph") == "graph"
    default_layout = row.get("options", {}).get("sf_layout", "128x4") == "128x4"
    return bool(in_graph and default_layout and row["bench"] not in ("compile", "emulated", "selection", "tiles"))


def _best_tiles(rows: Sequence[Row]) -> list[Row]:
    """Of every kernel at every shape the distance that was quickest, quickest kernels first."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["us"])):
        best = groups.setdefault((row["M"], row["K"], row["options"]["sf_layout"]), [])
        if all(row["kernel"] != other["kernel"] for other in best):
            best.append(row)
    return [row for best in groups.values() for row in best]


def table(bench: str, rows: Sequence[Row], summary: bool = False) -> Table | None:
    """The table of one bench's rows; None when there are none. `summary` keeps the rows that README shows."""
    title, columns = TABLES[bench]
    kept = [row for row in rows if row["bench"] == bench and (not summary or _in_summary(row))]
    kept = _best_tiles(kept) if bench == "tiles" else kept
    if not kept:
        return None
    filled = [(name, cell) for name, cell in columns if any(cell(row) for row in kept)]
    cells = tuple(tuple(cell(row) for _, cell in filled) for row in kept)
    return Table(title, tuple(name for name, _ in filled), cells)


def of(bench: str, rows: Sequence[Row], summary: bool = False) -> list[Table]:
    """Every table of one bench's rows: for GEMMs first what the sweep says. `summary`: what README shows."""
    overview = [shown for shown in (_speedup_table(rows), _cost_table(rows)) if shown] if bench == "gemm" else []
    if overview and summary:  # the overview says it for bf16 activations
        rows = [row for row in rows if row.get("a") != "bf16"]
    listed = table(bench, rows, summary)
    return overview + ([listed] if listed else [])


def _speedup_table(rows: Sequence[Row]) -> Table | None:
    over_peer = sweep.over_peer(rows)
    note = (
        f"Beside humming-kernels: {statistics.geometric_mean(over_peer):.2f}x as fast in the geometric mean of "
        f"{len(over_peer)} products, {min(over_peer):.2f}x at least."
        if over_peer
        else ""
    )
    title = "Speed-up over cuBLAS bf16: bf16 activations [M, K] · NVFP4 weights [N, K], CUDA graphs"
    order = (sweep.OURS, sweep.OURS_PDL, sweep.OURS_SUSTAINED, sweep.PEER, sweep.LIMIT)
    return _curve_table(title, sweep.speedups(rows), order, lambda ratio: f"{ratio:.2f}", note)


def _cost_table(rows: Sequence[Row]) -> Table | None:
    title = "What quantizing the activations adds: `quantize_gemm` over `gemm`, CUDA graphs"
    return _curve_table(title, sweep.quantize_costs(rows), ("amax", "given"), lambda cost: f"{cost - 1:+.0%}")


def _curve_table(
    title: str, curves: sweep.Curves, order: Sequence[str], text: Callable[[float], str], note: str = ""
) -> Table | None:
    """A row for each curve of each shape, a column for each M; None without curves."""
    sizes = sweep.sizes(curves)
    cells = tuple(
        (f"{N} x {K}", name, *(text(by_name[name][M]) if M in by_name[name] else "" for M in sizes))
        for (N, K), by_name in curves.items()
        for name in order
        if name in by_name
    )
    return Table(title, ("N x K", "", *(f"M = {M}" for M in sizes)), cells, note) if cells else None


def markdown(shown: Table) -> str:
    """A pipe table; every column but the first is right-aligned."""
    lines = [" | ".join(shown.columns), " | ".join([":--"] + ["--:"] * (len(shown.columns) - 1))]
    lines += [" | ".join(cells) for cells in shown.rows]
    return "\n".join(f"| {line} |" for line in lines)
