"""What the rows of the GEMM sweep say: speed-up over cuBLAS by shape and M, beside the peer and the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4gemm.report import Row

OURS, OURS_PDL, PEER, LIMIT = "fp4gemm", "fp4gemm, dependent launches", "humming-kernels", "limit"
OURS_SUSTAINED = "fp4gemm, each at its own clock"  # and cuBLAS too
PEER_KEY = "humming"  # in a row's vs_us
Shape = tuple[int, int]  # N, K
Curve = dict[int, float]  # M -> figure
Curves = dict[Shape, dict[str, Curve]]


def flop(row: Row) -> int:
    """Multiplications and additions of one product."""
    return 2 * int(row["M"]) * int(row["N"]) * int(row["K"])


# --- the roofline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """The best that was reached in graphs, in turn: TB/s (bytes read + written) and cuBLAS's bf16 TFLOP/s."""

    tb_s: float
    tflop_s: float

    def us(self, row: Row) -> float:
        """Microseconds below which this row cannot come: its bytes at full bandwidth or its work at full rate."""
        return max(float(row["bytes"]) / self.tb_s, flop(row) / self.tflop_s) / 1e6


def roof(rows: Iterable[Row], copy_tb_s: float) -> Roof | None:
    """The roof of the run that these rows come from; None without GEMM rows in graph mode.

    A large cuBLAS product at M = 1 only reads, which is a little faster than a copy: the better of both counts.
    """
    yardsticks = [(row, row["vs_us"]["cublas_bf16"]) for row in rows if row["bench"] == "gemm" and _in_graph(row)]
    if not yardsticks:
        return None
    return Roof(
        max(copy_tb_s, *(_bf16_bytes(row) / us / 1e6 for row, us in yardsticks)),
        max(flop(row) / us / 1e6 for row, us in yardsticks),
    )


def _bf16_bytes(row: Row) -> int:
    M, N, K = (int(row[name]) for name in "MNK")
    return 2 * (M * K + N * K + M * N)


def add_limits(rows: Iterable[Row], copy_tb_s: float) -> None:
    """Gives GEMM rows `limit_ratio`: the speed-up over cuBLAS that the roofline of this run allows. Not those at their
    own clocks, which are others than that of the roof."""
    gemms = [row for row in rows if row["bench"] == "gemm" and row["mode"] != "sustained"]
    if top := roof(gemms, copy_tb_s):
        for row in gemms:
            row["limit_ratio"] = row["vs_us"]["cublas_bf16"] / top.us(row)


# --- curves -----------------------------------------------------------------------------------------------------------


def _in_graph(row: Row) -> bool:
    return bool(row["mode"] == "graph")


def products(rows: Iterable[Row], mode: str = "graph", op: str = "gemm") -> list[Row]:
    """The sweep's rows: bf16 activations, NVFP4 weights, plain epilogue, in one mode."""
    return [
        row
        for row in rows
        if row["bench"] == "gemm"
        and (row.get("op"), row["a"], row["epilogue"], row["mode"]) == (op, "bf16", "rowcol", mode)
    ]


def speedups(rows: Sequence[Row]) -> Curves:
    """Times faster than cuBLAS bf16: plain graphs, dependent launches, own clocks, the peer, the limit; whatever was
    measured."""
    curves: Curves = {}
    for row in products(rows):
        cublas, peer = row["vs_us"]["cublas_bf16"], row["vs_us"].get(PEER_KEY)
        _put(curves, row, OURS, cublas / row["us"])
        if peer:
            _put(curves, row, PEER, cublas / peer)
        if "limit_ratio" in row:
            _put(curves, row, LIMIT, row["limit_ratio"])
    for mode, name in (("graph_pdl", OURS_PDL), ("sustained", OURS_SUSTAINED)) if curves else ():
        for row in products(rows, mode):
            _put(curves, row, name, row["vs_us"]["cublas_bf16"] / row["us"])
    return curves


def quantize_costs(rows: Sequence[Row]) -> Curves:
    """Time of quantize_gemm over that of gemm with ready activations, by how the outer scale comes."""
    curves: Curves = {}
    for row in products(rows, op="quantize_gemm"):
        if "quantize_cost" in row:
            _put(curves, row, row["options"]["outer_scale"], row["quantize_cost"])
    return curves


def over_peer(rows: Sequence[Row]) -> list[float]:
    """Times faster than the peer, one figure a problem of the sweep."""
    return [row["vs_us"][PEER_KEY] / row["us"] for row in products(rows) if PEER_KEY in row["vs_us"]]


def sizes(curves: Curves) -> list[int]:
    """Every M of the curves, in order."""
    return sorted({M for by_name in curves.values() for curve in by_name.values() for M in curve})


def _put(curves: Curves, row: Mapping[str, Any], name: str, value: float) -> None:
    curves.setdefault((row["N"], row["K"]), {}).setdefault(name, {})[row["M"]] = value
