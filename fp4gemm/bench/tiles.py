"""How the per-row quantizer divides its work: threads, blocks and rows of a CTA, and how far it fetches ahead.

The figures behind ``select.quantize_spec`` and ``select.prefetch_ctas``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import fp4gemm
from fp4gemm import launch
from fp4gemm.bench import timing
from fp4gemm.bench.common import ARCH, Config, Job, nbytes, random_inputs
from fp4gemm.formats import BLOCK
from fp4gemm.report import Row
from fp4gemm.spec import QuantizeSpec, check
from fp4gemm.tensor import FP4Tensor

SHAPES = ((8192, 8192), (16384, 8192), (16384, 4096), (16384, 2048))
LAYOUTS = ("linear", "128x4")
PREFETCH_KB = (0, 32, 64, 128)  # for each SM


def candidates(k: int, sf_layout: str) -> list[QuantizeSpec]:
    """One, two or four blocks a thread; CTAs of 256 and 512 threads, and of one row."""
    specs = []
    for blocks in (1, 2, 4):
        threads = k // BLOCK // blocks
        for rows in sorted({1, max(1, 256 // threads), max(1, 512 // threads)}):
            specs.append(QuantizeSpec(ARCH, "bf16", "per_row", "te_per_token", sf_layout, threads, blocks, rows))
    return [spec for spec in specs if check(spec) is None]


def jobs(config: Config) -> Iterator[Job]:
    """Every candidate with every distance, in graph mode."""
    for M, K in SHAPES[:1] if config.quick else SHAPES:
        for sf_layout in LAYOUTS:
            yield Job(f"tiles {M}x{K} {sf_layout}", functools.partial(_rows, M, K, sf_layout, config))


def _rows(M: int, K: int, sf_layout: str, config: Config) -> list[Row]:
    xs = random_inputs(timing.rotation(2 * M * K), M, K)
    outs = [fp4gemm.quantize(x, sf_layout=sf_layout) for x in xs]
    moved = nbytes(xs[0], outs[0])
    calls = {
        (spec, kb): [
            functools.partial(_launch, _launcher(spec), spec, kb, x, out) for x, out in zip(xs, outs, strict=True)
        ]
        for spec in candidates(K, sf_layout)
        for kb in PREFETCH_KB
    }
    named: dict[str, list[timing.Call]] = {f"{spec.name} {kb}": list(each) for (spec, kb), each in calls.items()}
    us = timing.compare({**named, "copy_same_bytes": timing.copies_of(moved)}, "graph", config.repeats)
    row = {"bench": "tiles", "M": M, "K": K, "dtype": "bf16", "mode": "graph", "bytes": moved}
    return [
        {
            **row,
            "kernel": spec.name,
            "options": {"sf_layout": sf_layout, "prefetch_kb": kb},
            "us": us[f"{spec.name} {kb}"],
            "vs_us": {"copy_same_bytes": us["copy_same_bytes"]},
        }
        for spec, kb in calls
    ]


@functools.cache
def _launcher(spec: QuantizeSpec) -> launch.Launcher:
    return launch.Launcher(spec, launch.QUANTIZE_ARGUMENTS)


@functools.cache
def _sms() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def _launch(launcher: launch.Launcher, spec: QuantizeSpec, kb: int, x: torch.Tensor, out: FP4Tensor) -> None:
    M, K = x.shape
    ahead = _sms() * max(1, round(kb * 1024 / (spec.rows * K * x.element_size()))) if kb else 0
    launcher(
        (M // spec.rows, 1, 1), torch.cuda.current_stream().cuda_stream,
        x.data_ptr(), out.data.data_ptr(), out.block_scale.data_ptr(), out.outer_scale.data_ptr(), 0,
        K, 0, M, M, K, K // BLOCK, 0, ahead, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
