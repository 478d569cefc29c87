"""The quantizer, option by option, and the dequantizer, against a copy of the same bytes and against peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

import fp4gemm
from fp4gemm.bench import peers, timing
from fp4gemm.bench.common import Config, Job, nbytes, random_inputs
from fp4gemm.formats import RECIPE_SIGNS
from fp4gemm.report import Row
from fp4gemm.tensor import FP4Tensor

LARGE = tuple(product((1024, 2048, 4096, 8192, 16384, 32768), (2048, 4096, 8192)))  # M, K
SMALL = ((1, 8192), (16, 8192), (128, 8192))
OF_MODELS = ((16384, 5120), (8192, 14336), (4096, 28672))  # whose K is no power of two
DEQUANTIZED = ((4096, 4096), (8192, 8192), (16384, 8192))
PEERS_AT = (8192, 8192)
_GIVEN = 1.0 / 512  # a decode multiplier that suits N(0, 1): amax about 5.2 = 512 / 2688 * 5.2 of the range
_SEED, _RESIDUAL = 1, 512
_SETTLE_S = 0.02  # no matrix product runs before
_BOTH, _NORM = "both", "add_rmsnorm"


@dataclass(frozen=True)
class Variant:
    """A quantizer's options as the rows record them.

    ``given``: the caller gives the outer scale; ``outputs``: the result of x ("row"), of its transpose, or both.
    """

    scaling: str = "per_row"
    sf_layout: str = "128x4"
    given: bool = False
    outputs: str = "row"
    hadamard: bool = False
    stochastic: bool = False
    adaptive: str | None = None
    residual: int = 0
    square: bool = False
    producer: str | None = None

    def options(self) -> dict[str, object]:
        rare = {
            "adaptive": self.adaptive,
            "residual": self.residual,
            "block": "16x16" if self.square else None,
            "producer": self.producer,
        }
        return {
            "scaling": self.scaling,
            "outer_scale": "given" if self.given else "amax",
            "outputs": self.outputs,
            "sf_layout": self.sf_layout,
            "rht": self.hadamard,
            "sr": self.stochastic,
            **{name: value for name, value in rare.items() if value},
        }

    def call(self) -> Callable[[torch.Tensor], object]:
        """x [M, K] -> FP4Tensor, or two of them."""
        arguments: dict[str, Any] = {"scaling": self.scaling, "sf_layout": self.sf_layout}
        if self.given:
            arguments["outer_scale"] = torch.tensor(_GIVEN, device=timing.DEVICE)
        if self.outputs == "transposed":
            arguments["transposed"] = True
        if self.hadamard:
            arguments["hadamard"] = RECIPE_SIGNS
        if self.stochastic:
            arguments["seed"] = _SEED
        if self.adaptive:
            arguments["adaptive"] = self.adaptive
        if self.residual:
            arguments["residual"] = self.residual
        if self.square:
            arguments["block"] = (16, 16)
        if self.producer == _NORM:
            return functools.partial(_quantize_norm, **arguments)
        if self.producer:
            arguments["producer"] = self.producer
        return functools.partial(fp4gemm.quantize_both if self.outputs == _BOTH else fp4gemm.quantize, **arguments)

    @property
    def columns(self) -> int:
        """Of x for each of the result: gate and up, or x and a residual beside each other."""
        return 2 if self.producer in ("silu_mul", _NORM) else 1

    @property
    def reads(self) -> int:
        """How often x is read: a column's amax is only known when all of x has been read."""
        return 2 if self.outputs != "row" and self.scaling == "per_row" and not self.given else 1

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options().items() if value and value != "amax")


_TRAINING = Variant(outputs=_BOTH)
VARIANTS = (
    Variant(),
    Variant(sf_layout="linear"),
    Variant(sf_layout="8x4"),
    Variant(scaling="per_tensor"),
    Variant(given=True),
    Variant(stochastic=True),
    Variant(adaptive="mse"),
    Variant(residual=_RESIDUAL),
    Variant(scaling="per_tensor", square=True),
    Variant(outputs="transposed"),
    _TRAINING,
    replace(_TRAINING, hadamard=True),
    replace(_TRAINING, stochastic=True),
    replace(_TRAINING, hadamard=True, stochastic=True),
    *(Variant(producer=name) for name in ("silu_mul", "gelu_tanh", "relu2", _NORM)),
)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k = x.shape[1] // 2
    return x[:, :k], x[:, k:]


