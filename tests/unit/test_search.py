"""Searches on the CPU: hand-checked choices, what is refused, Hessians that are accumulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fp4gemm
from fp4gemm import search
from fp4gemm.formats import decode_e2m1
from fp4gemm.reference.rounding import encode_e2m1


def brute_force(x: list[float], encode: float) -> int:
    """The best byte of one block, one number at a time in float64."""
    best, byte = float("inf"), 0
    for candidate in range(1, 127):
        scale = float(torch.tensor(candidate, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
        error = 0.0
        for value in x:
            v = torch.tensor(abs(value) * encode / scale, dtype=torch.float32)
            error += (float(decode_e2m1(encode_e2m1(v.reshape(1)))) * scale - abs(value) * encode) ** 2
        if error < best * (1 - 1e-9):
            best, byte = error, candidate
    return byte


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_agrees(seed: int) -> None:
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
    outer = torch.tensor(2.0**-5)
    got = search.search_scales(x, outer_scale=outer, sf_layout="linear")
    assert int(got.block_scale.view(torch.uint8)) == brute_force(x[0].tolist(), 32.0)


def test_values_below_half_a_scale_are_not_lost() -> None:
    """An amax below 6 * 2^-10 of the outer scale rounds to a scale of 0; a search finds 5 * 2^-9, and code 1."""
    x = torch.full((1, 16), 0.005)
    got = search.search_scales(x, outer_scale=torch.tensor(1.0), sf_layout="linear")
    assert got.block_scale.view(torch.uint8).tolist() == [[5]]
    error = float((got.dequantize() - x).square().sum())
    assert error < 1e-6


def test_never_worse_than_the_amax_and_four_six_between() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    outer = torch.tensor(1.0 / 512)

    def error(t: fp4gemm.FP4Tensor) -> float:
        return float((t.dequantize().double() - w.double()).square().sum())

    naive = error(fp4gemm.quantize(w, outer_scale=outer, convention="te_per_token"))
    four_six = error(search.search_scales(w, candidates="4/6", outer_scale=outer))
    best = error(search.search_scales(w, outer_scale=outer))
    assert best < four_six < naive
    assert error(search.search_scales(w, outer_scale=outer, candidates=range(1, 127))) == best


def test_diagonal_hessians_weigh_squares() -> None:
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    plain = search.search_scales(w)
    for h in (torch.eye(16).expand(2, 16, 16), torch.zeros(2, 16, 16)):
        got = search.search_scales(w, "hessian", hessian=h.contiguous())
        assert torch.equal(got.data, plain.data)
        assert torch.equal(got.block_scale.view(torch.uint8), plain.block_scale.view(torch.uint8))


def test_transposed() -> None:
    w = torch.randn(48, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(search.search_scales(w, dim=0).data, search.search_scales(w.t().contiguous()).data)


_GOOD = torch.eye(16).repeat(2, 1, 1)
_SKEW = _GOOD.clone()
_SKEW[1, 0, 1] = 0.1
_NEGATIVE = _GOOD.clone()
_NEGATIVE[1, 3, 3] = -0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"metric": "mse"}, "metric: expected one of"),
        ({"metric": "hessian"}, "hessian: expected a Hessian"),
        ({"hessian": _GOOD}, "hessian: expected None"),
        ({"metric": "hessian", "hessian": _GOOD[:1]}, "hessian: expected shape"),
        ({"metric": "hessian", "hessian": _GOOD * float("nan")}, "hessian: expected finite"),
        ({"metric": "hessian", "hessian": _SKEW}, r"hessian: expected symmetric blocks, got one \(1\)"),
        ({"metric": "hessian", "hessian": _NEGATIVE}, r"hessian: expected positive semidefinite blocks, got one \(1\)"),
        ({"block": 8}, "block: expected 16 or 32"),
        ({"dim": 2}, "dim: expected"),
        ({"candidates": range(5)}, "candidates: expected a range"),
        ({"candidates": "some"}, "candidates: expected one of"),
        ({"scaling": "per_column"}, "scaling: expected one of"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search.search_scales(torch.randn(4, 32), **arguments)


@pytest.mark.parametrize("kind", ["full", "ill", "deficient"])
def test_factors(kind: str) -> None:
    """U^T U is H with its ridge; an error beyond its reach is one of |U d|."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3 if kind == "deficient" else 64, 16, generator=generator)
    if kind == "ill":
        x = x[..., :1] + 1e-3 * x
    h = x.transpose(1, 2) @ x
    found = search.factor(h)
    again = found.upper.double().transpose(1, 2) @ found.upper.double()
    again *= 4.0 ** found.exponent.double().reshape(-1, 1, 1)
    assert float((again - h).abs().amax() / h.abs().amax()) < 1e-5
    d = torch.randn(8, 16, generator=generator).double()
    norm = (found.upper.double() @ d.unsqueeze(-1)).norm(dim=1)
    assert bool((d.abs() <= found.reach.double() * norm).all())


