"""The options of the quantizer against an independent implementation: one Python loop over blocks, in numpy float32.

It shares no code with fp4gemm; roundings to nearest are those of the oracle of the plain conventions.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import codes, hard, scale_bytes
from test_reference_scalar import E2M1, e2m1, e4m3, random_problem

from fp4gemm import reference
from fp4gemm.formats import QuantizeOptions
from fp4gemm.reference.philox import random_bytes
from fp4gemm.reference.rounding import encode_e2m1_stochastic

f32 = np.float32
MAX = np.finfo(f32).max
ENCODE = ("te_per_token", "te")
INF, NAN = float("inf"), float("nan")


# ---------------------------------------------------------------- the oracle


def philox_words(seed: int, block: int) -> list[int]:
    word = 2**32
    k = [seed % word, seed // word % word]
    c = [block % word, block // word % word, 0, 0]
    for _ in range(7):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high // word ^ c[1] ^ k[0], high % word, low // word ^ c[3] ^ k[1], low % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c


def noise(seed: int, block: int) -> list[int]:
    return list(b"".join(word.to_bytes(4, "little") for word in philox_words(seed, block)))


def stochastic_code(v, byte: int) -> int:
    if np.isnan(v):
        return 7
    below = [i for i, value in enumerate(E2M1) if value <= abs(v)][-1]
    if below < 7:
        low, high = Fraction(E2M1[below]), Fraction(E2M1[below + 1])
        below += (Fraction(float(abs(v))) - low) / (high - low) + Fraction(byte, 256) >= 1
    return below | int(np.signbit(v)) << 3


def encode(values: np.ndarray, seed: int | None, block: int) -> np.ndarray:
    if seed is None:
        return e2m1(values)
    return np.array([stochastic_code(v, byte) for v, byte in zip(values, noise(seed, block), strict=True)], np.uint8)


def decode(nibbles: np.ndarray) -> np.ndarray:
    return np.array([(-1 if c & 8 else 1) * f32(E2M1[c & 7]) for c in nibbles], dtype=f32)


def transform(block: np.ndarray, mask: int) -> np.ndarray:
    v = [f32(-x) if mask >> i & 1 else x for i, x in enumerate(block)]
    for stride in (1, 2, 4, 8):
        for i in range(16):
            if not i & stride:
                v[i], v[i + stride] = v[i] + v[i + stride], v[i] - v[i + stride]
    return np.array([x * f32(0.25) for x in v], dtype=f32)


def level_of(convention: str, amax, top: int):
    if convention == "te_per_token":
        return np.fmin(f32(top) / np.maximum(amax, f32(1e-12)), MAX)
    return f32(1) if amax == 0 else np.fmin(f32(top) / amax, MAX)


def coefficient(convention: str, scale, s):
    if convention == "te_per_token":
        return f32(0) if scale == 0 else s / scale
    return np.fmin(f32(1) / (scale * (f32(1) / s)), MAX)


def largest(values: np.ndarray):
    return np.where(np.isnan(values), f32(0), np.abs(values)).max(initial=f32(0))


def block_error(block, scale, s, convention: str, measure: str):
    q = decode(e2m1(block * coefficient(convention, scale, s)))
    total = f32(0)
    for x, value in zip(block, q, strict=True):
        d = value * scale - x * s
        if not np.isnan(x):
            total = total + (abs(d) if measure == "mae" else d * d)
    return total


@np.errstate(all="ignore")
def oracle(
    x: np.ndarray, convention: str, per_tensor: bool, outer: np.ndarray | None, o: QuantizeOptions, seed, square
):
    """Outer scales [M], scale bytes [M][.] and codes [M][.] of float32 x [M, K], K a multiple of 16."""
    m, groups = x.shape[0], x.shape[1] // 16
    blocks = x.reshape(m, groups, 16)
    if o.hadamard is not None:
        blocks = np.stack([[transform(b, o.hadamard) for b in row] for row in blocks]).reshape(blocks.shape)
    top = 1536 if o.adaptive else 2688
    pairs, columns = groups - o.residual // 16, groups + o.residual // 16
    outers, all_scales, all_codes = [], [], []
    for r in range(m):
        amax = largest(blocks if per_tensor else blocks[r])
        if outer is None:
            outers.append(amax * f32(1 / top))
            s = level_of(convention, amax, top)
        else:
            outers.append(outer.reshape(-1)[r % outer.size])
            s = np.fmin(f32(1) / outers[-1], MAX)
        scales_out, codes_out = [], []
        for g in range(groups):
            band = blocks[r // 16 * 16 : r // 16 * 16 + 16, g] if square else blocks[r : r + 1, g]
            base = largest(band) * (s * f32(1 / 6))
            code, scale = e4m3(base[None])
            if o.adaptive:
                code4, scale4 = e4m3((base * f32(1.5))[None])
                errors = [f32(0), f32(0)]
                for b in band:
                    errors[0] = errors[0] + block_error(b, scale[0], s, convention, o.adaptive)
                    errors[1] = errors[1] + block_error(b, scale4[0], s, convention, o.adaptive)
                if errors[1] < errors[0]:
                    code, scale = code4, scale4
            if g >= pairs and code[0] == 0:
                code, scale = np.array([1], np.uint8), np.array([2**-9], f32)
            block = blocks[r, g]
            c = encode(block * coefficient(convention, scale[0], s), seed, r * columns + len(scales_out))
            scales_out.append(int(code[0]))
            codes_out += c.tolist()
            if g < pairs:
                continue
            if o.residual_side == "activation":
                d = block * s - decode(c) * scale[0]
                d[np.isnan(d)] = 0
                code, scale = e4m3((np.abs(d).max() * f32(1 / 6))[None])
                if code[0] == 0:
                    code, scale = np.array([1], np.uint8), np.array([2**-9], f32)
                c = encode(d / scale[0], seed, r * columns + len(scales_out))
            scales_out.append(int(code[0]))
            codes_out += c.tolist()
        all_scales.append(scales_out)
        all_codes.append(codes_out)
    return outers, all_scales, all_codes


def assert_equals_oracle(x: torch.Tensor, convention="te_per_token", scaling="per_row", outer=None, block=(1, 16), **o):
    """``o`` are the options of ``reference.quantize``; x has whole blocks along K of the result."""
    got = reference.quantize(
        x, scaling=scaling, convention=convention, sf_layout="linear", outer_scale=outer, block=block, **o
    )
    source = (x.t() if o.get("transposed") else x).float()
    if o.get("channel_order") is not None:
        source = source[:, o["channel_order"].long()]
    seed = o.get("seed")
    names = ("hadamard", "adaptive", "residual", "residual_side")
    options = QuantizeOptions(stochastic=seed is not None, **{name: o[name] for name in names if name in o})
    outers, scales, nibbles = oracle(
        np.ascontiguousarray(source.numpy()),
        convention,
        scaling == "per_tensor" if outer is None else outer.dim() == 0,
        None if outer is None else outer.numpy(),
        options,
        None if seed is None else int(seed),
        block == (16, 16),
    )
    label = f"{convention}, {scaling}, {x.dtype}, {o}"
    if got.outer_scale.dim() == 0:
        outers = outers[:1]
    bits = np.array(outers, dtype=f32).view(np.uint32)
    np.testing.assert_array_equal(got.outer_scale.reshape(-1).numpy().view(np.uint32), bits, f"outer: {label}")
    np.testing.assert_array_equal(scale_bytes(got).numpy(), np.array(scales, np.uint8), f"scales: {label}")
    np.testing.assert_array_equal(codes(got).numpy(), np.array(nibbles, np.uint8), f"codes: {label}")


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_random_bytes(seed):
    blocks = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7]
    expected = [noise(seed, b) for b in blocks]
    for given_seed in (seed, torch.tensor(seed), torch.tensor([seed])):
        assert random_bytes(given_seed, torch.tensor(blocks)).tolist() == expected


def test_stochastic_rounding_of_every_byte_around_every_boundary():
    grid = np.array(
        [0, 2**-149, 2**-30, 0.25, 0.3, 0.5, 1, 1.25, 1.5, 1.9, 2, 2.7, 3, 3.999, 4, 5, 5.99, 6, 7, INF], f32
    )
    values = np.concatenate([grid, np.nextafter(grid, f32(INF)), np.nextafter(grid, f32(0))])
    values = np.concatenate([values, -values, np.array([NAN, -NAN], f32)])
    bytes_ = np.arange(256, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = [[stochastic_code(v, int(b)) for b in bytes_] for v in values]
    got = encode_e2m1_stochastic(torch.from_numpy(values)[:, None], torch.from_numpy(bytes_)[None])
    assert got.tolist() == expected


@pytest.mark.parametrize("convention", ["te_per_token", "te"])
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("special", [False, True])
def test_stochastic_rounding(convention, scaling, special):
    for seed in (0, 12345678901234567):
        assert_equals_oracle(hard(19, 48, seed % 97, special=special), convention, scaling, seed=seed)
    assert_equals_oracle(hard(32, 32, 3).t(), convention, scaling, transposed=True, seed=7)


@pytest.mark.parametrize("convention", ["te_per_token", "te"])
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("options", [{}, {"seed": 3}])
@pytest.mark.parametrize("special", [False, True])
def test_hadamard(convention, scaling, options, special):
    x = hard(19, 48, 4, special=special).t()
    assert_equals_oracle(x, convention, scaling, transposed=True, hadamard=0xACE1, **options)


def test_hadamard_of_square_blocks():
    x = hard(32, 48, 4).t()
    assert_equals_oracle(x, "te", "per_tensor", block=(16, 16), transposed=True, hadamard=5)


@pytest.mark.parametrize("convention", ENCODE)
@pytest.mark.parametrize("measure", ["mse", "mae"])
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("special", [False, True])
def test_adaptive(convention, measure, scaling, special):
    for seed in range(4):
        assert_equals_oracle(hard(19, 48, seed, special=special), convention, scaling, adaptive=measure)
    x = hard(19, 48, 9, torch.bfloat16, special)
    assert_equals_oracle(x, convention, "per_tensor", block=(16, 16), adaptive=measure)
    for outer in (0.01, 1.0, 1e-38):
        assert_equals_oracle(x, convention, scaling, torch.tensor(outer), adaptive=measure)


@pytest.mark.parametrize("convention", ENCODE)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("side", ["activation", "weight"])
@pytest.mark.parametrize("residual", [16, 32, 80])
@pytest.mark.parametrize("special", [False, True])
def test_residual(convention, scaling, side, residual, special):
    options = {"residual": residual, "residual_side": side}
    for seed in range(3):
        x = hard(11, 80, seed, special=special)
        assert_equals_oracle(x, convention, scaling, **options)
        assert_equals_oracle(x, convention, scaling, seed=seed, **options)
    for outer in (0.01, 1.0, 1e-38):
        assert_equals_oracle(x, convention, scaling, torch.tensor(outer), **options)


def test_residual_with_a_channel_order_and_transposed():
    x, order = hard(11, 80, 5), torch.randperm(80, generator=torch.Generator().manual_seed(1))
    for index in (order, order.int()):
        assert_equals_oracle(x, residual=32, channel_order=index)
    assert_equals_oracle(x.to(torch.float8_e4m3fn), residual=32, channel_order=order)
    assert_equals_oracle(x.t(), transposed=True, residual=48, channel_order=order, seed=4)


OPTIONS = st.fixed_dictionaries(
    {
        "convention": st.sampled_from(ENCODE),
        "scaling": st.sampled_from(["per_row", "per_tensor"]),
        "transposed": st.booleans(),
    }
)
KINDS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"seed": st.integers(0, 2**63 - 1)}),
    st.fixed_dictionaries({"hadamard": st.integers(0, 65535), "transposed": st.just(True)}),
    st.fixed_dictionaries(
        {"hadamard": st.integers(0, 65535), "transposed": st.just(True), "seed": st.integers(0, 2**63 - 1)}
    ),
    st.fixed_dictionaries({"adaptive": st.sampled_from(["mse", "mae"])}),
    st.fixed_dictionaries({"residual": st.just(16), "residual_side": st.sampled_from(["activation", "weight"])}),
    st.fixed_dictionaries({"residual": st.just(16), "seed": st.integers(0, 2**63 - 1)}),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    options=OPTIONS, kind=KINDS, rows=st.integers(1, 20), groups=st.integers(1, 4), data=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]), special=st.booleans(),
)  # fmt: skip
def test_random_problems(options, kind, rows, groups, data, dtype, special):
    options = options | kind
    special = special and dtype != torch.float8_e4m3fn  # has no Inf, and torch's cast none of its own
    x = hard(rows, 16 * groups, data, special=special).to(dtype)
    assert_equals_oracle(x.t().contiguous() if options["transposed"] else x, **options)


@pytest.mark.parametrize("seed", range(3))
def test_the_problems_of_the_plain_oracle(seed):
    assert_equals_oracle(random_problem(seed, torch.float32), seed=seed)
    assert_equals_oracle(random_problem(seed, torch.float32), residual=32, adaptive=None)
