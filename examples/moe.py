#!/usr/bin/env python3
"""A routed mixture of experts in NVFP4: beside a loop of dense layers, and beside torch's grouped products in bf16.

    python examples/moe.py                              on the GPU: 8 experts of 4096 x 14336, two for each token
    python examples/moe.py --device cpu                 small, and without times
    python examples/moe.py --experts 64 --hidden 2048 --tokens 16 --tokens 4096 --train

A block routes every token to `top` experts, sorts tokens by expert, multiplies them by the gate and up projections of
their experts, quantizes SiLU(gate) · up on the way into the down projections, and adds up what the experts of a token
say, weighed by the router. Only the device ever knows how many tokens an expert has: the block is one CUDA graph for
whatever the router decides. The loop calls a dense layer for each expert, and has to wait for these numbers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout runs itself, whatever is installed

import fp4gemm  # noqa: E402
from fp4gemm.nn import GroupedLinear, Recipe, linear, per_token  # noqa: E402


@dataclass(frozen=True)
class Size:
    width: int = 4096
    hidden: int = 14336
    experts: int = 8
    top: int = 2


SMALL = Size(width=128, hidden=192, experts=8, top=2)


@dataclass(frozen=True)
class Routing:
    """Which rows go to which expert: T tokens, R = T · top rows, sorted by expert.

    source: int64 [R], the token of each row. offsets: int64 [E + 1], where rows of an expert begin. place: int64 [R],
    the row of each choice of each token. weights: [T, top].
    """

    source: Tensor
    offsets: Tensor
    place: Tensor
    weights: Tensor

    @classmethod
    def of(cls, logits: Tensor, top: int) -> Routing:
        """Logits [T, E] of a router. Nothing here waits for the device."""
        weights, chosen = logits.float().softmax(-1).topk(top)
        weights = weights / weights.sum(-1, keepdim=True)
        expert, order = chosen.flatten().sort(stable=True)
        offsets = torch.searchsorted(expert, torch.arange(logits.shape[1] + 1, device=logits.device))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(order // top, offsets, place, weights)

    def combine(self, y: Tensor) -> Tensor:
        """[T, K] of rows [R, K] that experts have made: in a fixed order, so that a sum is the same every time."""
        chosen = y[self.place].view(*self.weights.shape, -1)
        return (chosen * self.weights[..., None]).sum(1).to(y.dtype)


class MoE(nn.Module):
    """Tokens [T, width] -> [T, width]."""

    def __init__(self, size: Size, recipe: Recipe | None = None, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.top = size.top
        self.router = nn.Linear(size.width, size.experts, bias=False, dtype=dtype)
        options = {"bias": False, "dtype": dtype, "recipe": recipe}
        self.up = GroupedLinear(size.experts, size.width, 2 * size.hidden, **options)  # gate, then up
        self.down = GroupedLinear(size.experts, size.hidden, size.width, **options)
        self.fused = True  # without gradients, SiLU · mul is part of the quantizer in front of `down`

    def route(self, x: Tensor) -> Routing:
        return Routing.of(self.router(x), self.top)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.route(x)
        h = self.up(x[routing.source], routing.offsets)
        if self.fused and not torch.is_grad_enabled():
            return routing.combine(self.down(h, routing.offsets, producer="silu_mul"))
        gate, up = h.chunk(2, dim=-1)
        return routing.combine(self.down(F.silu(gate) * up, routing.offsets))


def per_expert(moe: MoE, x: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The same block, one expert after another."""
    routing = moe.route(x)
    rows = x[routing.source]
    ends = itertools.pairwise(routing.offsets.tolist())  # waits for the device
    return routing.combine(torch.cat([expert(e, rows[a:b]) for e, (a, b) in enumerate(ends)]))


def dense(moe: MoE) -> Callable[[Tensor], Tensor]:
    """A loop of dense products without gradients, weights quantized once."""
    ups, downs = ([fp4gemm.quantize(w).prepack() for w in each.weight.detach()] for each in (moe.up, moe.down))

    def expert(e: int, rows: Tensor) -> Tensor:
        return fp4gemm.quantize_gemm(fp4gemm.quantize_gemm(rows, ups[e]), downs[e], producer="silu_mul")

    return lambda x: per_expert(moe, x, expert)


