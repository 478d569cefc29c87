"""Producers: the functions that they are, the order of their sums, and the bytes of quantizing what they make."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_cases import assert_same, normal

import fp4gemm
from fp4gemm import reference
from fp4gemm.formats import GRADIENTS, PRODUCERS
from fp4gemm.reference.producers import fma

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN, INF = float("nan"), float("inf")


def expected(x: torch.Tensor, producer: str) -> torch.Tensor:
    """The function itself, in float64."""
    x = x.double()
    if producer == "silu_mul":
        gate, up = x.chunk(2, dim=1)
        return F.silu(gate) * up
    if producer == "gelu_tanh":  # 1 + tanh(z) would cancel
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.relu(x).square()


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_producers_are_their_functions(producer, dtype):
    x = (normal(64, 96, seed=3) * torch.linspace(0.01, 6, 96)).to(dtype)
    got, want = reference.produce(x, producer), expected(x, producer)
    assert got.dtype == dtype
    assert got.shape == want.shape
    # 1e-5 of the function, or 2^-64 of x where it is less than that; then one rounding, of fp16 perhaps to a subnormal.
    bound = want.abs() * (1e-5 + torch.finfo(dtype).eps / 2) + (2.0**-25 if dtype == torch.float16 else 2.0**-55)
    assert bool(((got.double() - want).abs() <= bound).all())


ACTIVATIONS = {
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_autograd(gradient, dtype):
    h = (normal(64, 96, seed=4) * torch.linspace(0.01, 8, 96)).to(dtype)
    h[0, :6] = torch.tensor([0.0, -0.0, 60.0, -60.0, -1e4, 1e4])
    g = normal(64, 96, seed=5).to(dtype)
    inputs = h.double().requires_grad_()
    ACTIVATIONS[gradient](inputs).backward(g.double())
    got = reference.produce_gradient(g, h, gradient)
    assert got.dtype == dtype
    want, scale = inputs.grad, g.double().abs()
    bound = want.abs() * torch.finfo(dtype).eps + scale * 2e-5 + (2.0**-25 if dtype == torch.float16 else 0)
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_member_gets_its_gradient(gradient):
    g, h = normal(40, 64, seed=6).bfloat16(), normal(40, 64, seed=7).bfloat16()
    made = reference.produce_gradient(g, h, gradient)
    dims = torch.tensor([7, 33])
    *got, dbias = fp4gemm.quantize_grouped(g, first_dims=dims, gradient=gradient, h=h, both=True, dbias=True)
    for i, part in enumerate(made.split([7, 33])):
        assert_same(got[0].member(i), fp4gemm.quantize(part))
        assert_same(got[1].member(i), fp4gemm.quantize(part, transposed=True))
        torch.testing.assert_close(dbias[i], part.float().sum(0))


@pytest.mark.parametrize("producer", PRODUCERS)
def test_quantizing_with_a_producer_is_quantizing_what_it_makes(producer):
    x = normal(9, 192, seed=1).bfloat16()
    made = reference.produce(x, producer)
    for options in ({}, {"scaling": "per_tensor"}, {"seed": 3}, {"residual": 32}, {"adaptive": "mse"}):
        want = reference.quantize(made, **options)
        assert_same(reference.quantize(x, producer=producer, **options), want)
        assert_same(fp4gemm.quantize(x, producer=producer, **options), want)
    w = fp4gemm.quantize(normal(24, made.shape[1], seed=2))
    want = fp4gemm.gemm(fp4gemm.quantize(made), w)
    assert torch.equal(fp4gemm.quantize_gemm(x, w, producer=producer), want)
    assert torch.equal(fp4gemm.quantize_gemm(x.reshape(3, 3, 192), w, producer=producer), want.reshape(3, 3, 24))


def test_values_that_are_not_finite():
    x = torch.tensor([[NAN, INF, -INF, -100.0, 100.0, -0.0]])
    gelu = reference.produce(x, "gelu_tanh")[0].tolist()
    assert math.isnan(gelu[0])
    assert gelu[1:] == [INF, -INF, pytest.approx(-100 * 2.0**-64, rel=1e-5), pytest.approx(100.0, rel=1e-5), 0.0]
    silu = reference.produce(torch.cat([x, torch.ones_like(x)], 1), "silu_mul")[0].tolist()
    assert math.isnan(silu[0])
    assert silu[1:3] == [INF, -INF]
    assert reference.produce(x, "relu2")[0, 1:].tolist() == [INF, 0.0, 0.0, 10000.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 16, 100, 4096])
def test_rmsnorm_is_its_function(dtype, k):
    x, residual, weight = (normal(5, k, seed=i).to(dtype) for i in (1, 2, 3))
    got, h = reference.rmsnorm(x, weight[0], 1e-5, residual)
    assert torch.equal(h, x + residual)
    want = F.rms_norm(h.double(), (k,), weight[0].double(), 1e-5)
    bound = want.abs() * (1e-6 + torch.finfo(dtype).eps / 2) + 1e-6
    assert bool(((got.double() - want).abs() <= bound).all())
    alone, same = reference.rmsnorm(x, weight[0])
    assert same is x
    assert torch.equal(alone, reference.rmsnorm(x, weight[0], residual=torch.zeros_like(x))[0])


def test_the_order_of_the_sum_of_squares():
    """Folded inside a block, then over 32 blocks, then group by group: spelt out in numpy."""
    x = normal(3, 1100, seed=4)

    def folded(v):
        while v.shape[-1] > 1:
            half = v.shape[-1] // 2
            v = v[..., :half] + v[..., half:]
        return v[..., 0]

    for row, got in zip(x, reference.rmsnorm(x, torch.ones(1100), 0.0)[0], strict=True):
        squares = np.pad((row * row).numpy(), (0, 1536 - 1100)).reshape(3, 32, 16)
        total = np.float32(0)
        for group in folded(folded(squares)):
            total = np.float32(total + group)
        scale = np.float32(1) / np.float32(np.sqrt(np.float64(total / np.float32(1100))))
        assert np.array_equal(got.numpy(), row.numpy() * scale)


@pytest.mark.parametrize("added", [False, True])
def test_rmsnorm_of_no_rows(added):
    x = torch.empty(0, 40)
    made, h = fp4gemm.quantize_rmsnorm(x, torch.ones(40), residual=x if added else None)
    assert (made.shape, h.shape) == ((0, 40), (0, 40))


def test_quantize_rmsnorm_is_quantizing_the_norm():
    x, residual, weight = (
        normal(9, 160, seed=1).bfloat16(),
        normal(9, 160, seed=2).bfloat16(),
        normal(1, 160, seed=3)[0].bfloat16(),
    )
    made, h = reference.rmsnorm(x, weight, 1e-5, residual)
    for options in ({}, {"scaling": "per_tensor", "sf_layout": "8x4"}, {"seed": 3}, {"outer_scale": torch.ones(9)}):
        for quantize in (reference.quantize_rmsnorm, fp4gemm.quantize_rmsnorm):
            got, total = quantize(x, weight, eps=1e-5, residual=residual, **options)
            assert_same(got, reference.quantize(made, **options))
            assert torch.equal(total, h)
    assert fp4gemm.quantize_rmsnorm(x, weight)[1] is x


def test_fma_rounds_once():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3000, generator=generator) * 10.0 ** (4 * i % 7 - 3) for i in range(3))
    c[:2000] = -(a * b)[:2000] * (1 + torch.randn(2000, generator=generator) * 1e-7)
    a[:10] *= 1e-30
    b[:10] *= 1e-12  # subnormal results
    for x, y, z, got in zip(a, b, c, fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = np.float32(float(exact))
        around = (near, np.nextafter(near, np.float32(INF)), np.nextafter(near, np.float32(-INF)))
        best = min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1))
        assert float(got) == float(best)
    assert math.isinf(fma(torch.tensor(INF), torch.tensor(1.0), torch.tensor(1.0)))


X = torch.zeros(4, 64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fp4gemm.quantize(X, producer="silu"), ValueError, "producer: expected one of silu_mul"),
        (lambda: fp4gemm.quantize(X, producer="relu2", transposed=True), ValueError, "producer: expected None beside"),
        (lambda: fp4gemm.quantize(X[:, :63], producer="silu_mul"), ValueError, r"x: expected \[M, 2 K\] for silu_mul"),
        (lambda: fp4gemm.quantize(X.to(torch.float8_e4m3fn), producer="relu2"), TypeError, "x.dtype: expected"),
        (
            lambda: fp4gemm.quantize(X, producer="silu_mul", residual=48),
            ValueError,
            "residual: expected at most K = 32",
        ),
        (
            lambda: fp4gemm.quantize_gemm(X, fp4gemm.quantize(X), producer="silu_mul"),
            ValueError,
            "x: expected .* K = 128",
        ),
        (
            lambda: fp4gemm.quantize_gemm(X, fp4gemm.quantize(X), residual=160),
            ValueError,
            r"residual: expected at most K of w, shape \(4, 64\), got 160",
        ),
        (lambda: fp4gemm.quantize_gemm(X[0], fp4gemm.quantize(X)), ValueError, "x: expected at least 2 dimensions"),
        (lambda: fp4gemm.quantize_rmsnorm(X, X[0].bfloat16()), TypeError, "weight: expected dtype torch.float32"),
        (lambda: fp4gemm.quantize_rmsnorm(X, X[0, :32]), ValueError, r"weight: expected shape \[64\]"),
        (lambda: fp4gemm.quantize_rmsnorm(X, X[0], residual=X[:2]), ValueError, r"residual: expected shape \[4, 64\]"),
        (lambda: fp4gemm.quantize_rmsnorm(X, X[0], eps=-1.0), ValueError, "eps: expected a finite number >= 0"),
        (lambda: fp4gemm.quantize_rmsnorm(X, X[0], scaling="per_column"), ValueError, "scaling: expected per_row"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
