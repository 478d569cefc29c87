"""Searches on the GPU: bytes of the reference, no difference from exhaustive ones, and an independent float64 one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fp4gemm
from fp4gemm import search
from fp4gemm.formats import SF_LAYOUTS, decode_e2m1
from fp4gemm.reference.rounding import encode_e2m1

WEIGHTS = ("random", "heavy", "tiny", "huge", "constant", "outlier", "small", "nan", "inf", "zeros")
HESSIANS = ("full", "deficient", "ill", "diagonal", "zero")
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


def weights(m: int, k: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    w = torch.randn(m, k, generator=generator)
    chance = torch.rand(w.shape, generator=generator)
    if kind == "heavy":
        w = w / (chance + 1e-3)
    elif kind == "tiny":
        w *= 1e-6
        w[:, k // 2 :] *= 1e-6
    elif kind == "huge":
        w *= 1e4
    elif kind == "constant":
        w = 0.37 * w.sign()
    elif kind == "outlier":
        w[:, ::19] *= 1000
    elif kind == "small":  # blocks of scales below the normal ones, and below 6 * 2^-10
        w *= 10.0 ** (-5 * torch.rand(m, -(-k // 16), generator=generator)).repeat_interleave(16, 1)[:, :k]
        w[:, 0] = 3.0
    elif kind in ("nan", "inf"):
        w[chance < 0.01] = float(kind)
    elif kind == "zeros":
        w *= chance < 0.05
    return w


def hessians(units: int, block: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(units, 3 if kind == "deficient" else 4 * block, block, generator=generator)
    if kind == "ill":
        x = x[..., :1] + 10.0 ** (-3 * torch.rand(units, 1, block, generator=generator)) * x
    h = x.transpose(1, 2) @ x
    if kind == "diagonal":
        h = torch.diag_embed(h.diagonal(dim1=1, dim2=2))
    if kind == "zero":
        h[::2] = 0
    return h


def draw(rng: random.Random, metric: str, m: int, k: int) -> tuple[torch.Tensor, dict[str, Any], str]:
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    kind, block = rng.choice(WEIGHTS), rng.choice((16, 16, 32))
    w = weights(m, k, kind, generator).to(rng.choice(DTYPES))
    arguments: dict[str, Any] = {
        "metric": metric,
        "block": block,
        "dim": rng.choice((-1, -1, 0)),
        "scaling": rng.choice(("per_row", "per_row", "per_tensor")),
        "sf_layout": rng.choice(tuple(SF_LAYOUTS)),
        "candidates": rng.choice(("all", "all", "all", "4/6", range(30, 100))),
    }
    of = ""
    if metric == "hessian":
        of = rng.choice(HESSIANS)
        columns = m if arguments["dim"] == 0 else k
        arguments["hessian"] = hessians(-(-columns // block), block, of, generator)
    return w, arguments, f"{kind} {of} {m}x{k} {w.dtype} {arguments.get('dim')} {arguments['candidates']}"


def to(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


def same(got: fp4gemm.FP4Tensor, want: fp4gemm.FP4Tensor, what: str) -> None:
    for name in ("outer_scale", "block_scale", "data"):
        a, b = (getattr(t, name).cpu().flatten().view(torch.uint8) for t in (got, want))
        assert a.shape == b.shape, what
        wrong = (a != b).nonzero()
        assert len(wrong) == 0, f"{what}: {name}: {len(wrong)} bytes differ, first at {wrong[0].tolist()}"


@pytest.mark.parametrize("metric", ["sse", "hessian"])
@pytest.mark.parametrize("case", range(12))
def test_bytes_of_the_reference(metric: str, case: int, device: torch.device) -> None:
    rng = random.Random(f"{metric} {case}")
    shapes = ((1, 16), (3, 17), (40, 80), (130, 48))
    shapes += () if metric == "hessian" else ((1, 1), (5, 500), (300, 272))
    w, arguments, what = draw(rng, metric, *rng.choice(shapes))
    got = search.search_scales(w.to(device), **to(device, arguments))
    same(got, search.search_scales(w, **arguments), what)


@pytest.mark.parametrize("metric", ["sse", "hessian"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_exhaustive_on_the_device_agrees(metric: str, kind: str, device: torch.device) -> None:
    """Every scale of larger weights, chosen again from all candidates by the kernel itself."""
    generator = torch.Generator().manual_seed(1)
    m, k = (1024, 2048) if device.type == "cuda" else (8, 32)
    w = weights(m, k, kind, generator).bfloat16().to(device)
    for block in (16, 32):
        for of in HESSIANS if metric == "hessian" else ("",):
            h = hessians(k // block, block, of, generator).to(device) if of else None
            _, audit = search.audit(w, metric, hessian=h, block=block)
            assert audit.wrong == 0, f"{kind} {of} {block}: {audit}"
            assert (audit.scales > 0) == (not w.isinf().any(1).all()), audit  # a row with Inf has S = 0


@pytest.mark.parametrize("metric", ["sse", "hessian"])
@pytest.mark.parametrize("block", [16, 32])
def test_no_scale_is_better_in_float64(metric: str, block: int, device: torch.device) -> None:
    """An independent search, in float64: its best error is the error of our choice."""
    generator = torch.Generator().manual_seed(2)
    for kind in ("random", "heavy", "tiny", "huge", "outlier", "constant", "small"):
        w = weights(64, 64, kind, generator).to(device)
        h = hessians(64 // block, block, "full", generator).to(device) if metric == "hessian" else None
        got = search.search_scales(w, metric, hessian=h, block=block, sf_layout="linear")
        x = w.double().reshape(64, -1, block)
        outer = got.outer_scale.double().reshape(64, 1, 1)

        def error(scale: torch.Tensor, x: torch.Tensor = x, outer: torch.Tensor = outer, h: Any = h) -> torch.Tensor:
            step = scale.double() * outer
            v = (x / step).float()
            d = decode_e2m1(encode_e2m1(v)).double() * step - x
            return d.square().sum(-1) if h is None else torch.einsum("rbi,bij,rbj->rb", d, h.double(), d)

        every = torch.arange(1, 127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
        best = torch.stack([error(scale) for scale in every]).amin(0)
        ours = error(got.block_scale.float()[:, :: block // 16].unsqueeze(-1))
        assert bool((ours <= best * (1 + 1e-4) + 1e-30).all()), kind


def test_the_result_multiplies(device: torch.device) -> None:
    """It is a weight like any other, and errs less than one that is scaled by amaxes."""
    torch.manual_seed(3)
    x = (torch.randn(64, 512) * torch.exp(torch.randn(512))).to(device)
    w = torch.randn(256, 512).to(device)
    found = search.HessianAccumulator(512, device=device)
    found.add(x)
    exact = x.double() @ w.double().t()
    errors = []
    for w4 in (
        fp4gemm.quantize(w),
        search.search_scales(w),
        search.search_scales(w, "hessian", hessian=found.hessian()),
    ):
        y = fp4gemm.gemm(x.bfloat16(), w4, out_dtype=torch.float32)
        dequantized = x.bfloat16().double() @ w4.dequantize().double().t()
        assert torch.allclose(y.double(), dequantized, rtol=1e-4, atol=1e-3)
        errors.append(float((y.double() - exact).square().sum()))
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]


def test_graph(cuda: torch.device) -> None:
    """With a factor made before, nothing waits: a search can be captured."""
    w = torch.randn(300, 512, device=cuda, dtype=torch.bfloat16)
    found = search.factor(hessians(32, 16, "full", torch.Generator().manual_seed(4)).to(cuda))
    for arguments in ({"metric": "sse"}, {"metric": "hessian", "hessian": found}):
        want = search.search_scales(w, **arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = search.search_scales(w, **arguments)
        graph.replay()
        same(got, want, str(arguments["metric"]))


def test_factors_agree_on_every_device(device: torch.device) -> None:
    """Not to the bit: torch's square root on a CPU is not always rounded correctly."""
    for kind in HESSIANS:
        h = hessians(64, 16, kind, torch.Generator().manual_seed(5))
        here, there = search.factor(h), search.factor(h.to(device))
        one, other = (upper.double().mT @ upper.double() for upper in (here.upper, there.upper.cpu()))
        assert bool(((one - other).abs() <= 1e-6 * one.diagonal(0, -2, -1).amax(-1)[:, None, None]).all()), kind
        assert torch.equal(here.exponent, there.exponent.cpu()), kind