def dense_layers(moe: MoE) -> Callable[[Tensor], Tensor]:
    """A loop of dense layers with gradients."""

    def expert(e: int, rows: Tensor) -> Tensor:
        gate, up = linear(rows, moe.up.weight[e], None, moe.up.recipe).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, moe.down.weight[e], None, moe.down.recipe)

    return lambda x: per_expert(moe, x, expert)


def in_torch(moe: MoE) -> Callable[[Tensor], Tensor]:
    """The same parameters as torch multiplies them, grouped."""
    plain = copy.deepcopy(moe, {id(p): p for p in moe.parameters()})
    plain.up.recipe = plain.down.recipe = None
    plain.fused = False

    def call(x: Tensor) -> Tensor:
        with fp4gemm.autocast(None):
            return plain(x)

    return call


def step(block: Callable[[Tensor], Tensor], moe: MoE, x: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def call() -> None:
        moe.zero_grad()
        block(x).float().square().mean().backward()

    return call


def difference(got: Tensor, want: Tensor) -> tuple[float, float]:
    """How many values are the same bits, and the relative error."""
    got, want = got.detach(), want.detach()
    same = float((got == want).float().mean())
    return same, float((got.double() - want.double()).norm() / want.double().norm())


def times(blocks: dict[str, Callable[[], object]], graph: Sequence[str]) -> dict[str, float]:
    """Median microseconds; in a CUDA graph where that is possible."""
    from fp4gemm.bench import timing

    return timing.interleave(
        {name: timing.sampler("graph" if name in graph else "eager", [call]) for name, call in blocks.items()},
        timing.DEFAULT_REPEATS,
    )


def serve(moe: MoE, x: Tensor) -> str:
    """One line: agreement with the loop, and times."""
    moe.eval()
    with torch.no_grad():
        ours, loop, bf16 = moe, dense(moe), in_torch(moe)
        same, error = difference(ours(x), loop(x))
        line = f"{len(x):7} tokens: {same:7.2%} of values as in the loop, difference {error:.1e}"
        line += f", to bf16 {difference(ours(x), bf16(x))[1]:.3f}"
        if not x.is_cuda:
            return line
        calls = {"grouped": lambda: ours(x), "bf16": lambda: bf16(x), "loop": lambda: loop(x)}
        us = times(calls, ("grouped", "bf16"))
        eager = times({"eager": calls["grouped"]}, ())["eager"]
    return (
        f"{line}; {us['grouped']:,.0f} us in a graph, {eager:,.0f} us without, loop {us['loop']:,.0f} us, "
        f"torch's bf16 in a graph {us['bf16']:,.0f} us ({us['bf16'] / us['grouped']:.2f}x)"
    )


def train(moe: MoE, x: Tensor) -> str:
    """The same of a training step."""
    moe.train()
    blocks = {"grouped": moe, "loop": dense_layers(moe)}
    steps = {name: step(block, moe, x) for name, block in blocks.items()}
    gradients = {}
    for name, call in steps.items():
        call()
        gradients[name] = [p.grad for p in moe.parameters()]
    found = [difference(a, b) for a, b in zip(*gradients.values(), strict=True)]
    line = f"{len(x):7} tokens, a step: gradients differ by {max(error for _, error in found):.1e} from the loop's"
    if not x.is_cuda:
        return line
    us = times(steps, ())
    return f"{line}; {us['grouped']:,.0f} us, loop {us['loop']:,.0f} us"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, action="append", help="repeatable")
    parser.add_argument("--train", action="store_true", help="also a training step")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}, on the CPU {getattr(SMALL, name)}")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    default = Size() if device.type == "cuda" else SMALL
    given = {name: getattr(options, name) for name in vars(Size()) if getattr(options, name) is not None}
    size = Size(**{**vars(default), **given})
    torch.manual_seed(0)
    with device:
        moe = MoE(size, per_token())
        shape = f"{size.width} -> {size.hidden} -> {size.width}"
        print(f"{size.experts} experts, {size.top} for each token, {shape}, {device}")
        for tokens in options.tokens or ((1, 8, 64, 512, 4096) if device.type == "cuda" else (1, 8, 64)):
            x = torch.randn(tokens, size.width, dtype=torch.bfloat16)
            print(serve(moe, x), flush=True)
            if options.train:
                print(train(moe, x), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