@functools.cache
def _weight(k: int) -> torch.Tensor:
    return random_inputs(1, 1, k)[0][0]


def _quantize_norm(both: torch.Tensor, **arguments: Any) -> tuple[FP4Tensor, torch.Tensor]:
    x, residual = _halves(both)
    return fp4gemm.quantize_rmsnorm(x, _weight(x.shape[1]), residual=residual, **arguments)


def _unfused(producer: str, x: torch.Tensor) -> object:
    """What a layer does without a fused producer: torch's own kernels, then the quantizer."""
    if producer == _NORM:
        h, residual = _halves(x)
        h = h + residual
        return fp4gemm.quantize(F.rms_norm(h, (h.shape[1],), _weight(h.shape[1]), 1e-6)), h
    if producer == "silu_mul":
        gate, up = _halves(x)
        return fp4gemm.quantize(F.silu(gate) * up)
    return fp4gemm.quantize(F.gelu(x, approximate="tanh") if producer == "gelu_tanh" else F.relu(x).square())


def jobs(config: Config) -> Iterator[Job]:
    """Every option at every shape, small ones and other K without those of training; then dequantize."""
    for variant in VARIANTS[:1] if config.quick else VARIANTS:
        more: Sequence[tuple[int, int]] = (*OF_MODELS, *SMALL) if variant.outputs == "row" else ()
        for M, K in ((8192, 8192), (16, 8192)) if config.quick else (*LARGE, *more):
            yield Job(f"quantize {M}x{K} {variant}", functools.partial(_quantize_rows, variant, M, K, config))
    for M, K in DEQUANTIZED[:1] if config.quick else DEQUANTIZED:
        yield Job(f"dequantize {M}x{K}", functools.partial(_dequantize_rows, M, K, config))


def _quantize_rows(variant: Variant, M: int, K: int, config: Config) -> list[Row]:
    columns = variant.columns * K
    xs = random_inputs(timing.rotation(2 * M * columns), M, columns)
    quantize = variant.call()
    made = quantize(xs[0])
    results = made if isinstance(made, tuple) else (made,)
    moved = variant.reads * nbytes(xs[0]) + nbytes(*(t for t in results if isinstance(t, (FP4Tensor, torch.Tensor))))
    ours: list[timing.Call] = [functools.partial(quantize, x) for x in xs]
    others = peers.calls(xs) if (M, K) == PEERS_AT and variant == VARIANTS[0] else {}
    if variant.producer:
        others = {"unfused": [functools.partial(_unfused, variant.producer, x) for x in xs]}
    row = {"bench": "quantize", "M": M, "K": K, "dtype": "bf16", "options": variant.options()}
    return _rows(row, "quantize", ours, moved, config, others)


def _dequantize_rows(M: int, K: int, config: Config) -> list[Row]:
    first = fp4gemm.quantize(random_inputs(1, M, K)[0])
    count = timing.rotation(nbytes(first))
    packed = [first, *(fp4gemm.quantize(random_inputs(1, M, K)[0]) for _ in range(count - 1))]
    moved = nbytes(first, fp4gemm.dequantize(first, torch.bfloat16))
    calls: list[timing.Call] = [functools.partial(fp4gemm.dequantize, t, torch.bfloat16) for t in packed]
    row = {"bench": "dequantize", "M": M, "K": K, "dtype": "bf16", "options": {"sf_layout": "128x4"}}
    return _rows(row, "dequantize", calls, moved, config, {})


def _rows(
    row: Row, name: str, calls: list[timing.Call], moved: int, config: Config, others: dict[str, list[timing.Call]]
) -> list[Row]:
    """One row per mode. ``moved``: what the job must read and write at least."""
    return [_row(row, name, calls, moved, mode, config.repeats, others) for mode in timing.MODES]


def _row(
    row: Row, name: str, calls: list[timing.Call], moved: int, mode: str, repeats: int,
    others: dict[str, list[timing.Call]],
) -> Row:  # fmt: skip
    candidates = {name: calls, "copy_same_bytes": timing.copies_of(moved), **others}
    us = timing.compare(candidates, mode, repeats, settle_s=_SETTLE_S)
    return {
        **row,
        "mode": mode,
        "us": us[name],
        "bytes": moved,
        "gb_s": moved / us[name] / 1e3,
        "copy_fraction": us["copy_same_bytes"] / us[name],
        "vs_us": {other: us[other] for other in ("copy_same_bytes", *others)},
    }
