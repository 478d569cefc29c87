"""The reference dequantizer and GEMM."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import CONVENTIONS, DTYPES, normal

from fp4gemm import formats, reference
from fp4gemm.tensor import FP4Tensor

# ---------------------------------------------------------------- dequantize


def every_product() -> FP4Tensor:
    """[127, 16]: row s holds all 16 codes under block scale byte s."""
    data = formats.pack_e2m1(torch.arange(16, dtype=torch.uint8)).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).reshape(127, 1).view(torch.float8_e4m3fn)
    return FP4Tensor(data, scales, torch.linspace(0.1, 3, 127), (127, 16), "linear")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_times_every_block_scale_is_exact(dtype):
    t = every_product()
    scale = [m / 8 * 2.0**-6 for m in range(8)]
    scale += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    exact = torch.tensor(scale, dtype=torch.float64)[:, None] * torch.tensor(formats.E2M1_VALUES, dtype=torch.float64)
    got = reference.dequantize(t, dtype, outer=False)
    assert got.dtype == dtype
    assert torch.equal(got.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_multiplies_in_float32_and_rounds_once(dtype):
    t = every_product()
    product = reference.dequantize(t, outer=False).numpy() * t.outer_scale.numpy()[:, None]
    assert product.dtype == np.float32
    assert torch.equal(reference.dequantize(t, dtype), torch.from_numpy(product).to(dtype))


def test_dequantize_to_a_bad_dtype():
    with pytest.raises(TypeError, match=r"dtype: expected one of torch.bfloat16, .*, got torch.float64"):
        reference.dequantize(every_product(), torch.float64)


stable = st.tuples(
    st.integers(1, 40),
    st.integers(1, 90),
    st.sampled_from(CONVENTIONS),
    st.sampled_from(formats.SCALINGS),
    st.integers(0, 9999),
)


@settings(deadline=None, max_examples=80)
@given(stable)
def test_quantizing_dequantized_values_again_changes_nothing(problem):
    """Holds while block scales are normal e4m3 numbers: then a block has a code of magnitude 6, its scale comes back,
    and every value stands next to its own code. (Subnormal scales are too coarse for the first of these.)"""
    rows, k, convention, scaling, seed = problem
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, formats.padded_k(k) // 16, 16, generator=g)
    x = (x / x.abs().amax(-1, keepdim=True) * torch.exp2(-8 * torch.rand(x.shape[:2], generator=g))[..., None]).flatten(
        1
    )
    if scaling == "per_column":
        x = x.t()
    first = reference.quantize(x, scaling=scaling, convention=convention)
    values = reference.dequantize(first)
    again = reference.quantize(values, scaling="per_row" if scaling == "per_column" else scaling, convention=convention)
    assert torch.equal(again.data, first.data)
    assert torch.equal(again.block_scale.view(torch.uint8), first.block_scale.view(torch.uint8))
    torch.testing.assert_close(again.outer_scale, first.outer_scale, rtol=3e-7, atol=0)


@settings(deadline=None, max_examples=60)
@given(stable)
def test_error_is_bounded_by_the_grid(problem):
    """|x - x'| <= 1/6 of the block's amax (half the widest step, 1, of 6) plus what rounding the scale adds."""
    rows, k, convention, scaling, seed = problem
    x = normal(rows, k, seed=seed)
    source = x.t() if scaling == "per_column" else x
    t = reference.quantize(x, scaling=scaling, convention=convention)
    padded = torch.nn.functional.pad(source, (0, -source.shape[1] % 16)).reshape(source.shape[0], -1, 16)
    amax = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, : source.shape[1]]
    step = t.outer_scale.reshape(-1, 1) * 2.0**-9 * 6  # what a subnormal block scale may lose
    assert ((reference.dequantize(t) - source).abs() <= amax * (1 / 6 + 1 / 16) + step).all()


# ---------------------------------------------------------------- GEMM


def identity(k: int) -> FP4Tensor:
    """1.0 = code 2 under block scale 1 and outer scale 1."""
    data = formats.pack_e2m1(2 * torch.eye(formats.padded_k(k), dtype=torch.uint8))[:k]
    scales = torch.ones(k, formats.scale_columns(k)).to(torch.float8_e4m3fn)
    return FP4Tensor(data.contiguous(), scales, torch.tensor(1.0), (k, k), "linear")


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("k", [16, 40, 64])
def test_gemm_with_the_identity_is_dequantize(out_dtype, scaling, k):
    a = reference.quantize(normal(33, k), scaling=scaling)
    assert torch.equal(reference.gemm(a, identity(k), out_dtype=out_dtype), reference.dequantize(a, out_dtype))


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200)),
    st.sampled_from(["per_row", "per_tensor"]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 9999),
)
def test_gemm_against_float64(shape, scaling, with_bias, out_dtype, seed):
    m, n, k = shape
    a = reference.quantize(normal(m, k, seed=seed), sf_layout="8x4")
    b = reference.quantize(normal(n, k, seed=seed + 1), scaling=scaling)
    bias = normal(1, n, seed=seed + 2)[0] if with_bias else None
    left, right = (reference.dequantize(t, outer=False).double() for t in (a, b))
    outer = a.outer_scale.double().reshape(-1, 1) * b.outer_scale.double().reshape(1, -1)
    exact = (left @ right.t()) * outer
    # K additions of exact products, two scalings and a bias: each within half a float32 ulp of what it rounds.
    magnitude = (left.abs() @ right.abs().t()) * outer
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    half_ulp = torch.finfo(out_dtype).eps / 2
    bound = (
        (k + 4) * 2.0**-24 * magnitude * (1 + half_ulp)
        + half_ulp * exact.abs()
        + torch.finfo(out_dtype).smallest_normal
    )
    got = reference.gemm(a, b, bias, out_dtype)
    assert got.dtype == out_dtype
    assert got.shape == (m, n)
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_rescales_in_the_documented_order(with_bias):
    """One product per sum, so acc is exact and every later rounding is visible bit for bit."""
    n = 64
    a, b = (reference.quantize(torch.eye(n)[:, :16] * 0 + 1.0, outer_scale=torch.rand(n) + 0.1) for _ in range(2))
    only_first = torch.zeros_like(a.data)
    only_first[:, 0] = torch.randint(1, 16, (n,), dtype=torch.uint8)
    a = FP4Tensor(only_first, a.block_scale, a.outer_scale, a.shape, a.sf_layout)
    bias = torch.randn(n) if with_bias else None
    acc = (reference.dequantize(a, outer=False) @ reference.dequantize(b, outer=False).t()).numpy()
    outer_a, outer_b = a.outer_scale.numpy()[:, None], b.outer_scale.numpy()[None, :]
    expected, other = outer_a * (outer_b * acc), (outer_a * outer_b) * acc
    assert (expected != other).any()  # or the test shows nothing
    if bias is not None:
        expected = expected + bias.numpy()
    assert torch.equal(reference.gemm(a, b, bias, torch.float32), torch.from_numpy(expected))


def test_gemm_without_k_is_the_bias():
    a, b = reference.quantize(torch.ones(3, 0)), reference.quantize(torch.ones(2, 0))
    assert torch.equal(reference.gemm(a, b), torch.zeros(3, 2, dtype=torch.bfloat16))
    bias = torch.tensor([1.5, -2.0], dtype=torch.float16)
    assert torch.equal(reference.gemm(a, b, bias, torch.float32), bias.float().expand(3, 2))
