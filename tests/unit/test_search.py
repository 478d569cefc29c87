"""Searches on the CPU: hand-checked choices, what is refused, Hessians that are accumulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fp4gemm
from fp4gemm import search
from fp4gemm.formats import decode_e2m1, unpack_e2m1
from fp4gemm.reference import search as reference_search
from fp4gemm.reference.rounding import encode_e2m1
from fp4gemm.search import feedback, scales
from fp4gemm.search.factor import diagonal_blocks


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


def test_a_parameter_has_no_gradient_here() -> None:
    w = torch.nn.Parameter(torch.randn(4, 32))
    got = search.search_scales(w)
    assert not got.outer_scale.requires_grad
    assert torch.equal(got.data, search.search_scales(w.detach()).data)


def test_transposed() -> None:
    w = torch.randn(48, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(search.search_scales(w, dim=0).data, search.search_scales(w.t().contiguous()).data)


_GOOD = torch.eye(16).repeat(2, 1, 1)
_SKEW = _GOOD.clone()
_SKEW[1, 0, 1] = 0.1
_NEGATIVE = _GOOD.clone()
_NEGATIVE[1, 3, 3] = -0.5
_CROSS = torch.eye(32)
_CROSS[3, 20] = _CROSS[20, 3] = 2


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
        ({"feedback": True}, "feedback: expected metric='hessian'"),
        ({"metric": "hessian", "feedback": True, "hessian": _GOOD}, r"hessian: expected shape \(32, 32\)"),
        ({"metric": "hessian", "feedback": True, "hessian": _CROSS}, r"hessian: expected a positive definite \[K, K\]"),
        ({"metric": "hessian", "feedback": True, "hessian": _CROSS.triu()}, "hessian: expected symmetric"),
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


def test_a_split_factor_is_that_of_each_block() -> None:
    for n in (16, 32):
        x = torch.randn(5, 40, n, generator=torch.Generator().manual_seed(15))
        h = (x.mT @ x) * torch.tensor([1, 1e-6, 30, 0, 1e9]).reshape(5, 1, 1)
        for i, one in enumerate(search.factor(h).split()):
            assert all(torch.equal(a, b) for a, b in zip(one, search.factor(h[i : i + 1]), strict=True))


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


def _activations(k: int, seed: int, tokens: int = 400) -> torch.Tensor:
    """Correlated over all columns, and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 2 * torch.randn(k, k, generator=generator) / k**0.5
    size = torch.exp(0.5 * torch.randn(k, generator=generator))
    return torch.randn(tokens, k, generator=generator) @ mix * size