def test_feedback(device: torch.device) -> None:
    """Less d^T H d in every row or the same, the same bytes again, and as good as on the CPU."""
    generator = torch.Generator().manual_seed(6)
    n, k = (512, 1024) if device.type == "cuda" else (16, 64)
    x = torch.randn(4 * k, k, generator=generator) @ (torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5)
    w = torch.randn(n, k, generator=generator).bfloat16()
    found = search.HessianAccumulator(k, full=True)
    found.add(x)
    h = found.full_hessian(damping=0.01)

    def errors(t: fp4gemm.FP4Tensor) -> torch.Tensor:
        d = t.to("cpu").dequantize().double() - w.double()
        return ((d @ h.double()) * d).sum(1)

    def run(where: torch.device, rows: int, **options: Any) -> fp4gemm.FP4Tensor:
        return search.search_scales(w[:rows].to(where), "hessian", **options)

    full = {"hessian": h.to(device), "feedback": True}
    plain, got = run(device, n, hessian=found.hessian(damping=0.01).to(device)), run(device, n, **full)
    same(run(device, n, **full), got, "again")
    assert bool((errors(got) <= errors(plain) * (1 + 1e-6)).all())
    assert float(errors(got).sum()) < 0.8 * float(errors(plain).sum())
    few = 8  # rows: the reference takes its time
    here = run(torch.device("cpu"), few, hessian=h, feedback=True).dequantize().double() - w[:few].double()
    want = float(((here @ h.double()) * here).sum())
    assert float(errors(got)[:few].sum()) == pytest.approx(want, rel=0.02)
