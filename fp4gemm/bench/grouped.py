"""Products of experts (`gemm_grouped`, `quantize_gemm_grouped`) beside torch's grouped bf16 product, a loop of `gemm`
over experts whose sizes the host knows, and humming-kernels.

Rows of x are sorted by expert. Every candidate reads weights that the L2 has lost, and a call is a node of a CUDA
graph; `graph_pdl` is captured inside `programmatic()`, which quantizers heed; the products are the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fp4gemm
from fp4gemm.bench import gemm, humming, kernels, routing, sweep, timing
from fp4gemm.bench.common import ARCH, Config, Job, nbytes, random_inputs
from fp4gemm.bench.problem import FORM, exact_values
from fp4gemm.bench.timing import Call
from fp4gemm.grouped import GroupedWeight
from fp4gemm.grouped_ops import mean_tokens
from fp4gemm.report import Row
from fp4gemm.tensor import FP4Tensor

LOOP, TORCH = "loop", "torch_grouped_bf16"  # in a row's vs_us
# Experts, N, K; mean tokens of an expert. Up and down projections of large experts; of small ones gate and up.
CASES = (
    ((8, 14336, 4096), (1, 4, 16, 64, 256, 4096)),
    ((8, 4096, 14336), (1, 16, 64, 4096)),
    ((64, 2816, 2048), (1, 4, 16, 64, 256)),
)
QUICK = (((8, 4096, 4096), (4, 512)),)
_CHECKED_ROWS = 8  # of each expert, against float64
_PEER_ERROR = 1e-2


@dataclass(frozen=True)
class Weights:
    """Of E experts, as many copies as the L2 cannot keep: packed, bf16 [E, N, K], in humming's form, and by expert."""

    packed: Sequence[GroupedWeight]
    bf16: Sequence[Tensor]
    peers: Sequence[humming.GroupedWeight]
    single: Sequence[Sequence[FP4Tensor]]


def make_weights(experts: int, N: int, K: int) -> Weights:
    copies = timing.rotation(experts * N * K * 9 // 16)
    bf16, packed, peers = [], [], []
    for _ in range(copies):
        values = random_inputs(experts, N, K)
        quantized = [fp4gemm.quantize(w, scaling="per_tensor") for w in values]
        bf16.append(torch.stack(values))
        packed.append(fp4gemm.stack_weights([w.prepack(FORM) for w in quantized]))
        if humming.available() and humming.takes(N, K):
            peers.append(humming.GroupedWeight(quantized))
    return Weights(packed, bf16, peers, [[w.expert(e) for e in range(experts)] for w in packed])


@dataclass(frozen=True)
class Problem:
    """Tokens [T, K], one copy for each of the weights, and the rows of each expert."""

    x: Sequence[Tensor]
    weights: Weights
    counts: list[int]
    offsets: Tensor  # int64 [E + 1], on the device

    def ours(self, function: Callable[..., Tensor]) -> list[Call]:
        return [functools.partial(function, x, w, self.offsets) for x, w in self._with(self.weights.packed)]

    def loop(self) -> list[Call]:
        return [
            functools.partial(_loop, torch.split(x, self.counts), w, _output(x, w[0]))
            for x, w in self._with(self.weights.single)
        ]

    def torch_grouped(self) -> list[Call]:
        ends = self.offsets[1:].int()
        product = torch_grouped_mm()
        return [functools.partial(product, x, w.transpose(1, 2), offs=ends) for x, w in self._with(self.weights.bf16)]

    def humming(self) -> list[Call]:
        return [w.call(x, self.offsets) for x, w in zip(self.x, self.weights.peers, strict=False)]

    def _with(self, weights: Sequence[Any]) -> Iterator[tuple[Tensor, Any]]:
        return zip(self.x, weights, strict=True)


def torch_grouped_mm() -> Callable[..., Tensor]:
    """The public function where torch has it, else the private one before it."""
    found: Callable[..., Tensor] = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return found


def _output(x: Tensor, w: FP4Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.rows)


def _loop(parts: Sequence[Tensor], weights: Sequence[FP4Tensor], out: Tensor) -> Tensor:
    """As many launches as experts that have tokens."""
    for x, w, d in zip(parts, weights, torch.split(out, [len(x) for x in parts]), strict=True):
        if len(x):
            fp4gemm.gemm(x, w, out=d)
    return out


def make_problem(name: str, tokens: int, weights: Weights) -> Problem:
    """``tokens`` for each expert on average."""
    experts, _, K = weights.packed[0].shape
    counts = routing.counts(name, experts, experts * tokens)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64, device=timing.DEVICE)
    return Problem(random_inputs(len(weights.packed), sum(counts), K), weights, counts, offsets)


