"""The reference quantizer: documented bytes, special values, scalings, blocks and given scales."""

import numpy as np
import pytest
import torch
from reference_cases import CONVENTIONS, DTYPES, assert_same, codes, normal, scale_bytes

from fp4gemm import formats, reference
from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.reference import conventions
from fp4gemm.tensor import FP4Tensor

WORKED = [-12, -7.5, -3.1, -1, -0.3, -0.05, 0, 0.05, 0.3, 1, 2, 3, 4.5, 6, 9, 10]
INF, NAN = float("inf"), float("nan")


# ---------------------------------------------------------------- documented bytes


def test_worked_vector():
    t = reference.quantize(torch.tensor([WORKED]), scaling="per_tensor")
    assert t.data.numpy().tobytes() == bytes.fromhex("EF 9B 88 00 10 32 54 66")
    assert scale_bytes(t).tolist() == [[0x7E]]
    assert t.outer_scale.item() == np.float32(12) * np.float32(1 / 2688)
    values = [-12, -8, -3, -1, -0.0, -0.0, 0, 0, 0, 1, 2, 3, 4, 6, 8, 8]
    torch.testing.assert_close(reference.dequantize(t), torch.tensor([values], dtype=torch.float32), rtol=2e-7, atol=0)


def test_names_of_the_conventions_agree():
    assert tuple(conventions.CONVENTIONS) == formats.CONVENTIONS


@pytest.mark.parametrize("scaling, convention", [("per_row", "te_per_token"), ("per_tensor", "te")])
def test_default_convention(scaling, convention):
    x = normal(32, 256)
    x[:, :16] *= 1e-7  # underflowing blocks: there the two conventions differ
    assert_same(reference.quantize(x, scaling=scaling), reference.quantize(x, scaling=scaling, convention=convention))
    other = ({"te", "te_per_token"} - {convention}).pop()
    assert not torch.equal(
        reference.quantize(x, scaling=scaling).data,
        reference.quantize(x, scaling=scaling, convention=other).data,
    )


def test_per_column_defaults_to_the_per_token_convention():
    x = normal(64, 32)
    x[:16] *= 1e-7
    assert_same(
        reference.quantize(x, scaling="per_column"),
        reference.quantize(x, scaling="per_column", convention="te_per_token"),
    )


# ---------------------------------------------------------------- special values


def one_row(convention: str, values: list[float], scaling: str = "per_row", **options) -> FP4Tensor:
    values = values + [0.0] * (-len(values) % 16)
    return reference.quantize(torch.tensor([values]), scaling=scaling, convention=convention, **options)


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("convention, scale", [("te_per_token", 0), ("te", 0), ("torchao", 0x08), ("modelopt", 0x38)])
def test_zeros(convention, scale, scaling):
    t = one_row(convention, [0.0, -0.0], scaling)
    assert scale_bytes(t).tolist() == [[scale]]
    assert codes(t).tolist() == [[0, 8] + [0] * 14]
    assert t.outer_scale.sum() == 0
    back = reference.dequantize(t)
    assert torch.equal(back, torch.zeros(1, 16))
    assert torch.signbit(back[0, :3]).tolist() == [False, True, False]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_zero_row_and_a_zero_block_beside_others(convention):
    x = normal(3, 48)
    x[1] = 0
    x[2, 16:32] = 0
    back = reference.dequantize(reference.quantize(x, convention=convention))
    assert back.isfinite().all()
    assert (back[1] == 0).all()
    assert (back[2, 16:32] == 0).all()
    torch.testing.assert_close(back, x, atol=0.5, rtol=0.35)


@pytest.mark.parametrize(
    "convention, scale, code",
    [("te_per_token", 0x00, 0), ("te", 0x00, 7), ("torchao", 0x08, 0), ("modelopt", 0x01, 0)],
)
def test_an_underflowing_block(convention, scale, code):
    """A block amax of 1e-6 beside one of 6 wants the scale 448e-6 / 6, which rounds to e4m3 zero."""
    t = one_row(convention, [6.0] + [0.0] * 15 + [1e-6, -1e-6, 0.0, -0.0])
    assert scale_bytes(t).tolist() == [[0x7E, scale]]
    assert codes(t)[0, 16:20].tolist() == [code, code + 8, 0, 8]
    assert (reference.dequantize(t)[0, 16:] == 0).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_nan_does_not_touch_its_neighbours(convention, scaling):
    clean = one_row(convention, WORKED, scaling)
    for nan in (NAN, -NAN):
        dirty = WORKED.copy()
        dirty[6] = nan  # was 0
        t = one_row(convention, dirty, scaling)
        assert torch.equal(t.block_scale.view(torch.uint8), clean.block_scale.view(torch.uint8))
        assert torch.equal(t.outer_scale, clean.outer_scale)
        expected = codes(clean)
        expected[0, 6] = 7
        assert torch.equal(codes(t), expected)


@pytest.mark.parametrize("convention, scale", [("te_per_token", 0), ("te", 0), ("torchao", 0x08), ("modelopt", 0x38)])
def test_a_row_of_nan(convention, scale):
    t = one_row(convention, [NAN] * 16)
    assert scale_bytes(t).tolist() == [[scale]]
    assert codes(t).tolist() == [[7] * 16]
    assert t.outer_scale.tolist() == [0.0]
    assert (reference.dequantize(t) == 0).all()


