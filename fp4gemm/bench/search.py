"""The search for block scales, by either error, beside those of other packages."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from fp4gemm import search
from fp4gemm.bench import search_peers, timing
from fp4gemm.bench.common import Config, Job, random_inputs
from fp4gemm.formats import METRICS
from fp4gemm.report import Row

SHAPE = (8192, 8192)  # N, K
QUICK = (1024, 2048)
WEIGHTS = ("gaussian", "heavy_tailed")
_TOKENS = 4096
_ROWS = 256  # whose errors are compared in float64


def jobs(config: Config) -> Iterator[Job]:
    """Both errors, both block sizes; weights that have outliers, too; peers beside the first of each error."""
    shapes = config.shapes or ((QUICK,) if config.quick else (SHAPE,))
    for N, K in shapes:
        for metric in METRICS:
            for weights in WEIGHTS[:1] if config.quick else WEIGHTS:
                for block in (16, 32) if weights == WEIGHTS[0] else (16,):
                    label = f"search {N}x{K} {metric} block={block} {weights}"
                    yield Job(label, functools.partial(_rows, metric, weights, block, N, K, config))


def hessian_of(k: int, block: int) -> torch.Tensor:
    """Of activations whose channels have different sizes (log-normal) and are correlated by a half within 16."""
    z = torch.randn(_TOKENS, k, device=timing.DEVICE)
    shared = torch.randn(_TOKENS, k // 16, device=timing.DEVICE).repeat_interleave(16, 1)
    channels = torch.exp(0.5 * torch.randn(k, device=timing.DEVICE))
    found = search.HessianAccumulator(k, block=block, device=timing.DEVICE)
    found.add((z + shared) * channels)
    return found.hessian()


def _weights(name: str, copies: int, N: int, K: int) -> list[torch.Tensor]:
    ws = random_inputs(copies, N, K)
    if name == "heavy_tailed":  # Student's t of three degrees of freedom
        ws = [(w.float() / (torch.randn(3, N, K, device=w.device).square().mean(0).sqrt())).bfloat16() for w in ws]
    return ws


def _rows(metric: str, weights: str, block: int, N: int, K: int, config: Config) -> list[Row]:
    ws = _weights(weights, timing.rotation(2 * N * K), N, K)
    h = hessian_of(K, block) if metric == "hessian" else None
    arguments: dict[str, Any] = {"metric": metric, "block": block}
    if h is not None:
        arguments["hessian"] = search.factor(h)
    ours: list[timing.Call] = [functools.partial(search.search_scales, w, **arguments) for w in ws]
    _, counted = search.audit(ws[0], **arguments)
    beside = weights == WEIGHTS[0] and block == 16
    peers = search_peers.find(ws, metric, hessian_of(K, 16) if h is None else h) if beside else {}
    # Peers build tables on the way, which a graph cannot hold; they take milliseconds, so a launch costs them nothing.
    samplers = {"fp4gemm": timing.sampler("graph", ours)}
    samplers |= {name: timing.sampler("eager", peer.calls) for name, peer in peers.items()}
    us = timing.interleave(samplers, config.repeats)
    compared = {name: _compare(ws[0], peer, metric, h, arguments) for name, peer in peers.items()}
    return [
        {
            "bench": "search", "metric": metric, "N": N, "K": K, "mode": "graph", "dtype": "bf16",
            "options": {"block": block, "weights": weights, "scaling": "per_row"},
            "us": us["fp4gemm"],
            "vs_us": {name: us[name] for name in peers},
            "g_values_s": N * K / us["fp4gemm"] / 1e3,
            "identical_to_exhaustive": counted.wrong == 0,
            "tried_per_scale": counted.tried_per_scale,
            "peers": compared,
        }
    ]  # fmt: skip


def _compare(
    w: torch.Tensor, peer: search_peers.Peer, metric: str, h: torch.Tensor | None, arguments: dict[str, Any]
) -> dict[str, float]:
    """Our search under a peer's outer scale beside its own: scales that are the same, and what its own err more."""
    rows = min(_ROWS, w.shape[0])
    got = search.search_scales(w[:rows], outer_scale=peer.outer, **arguments).linear_block_scale().float()
    best = search_peers.errors(w, got, peer.outer, h, rows)
    theirs = search_peers.errors(w, peer.scales, peer.outer, h, rows)
    return {
        "same_scales": float((got == peer.scales[:rows]).double().mean()),
        "worse_scales": float((theirs > best * (1 + 1e-5)).double().mean()),
        "better_scales": float((theirs < best * (1 - 1e-5)).double().mean()),
        "excess_error": float(theirs.sum() / best.sum() - 1),
    }