def rel_error(D: object, problem: Problem, x: Tensor | None = None) -> float:
    """||D - X W_e^T|| / ||X W_e^T|| in float64 over evenly spaced rows of every expert: of what the first call gave.

    Raises RuntimeError where it is not finite.
    """
    assert isinstance(D, Tensor)
    x = problem.x[0].double() if x is None else x
    error = norm = 0.0
    for d, rows, w in zip(
        torch.split(D, problem.counts), torch.split(x, problem.counts), problem.weights.single[0], strict=True
    ):
        if not len(d):
            continue
        step = max(1, len(d) // _CHECKED_ROWS)
        exact = rows[::step].double() @ exact_values(w).t()
        error += float((d[::step].double() - exact).square().sum())
        norm += float(exact.square().sum())
    found = math.sqrt(error / norm)
    if not math.isfinite(found):
        raise RuntimeError(f"D is not finite: relative error {found}")
    return found


def jobs(config: Config) -> Iterator[Job]:
    """Every case balanced, and from 16 tokens on in the other routings too."""
    for shape, sizes in QUICK if config.quick else CASES:
        make = functools.lru_cache(maxsize=1)(functools.partial(make_weights, *shape))
        for tokens in sizes:
            for name in routing.ROUTINGS if tokens >= 16 else routing.ROUTINGS[:1]:
                label = f"grouped {'x'.join(map(str, shape))}, {tokens} tokens, {name}"
                yield Job(label, functools.partial(_rows, name, tokens, make, config.repeats))


def _rows(name: str, tokens: int, make: Callable[[], Weights], repeats: int) -> list[Row]:
    problem = make_problem(name, tokens, make())
    ours = {"gemm_grouped": problem.ours(fp4gemm.gemm_grouped)}
    ours["quantize_gemm_grouped"] = problem.ours(fp4gemm.quantize_gemm_grouped)
    others = {LOOP: problem.loop(), TORCH: problem.torch_grouped()}
    if peer := problem.humming():
        error = rel_error(peer[0](), problem)
        if not error < _PEER_ERROR:
            raise RuntimeError(f"humming: relative error {error:.1e}: it is not called as its version expects")
        others[sweep.PEER_KEY] = peer
    quantized = exact_values(fp4gemm.quantize(problem.x[0]))
    errors = {
        op: rel_error(calls[0](), problem, x) for (op, calls), x in zip(ours.items(), (None, quantized), strict=True)
    }
    del quantized
    us = gemm.times({gemm.GRAPH: ours | others, gemm.GRAPH_PDL: ours}, repeats)
    beside = {other: us[gemm.GRAPH, other] for other in others}
    return [
        _row(problem, name, op, mode, us[mode, op], beside) | {"rel_error": errors[op]}
        for mode in (gemm.GRAPH, gemm.GRAPH_PDL)
        for op in ours
    ]


def _row(problem: Problem, name: str, op: str, mode: str, us: float, others: Mapping[str, float]) -> Row:
    """`bytes`: tokens, results, and the weights of experts that have tokens, each once."""
    weight, T = problem.weights.packed[0], len(problem.x[0])
    experts, N, K = weight.shape
    moved = nbytes(problem.x[0]) + 2 * T * N + weight.nbytes // experts * sum(count > 0 for count in problem.counts)
    return {
        "bench": "grouped",
        "op": op,
        "arch": ARCH,
        "experts": experts,
        "M": T,
        "N": N,
        "K": K,
        "routing": name,
        "options": {"most_tokens": max(problem.counts), "empty_experts": problem.counts.count(0)},
        "mode": mode,
        "kernel": kernels.grouped_name(experts, mean_tokens(T, experts), N, K),
        "us": us,
        "bytes": moved,
        "tb_s": moved / us / 1e6,
        "tflop_s": 2 * T * N * K / us / 1e6,
        "vs_us": dict(others),
    }
