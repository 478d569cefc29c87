"""The search kernels against the reference, byte for byte, and against themselves without pruning.

``search.calls`` runs as it does on a GPU, but for the launch.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import emulator as emulation
import pytest
import torch

from fp4gemm import reference, select
from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.reference import search as reference_search
from fp4gemm.reference.search import SearchArguments
from fp4gemm.search import calls
from fp4gemm.search.factor import factor
from fp4gemm.spec import SearchSpec, check

PROBLEMS = 16  # of each kind
SPECIALS = (
    "none", "none", "nan", "inf", "zeros", "tiny", "huge", "heavy", "constant", "outlier", "ties", "small", "subnormal",
)  # fmt: skip
RANGES = ((1, 126), (1, 126), (1, 126), (40, 90), (7, 7), (1, 20), (100, 126))


@pytest.fixture
def kernels(emulator: emulation.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """``search.calls`` on CPU tensors."""

    class Launcher(emulation.QuantizeLauncher):
        def __init__(self, spec: SearchSpec, arguments: Any) -> None:
            assert check(spec) is None
            super().__init__(emulator, spec, arguments)

    monkeypatch.setattr(calls, "Launcher", Launcher)
    monkeypatch.setattr(calls, "_stream", lambda _: random.randrange(1 << 30))
    monkeypatch.setattr(select, "arch_of", lambda _: "sm_90a")
    calls._launcher.cache_clear()
    yield
    calls._launcher.cache_clear()


def weights(m: int, k: int, special: str, generator: torch.Generator) -> torch.Tensor:
    w = torch.randn(m, k, generator=generator)
    chance = torch.rand(w.shape, generator=generator)
    if special in ("nan", "inf"):
        w[chance < 0.01] = float(special)
        w[chance < 0.004] *= -1
    elif special == "zeros":
        w *= chance < 0.05
        w[m // 2] = -0.0
    elif special == "tiny":
        w *= 10.0 ** (-40 * torch.rand(m, 1, generator=generator))
        w[:, k // 2 :] *= 1e-6
    elif special == "huge":
        w *= 10.0 ** (37 * torch.rand(m, 1, generator=generator))
    elif special == "heavy":
        w = w / (chance + 1e-3)
    elif special == "constant":
        w = torch.rand(m, 1, generator=generator).expand(m, k) * w.sign()
    elif special == "outlier":
        w[:, :: 16 + 5] *= 1000
    elif special == "ties":
        w = torch.randint(-14, 15, w.shape, generator=generator) / 2.0
    elif special == "small":  # blocks of scales below the normal ones
        w *= 10.0 ** (-5 * torch.rand(m, -(-k // 16), generator=generator)).repeat_interleave(16, 1)[:, :k]
        w[:, 0] = 3.0
    elif special == "subnormal":  # values that reach the bottom of float32 beside others
        w *= torch.where(chance < 0.5, 1e-25, 1.0) * torch.where(chance < 0.2, 1e-18, 1.0)
    return w


def hessians(units: int, block: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    tokens = {"full": 4 * block, "deficient": 3}.get(kind, 4 * block)
    x = torch.randn(units, tokens, block, generator=generator)
    if kind == "ill":
        x = x[..., :1] + 10.0 ** (-4 * torch.rand(units, 1, block, generator=generator)) * x
    h = x.transpose(1, 2) @ x
    if kind == "diagonal":
        h = torch.diag_embed(h.diagonal(dim1=1, dim2=2))
    if kind == "zero":
        h[::2] = 0
    return h * 10.0 ** float(torch.randn((), generator=generator) * 3)


def draw(rng: random.Random, metric: str) -> tuple[SearchArguments, torch.Tensor | None, str]:
    block, m = rng.choice((16, 16, 32)), rng.choice((1, 3, 40, 130))
    k = rng.choice((1, 16, 17, 48, 72, 80, 130) if m < 100 else (16, 40))
    dtype, layout = rng.choice(tuple(select.INPUT_NAMES)), rng.choice(tuple(SF_LAYOUTS))
    special = rng.choice(SPECIALS)
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    w = weights(m, k, special, generator)
    if dtype == torch.float8_e4m3fn:
        w = w.clamp(-448, 448)
    w = w.to(dtype)
    shape = rng.choice(((), (m,)))
    given = rng.random() < 0.3
    four_six = rng.random() < 0.2
    first, last = (1, 126) if four_six else rng.choice(RANGES)
    if given:
        scale = 10.0 ** (torch.rand(shape, generator=generator) * rng.choice((4, 30)) - rng.choice((4, 3, 30)))
    else:
        scale = reference.amax(w, rows=shape != (), tensor=shape == ())[0]
    found, kind = None, ""
    if metric == "hessian":
        kind = rng.choice(("full", "full", "deficient", "ill", "diagonal", "zero"))
        found = factor(hessians(-(-k // block), block, kind, generator))
    upper, reach, packed = (None,) * 3 if found is None else (found.upper, found.reach, found.packed)
    args = SearchArguments(w, scale, given, layout, metric, block, upper, reach, four_six, first, last)
    text = f"{m}x{k} {dtype} {special} {layout} given={given} block={block} {kind} {first}..{last} four_six={four_six}"
    return args, packed, text


@pytest.mark.parametrize("case", range(PROBLEMS))
@pytest.mark.parametrize("metric", ["sse", "hessian"])
def test_random_problems(metric: str, case: int, kernels: None) -> None:
    rng = random.Random(f"{metric} {case}")
    args, packed, text = draw(rng, metric)
    counters = torch.zeros(3, dtype=torch.int64)
    got, errors = calls.search(args, packed=packed, counters=counters, errors=True)
    want = reference_search.search(args, exhaustive=True)
    pruned = reference_search.search(args)
    for name in ("outer_scale", "block_scale", "data"):
        for found in (want, pruned):
            a, b = getattr(got, name), getattr(found.tensor, name)
            assert a.shape == b.shape, text
            wrong = (a.flatten().view(torch.uint8) != b.flatten().view(torch.uint8)).nonzero()
            assert len(wrong) == 0, f"{text}: {name}: {len(wrong)} bytes wrong, first at {wrong[0].tolist()}"
    assert errors is not None
    assert torch.equal(errors, want.errors), text
    assert counters[2] == 0, f"{text}: {counters.tolist()}"
    if args.metric == "sse":  # the kernel asks later what saturates
        assert pruned.tried <= counters[1] <= pruned.tried + 4 * counters[0], text


def test_ctas_share_rows_and_columns(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of 32 rows in a CTA, several CTAs in both directions."""
    monkeypatch.setattr(calls, "_CTAS", 2)
    w = torch.randn(200, 160).bfloat16()
    args = SearchArguments(w, torch.tensor(4.0), False, "128x4", "sse", 16, None, None)
    assert calls.grid(256, 12, 1) == ((3, 1, 1), 12)
    for found in (args, replace(args, sf_layout="linear", block=32), replace(args, sf_layout="8x4")):
        got, _ = calls.search(found)
        want = reference_search.search(found).tensor
        assert torch.equal(got.block_scale.view(torch.uint8), want.block_scale.view(torch.uint8))
        assert torch.equal(got.data, want.data)
