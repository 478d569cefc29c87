"""Quantizer and dequantizer against a copy of the same number of bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import fp4gemm
from fp4gemm.bench import timing
from fp4gemm.bench.common import Config, Job, nbytes, random_inputs
from fp4gemm.report import Row

LARGE = ((4096, 4096), (8192, 8192), (16384, 8192))
SMALL = ((1, 8192), (16, 8192), (128, 8192))
_GIVEN = 1.0 / 512  # a decode multiplier that suits N(0, 1): amax about 5.2 = 512 / 2688 * 5.2 of the range


@dataclass(frozen=True)
class Variant:
    """A quantizer's options as the rows record them; `given` means that the caller gives the outer scale."""

    scaling: str = "per_row"
    sf_layout: str = "128x4"
    given: bool = False

    def options(self) -> dict[str, object]:
        return {
            "scaling": self.scaling,
            "outer_scale": "given" if self.given else "amax",
            "outputs": "row",
            "sf_layout": self.sf_layout,
            "rht": False,
            "sr": False,
        }

    def __str__(self) -> str:
        return f"{self.scaling}{' given' if self.given else ''} {self.sf_layout}"


VARIANTS = (
    Variant(),
    Variant(sf_layout="linear"),
    Variant(sf_layout="8x4"),
    Variant(scaling="per_tensor"),
    Variant(given=True),
)


def jobs(config: Config) -> Iterator[Job]:
    """Per-row in three layouts, per-tensor and given scale, then dequantize; large and small M, both modes."""
    shapes: Sequence[tuple[int, int]] = ((8192, 8192), (16, 8192)) if config.quick else (*LARGE, *SMALL)
    for variant in VARIANTS[:1] if config.quick else VARIANTS:
        for M, K in shapes:
            yield Job(f"quantize {M}x{K} {variant}", functools.partial(_quantize_rows, variant, M, K, config))
    for M, K in shapes[:1] if config.quick else LARGE:
        yield Job(f"dequantize {M}x{K}", functools.partial(_dequantize_rows, M, K, config))


def _quantize_rows(variant: Variant, M: int, K: int, config: Config) -> list[Row]:
    xs = random_inputs(timing.rotation(2 * M * K), M, K)
    outer = torch.tensor(_GIVEN, device=timing.DEVICE) if variant.given else None
    quantize = functools.partial(
        fp4gemm.quantize, scaling=variant.scaling, sf_layout=variant.sf_layout, outer_scale=outer
    )
    moved = nbytes(xs[0], quantize(xs[0]))
    calls: list[timing.Call] = [functools.partial(quantize, x) for x in xs]
    row = {"bench": "quantize", "M": M, "K": K, "dtype": "bf16", "options": variant.options()}
    return _rows(row, "quantize", calls, moved, config)


def _dequantize_rows(M: int, K: int, config: Config) -> list[Row]:
    first = fp4gemm.quantize(random_inputs(1, M, K)[0])
    count = timing.rotation(nbytes(first))
    packed = [first, *(fp4gemm.quantize(random_inputs(1, M, K)[0]) for _ in range(count - 1))]
    moved = nbytes(first, fp4gemm.dequantize(first, torch.bfloat16))
    calls: list[timing.Call] = [functools.partial(fp4gemm.dequantize, t, torch.bfloat16) for t in packed]
    row = {"bench": "dequantize", "M": M, "K": K, "dtype": "bf16", "options": {"sf_layout": "128x4"}}
    return _rows(row, "dequantize", calls, moved, config)


def _rows(row: Row, name: str, calls: list[timing.Call], moved: int, config: Config) -> list[Row]:
    """One row per mode. `moved`: what the job must read and write at least, whatever the kernel reads twice."""
    return [_row(row, name, calls, moved, mode, config.repeats) for mode in timing.MODES]


def _row(row: Row, name: str, calls: list[timing.Call], moved: int, mode: str, repeats: int) -> Row:
    us = timing.compare({name: calls, "copy_same_bytes": timing.copies_of(moved)}, mode, repeats)
    copy = us["copy_same_bytes"]
    return {
        **row,
        "mode": mode,
        "us": us[name],
        "bytes": moved,
        "gb_s": moved / us[name] / 1e3,
        "copy_fraction": copy / us[name],
        "vs_us": {"copy_same_bytes": copy},
    }