@pytest.mark.parametrize(
    "convention, scales, finite_code",
    [
        ("te_per_token", [0x7E, 0x00], 0),
        ("te", [0x7E, 0x00], 7),
        ("torchao", [0x7E, 0x08], 0),
        ("modelopt", [0x7E, 0x38], 0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_with_inf(convention, scales, finite_code, sign):
    """The outer scale is Inf: the infinities come back as +Inf, everything else in the row as NaN."""
    t = one_row(convention, [sign * INF, 1.0, -1.0, 0.0] + [0.0] * 12 + [2.0, -2.0, 0.0])
    assert scale_bytes(t).tolist() == [scales]
    assert codes(t)[0, :4].tolist() == [7, 0, 8, 0]
    assert codes(t)[0, 16:19].tolist() == [finite_code, finite_code + 8, 0]
    assert t.outer_scale.tolist() == [INF]
    back = reference.dequantize(t)[0]
    assert back[0] == INF
    assert back[1:].isnan().all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_inf_in_one_row_leaves_the_other_rows_alone(convention):
    x = normal(4, 32)
    clean = reference.quantize(x, convention=convention)
    x[2, 7] = INF
    t = reference.quantize(x, convention=convention)
    others = [0, 1, 3]
    assert torch.equal(t.data[others], clean.data[others])
    assert torch.equal(scale_bytes(t)[others], scale_bytes(clean)[others])
    assert torch.equal(t.outer_scale[others], clean.outer_scale[others])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_inf_saturates_under_a_given_outer_scale(convention):
    t = one_row(convention, [INF, -INF, 1.0], outer_scale=torch.tensor(1.0))
    assert scale_bytes(t).tolist() == [[0x7E]]
    assert codes(t)[0, :3].tolist() == [7, 15, 0]
    assert reference.dequantize(t)[0, :2].tolist() == [2688.0, -2688.0]


# ---------------------------------------------------------------- scalings, blocks, given scales


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sf_layout", sorted(SF_LAYOUTS))
def test_per_column_is_the_transpose_per_row(convention, dtype, sf_layout):
    x = normal(50, 37, dtype)
    got = reference.quantize(x, scaling="per_column", convention=convention, sf_layout=sf_layout)
    assert got.shape == (37, 50)
    assert got.outer_scale.shape == (37,)
    assert_same(got, reference.quantize(x.t().contiguous(), convention=convention, sf_layout=sf_layout))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rows_are_independent(convention):
    x = normal(7, 64) * torch.exp2(torch.arange(-9, 12, 3))[:, None]
    whole = reference.quantize(x, convention=convention, sf_layout="linear")
    for i in range(7):
        row = reference.quantize(x[i : i + 1], convention=convention, sf_layout="linear")
        assert torch.equal(whole.data[i], row.data[0])
        assert torch.equal(scale_bytes(whole)[i], scale_bytes(row)[0])
        assert whole.outer_scale[i] == row.outer_scale[0]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(32, 48), (40, 56), (16, 16), (5, 3)])
def test_2d_blocks_quantize_w_and_its_transpose_to_the_same_values(convention, shape):
    w = normal(*shape, torch.bfloat16)
    options = {"scaling": "per_tensor", "block": (16, 16), "convention": convention}
    forward, transposed = reference.quantize(w, **options), reference.quantize(w.t(), **options)
    assert torch.equal(reference.dequantize(forward), reference.dequantize(transposed).t())
    assert torch.equal(codes(forward)[:, : shape[1]], codes(transposed)[:, : shape[0]].t())
    assert_same(reference.quantize(w, **options | {"scaling": "per_column", "outer_scale": forward.outer_scale}),
                reference.quantize(w.t(), **options | {"outer_scale": forward.outer_scale}))  # fmt: skip


def test_2d_blocks_share_the_scale_of_their_largest_value():
    w = torch.ones(32, 32)
    w[20, 5] = 6.0
    scales = reference.quantize(w, scaling="per_tensor", block=(16, 16)).linear_block_scale().float()
    small = torch.tensor(448 / 6).to(torch.float8_e4m3fn).float()
    assert (scales[:16] == small).all()
    assert (scales[16:, 0] == 448).all()
    assert (scales[16:, 1] == small).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_given_outer_scale_is_stored_unchanged_and_owned(convention):
    x, outer = normal(4, 32), torch.tensor([0.01, 0.02, 0.04, 1 / 3])
    t = reference.quantize(x, outer_scale=outer, convention=convention)
    assert torch.equal(t.outer_scale, outer)
    outer.zero_()
    assert t.outer_scale[0] == np.float32(0.01)


def test_given_scales_by_shape():
    x, scalar = normal(4, 32), torch.tensor(0.01)
    per_tensor = reference.quantize(x, outer_scale=scalar)
    assert per_tensor.scaling == "per_tensor"
    assert_same(reference.quantize(x, outer_scale=scalar.reshape(1)), per_tensor)
    assert_same(
        reference.quantize(x, outer_scale=scalar.expand(4)), reference.quantize(x, outer_scale=scalar.repeat(4))
    )
    assert torch.equal(reference.quantize(x, outer_scale=scalar.repeat(4)).data, per_tensor.data)
    assert reference.quantize(x[:1], outer_scale=scalar.reshape(1)).scaling == "per_row"
    assert reference.quantize(x[:1], outer_scale=scalar.reshape(1), scaling="per_tensor").scaling == "per_tensor"
    assert reference.quantize(x, outer_scale=torch.full((32,), 0.01), scaling="per_column").scaling == "per_row"


@pytest.mark.parametrize("convention", ["te", "te_per_token"])
def test_the_outer_scale_of_a_power_of_two_amax_gives_the_same_bytes_back(convention):
    """amax = 21 * 2**7 = 2688: S and the outer scale are exactly 1, so taking amax and giving the scale agree."""
    x = normal(8, 64)
    x[:, 0] = 2688
    taken = reference.quantize(x, convention=convention)
    assert (taken.outer_scale == 1).all()
    assert_same(reference.quantize(x, convention=convention, outer_scale=torch.ones(8)), taken)
