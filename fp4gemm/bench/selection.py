"""How far the kernel that selection takes is from the fastest candidate, at shapes of models that its table has not.

The packaged rates are fitted to these shapes among others; `--shape` takes those that they have not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from fp4gemm import select, tune
from fp4gemm.bench import timing
from fp4gemm.bench.common import ARCH, Config, Job, random_inputs
from fp4gemm.engine import Weight
from fp4gemm.report import Row
from fp4gemm.spec import PackedSpec

SHAPES = (
    (28672, 4096), (5120, 5120), (51200, 5120), (5120, 25600), (37888, 3584), (3584, 18944), (10240, 8192),
    (2560, 9728), (4608, 3584), (2112, 7168), (7168, 2048), (24576, 1536),
)  # fmt: skip
SIZES = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
QUICK_SHAPES, QUICK_SIZES = SHAPES[1:2], (1, 64)

_Weights = tuple[list[Weight], list[torch.Tensor]]  # prepacked, and bf16


def jobs(config: Config) -> Iterator[Job]:
    """Every candidate of the tuner for x [M, K] . w [N, K]^T, and cuBLAS bf16, in plain graphs and in turn."""
    sizes = config.sizes or (QUICK_SIZES if config.quick else SIZES)
    make = functools.lru_cache(maxsize=1)(functools.partial(_weights, sizes))
    for N, K in config.shapes or (QUICK_SHAPES if config.quick else SHAPES):
        for M in sizes:
            yield Job(f"selection {M}x{N}x{K}", functools.partial(_rows, M, N, K, make, config.repeats))


def _weights(sizes: tuple[int, ...], N: int, K: int) -> _Weights:
    """Of one shape, for whose sizes all candidates are built first, several at once."""
    gpu = select.gpu_of(torch.cuda.current_device())
    tune.build({spec for M in sizes for spec in _candidates(gpu, M, N, K)})
    return tune.rotated(N, K), random_inputs(timing.rotation(2 * N * K), N, K)


def _candidates(gpu: tuple[str, int], M: int, N: int, K: int) -> list[PackedSpec]:
    """The chosen one first."""
    chosen = select.packed_spec(gpu, M, N, K, "bf16", "bf16", None, False, N % 8 == 0)
    return list(dict.fromkeys((chosen, *tune.candidates(M, N, K, gpu[1]))))


def _rows(M: int, N: int, K: int, make: Callable[[int, int], _Weights], repeats: int) -> list[Row]:
    (weights, plain), gpu = make(N, K), select.gpu_of(torch.cuda.current_device())
    chosen, *others = _candidates(gpu, M, N, K)
    calls = tune.calls_of(M, weights)
    named = {spec.name: calls(spec) for spec in (chosen, *others)}
    us = timing.compare({**named, "cublas_bf16": _cublas(M, plain)}, "graph", repeats)
    cublas = us.pop("cublas_bf16")
    fastest = min(us, key=us.__getitem__)
    return [
        {
            "bench": "selection", "arch": ARCH, "M": M, "N": N, "K": K, "mode": "graph", "kernel": chosen.name,
            "options": {"fastest": fastest}, "us": us[chosen.name],
            "vs_us": {"fastest": us[fastest], "cublas_bf16": cublas},
        }
    ]  # fmt: skip


def _cublas(M: int, weights: list[torch.Tensor]) -> list[timing.Call]:
    N, K = weights[0].shape
    x, d = random_inputs(len(weights), M, K), random_inputs(len(weights), M, N)
    return [functools.partial(torch.mm, a, w.t(), out=out) for a, w, out in zip(x, weights, d, strict=True)]
