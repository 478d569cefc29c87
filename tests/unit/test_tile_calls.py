"""The tile kernels' specs, their selection, and the arguments of a launch (tests/emulated runs the kernels)."""

import random
from dataclasses import replace

import pytest
import torch

from fp4gemm import select, tile_calls
from fp4gemm.formats import PREPACKED, RECIPE_SIGNS, SF_LAYOUTS, VALUES
from fp4gemm.spec import ANY_SIGNS, ARCHS, INPUT_DTYPES, TileAmaxSpec, TileQuantizeSpec, check
from fp4gemm.tile_calls import TILE_AMAX_ARGUMENTS, TILE_QUANTIZE_ARGUMENTS, Output
from fp4gemm.variants import default_variants

QUANTIZE = TileQuantizeSpec("sm_90a", "bf16", "amax", "te_per_token", "128x4", "linear")
AMAX = TileAmaxSpec("sm_90a", "bf16", rows=True, columns=True)


@pytest.mark.parametrize(
    "good, changes, reason",
    [
        (QUANTIZE, {"arch": "sm_80"}, "arch: got 'sm_80'"),
        (AMAX, {"dtype": "fp8"}, "dtype: got 'fp8', expected one of bf16, fp16, fp32, e4m3"),
        (QUANTIZE, {"scaling": "per_row"}, "scaling: got 'per_row', expected one of amax, given"),
        (QUANTIZE, {"convention": "amd"}, "convention: got 'amd', expected one of te_per_token"),
        (QUANTIZE, {"rows": "4x4"}, "rows: got '4x4', expected one of linear, 128x4, 8x4, values, sm90"),
        (QUANTIZE, {"columns": "4x4"}, "columns: got '4x4', expected one of linear, 128x4, 8x4, values, sm90"),
        (QUANTIZE, {"rows": None, "columns": None}, "rows, columns: got None for both"),
        (QUANTIZE, {"hadamard": ANY_SIGNS, "columns": None}, "hadamard: expected a transposed result"),
        (
            QUANTIZE,
            {"hadamard": RECIPE_SIGNS, "square": True},
            "hadamard: expected a transposed result, and",
        ),
        (QUANTIZE, {"ctas": 9}, "ctas: got 9, expected 1 to 8"),
        (AMAX, {"rows": False, "columns": False}, "rows, columns: got False for both"),
        (QUANTIZE, {"hadamard": 1}, "hadamard: got 1, expected None, -1"),
        (AMAX, {"hadamard": 1}, "hadamard: got 1, expected None, -1"),
        (AMAX, {"hadamard": ANY_SIGNS, "columns": False}, "hadamard: expected columns"),
        (AMAX, {"ctas": 0}, "ctas: got 0, expected 1 to 8"),
    ],
)
def test_check_says_why(good, changes, reason):
    assert check(good) is None
    problem = check(replace(good, **changes))
    assert problem is not None
    assert reason in problem


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_selected_is_possible_and_named_apart(arch):
    layouts = (None, *SF_LAYOUTS, VALUES, PREPACKED)
    specs = [
        select.tile_quantize_spec(arch, dtype, scaling, "te", rows, columns, *flags)
        for dtype in INPUT_DTYPES
        for scaling in ("amax", "given")
        for rows in layouts
        for columns in layouts
        for flags in (
            (None, False, False, False),
            (ANY_SIGNS, True, False, True),
            (RECIPE_SIGNS, True, False, True),
            (None, True, True, True),
            (None, False, False, True),
        )
        if (rows or columns) and (columns or flags[0] is None)
    ]
    specs += [
        select.tile_amax_spec(arch, dtype, *flags)
        for dtype in INPUT_DTYPES
        for flags in (
            (True, True, ANY_SIGNS, True),
            (True, True, RECIPE_SIGNS, True),
            (True, False, None, True),
            (False, True, None, False),
        )
    ]
    assert [spec for spec in specs if check(spec) is not None] == []
    assert len({spec.name for spec in specs}) == len(set(specs)) == len(specs)


