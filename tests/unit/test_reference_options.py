"""What the options of the quantizer are for, forms that are equal by definition, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference_cases import assert_same, codes, hard, normal, scale_bytes

from fp4gemm import formats, reference
from fp4gemm.reference.hadamard import rotate
from fp4gemm.reference.philox import philox
from fp4gemm.reference.rounding import encode_e2m1_stochastic

E2M1 = list(formats.E2M1_VALUES[:8])
INF = float("inf")


# ---------------------------------------------------------------- stochastic rounding


def test_philox_known_answers():
    """The vectors of Random123 for Philox4x32-7."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(w) for w in philox((zero,) * 4, (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(w) for w in philox((ones,) * 4, (ones, ones))] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    counter = tuple(torch.tensor(c) for c in pi[:4])
    expected = [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    assert [int(w) for w in philox(counter, (pi[4], pi[5]))] == expected


def test_stochastic_rounding_keeps_code_values():
    exact = torch.tensor(E2M1 + [-v for v in E2M1])
    for byte in (0, 100, 255):
        got = encode_e2m1_stochastic(exact, torch.full((16,), byte, dtype=torch.uint8))
        assert got.tolist() == list(range(16))


def test_the_mean_over_all_bytes_is_the_value():
    """Exactly so for multiples of 1/256 of a step; else the mean is the multiple below, away from zero."""
    places = torch.arange(7 * 256)
    low = torch.tensor(E2M1)[places // 256]
    step = torch.tensor([0.5] * 4 + [1.0] * 2 + [2.0])[places // 256]
    values = low + step * (places % 256) / 256
    every = torch.arange(256, dtype=torch.uint8)
    for inside in (0.0, 0.5, 0.875):
        nibbles = encode_e2m1_stochastic((values + step * inside / 256)[:, None], every[None])
        assert torch.equal(torch.tensor(E2M1)[nibbles.int()].mean(1), values)


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_stochastic_rounding_is_unbiased(scaling):
    """The mean over 256 seeds is within 4 standard errors of x, for every value; squared errors are as they should."""
    x = normal(16, 32, seed=5)
    nearest = reference.quantize(x, scaling=scaling, sf_layout="linear")
    unit = (nearest.linear_block_scale().float() * nearest.outer_scale.reshape(-1, 1)).repeat_interleave(16, dim=1)
    scaled = (x / unit).abs()
    inside = scaled < 6  # the block scale's own rounding leaves a few above the largest code, which saturate
    assert inside.float().mean() > 0.95
    low = torch.tensor(E2M1)[torch.bucketize(scaled, torch.tensor(E2M1), right=True) - 1]
    step = torch.where(low < 2, 0.5, torch.where(low < 4, 1.0, 2.0))
    chance = ((scaled - low) / step * 256).floor() / 256
    values = torch.stack([reference.dequantize(reference.quantize(x, scaling=scaling, seed=i)) for i in range(256)])
    standard_error = step * unit * (chance * (1 - chance) / 256).sqrt()
    error = (values.mean(0) - x).abs()[inside]
    resolution = (step * unit / 256)[inside]  # of a byte
    assert bool((error <= 4 * standard_error[inside] + resolution).all())
    known = (standard_error > 0) & inside
    expected = x.sign() * (low + chance * step) * unit
    squares = ((values.mean(0) - expected) / standard_error)[known] ** 2
    assert abs(squares.mean() - 1) < 4 * math.sqrt(2 / len(squares))


def test_seeds_differ_and_repeat():
    x = normal(16, 64)
    one = reference.quantize(x, seed=1)
    assert_same(reference.quantize(x, seed=torch.tensor(1)), one)
    assert_same(reference.quantize(x, seed=torch.tensor([1])), one)
    plain = reference.quantize(x)
    assert torch.equal(one.block_scale.view(torch.uint8), plain.block_scale.view(torch.uint8))
    for other in (reference.quantize(x, seed=2), reference.quantize(x, seed=1 + 2**32), plain):
        assert (codes(other) != codes(one)).float().mean() > 0.2


# ---------------------------------------------------------------- Hadamard transform


@pytest.mark.parametrize("mask", [0, 0xACE1, 0xFFFF, 1])
def test_the_transform_is_orthogonal_and_right(mask):
    """Against the Sylvester matrix in float64, and its own inverse (H is symmetric: transform, then the signs)."""
    h = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)])
    v = normal(50, 16, seed=mask)
    signs = np.array([-1 if mask >> i & 1 else 1 for i in range(16)])
    exact = (v.numpy().astype(np.float64) * signs) @ h / 4
    got = rotate(v, mask)
    np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        rotate(got, 0) * torch.from_numpy(signs), v.double(), rtol=0, atol=2e-6, check_dtype=False
    )