def _full(x: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    found = search.HessianAccumulator(x.shape[1], full=True)
    found.add(x)
    return found.full_hessian(damping=damping), found.hessian(damping=damping)


def _form(d: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ri,ij,rj->r", d.double(), h.double(), d.double())


@pytest.mark.parametrize(
    "k, arguments",
    [
        (96, {}),
        (96, {"block": 32}),
        (70, {}),
        (70, {"block": 32, "sf_layout": "8x4"}),
        (64, {"scaling": "per_tensor", "dim": 0}),
        (64, {"candidates": "4/6", "sf_layout": "linear"}),
        (64, {"outer": "search"}),
    ],
)
def test_feedback_lowers_the_error_of_outputs(k: int, arguments: dict[str, Any]) -> None:
    """Of every row, or it is left as it was; of all rows by far more than rounding of the sums could."""
    full, _ = _full(_activations(k, 7))
    block = arguments.get("block", 16)
    w = torch.randn(24, k, generator=torch.Generator().manual_seed(8)).bfloat16()
    given = w.t() if arguments.get("dim") == 0 else w
    plain = search.search_scales(given, "hessian", hessian=diagonal_blocks(full, block), **arguments)
    got = search.search_scales(given, "hessian", hessian=full, feedback=True, **arguments)
    assert (got.shape, got.sf_layout) == (plain.shape, plain.sf_layout)
    assert torch.equal(got.outer_scale, plain.outer_scale)
    assert not unpack_e2m1(got.data)[:, k:].any()
    before, after = (_form(t.dequantize() - w.float(), full) for t in (plain, got))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.7 * float(before.sum())
    again = search.search_scales(given, "hessian", hessian=full, feedback=True, **arguments)
    for one, other in zip(_leaves(got), _leaves(again), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _leaves(t: fp4gemm.FP4Tensor) -> list[torch.Tensor]:
    return [t.data, t.block_scale, t.outer_scale.reshape(-1)]


def test_feedback_aims_where_real_numbers_would() -> None:
    """Targets and Hessians of blocks against a solve for all columns behind: the Schur complement, and its minimum."""
    full, _ = _full(_activations(64, 9))
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(10))
    plain = search.search_scales(w, "hessian", hessian=diagonal_blocks(full, 16))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def choose(args: Any, one: Any) -> fp4gemm.FP4Tensor:
        upper = one.upper[0].double()
        seen.append((args.source.double(), upper.T @ upper * 4.0 ** float(one.exponent)))
        return reference_search.search(args).tensor

    scale = w.abs().amax(1)
    ones = search.factor(diagonal_blocks(full, 16))
    args = reference_search.SearchArguments(w, scale, False, "128x4", "hessian", 16, ones.upper, ones.reach)
    got = feedback.improve(args, plain, full, choose)
    assert bool((got.data != plain.data).any(1).all())  # every row is one of feedback, so what it holds came of `seen`
    order = full.diagonal().reshape(4, 16).sum(1).argsort(descending=True)
    columns = (order[:, None] * 16 + torch.arange(16)).flatten()
    h, exact = full.double()[columns][:, columns], w.double()[:, columns]
    d = got.dequantize().double()[:, columns] - exact
    for at, (target, metric) in zip(range(0, 64, 16), seen, strict=True):
        inverse = torch.linalg.inv(h[at:, at:])
        assert torch.allclose(metric, torch.linalg.inv(inverse[:16, :16]), rtol=1e-5, atol=1e-6)
        answer = -(d[:, :at] @ h[:at, at:]) @ inverse
        assert torch.allclose(target, (exact[:, at:] + answer)[:, :16], rtol=1e-4, atol=1e-5)


def test_feedback_leaves_alone_what_it_cannot_improve() -> None:
    """Without correlation there is nothing to make up for; NaN and Inf have no error; inputs that are never there."""
    w = torch.randn(6, 48, generator=torch.Generator().manual_seed(11))
    diagonal = torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(12)) + 0.1)
    x = _activations(48, 13)
    x[:, 20] = 0
    full, _ = _full(x, damping=0)
    bad = w.clone()
    bad[1, 3], bad[2, 40], bad[3] = float("nan"), float("inf"), 0
    for values, h, same in ((w, diagonal, slice(None)), (bad, full, slice(1, 4))):
        plain = search.search_scales(values, "hessian", hessian=diagonal_blocks(h, 16), sf_layout="linear")
        got = search.search_scales(values, "hessian", hessian=h, feedback=True, sf_layout="linear")
        for one, other in zip(_leaves(got), _leaves(plain), strict=True):
            assert torch.equal(one[same].view(torch.uint8), other[same].view(torch.uint8))
    assert bool((_form(got.dequantize() - w, full) < _form(plain.dequantize() - w, full))[[0, 4, 5]].all())
    with pytest.raises(TypeError, match=r"hessian: expected a tensor \[48, 48\], got Factor"):
        search.search_scales(w, "hessian", hessian=search.factor(diagonal_blocks(full, 16)), feedback=True)


def _cases() -> list[dict[str, Any]]:
    full, blocks = _full(_activations(48, 14))
    return [
        {"outer": "search"},
        {"candidates": "4/6", "outer_scale": torch.tensor(0.01), "sf_layout": "linear"},
        {"metric": "hessian", "hessian": blocks},
        {"metric": "hessian", "hessian": search.factor(blocks), "dim": 0},
        {"metric": "hessian", "hessian": full, "feedback": True, "scaling": "per_tensor"},
    ]


@pytest.mark.parametrize("case", range(5))
def test_compiled(case: int) -> None:
    """In one graph, as an operator whose fake is right."""
    arguments = _cases()[case]
    w = torch.randn(*((48, 20) if arguments.get("dim") == 0 else (20, 48)), dtype=torch.bfloat16)
    compiled = torch.compile(lambda t: search.search_scales(t, **arguments), fullgraph=True, backend="aot_eager")
    for one, other in zip(_leaves(compiled(w)), _leaves(search.search_scales(w, **arguments)), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    request = scales._checked(
        w, arguments.get("metric", "sse"), arguments.get("hessian"), 16, arguments.get("dim", -1),
        arguments.get("candidates", "all"), arguments.get("outer_scale"), arguments.get("scaling", "per_row"),
        arguments.get("sf_layout", "128x4"), arguments.get("outer", "amax"), arguments.get("feedback", False),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fp4gemm.search_scales.default, tuple(request))
