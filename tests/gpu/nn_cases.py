"""Checks of fp4gemm.nn, bound to no device: tests/unit runs them on the CPU."""

from __future__ import annotations

from typing import Any

import gpu_cases as cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp4gemm
from fp4gemm.nn import Linear, Recipe, linear, per_tensor, per_token, w4a16

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


def operands(x: Tensor, w: Tensor, dy: Tensor, recipe: Recipe, seed: int) -> tuple[tuple[Any, Any], ...]:
    """What y, dx and dw are products of, each quantized by a call of its own."""
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
        noise["seed"] = torch.randint(0, 2**63 - 1, (1,), device=x.device)
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


def run_block(model: nn.Module, x: Tensor, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Result and gradients of one step, parameters and x."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.float().square().mean().backward()
    return y.detach(), {**grads(model), "x": x.grad}


def assert_same_step(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    cases.assert_same_bits(got[0], want[0], what)
    for name, gradient in want[1].items():
        cases.assert_same_bits(got[1][name], gradient, f"{what}: gradient of {name}")