@pytest.mark.parametrize("m", [1, 15, 17, 40])
def test_a_transformed_tail_is_a_whole_block(m):
    x = normal(m, 24)
    got = reference.quantize(x, transposed=True, hadamard=0xACE1)
    padded = torch.zeros(-(-m // 16) * 16, 24)
    padded[:m] = x
    assert got.shape == (24, len(padded))
    assert_same(got, reference.quantize(padded, transposed=True, hadamard=0xACE1))


def test_the_transform_cancels_in_a_gemm():
    """Products of transformed operands are those of the operands, up to quantization; an outlier then hurts less."""
    a, b = normal(256, 24, seed=1), normal(256, 40, seed=2)
    a[17] *= 64
    exact = a.double().t() @ b.double()
    errors = []
    for options in ({}, {"hadamard": 0xACE1}):
        qa, qb = (reference.quantize(t, transposed=True, **options) for t in (a, b))
        d = reference.gemm(qa, qb, out_dtype=torch.float32).double()
        errors.append(((d - exact).norm() / exact.norm()).item())
        rotated = [reference.dequantize(t).double() for t in (qa, qb)]
        assert torch.allclose(d, rotated[0] @ rotated[1].t(), rtol=1e-5, atol=1e-4)
    assert errors[1] < 0.2
    turned = [rotate(t.t().reshape(-1, 16, 16).contiguous(), 0xACE1).reshape(-1, 256).double() for t in (a, b)]
    # 16 additions of float32 in each operand.
    bound = 8 * 2.0**-24 * (a.double().norm(dim=0)[:, None] * b.double().norm(dim=0)[None])
    assert bool(((turned[0] @ turned[1].t() - exact).abs() <= bound).all())


# ---------------------------------------------------------------- 4/6


def test_adaptive_takes_the_better_of_two():
    """Values at 1, 3 and 4 of 4 are exact under a largest code of 4, and 4.5 of 6 is not a code."""
    four = torch.tensor([[4.0, 3.0, 1.0, 2.0] * 4])
    six = torch.tensor([[6.0, 4.0, 1.0, 2.0] * 4])
    for x, byte in ((four, 0x7C), (six, 0x78)):  # 384 and 256
        t = reference.quantize(x, scaling="per_tensor", adaptive="mse", sf_layout="linear")
        assert scale_bytes(t).tolist() == [[byte]]
        torch.testing.assert_close(reference.dequantize(t), x, rtol=1e-6, atol=0)


def test_adaptive_never_loses_to_the_same_range_without_it():
    x = normal(64, 256)
    outer = x.abs().amax(1) / 1536
    squared = [
        ((reference.dequantize(reference.quantize(x, outer_scale=outer, **o)) - x) ** 2).sum().item()
        for o in ({}, {"adaptive": "mse"})
    ]
    assert squared[1] < 0.95 * squared[0]


# ---------------------------------------------------------------- residual


def test_a_residual_row():
    """Where things stand: plain groups, then pairs; a zero block stores the least scale, both times."""
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32:48] = 6.0, 2.5
    t = reference.quantize(x, residual=32, sf_layout="linear", scaling="per_tensor", convention="te")
    assert t.shape == (1, 96)
    scales = scale_bytes(t)[0].tolist()
    assert scales[:2] == [0x7E, 0x00]
    assert scales[4:] == [0x01, 0x01]
    values = reference.dequantize(t)[0]
    assert (values[48:64] != 0).all()  # the error of 2.5
    torch.testing.assert_close(values[32:48] + values[48:64], x[0, 32:48], rtol=4e-3, atol=0)


def test_no_companion_is_the_plain_result():
    x = normal(5, 40)
    for side in ("activation", "weight"):
        assert_same(reference.quantize(x, residual=0, residual_side=side), reference.quantize(x))


def test_the_error_of_a_product_falls_with_companions():
    """Outlier channels last: the error of a . b falls as more of them have companions, toward that of b alone."""
    x, w = normal(39, 512, seed=1), normal(48, 512, seed=2)
    x[:, 64::3] *= torch.linspace(1, 30, 512)[64::3]
    order = x.abs().amax(0).argsort()
    exact = x.double() @ w.double().t()
    errors = []
    for residual in range(0, 513, 64):
        a = reference.quantize(x, residual=residual, channel_order=order if residual else None)
        b = reference.quantize(w, residual=residual, residual_side="weight", channel_order=order if residual else None)
        errors.append((reference.gemm(a, b, out_dtype=torch.float32).double() - exact).norm() / exact.norm())
    assert errors[2] < 0.85 * errors[0]
    assert all(later < 1.01 * earlier for earlier, later in itertools.pairwise(errors))
    back = reference.dequantize(reference.quantize(w)).double()
    of_w = (x.double() @ back.t() - exact).norm() / exact.norm()
    assert abs(errors[-1] - of_w) < 0.1 * of_w


# ---------------------------------------------------------------- forms that are equal by definition


ANY = [
    {}, {"seed": 5}, {"adaptive": "mse"}, {"scaling": "per_tensor"}, {"scaling": "per_tensor", "block": (16, 16)},
    {"convention": "torchao"}, {"convention": "modelopt", "seed": 5}, {"scaling": "per_tensor", "adaptive": "mae"},
]  # fmt: skip


@pytest.mark.parametrize("options", ANY, ids=str)
@pytest.mark.parametrize("shape", [(40, 56), (1, 16), (17, 3), (0, 16), (5, 0)])
def test_transposed_is_the_transpose(options, shape):
    x = normal(*shape, torch.bfloat16)
    got = reference.quantize(x, transposed=True, **options)
    assert got.shape == shape[::-1]
    assert_same(got, reference.quantize(x.t().contiguous(), **options))
    if options.get("scaling") is None:
        assert_same(got, reference.quantize(x, **options | {"scaling": "per_column"}))


@pytest.mark.parametrize("options", ANY, ids=str)
@pytest.mark.parametrize("mask", [None, 0xACE1])
def test_both_is_one_and_the_other(options, mask):
    hadamard = None if "adaptive" in options else mask  # 4/6 is not defined for transformed values
    x = normal(40, 56, torch.bfloat16)
    got = reference.quantize_both(x, sf_layout="8x4", transposed_sf_layout="linear", hadamard=hadamard, **options)
    assert_same(got[0], reference.quantize(x, sf_layout="8x4", **options))
    assert_same(got[1], reference.quantize(x, sf_layout="linear", transposed=True, hadamard=hadamard, **options))


@pytest.mark.parametrize("options", ANY, ids=str)
@pytest.mark.parametrize("mask", [None, 0xACE1])
def test_the_two_step_form_has_the_same_bytes(options, mask):
    hadamard = None if "adaptive" in options else mask  # 4/6 is not defined for transformed values
    x = hard(32, 48, 8)
    by_row, by_column, of_tensor = reference.amax(x, rows=True, columns=True, tensor=True, hadamard=hadamard)
    given_amax = (by_row, by_column)
    if options.get("scaling") == "per_tensor":
        given_amax = (of_tensor, by_column.amax())
    row, column = reference.quantize_both(x, hadamard=hadamard, **options)
    assert_same(reference.quantize(x, amax=given_amax[0], **options), row)
    assert_same(reference.quantize(x, transposed=True, hadamard=hadamard, amax=given_amax[1], **options), column)
    for got, expected in zip(
        reference.quantize_both(x, hadamard=hadamard, amax=given_amax, **options), (row, column), strict=True
    ):
        assert_same(got, expected)


def test_amax():
    x = hard(19, 40 // 8 * 16, 3, special=True)
    clean = x.nan_to_num(0.0, posinf=INF, neginf=-INF).abs()
    rows, columns, tensor = reference.amax(x, columns=True, tensor=True)
    assert torch.equal(rows, clean.amax(1))
    assert torch.equal(columns, clean.amax(0))
    assert torch.equal(tensor, clean.amax())
    assert reference.amax(x, rows=False) == ()
    y = normal(37, 20, torch.float16)
    (turned,) = reference.amax(y, rows=False, columns=True, hadamard=9)
    padded = torch.cat((y.float(), torch.zeros(11, 20))).t().reshape(20, 3, 16)
    assert torch.equal(turned, rotate(padded.contiguous(), 9).abs().amax((1, 2)))
    for shape in ((0, 5), (5, 0)):
        empty = reference.amax(torch.ones(shape), columns=True, tensor=True, hadamard=1)
        assert [t.tolist() for t in empty] == [[0.0] * shape[0], [0.0] * shape[1], 0.0]


def test_e4m3_input_is_its_values():
    x = torch.arange(256, dtype=torch.uint8).repeat(4).reshape(32, 32).view(torch.float8_e4m3fn)
    for options in ({}, {"scaling": "per_tensor"}, {"transposed": True, "hadamard": 3, "seed": 1}, {"residual": 16}):
        assert_same(reference.quantize(x, **options), reference.quantize(x.float(), **options))
    for got, expected in zip(reference.quantize_both(x), reference.quantize_both(x.float()), strict=True):
        assert_same(got, expected)
    assert torch.equal(reference.amax(x)[0], reference.amax(x.float())[0])


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"transposed": True, "hadamard": 5, "seed": 2}, {"adaptive": "mse"}, {"residual": 32, "seed": 3},
     {"adaptive": "mae", "scaling": "per_tensor", "block": (16, 16)}],
    ids=str,
)  # fmt: skip
def test_chunks_of_rows_do_not_change_bytes(options, monkeypatch):
    x = normal(80, 48)
    whole = reference.quantize(x, **options)
    monkeypatch.setitem(reference.quantize.__globals__, "_CHUNK_CPU", 7 * 48)
    assert_same(reference.quantize(x, **options), whole)


