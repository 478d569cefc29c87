"""The e2m1 grid, packing and the scale-factor layouts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4gemm import formats
from fp4gemm.formats import SF_LAYOUTS, decode_e2m1, decode_packed, pack_e2m1, scale_layout, unpack_e2m1

LAYOUTS = sorted(SF_LAYOUTS)
SWIZZLED = ["128x4", "8x4"]


def test_e2m1_values_follow_from_the_bits():
    for code, value in enumerate(formats.E2M1_VALUES):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        expected = torch.tensor(-magnitude if sign else magnitude)
        assert torch.tensor(value).view(torch.int32) == expected.view(torch.int32), f"code {code}"


def test_decode_keeps_the_sign_of_zero():
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == list(formats.E2M1_VALUES)
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8


def test_even_elements_are_low_nibbles():
    assert pack_e2m1(torch.tensor([0x1, 0xF, 0xA, 0x0], dtype=torch.uint8)).tolist() == [0xF1, 0x0A]


def test_unpack_then_pack_is_the_identity_on_every_byte():
    data = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = unpack_e2m1(data)
    assert codes.shape == (4, 128)
    assert int(codes.max()) == 15
    assert torch.equal(pack_e2m1(codes), data)


@pytest.mark.parametrize("shape", [(4, 64), (256,), (0, 8), (3, 0)])
def test_decode_of_packed_codes(shape):
    data = torch.arange(256, dtype=torch.uint8)[: math.prod(shape)].reshape(shape)
    want, got = decode_e2m1(unpack_e2m1(data)), decode_packed(data)
    assert got.shape == want.shape
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@given(st.lists(st.integers(0, 15), max_size=64).filter(lambda codes: len(codes) % 2 == 0))
def test_pack_then_unpack_is_the_identity(codes):
    tensor = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(unpack_e2m1(pack_e2m1(tensor)), tensor)


@pytest.mark.parametrize(
    "k, columns, padded", [(0, 0, 0), (1, 1, 16), (15, 1, 16), (16, 1, 16), (17, 2, 32), (160, 10, 160)]
)
def test_k_is_counted_in_whole_blocks(k, columns, padded):
    assert (formats.scale_columns(k), formats.padded_k(k)) == (columns, padded)


# T = 3 tiles along K, that is 12 scales, K = 192. The first two are the check values of docs/numerics.md.
@pytest.mark.parametrize(
    "name, m, kb, expected",
    [
        ("128x4", 33, 5, 533),
        ("128x4", 130, 0, 1568),
        ("128x4", 127, 11, 1535),
        ("128x4", 1, 0, 16),
        ("8x4", 0, 4, 32),
        ("8x4", 7, 3, 31),
        ("8x4", 8, 0, 96),
        ("8x4", 13, 6, 96 + 32 + 5 * 4 + 2),
        ("linear", 3, 5, 41),
    ],
)
def test_offsets_have_their_check_values(name, m, kb, expected):
    assert SF_LAYOUTS[name].offset(m, kb, 192) == expected
    assert int(SF_LAYOUTS[name].offset(torch.tensor(m), torch.tensor(kb), 192)) == expected


def closed_form(name: str, m: int, kb: int, k: int) -> int:
    """The formulas of docs/numerics.md as they stand there."""
    columns = -(-k // 16)
    tiles = -(-columns // 4)
    if name == "128x4":
        return m // 128 * tiles * 512 + kb // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + kb % 4
    if name == "8x4":
        return m // 8 * tiles * 32 + kb // 4 * 32 + m % 8 * 4 + kb % 4
    return m * columns + kb


@pytest.mark.parametrize("name", LAYOUTS)
def test_offset_is_the_closed_form_and_a_bijection_on_whole_tiles(name):
    layout, rows, k = SF_LAYOUTS[name], 256, 192
    offsets = [layout.offset(m, kb, k) for m in range(rows) for kb in range(12)]
    assert offsets == [closed_form(name, m, kb, k) for m in range(rows) for kb in range(12)]
    assert sorted(offsets) == list(range(layout.numel(rows, k)))


@pytest.mark.parametrize(
    "name, rows, k, expected",
    [
        ("linear", 5, 40, 15),
        ("128x4", 1, 16, 512),
        ("128x4", 129, 65, 256 * 8),
        ("8x4", 1, 16, 32),
        ("8x4", 9, 80, 16 * 8),
        ("128x4", 0, 64, 0),
        ("128x4", 64, 0, 0),
    ],
)
def test_sizes(name, rows, k, expected):
    layout = SF_LAYOUTS[name]
    assert layout.numel(rows, k) == expected
    assert layout.shape(rows, k) == ((rows, -(-k // 16)) if name == "linear" else (expected,))


problems = st.tuples(st.integers(0, 300), st.integers(0, 200))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LAYOUTS), problems, st.integers(0, 2**31))
def test_from_linear_puts_every_scale_at_its_offset_and_zero_elsewhere(name, problem, seed):
    (rows, k), layout = problem, SF_LAYOUTS[name]
    columns = formats.scale_columns(k)
    linear = torch.randint(1, 127, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stored = layout.from_linear(linear)
    assert stored.shape == layout.shape(rows, k)
    expected = torch.zeros(layout.numel(rows, k), dtype=torch.uint8)
    m, kb = torch.arange(rows).reshape(-1, 1), torch.arange(columns).reshape(1, -1)
    expected[layout.offset(m, kb, k).reshape(-1)] = linear.reshape(-1)
    assert torch.equal(stored.reshape(-1), expected)
    assert torch.equal(layout.to_linear(stored, rows, k), linear)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), problems)
def test_any_layout_converts_to_any_other_and_back(first, second, problem):
    rows, k = problem
    one, two = SF_LAYOUTS[first], SF_LAYOUTS[second]
    columns = formats.scale_columns(k)
    linear = torch.arange(rows * columns).remainder(126).add(1).to(torch.uint8).reshape(rows, columns)
    stored = one.from_linear(linear)
    there = two.from_linear(one.to_linear(stored, rows, k))
    assert torch.equal(one.from_linear(two.to_linear(there, rows, k)), stored)


@pytest.mark.parametrize("name", SWIZZLED)
def test_conversion_moves_float8_bytes_unchanged(name):
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    layout = SF_LAYOUTS[name]
    stored = layout.from_linear(every_byte.view(torch.float8_e4m3fn))
    assert stored.dtype == torch.float8_e4m3fn
    assert torch.equal(layout.to_linear(stored, 16, 256).view(torch.uint8), every_byte)


def test_from_linear_takes_strided_scales():
    scales = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    for name in LAYOUTS:
        stored = SF_LAYOUTS[name].from_linear(scales.t())
        assert stored.is_contiguous()
        assert torch.equal(SF_LAYOUTS[name].to_linear(stored, 8, 128), scales.t())


def test_an_unknown_layout_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"sf_layout: expected one of linear, 128x4, 8x4, got '64x4'"):
        scale_layout("64x4")


def test_layouts_cannot_be_changed_by_a_caller():
    with pytest.raises(TypeError):
        SF_LAYOUTS["mine"] = SF_LAYOUTS["8x4"]
