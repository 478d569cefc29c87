"""CPU time of a warm Python call: what a caller pays before the GPU has anything to do."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator

import torch

import fp4gemm
from fp4gemm import launch, select
from fp4gemm.bench.common import ARCH, Config, Job, random_inputs
from fp4gemm.bench.timing import Call
from fp4gemm.report import Row

SHAPE = (16, 256, 256)  # M, N, K: the GPU's share is a few microseconds
_CALLS = 200  # a few launches each: fewer than the launch queue holds, so that a full queue never makes the CPU wait
_WARM = 50


def _batch(call: Call) -> tuple[float, float]:
    """Microseconds of wall time and of process CPU time per call, over one batch that starts with an idle GPU."""
    torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(_CALLS):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    torch.cuda.synchronize()
    return wall / _CALLS * 1e6, cpu / _CALLS * 1e6


def call_us(calls: dict[str, Call], batches: int) -> dict[str, tuple[float, float]]:
    """Median (wall, process) microseconds per call of every candidate, batches interleaved."""
    for call in calls.values():
        for _ in range(_WARM):
            call()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(batches):
        for name, call in calls.items():
            samples[name].append(_batch(call))
    return {
        name: (statistics.median(w for w, _ in got), statistics.median(c for _, c in got))
        for name, got in samples.items()
    }


def _driver_launch() -> Call:
    """One launch with nothing to do: the least that each kernel of a call costs on this host."""
    launcher = launch.Launcher(select.dequantize_spec(ARCH, "bf16", "128x4", False), launch.DEQUANTIZE_ARGUMENTS)
    stream = torch.cuda.current_stream().cuda_stream
    return functools.partial(launcher, (1, 1, 1), stream, *(0,) * 7)  # without units


def jobs(config: Config) -> Iterator[Job]:
    """gemm and quantize_gemm on a prepacked weight, quantize and dequantize, at one small shape.

    Yardsticks: torch.mm into a given tensor, and one bare launch."""
    yield Job("overhead", functools.partial(_rows, config))


def _rows(config: Config) -> list[Row]:
    M, N, K = SHAPE
    x, w = random_inputs(1, M, K)[0], random_inputs(1, N, K)[0]
    x4, w4 = fp4gemm.quantize(x), fp4gemm.quantize(w).prepack()
    wt, out, given = w.t(), x.new_empty(M, N), x.new_ones((), dtype=torch.float32)
    calls: dict[str, Call] = {
        "gemm": functools.partial(fp4gemm.gemm, x, w4),
        "quantize": functools.partial(fp4gemm.quantize, x),
        "dequantize": functools.partial(fp4gemm.dequantize, x4, torch.bfloat16),
        "quantize_gemm": functools.partial(fp4gemm.quantize_gemm, x, w4),
        "quantize_gemm, given scale": functools.partial(fp4gemm.quantize_gemm, x, w4, outer_scale=given),
        "torch_mm": functools.partial(torch.mm, x, wt, out=out),
        "driver_launch": _driver_launch(),
    }
    us = call_us(calls, 10 if config.quick else 50)
    yardsticks = {name: us.pop(name)[0] for name in ("torch_mm", "driver_launch")}
    return [
        {
            "bench": "overhead",
            "op": op,
            "M": M,
            "N": N,
            "K": K,
            "mode": "eager",
            "us": wall,
            "process_us": process,
            "vs_us": yardsticks,
        }
        for op, (wall, process) in us.items()
    ]
