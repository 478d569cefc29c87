"""How many tokens each expert gets: balanced, Zipf's law, and what a router makes of real text."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from functools import cache
from importlib import resources

import torch

ROUTINGS = ("balanced", "zipf", "text")
_TOP_K, _WIDTH = 2, 64  # of the router


def counts(routing: str, experts: int, total: int) -> list[int]:
    """Tokens of each expert, ``total`` in all, as near to the routing's shares as whole numbers are."""
    shares = _shares(routing, experts)
    exact = [total * share for share in shares]
    whole = [int(v) for v in exact]
    for e in sorted(range(experts), key=lambda e: whole[e] - exact[e])[: total - sum(whole)]:
        whole[e] += 1
    return whole


@cache
def _shares(routing: str, experts: int) -> tuple[float, ...]:
    if routing == "balanced":
        return (1 / experts,) * experts
    if routing == "zipf":
        weights = [1 / (rank + 1) for rank in range(experts)]
        random.Random(0).shuffle(weights)
    elif routing == "text":
        weights = _routed_text(experts)
    else:
        raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
    return tuple(weight / sum(weights) for weight in weights)


def _routed_text(experts: int) -> list[float]:
    """How often the words of the demo's sentences have each expert among their two best, where every word has a random
    vector and the router is a random matrix: nobody trained it, but what is frequent in a text is."""
    text = resources.files("fp4gemm.demo").joinpath("pairs.txt").read_text(encoding="utf-8")
    words = Counter(re.findall(r"[a-z']+|[^\sa-z']", text.lower()))
    router = torch.randn(_WIDTH, experts, generator=torch.Generator().manual_seed(0))
    weights = [0.0] * experts
    for word, count in words.items():
        vector = torch.randn(_WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
        for expert in (vector @ router).topk(min(_TOP_K, experts)).indices.tolist():
            weights[expert] += count
    return weights
