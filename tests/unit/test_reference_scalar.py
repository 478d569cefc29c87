"""The quantizer against an independent implementation, step by step in numpy float32.

The oracle shares no code with fp4gemm: scales in numpy, roundings by distance to the list of grid values (checked here
against exact fractions), NaN rules by ``np.fmin``.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from fp4gemm import reference
from fp4gemm.reference.rounding import encode_e2m1, encode_e4m3

f32 = np.float32
MAX = np.finfo(f32).max
CONVENTIONS = ["te_per_token", "te", "torchao", "modelopt"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]


def nearest_even(values: np.ndarray, grid: list[float]) -> np.ndarray:
    """Index of the nearest grid value, the even index on a tie; the last index above the grid."""
    distance = np.abs(np.minimum(values.astype(np.float64), grid[-1])[..., None] - np.array(grid))
    closest = distance == distance.min(-1, keepdims=True)
    first, last = closest.argmax(-1), len(grid) - 1 - closest[..., ::-1].argmax(-1)
    return np.where(first % 2 == 0, first, last).astype(np.uint8)


def e2m1(v: np.ndarray) -> np.ndarray:
    nan = np.isnan(v)
    codes = nearest_even(np.where(nan, 0, np.abs(v)), E2M1)
    return np.where(nan, 7, codes | np.signbit(v).astype(np.uint8) << 3).astype(np.uint8)


def e4m3(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = nearest_even(np.fmin(v, f32(448)), E4M3)
    return codes, np.array(E4M3, dtype=f32)[codes]


def te_per_token(x, bmax, amax, outer):
    if outer is None:
        outer = amax * f32(1 / 2688)
        s = np.fmin(f32(2688) / np.maximum(amax, f32(1e-12)), MAX)
    else:
        s = np.fmin(f32(1) / outer, MAX)
    code, value = e4m3(np.fmin(bmax * (s * f32(1 / 6)), MAX))
    c = np.where(code == 0, f32(0), s / value)
    return outer, code, e2m1(x * c[..., None])


def te(x, bmax, amax, outer):
    if outer is None:
        outer = amax * f32(1 / 2688)
        s = np.where(amax == 0, f32(1), np.fmin(f32(2688) / amax, MAX))
    else:
        s = np.fmin(f32(1) / outer, MAX)
    code, value = e4m3(np.fmin(bmax * (s * f32(1 / 6)), MAX))
    c = np.fmin(f32(1) / (value * (f32(1) / s)), MAX)
    return outer, code, e2m1(x * c[..., None])


def torchao(x, bmax, amax, outer):
    if outer is None:
        outer = amax / f32(2688)
    pts = np.where(outer == 0, f32(1), outer)
    code, value = e4m3(np.maximum(np.fmin((bmax / f32(6)) / pts, f32(448)), f32(2**-6)))
    reciprocal = np.fmin(np.fmin(f32(1) / pts, MAX) / value, MAX)
    return outer, code, e2m1(np.clip(x * reciprocal[..., None], f32(-6), f32(6)))


def modelopt(x, bmax, amax, outer):
    if outer is None:
        outer = amax / f32(2688)
    pts = np.where(outer == 0, f32(1), outer)
    scale = bmax / (f32(6) * pts)
    scale = np.where(scale == 0, f32(1), scale)
    code, value = e4m3(np.maximum(np.fmin(scale, f32(448)), f32(2**-9)))
    return outer, code, e2m1(x / (value * pts)[..., None])


ORACLE = {"te_per_token": te_per_token, "te": te, "torchao": torchao, "modelopt": modelopt}


@np.errstate(all="ignore")
def oracle(x: np.ndarray, convention: str, per_tensor: bool, outer: np.ndarray | None = None):
    """Outer scale, scale bytes [M, K/16] and packed data of float32 x [M, K], K a multiple of 16."""
    blocks = x.reshape(x.shape[0], -1, 16)
    bmax = np.where(np.isnan(blocks), f32(0), np.abs(blocks)).max(-1)
    amax = bmax.max() if per_tensor else bmax.max(-1, keepdims=True)
    if outer is not None and outer.ndim:
        outer = outer[:, None]
    outer, scales, codes = ORACLE[convention](blocks, bmax, amax, outer)
    codes = codes.reshape(x.shape)
    return np.asarray(outer), scales, codes[:, ::2] | codes[:, 1::2] << 4


def assert_equals_oracle(x: torch.Tensor, convention: str, scaling: str, outer: torch.Tensor | None = None) -> None:
    got = reference.quantize(x, scaling=scaling, convention=convention, sf_layout="linear", outer_scale=outer)
    given = None if outer is None else outer.numpy()
    expected = oracle(x.float().numpy(), convention, scaling == "per_tensor", given)
    expected_outer, expected_scales, expected_data = expected
    label = f"{convention}, {scaling}, {x.dtype}"
    bits = got.outer_scale.numpy().view(np.uint32), expected_outer.astype(f32).reshape(got.outer_scale.shape)
    np.testing.assert_array_equal(bits[0], bits[1].view(np.uint32), f"outer scales: {label}")
    np.testing.assert_array_equal(got.block_scale.view(torch.uint8).numpy(), expected_scales, f"scales: {label}")
    np.testing.assert_array_equal(got.data.numpy(), expected_data, f"data: {label}")


def around_midpoints(grid: list[float]) -> np.ndarray:
    """Every grid value and every midpoint with its two float32 neighbours, and values past the end."""
    exact = np.array(grid + [(a + b) / 2 for a, b in itertools.pairwise(grid)] + [grid[-1] * 1.1, 1e30], dtype=f32)
    return np.concatenate([exact, np.nextafter(exact, f32(np.inf)), np.nextafter(exact, f32(0))])


def by_fractions(value: float, grid: list[float]) -> int:
    """Index of the nearest grid value in exact arithmetic, ties to the even index."""
    distances = [(abs(Fraction(value) - Fraction(g)), i % 2, i) for i, g in enumerate(grid)]
    return min(distances)[2]


@pytest.mark.parametrize("grid", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_roundings_and_oracle_equal_exact_arithmetic_around_every_midpoint(grid):
    values = around_midpoints(grid)
    exact = [by_fractions(float(v), grid) for v in values]
    assert nearest_even(values, grid).tolist() == exact
    if grid is E2M1:
        assert encode_e2m1(torch.from_numpy(values)).tolist() == exact
        negative = encode_e2m1(torch.from_numpy(-values))
        assert negative.tolist() == [code + 8 for code in exact]
    else:
        assert encode_e4m3(torch.from_numpy(values)).view(torch.uint8).tolist() == exact


def all_bf16_up_to(amax: float) -> torch.Tensor:
    patterns = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return patterns[patterns <= amax]


def tie_problem(amax: float) -> torch.Tensor:
    """bf16 [n, 32]: one row for each bf16 block amax up to ``amax``; the row's other block holds ``amax`` itself.

    The rest of a block is its amax times ratios of grid values and midpoints, so the codes meet ties too.
    """
    top = all_bf16_up_to(amax)
    ratios = torch.tensor([1, -5 / 6, 3.5 / 6, -2.5 / 6, 1.75 / 6, 1.25 / 6, -0.75 / 6, 0.25 / 6, 4 / 6, 3 / 6, 2 / 6])
    ratios = torch.cat([ratios, torch.tensor([-1.5 / 6, 1 / 6, 0.5 / 6, -0.0, 0.9])])
    x = torch.empty(len(top), 2, 16, dtype=torch.bfloat16)
    x[:, 0] = torch.tensor(amax) * ratios
    x[:, 1] = top.float()[:, None] * ratios
    return x.flatten(1)


@pytest.mark.parametrize("amax", [3.5, 5, 6, 7, 12])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_every_bf16_block_amax_under_the_tie_prone_amaxes(amax, convention, scaling):
    assert_equals_oracle(tie_problem(amax), convention, scaling)


def test_the_tie_problems_tell_the_scale_orders_apart():
    """If this fails, the test above has lost its teeth: each amax must separate our order from some other order."""
    for amax in (3.5, 5, 6, 7, 12):
        bmax, s = all_bf16_up_to(amax).float().numpy(), f32(2688) / f32(amax)
        ours = e4m3(bmax * (s * f32(1 / 6)))[0]
        others = [e4m3((bmax / f32(6)) * s)[0], e4m3(bmax * (s / f32(6)))[0], e4m3(s * (bmax * f32(1 / 6)))[0]]
        assert max(int((ours != other).sum()) for other in others) >= (1 if amax == 5 else 15), amax


def random_problem(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal data whose blocks span many binades, with some zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 6, 16, generator=g) * torch.exp2(torch.randint(-14, 6, (24, 6, 1), generator=g))
    x[torch.rand(x.shape, generator=g) < 0.05] = -0.0
    x[3, 2] = 0.0
    x[5] = 0.0
    return x.flatten(1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("seed", range(4))
def test_random_data(dtype, convention, scaling, seed):
    assert_equals_oracle(random_problem(seed, dtype), convention, scaling)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("outer", [1.0, 0.013, 1e-30, 1e30, 2e-39, 0.0, float("inf")])
def test_given_outer_scale(convention, outer):
    x = random_problem(11, torch.float32)
    assert_equals_oracle(x, convention, "per_tensor", torch.tensor(outer))
    assert_equals_oracle(x, convention, "per_row", torch.full((24,), outer))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("largest", [0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF], ids=["finite", "inf", "nan"])
def test_any_bit_pattern(convention, scaling, largest):
    """Random float32 bits: every exponent, subnormals, and as ``largest`` allows infinities and NaNs of both signs."""
    g = torch.Generator().manual_seed(largest)
    bits = torch.randint(0, largest + 1, (400, 32), generator=g)
    if largest >= 0x7F800000:
        bits[::3, 5] = 0x7F800000
    if largest > 0x7F800000:
        bits[1::3, 20] = 0x7FC00000
    # Narrow rows: all values of a row within a few binades, subnormal ones included.
    bits[200:] = (bits[200:, :1] + bits[200:] % (1 << 25)).clamp(max=largest)
    sign = torch.randint(0, 2, bits.shape, generator=g) << 31
    x = (bits | sign).to(torch.int32).view(torch.float32)
    assert_equals_oracle(x, convention, scaling)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("amax", [1e-45, 1e-42, 5e-40, 1e-38, 7.8e-36, 8e-36, 9.9e-13, 1.1e-12, 3.4e38])
def test_extreme_amaxes(convention, amax):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * amax
    x[:, 16:32] *= 1e-3
    for scaling in ("per_row", "per_tensor"):
        assert_equals_oracle(x, convention, scaling)
