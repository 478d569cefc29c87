"""`quantize_grouped` against a copy of the same bytes, and against the dense quantizer on the whole buffer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

import fp4gemm
from fp4gemm.bench import routing, timing
from fp4gemm.bench.common import ARCH, Config, Job, random_inputs
from fp4gemm.formats import RECIPE_SIGNS
from fp4gemm.report import Row

UNIFORM = "one shape"  # which the host knows
# Members, rows of all of them, K, and how the rows are spread.
CASES = (
    (8, 32768, 8192, UNIFORM),
    (8, 32768, 8192, "balanced"),
    (64, 32768, 8192, "balanced"),
    (64, 32768, 8192, "zipf"),
    (64, 32768, 8192, "text"),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"transposed": True},
    {"both": True},
    {"both": True, "hadamard": RECIPE_SIGNS, "seed": 1, "dbias": True},
)
_CODES = 9 / 16  # bytes of a value's code and its share of a block scale


def jobs(config: Config) -> Iterator[Job]:
    for members, M, K, name in CASES[:1] if config.quick else CASES:
        for options in OPTIONS:
            label = f"quantize_grouped {members} members of {M}x{K}, {name}, {options}"
            yield Job(label, functools.partial(_rows, members, M, K, name, options, config.repeats))


def _rows(members: int, M: int, K: int, name: str, options: dict[str, Any], repeats: int) -> list[Row]:
    counts = routing.counts("balanced" if name == UNIFORM else name, members, M)
    sizes: dict[str, Any] = {"members": members}
    if name != UNIFORM:
        sizes = {"first_dims": torch.tensor(counts, dtype=torch.int64, device=timing.DEVICE)}
    xs = random_inputs(timing.rotation(2 * M * K), M, K)
    results = 2 if options.get("both") else 1
    # x is read once more where an amax has to be known before the first value can be encoded.
    reads = 1 if not options else 2
    moved = int(M * K * (2 * reads + _CODES * results))
    quantize = functools.partial(fp4gemm.quantize_grouped, **sizes, **options)
    us = timing.compare(
        {
            "quantize_grouped": [functools.partial(quantize, x) for x in xs],
            "copy_same_bytes": timing.copies_of(moved),
            "dense": [functools.partial(_dense, x, options) for x in xs],
        },
        "graph",
        repeats,
    )
    own = us.pop("quantize_grouped")
    return [
        {
            "bench": "quantize_grouped",
            "op": "quantize_grouped",
            "arch": ARCH,
            "experts": members,
            "M": M,
            "K": K,
            "routing": name,
            "options": {**options, "most_rows": max(counts), "empty_members": counts.count(0)},
            "mode": "graph",
            "us": own,
            "bytes": moved,
            "tb_s": moved / own / 1e6,
            "vs_us": us,
        }
    ]


def _dense(x: torch.Tensor, options: dict[str, Any]) -> object:
    """The same work on one matrix, without the sums."""
    chosen = {key: value for key, value in options.items() if key not in ("both", "dbias")}
    return fp4gemm.quantize_both(x, **chosen) if options.get("both") else fp4gemm.quantize(x, **chosen)