# ---------------------------------------------------------------- out and noop


@pytest.mark.parametrize("options", [{}, {"scaling": "per_tensor"}, {"residual": 16, "seed": 1}], ids=str)
@pytest.mark.parametrize("flag", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_out_and_noop(options, flag):
    x, other = normal(9, 32), normal(9, 32, seed=1)
    expected, before = reference.quantize(x, **options), reference.quantize(other, **options)
    out = reference.quantize(other, **options)
    tensors = out.data, out.block_scale, out.outer_scale
    for shape in ((), (1,)):
        assert reference.quantize(x, out=out, noop=torch.ones(shape, dtype=flag), **options) is out
        assert_same(out, before)
    reference.quantize(x, out=out, noop=torch.zeros((), dtype=flag), **options)
    assert_same(out, expected)
    assert reference.quantize(other, out=out, **options) is out
    assert_same(out, before)
    assert all(one is same for one, same in zip(tensors, (out.data, out.block_scale, out.outer_scale), strict=True))


# ---------------------------------------------------------------- bad options


X = torch.ones(32, 48)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"hadamard": 1}, ValueError, "hadamard: needs transposed=True"),
        ({"hadamard": 65536, "transposed": True}, ValueError, r"hadamard: expected a mask in 0..65535, got 65536"),
        ({"hadamard": -1, "transposed": True}, ValueError, "hadamard: expected a mask"),
        ({"hadamard": True, "transposed": True}, TypeError, "hadamard: expected an int .*, got bool"),
        ({"hadamard": 1.0, "scaling": "per_column"}, TypeError, "hadamard: expected an int .*, got float"),
        ({"seed": -1}, ValueError, r"seed: expected 0..2\*\*63-1, got -1"),
        ({"seed": 2**63}, ValueError, "seed: expected 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, an int64 tensor or None, got float"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected dtype torch.int64, got torch.float32"),
        ({"seed": torch.ones(2).long()}, ValueError, r"seed: expected shape \[\] or \[1\], got \[2\]"),
        ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed: expected device cpu .*got meta"),
        ({"adaptive": "abs"}, ValueError, "adaptive: expected one of mse, mae, got 'abs'"),
        ({"adaptive": "mse", "seed": 1}, ValueError, "adaptive: expected None beside hadamard, seed or residual"),
        ({"adaptive": "mse", "residual": 16}, ValueError, "adaptive: expected None beside"),
        ({"adaptive": "mse", "hadamard": 1, "transposed": True}, ValueError, "adaptive: expected None beside"),
        ({"adaptive": "mse", "convention": "torchao"}, ValueError, "convention: expected one of te_per_token, te with"),
        ({"residual": 16, "convention": "modelopt"}, ValueError, "convention: .* with residual, got 'modelopt'"),
        ({"residual": 8}, ValueError, "residual: expected a multiple of 16, at least 0, got 8"),
        ({"residual": -16}, ValueError, "residual: expected a multiple of 16"),
        ({"residual": 64}, ValueError, "residual: expected at most K = 48, got 64"),
        ({"residual": 48, "transposed": True}, ValueError, "residual: expected at most K = 32, got 48"),
        ({"residual": "16"}, TypeError, "residual: expected an int, got str"),
        ({"residual": 16, "residual_side": "left"}, ValueError, "residual_side: expected one of activation, weight"),
        ({"residual": 16, "hadamard": 1, "transposed": True}, ValueError, "residual: expected 0 beside hadamard"),
        ({"residual": 16, "scaling": "per_tensor", "block": (16, 16)}, ValueError, "residual: expected 0 beside"),
        ({"channel_order": torch.arange(48)}, ValueError, "channel_order: expected None without a residual"),
        ({"channel_order": [0], "residual": 16}, TypeError, "channel_order: expected a torch.Tensor or None, got list"),
        ({"channel_order": torch.ones(48), "residual": 16}, TypeError, "channel_order: expected dtype torch.int64 or"),
        ({"channel_order": torch.arange(47), "residual": 16}, ValueError, r"channel_order: expected shape \[48\]"),
        ({"amax": torch.ones(5)}, ValueError, r"amax: expected shape \[\], \[1\] or \[32\] .* got \[5\]"),
        ({"amax": torch.ones(()).half()}, TypeError, "amax: expected dtype torch.float32, got torch.float16"),
        ({"amax": torch.ones(()), "outer_scale": torch.ones(())}, ValueError, "amax: expected None where outer_scale"),
        ({"noop": torch.ones(())}, ValueError, "noop: expected None where out is None"),
        ({"out": torch.ones(3)}, TypeError, "out: expected an FP4Tensor or None, got Tensor"),
        ({"out": reference.quantize(X[:16])}, ValueError, r"out: expected shape \(32, 48\), got \(16, 48\)"),
        ({"out": reference.quantize(X), "residual": 16}, ValueError, r"out: expected shape \(32, 64\)"),
        ({"out": reference.quantize(X, sf_layout="8x4")}, ValueError, "out: expected sf_layout '128x4', got '8x4'"),
        ({"out": reference.quantize(X, scaling="per_tensor")}, ValueError, r"out: expected outer .* \[32\], got \[\]"),
        ({"out": reference.quantize(X).prepack()}, ValueError, "out: expected a tensor that is not prepacked"),
        ({"out": reference.quantize(X).to("meta")}, ValueError, "out: expected device cpu .* got meta"),
        ({"out": reference.quantize(X), "noop": 1}, TypeError, "noop: expected a torch.Tensor or None, got int"),
        ({"out": reference.quantize(X), "noop": torch.tensor(1)}, TypeError, "noop: expected dtype torch.bool or"),
        ({"out": reference.quantize(X), "noop": torch.ones(2)}, ValueError, r"noop: expected shape \[\] or \[1\]"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        reference.quantize(X, **options)


def test_a_residual_needs_whole_blocks():
    with pytest.raises(ValueError, match="x: expected K to be a multiple of 16 with a residual, got 47"):
        reference.quantize(X[:, :47], residual=16)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: reference.quantize_both(X, scaling="per_column"),
            ValueError,
            "scaling: expected one of per_row, per_t",
        ),
        (lambda: reference.quantize_both(X, hadamard=1, adaptive="mse"), ValueError, "adaptive: expected None beside"),
        (lambda: reference.quantize_both(X, amax=torch.ones(32)), ValueError, r"amax: expected shape .* or a pair"),
        (
            lambda: reference.quantize_both(X, outer_scale=1.0),
            TypeError,
            "outer_scale: expected a torch.Tensor, a pair",
        ),
        (
            lambda: reference.quantize_both(X, amax=(torch.ones(32), torch.ones(32))),
            ValueError,
            r"amax: expected shape \[\], \[1\] or \[48\]",
        ),
        (lambda: reference.quantize_both(X, transposed_sf_layout="4x4"), ValueError, "sf_layout: expected one of"),
        (lambda: reference.amax(X, hadamard=1), ValueError, "hadamard: needs columns=True"),
        (lambda: reference.amax(X, columns=True, hadamard=1 << 16), ValueError, "hadamard: expected a mask"),
        (lambda: reference.amax(X.double()), TypeError, "x.dtype: expected one of .*float8_e4m3fn, got torch.float64"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_check_finite_looks_at_amax_and_e4m3():
    x = X.to(torch.float8_e4m3fn)
    assert_same(reference.quantize(x, check_finite=True), reference.quantize(x))
    with pytest.raises(ValueError, match="amax: expected finite values"):
        reference.quantize(x, check_finite=True, amax=torch.tensor(INF))
    x.view(torch.uint8)[3, 4] = 0x7F
    with pytest.raises(ValueError, match=r"x: expected finite values .*got 1 NaN"):
        reference.quantize(x, check_finite=True)