def test_accumulator(tmp_path: Path) -> None:
    x = torch.randn(7, 5, 40, generator=torch.Generator().manual_seed(4))
    whole, parts, full = (search.HessianAccumulator(40, full=i == 2) for i in range(3))
    whole.add(x)
    full.add(x)
    for part in x:
        parts.add(part.half().float())
    want = torch.nn.functional.pad(x.reshape(35, 40), (0, 8)).reshape(35, 3, 16).double()
    h = torch.einsum("tbi,tbj->bij", want, want) / 35
    assert torch.allclose(whole.hessian().double(), h, rtol=1e-5, atol=1e-5)
    assert torch.allclose(full.hessian().double(), h, rtol=1e-5, atol=1e-5)
    assert torch.allclose(full.full_hessian().double()[:16, :16], h[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(parts.hessian(normalize=False) / 35, whole.hessian(), rtol=1e-2, atol=1e-2)
    damped = whole.hessian(damping=0.5) - whole.hessian()
    mean = whole.hessian().diagonal(dim1=1, dim2=2).mean(-1)
    assert torch.allclose(damped, torch.diag_embed(0.5 * mean.unsqueeze(-1).expand(3, 16)), atol=1e-6)
    whole.save(tmp_path / "h.safetensors")
    again = search.HessianAccumulator.load(tmp_path / "h.safetensors")
    assert torch.equal(again.sum, whole.sum)
    assert again.tokens == 35
    again.merge(whole)
    assert torch.allclose(again.hessian(), whole.hessian())
    with pytest.raises(ValueError, match="x: expected"):
        whole.add(torch.randn(3, 39))


@pytest.mark.parametrize("metric", ["sse", "hessian"])
def test_outer_scales(metric: str) -> None:
    """Each row is as good as the best of the grid, and better than without in most."""
    generator = torch.Generator().manual_seed(6)
    w, x = torch.randn(6, 48, generator=generator), torch.randn(200, 48, generator=generator)
    h = torch.einsum("tbi,tbj->bij", x.reshape(200, 3, 16), x.reshape(200, 3, 16))
    arguments: dict[str, Any] = {"metric": metric, "hessian": h if metric == "hessian" else None}

    def error(t: fp4gemm.FP4Tensor) -> torch.Tensor:
        d = (t.dequantize().double() - w.double()).reshape(6, 3, 16)
        return d.square().sum((1, 2)) if metric == "sse" else torch.einsum("rbi,bij,rbj->r", d, h.double(), d)

    plain, got = search.search_scales(w, **arguments), search.search_scales(w, outer="search", **arguments)
    grid = torch.stack(
        [error(search.search_scales(w, outer_scale=plain.outer_scale * (1 + i / 16), **arguments)) for i in range(16)]
    )
    assert torch.allclose(error(got), grid.amin(0), rtol=1e-5)
    assert bool((error(got) <= error(plain) * (1 + 1e-5)).all())
    assert int((error(got) < error(plain)).sum()) >= 4
