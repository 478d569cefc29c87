"""GEMMs with NVFP4 weights beside cuBLAS bf16, beside dequantize-then-cuBLAS, and beside humming-kernels.

The sweep multiplies bf16 activations by prepacked weights (W4A16: `gemm`) and quantizes the activations on the way
(W4A4: `quantize_gemm`; its GEMM reads activations that are exact in bf16, so it is the kernel of `gemm`). All
candidates of a problem are timed in one process: in `graph` in turns of 2 ms, so that they share the clock that the
power limit leaves them, as the kernels of a model do; in `sustained` each at the clock that it has for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fp4gemm
from fp4gemm import launch
from fp4gemm.bench import kernels, sweep, timing
from fp4gemm.bench.common import ARCH, Config, Job, nbytes, random_inputs
from fp4gemm.bench.problem import Problem, Weights, make_problem, make_weights, rel_error
from fp4gemm.bench.timing import Call
from fp4gemm.report import Row

SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192), (4096, 14336))  # N, K
SIZES = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)  # M
QUICK_SHAPES, QUICK_SIZES = SHAPES[:1], (1, 64, 1024)
PACKED = ((8192, 8192, 8192), (4096, 4096, 4096), (1024, 8192, 8192))  # M, N, K of gemm(a4, b4)
VARIED = ((16, 8192, 8192), (1024, 8192, 8192))  # of the variants
GRAPH, GRAPH_PDL, EAGER = "graph", "graph_pdl", "eager"  # graph_pdl: inside of programmatic()
SUSTAINED = "sustained"  # plain graphs, each candidate for 0.2 s by itself before it is timed
_GIVEN_UP_TO = 64  # M: with a given outer scale, small products quantize inside the GEMM kernel
_GIVEN = 1.0 / 512  # a decode multiplier that suits N(0, 1): amax about 5.2 = 512 / 2688 * 5.2 of the range
_PEER_ERROR = 1e-2  # more than twice what humming shows when it is called as it should be

Candidates = Mapping[str, Sequence[Call]]
Times = dict[tuple[str, str], float]  # (mode, candidate) -> microseconds


@dataclass(frozen=True)
class Variant:
    """What a call of `gemm` adds to the plain product; `arguments` makes it from M and N."""

    epilogue: str
    arguments: Callable[[int, int], dict[str, Any]]


VARIANTS = (
    Variant("rowcol_bias", lambda M, N: {"bias": random_inputs(1, 1, N)[0][0]}),
    Variant("rowcol_fp32", lambda M, N: {"out_dtype": torch.float32}),
)


def jobs(config: Config) -> Iterator[Job]:
    """The sweep; then, unless shapes or sizes were chosen, both operands packed and the variants."""
    shapes = config.shapes or (QUICK_SHAPES if config.quick else SHAPES)
    sizes = config.sizes or (QUICK_SIZES if config.quick else SIZES)
    # Every M of a shape is measured with the same weights, and only one shape's are kept.
    weights = functools.lru_cache(maxsize=1)(functools.partial(_sweep_weights, sizes))
    for N, K in shapes:
        for M in sizes:
            yield Job(f"gemm {M}x{N}x{K}", functools.partial(_sweep_rows, M, N, K, weights, config.repeats))
    if config.quick or config.shapes or config.sizes:
        return
    weights = functools.lru_cache(maxsize=1)(make_weights)
    for M, N, K in PACKED:
        yield Job(f"packed gemm {M}x{N}x{K}", functools.partial(_packed_rows, M, N, K, weights, config.repeats))
    for M, N, K in VARIED:
        yield Job(f"variants {M}x{N}x{K}", functools.partial(_variant_rows, M, N, K, weights, config.repeats))


MakeWeights = Callable[[int, int], Weights]


def _sweep_weights(sizes: Sequence[int], N: int, K: int) -> Weights:
    weights = make_weights(N, K)
    if weights.humming:
        weights.humming[0].compile(sizes)
    return weights


def _sweep_rows(M: int, N: int, K: int, make: MakeWeights, repeats: int) -> list[Row]:
    problem = make_problem(M, make(N, K))
    given = {"quantize_gemm given": torch.tensor(_GIVEN, device=timing.DEVICE)} if M <= _GIVEN_UP_TO else {}
    outer_scales: dict[str, torch.Tensor | None] = {"quantize_gemm amax": None, **given}
    ours = {"gemm": problem.gemm()} | {name: problem.quantize_gemm(scale) for name, scale in outer_scales.items()}
    inputs = {"gemm": problem.x[0]} | {
        name: fp4gemm.quantize(problem.x[0], outer_scale=scale) for name, scale in outer_scales.items()
    }
    errors = {name: rel_error(calls[0](), inputs[name], problem.weights) for name, calls in ours.items()}
    yardsticks = _yardsticks(problem)
    us = times({GRAPH: ours | yardsticks, GRAPH_PDL: ours}, repeats)
    us |= times({SUSTAINED: ours | yardsticks}, repeats) | times({EAGER: ours | yardsticks}, repeats)
    moved = nbytes(problem.x[0], problem.weights.packed[0]) + 2 * M * N
    rows = []
    for mode in (GRAPH, GRAPH_PDL, SUSTAINED, EAGER):
        others = {name: us[GRAPH if mode == GRAPH_PDL else mode, name] for name in yardsticks}
        for name in ours:
            op, _, outer_scale = name.partition(" ")
            row = _row(op, (M, N, K), "bf16", mode, us[mode, name], others, moved) | {"rel_error": errors[name]}
            if outer_scale:
                row |= {"options": {"outer_scale": outer_scale}, "quantize_cost": us[mode, name] / us[mode, "gemm"]}
            rows.append(row)
    return rows


def _yardsticks(problem: Problem) -> dict[str, list[Call]]:
    """What the sweep's rows are compared with. Raises RuntimeError when humming computes something else."""
    yardsticks = {"cublas_bf16": problem.cublas(), "dequantize_cublas": problem.dequantize_cublas()}
    if peer := problem.humming():
        error = rel_error(peer[0](), problem.x[0], problem.weights)
        if not error < _PEER_ERROR:
            raise RuntimeError(f"humming: relative error {error:.1e}: it is not called as its version expects")
        yardsticks[sweep.PEER_KEY] = peer
    return yardsticks