def test_selected_kernels_are_among_the_default_variants():
    options = (("amax", "te_per_token", "128x4", "128x4"), ("amax", "te_per_token", None, "128x4"))
    selected = [
        *(select.tile_quantize_spec(arch, "bf16", *option) for arch in ARCHS for option in options),
        *(select.tile_amax_spec(arch, "bf16", True, True) for arch in ARCHS),
    ]
    assert set(selected) - set(default_variants()) == set()


def test_division_by_multiplication():
    """What TileSource::row_tile computes, for every tile number that a grid has."""
    rng = random.Random(1)
    for divisor in (*range(1, 1000), 2**20, 2**20 + 1, 12345679, 2**31 - 1):
        magic, shift = tile_calls._division(divisor)
        assert magic < 2**32
        last = (2**31 - 1) // divisor * divisor
        for t in (0, divisor - 1, divisor, last - 1, last, 2**31 - 1, *(rng.randrange(2**31) for _ in range(20))):
            quotient = (t * magic >> 32) >> shift if magic else t
            assert t >= 2**31 or t < 0 or quotient == t // divisor, (t, divisor)


def test_arguments_of_a_launch():
    x = torch.zeros(40, 300, dtype=torch.bfloat16)
    rows = Output.allocate(40, 300, "128x4", torch.ones(40))
    columns = Output.allocate(300, 40, "linear", torch.ones(()))
    flag, seed = torch.ones((), dtype=torch.float32), torch.tensor([7])
    values = tile_calls.quantize_values(x, rows, columns, 0x8001, seed, flag)
    TILE_QUANTIZE_ARGUMENTS.pack(*values)
    assert values[:7] == (x.data_ptr(), 0, 300, 1, 40, 300, 3)
    assert values[9:13] == (
        rows.data.data_ptr(), rows.block_scale.data_ptr(), rows.outer_scale.data_ptr(), rows.scale_in.data_ptr()
    )  # fmt: skip
    assert values[17:20] == (flag.data_ptr(), seed.data_ptr(), 0)
    assert values[20:28] == (1 << 15, 0, 0, 0, 0, 0, 0, 1 << 31)  # the signs of values 0 and 15
    assert values[28:] == (1, 0, 0x7FFFFFFF)
    assert (rows.outer_scale.shape, columns.outer_scale.shape) == ((40,), ())
    assert tile_calls.quantize_values(x, rows, None, None, -1, None)[13:20] == (0, 0, 0, 0, 0, 0, 2**64 - 1)
    assert tile_calls.tiles(x) == 3
    values = tile_calls.amax_values(x, (None, torch.zeros(300), None, None), None)
    TILE_AMAX_ARGUMENTS.pack(*values)
    assert values[9] == values[11] == values[12] == 0


@pytest.mark.parametrize(
    "x, expected",
    [
        (torch.zeros(8, 16, dtype=torch.bfloat16), True),
        (torch.zeros(8, 20, dtype=torch.bfloat16), False),
        (torch.zeros(1, 20, dtype=torch.bfloat16), True),
        (torch.zeros(8, 24, dtype=torch.bfloat16)[:, :17], True),
        (torch.zeros(8, 24, dtype=torch.bfloat16)[:, 1:17], False),
        (torch.zeros(16, 8, dtype=torch.bfloat16).t(), False),
    ],
)
def test_vectorized(x, expected):
    assert tile_calls.vectorized(x) is expected


def test_results_must_be_aligned():
    data = torch.zeros(4 * 8 + 1, dtype=torch.uint8)[1:].view(4, 8)
    out = Output.allocate(4, 16, "linear", torch.ones(4))
    with pytest.raises(ValueError, match=r"^out: expected data and block scales on 16-byte boundaries"):
        _ = replace(out, data=data).addresses