def _packed_rows(M: int, N: int, K: int, make: MakeWeights, repeats: int) -> list[Row]:
    problem = make_problem(M, make(N, K))
    calls = problem.packed_gemm()
    a4 = fp4gemm.quantize(problem.x[0])
    error = {"rel_error": rel_error(calls[0](), a4, problem.weights)}
    moved = nbytes(a4, problem.weights.packed[0]) + 2 * M * N
    rows = []
    for mode in (GRAPH, SUSTAINED, EAGER):
        us = times({mode: {"gemm": calls, "cublas_bf16": problem.cublas()}}, repeats)
        others = {"cublas_bf16": us[mode, "cublas_bf16"]}
        rows.append(_row("gemm", (M, N, K), "nvfp4", mode, us[mode, "gemm"], others, moved) | error)
    return rows


def _variant_rows(M: int, N: int, K: int, make: MakeWeights, repeats: int) -> list[Row]:
    problem = make_problem(M, make(N, K))
    arguments = {variant.epilogue: variant.arguments(M, N) for variant in VARIANTS}
    ours = {epilogue: problem.gemm(**given) for epilogue, given in arguments.items()}
    us = times({GRAPH: ours | {"cublas_bf16": problem.cublas()}}, repeats)
    rows = []
    for epilogue, calls in ours.items():
        D, bias = calls[0](), arguments[epilogue].get("bias")
        error = rel_error(D, problem.x[0], problem.weights, bias if isinstance(bias, torch.Tensor) else None)
        moved = nbytes(problem.x[0], problem.weights.packed[0], *(v for v in (D, bias) if isinstance(v, torch.Tensor)))
        others = {"cublas_bf16": us[GRAPH, "cublas_bf16"]}  # the plain product: cuBLAS too could fuse these
        row = _row("gemm", (M, N, K), "bf16", GRAPH, us[GRAPH, epilogue], others, moved)
        rows.append(row | {"epilogue": epilogue, "rel_error": error})
    return rows


def times(candidates: Mapping[str, Candidates], repeats: int) -> Times:
    """Median time of every candidate of every mode: in turn, or, sustained, each at its own clock."""
    samplers = {
        (mode, name): _sampler(mode, calls) for mode, by_name in candidates.items() for name, calls in by_name.items()
    }
    return timing.in_turns(samplers, repeats) if SUSTAINED in candidates else timing.interleave(samplers, repeats)


def _sampler(mode: str, calls: Sequence[Call]) -> timing.Sampler:
    if mode == EAGER:
        return timing.sampler("eager", calls)
    with launch.programmatic(mode == GRAPH_PDL):  # a capture decides how its launches depend on each other
        return timing.sampler("graph", calls)


def _row(
    op: str, shape: tuple[int, int, int], a: str, mode: str, us: float, others: Mapping[str, float], moved: int
) -> Row:
    """`moved`: what the product must read and write at least, each byte once."""
    M, N, K = shape
    return {
        "bench": "gemm",
        "op": op,
        "arch": ARCH,
        "layout": "tn",
        "M": M,
        "N": N,
        "K": K,
        "a": a,
        "b": "nvfp4",
        "epilogue": "rowcol",
        "mode": mode,
        "kernel": kernels.gemm_name(M, N, K),
        "us": us,
        "bytes": moved,
        "tb_s": moved / us / 1e6,
        "tflop_s": 2 * M * N * K / us / 1e6,
        "ratio": others["cublas_bf16"] / us,
        "vs_us": dict(others),
    }
