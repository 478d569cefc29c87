"""Groups without a GPU: equal to a loop over ``quantize``, room for every size that can be, and what is refused."""

import copy
import importlib.util
import io
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch

import fp4gemm
from fp4gemm import reference, select
from fp4gemm.formats import RECIPE_SIGNS, SF_LAYOUTS, scale_layout
from fp4gemm.group.arguments import check_group
from fp4gemm.group.shape import GroupShape
from fp4gemm.reference.group import column_sums, member_seed
from fp4gemm.spec import (
    ANY_SIGNS,
    ARCHS,
    INPUT_DTYPES,
    GroupSpec,
    GroupSumsSpec,
    QuantizeSpec,
    TileAmaxSpec,
    TileQuantizeSpec,
    check,
)
from fp4gemm.tensor import FP4Tensor
from fp4gemm.variants import default_variants


def _load(name):
    path = Path(__file__).resolve().parents[1] / "gpu" / f"{name}.py"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


gpu_cases, cases = _load("gpu_cases"), _load("group_cases")
CPU = torch.device("cpu")


# ---------------------------------------------------------------- what comes out


def members_of(case, x):
    """Each member's values, by the sizes and gaps of the case alone."""
    flat, at = x.reshape(-1), 0
    for (m, k), gap in zip(case.sizes, case.gaps, strict=True):
        at += gap
        yield flat[at : at + m * k].view(m, k)
        at += m * k


@pytest.mark.parametrize("first", range(0, 200, 50))
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_group_is_a_loop_over_quantize(kind, first):
    for seed in range(first, first + 50):
        case = cases.GroupCase.draw(seed, kind, largest=120)
        x, arguments = case.make(CPU)
        got = fp4gemm.quantize_grouped(x, **arguments)
        results = got if isinstance(got, tuple) else (got,)
        options = {name: arguments.get(name) for name in ("scaling", "sf_layout", "convention")}
        parts = list(members_of(case, x))
        if "gradient" in arguments:
            inputs = members_of(case, arguments["h"])
            parts = [
                reference.produce_gradient(g, h, arguments["gradient"]) for g, h in zip(parts, inputs, strict=True)
            ]
        turned = (False, True) if arguments["both"] else (arguments["transposed"],)
        for t, transposed in zip(results, turned, strict=False):
            hadamard = arguments.get("hadamard") if transposed else None
            amax = None
            if arguments.get("shared"):
                kept = [part for part in parts if part.numel()]
                amaxes = [fp4gemm.amax(p, rows=False, columns=True, hadamard=hadamard)[0].max() for p in kept]
                amax = torch.stack(amaxes).max() if amaxes else torch.zeros(())
            assert t.count == len(parts)
            for i, part in enumerate(parts):
                noise = None if "seed" not in arguments else member_seed(arguments["seed"], i)
                want = fp4gemm.quantize(
                    part, transposed=transposed, hadamard=hadamard, seed=noise, amax=amax, **options
                )
                gpu_cases.assert_same(t.member(i), want, f"{case}, member {i}")
        if arguments["dbias"]:
            want = torch.cat([column_sums(part) for part in parts])
            sums = got[-1].reshape(-1)[: len(want)]
            assert torch.equal(sums.nan_to_num(7.0), want.nan_to_num(7.0))


def test_problems_cover_what_they_should():
    drawn = [cases.GroupCase.draw(seed, kind) for kind in cases.KINDS for seed in range(200)]
    assert max(len(case.sizes) for case in drawn) >= 128
    assert sum(any(m == 0 for m, _ in case.sizes) for case in drawn) > 100
    assert sum(any(m == 1 for m, _ in case.sizes) for case in drawn) > 100
    assert sum(any(k == 0 for _, k in case.sizes) for case in drawn) > 20
    assert sum(any(case.gaps) for case in drawn) > 50
    assert any(case.rows_from_offsets for case in drawn)
    assert {case.options["sf_layout"] for case in drawn} == set(SF_LAYOUTS)


def test_every_row_varies_its_place():
    """Numbers that one can count: 3 members of 1, 0 and 130 rows, K = 80."""
    t = fp4gemm.quantize_grouped(torch.randn(131, 80), first_dims=torch.tensor([1, 0, 130]))
    assert t.lines.tolist() == [1, 0, 130]
    assert t.widths.tolist() == [80, 80, 80]
    assert t.data_offsets.tolist() == [0, 40, 40, 40 + 130 * 40]
    assert t.scale_offsets.tolist() == [0, 1024, 1024, 1024 + 2048]  # 128 rows of 8 scales, and 256
    assert t.line_offsets.tolist() == [0, 1, 1, 131]


def test_sums_are_sums():
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(column_sums(x), x.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    assert column_sums(torch.randn(0, 3)).tolist() == [0, 0, 0]


def test_seeds_of_members():
    assert member_seed(5, 0) == 5
    assert member_seed(5, 3) == (5 + 3 * 0x9E3779B97F4A7C15) % 2**63
    assert int(member_seed(torch.tensor(5), 3)) == member_seed(5, 3)
    assert int(member_seed(torch.tensor(2**63 - 1), 1)) == member_seed(2**63 - 1, 1)


def test_tensor_passes_through_trees_and_copies():
    t = fp4gemm.quantize_grouped(torch.randn(4, 3, 32))
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True), pickle.loads(pickle.dumps(t))
    for other in (torch.utils._pytree.tree_map(torch.clone, t), copy.deepcopy(t), *read):
        assert isinstance(other, fp4gemm.GroupedFP4Tensor)
        cases.assert_same(other, t, "copy")
    assert "members=4" in repr(t)
    assert all(isinstance(member, FP4Tensor) for member in t.members())
    with pytest.raises(IndexError, match=r"^i: expected 0 .. 3, got 4"):
        t.member(4)


# ---------------------------------------------------------------- room


@pytest.mark.parametrize("units", [(1, 16), (128, 64), (8, 64), (1, 128), (16, 1)])
def test_there_is_room_for_every_size(units):
    """Sums of rounded sizes never exceed what was allocated for them, and reach it for members of one shape."""
    rng = random.Random(str(units))

    def up(n, unit):
        return -(-n // unit) * unit

    for _ in range(300):
        count = rng.choice((1, 2, 7, 50))
        sizes = [(rng.choice((0, 1, rng.randrange(300))), 16 * rng.randrange(20)) for _ in range(count)]
        rows, columns = rng.randrange(200), 16 * rng.randrange(20)
        elements = sum(m * k for m, k in sizes)
        total = [sum(column) for column in zip(*sizes, strict=True)]
        shapes = {
            "same": (GroupShape(count, rows, columns, 0, count * rows, count * columns), [(rows, columns)] * count),
            "rows": (GroupShape(count, None, columns, 0, total[0], count * columns), [(m, columns) for m, _ in sizes]),
            "columns": (GroupShape(count, rows, None, 0, count * rows, total[1]), [(rows, k) for _, k in sizes]),
            "both": (GroupShape(count, None, None, elements, *total), sizes),
        }
        for kind, (shape, each) in shapes.items():
            for turned in (False, True):
                room = (shape.transposed() if turned else shape).area(*units)
                used = sum(up(k if turned else m, units[0]) * up(m if turned else k, units[1]) for m, k in each)
                assert used <= room, (kind, turned, each)
                assert kind != "same" or used == room


def test_room_does_not_run_away():
    """For many tokens of a few experts, tensors are hardly larger than dense ones."""
    shape = GroupShape(8, None, 4096, 32768 * 4096, 32768, 8 * 4096)
    layout = scale_layout("128x4")
    assert shape.data_bytes() == 32768 * 2048
    assert shape.scale_bytes(layout) <= (32768 + 8 * 128) * 256
    assert shape.transposed().data_bytes() <= (32768 + 8 * 16) * 2048


# ---------------------------------------------------------------- what is refused

X = torch.zeros(10, 32)
DIMS = torch.tensor([3, 7])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "members: expected how many tensors x"),
        ({"members": 3}, ValueError, "x: 10 rows are not 3 members of as many rows each"),
        ({"members": 0}, ValueError, "members: expected 1 to"),
        ({"members": 2.0}, TypeError, "members: expected an int, got float"),
        ({"members": 3, "first_dims": DIMS}, ValueError, r"first_dims: expected contiguous \[3\], got \[2\]"),
        ({"first_dims": DIMS.int()}, TypeError, "first_dims: expected dtype torch.int64, got torch.int32"),
        ({"first_dims": [3, 7]}, TypeError, "first_dims: expected a torch.Tensor or None, got list"),
        ({"first_dims": DIMS.to("meta")}, ValueError, "first_dims: expected device cpu"),
        ({"first_dims": DIMS, "offsets": DIMS}, ValueError, r"offsets: expected contiguous \[3\], got \[2\]"),
        ({"last_dims": DIMS, "rows": 2}, ValueError, "x: expected one dimension where columns vary"),
        ({"first_dims": DIMS, "rows": 2}, ValueError, "rows: expected None where x has the columns"),
        ({"first_dims": DIMS, "bounds": (1, 2)}, ValueError, "bounds: expected None unless rows and columns both"),
        ({"members": 2, "scaling": "per_column"}, ValueError, "scaling: expected one of per_row, per_tensor"),
        ({"members": 2, "shared": True}, ValueError, "shared: expected False unless scaling is per_tensor"),
        ({"members": 2, "hadamard": 1}, ValueError, "hadamard: needs a transposed result"),
        ({"members": 2, "sf_layout": "4x4"}, ValueError, "sf_layout: expected one of"),
        ({"members": 2, "convention": "x"}, ValueError, "convention: expected one of"),
        ({"members": 2, "seed": -1}, ValueError, "seed: expected 0"),
        ({"members": 2, "amax": torch.ones(3)}, ValueError, r"amax: expected shape \[\] or \[2\] or \[10\], got \[3\]"),
        ({"members": 2, "h": X}, ValueError, "h: expected None without a gradient, got a tensor"),
        ({"members": 2, "gradient": "tanh", "h": X}, ValueError, "gradient: expected one of relu, relu2"),
        ({"members": 2, "gradient": "relu"}, TypeError, "h: expected a torch.Tensor, the input of the activation"),
        ({"members": 2, "gradient": "relu", "h": X.half()}, TypeError, "h: expected dtype torch.float32"),
        ({"members": 2, "gradient": "relu", "h": X[1:]}, ValueError, r"h: expected contiguous \[10, 32\] \(as x\)"),
        ({"members": 2, "amax": 1.0}, TypeError, "amax: expected a torch.Tensor, got float"),
        ({"members": 2, "amax": torch.ones(()), "outer_scale": torch.ones(())}, ValueError, "amax: expected None"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fp4gemm.quantize_grouped(X, **arguments)


@pytest.mark.parametrize(
    "x, arguments, error, message",
    [
        ([1.0], {}, TypeError, "x: expected a torch.Tensor, got list"),
        (X.int(), {"members": 2}, TypeError, "x.dtype: expected one of"),
        (X.t(), {"members": 2}, ValueError, "x: expected a contiguous buffer"),
        (X.view(-1), {"members": 2}, ValueError, r"x: expected \[members \* M, K\] or"),
        (X.view(2, 5, 32), {"members": 3}, ValueError, r"members: expected 2 \(that of x"),
        (X.view(2, 5, 32), {"first_dims": DIMS}, ValueError, r"x: expected \[T, K\] where rows vary"),
        (X.view(-1), {"last_dims": DIMS}, TypeError, "rows: expected an int, the rows of each member"),
        (X.view(-1), {"last_dims": DIMS, "rows": 0}, ValueError, "rows: expected at least 1, got 0"),
        (X.view(-1), {"last_dims": DIMS, "rows": 1, "first_dims": DIMS}, ValueError, "rows: expected None beside"),
        (X.view(-1), {"last_dims": DIMS, "first_dims": DIMS, "bounds": 3}, TypeError, "bounds: expected a pair"),
    ],
)
def test_bad_buffers(x, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fp4gemm.quantize_grouped(x, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"first_dims": [3, -1]}, "member 1: expected sizes of at least 0, got -1 x 32"),
        ({"first_dims": [3, 8]}, "member 1: 8 x 32 values at 96 are not within the 320 of x"),
        (
            {"last_dims": [32, 32], "rows": 2, "offsets": [0, 66, 130]},
            "member 1: begins at element 66, expected a multi",
        ),
        ({"offsets": [4, 3, 10]}, "member 0: expected sizes of at least 0, got -1 x 32"),
        ({"offsets": [0, 3, 11]}, "member 1: 8 x 32 values at 96 are not within the 320 of x"),
        ({"first_dims": [6, 6], "offsets": [0, 1, 7]}, "member 1: the 384 elements up to its end are more than x"),
        ({"last_dims": [32, 40], "rows": 2}, "member 1: expected a width that is a multiple of 16"),
        ({"last_dims": [32, 16], "first_dims": [2, 2], "bounds": (3, 48)}, "member 1: 4 rows up to its end"),
        ({"last_dims": [32, 16], "first_dims": [2, 2], "bounds": (4, 32)}, "member 1: 48 columns up to its end"),
    ],
)
def test_check_dims_names_the_member(arguments, message):
    arguments = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in arguments.items()}
    storage = torch.zeros(320 + 8, dtype=torch.float32)
    x = storage[-storage.data_ptr() // 4 % 4 :][:320]  # on 16 bytes, wherever the allocator put it
    x = x if "last_dims" in arguments else x.view(10, 32)
    with pytest.raises(ValueError, match=f"^{message}"):
        fp4gemm.quantize_grouped(x, **arguments, check_dims=True)


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_selected_is_possible_and_named_apart(arch):
    specs = [
        select.group_rows_spec(arch, dtype, k, scaling, "te", layout, vectorized, stochastic)
        for dtype in INPUT_DTYPES
        for k in (None, 1, 16, 300, 2048, 8192, 40000)
        for scaling in ("per_row", "per_tensor", "amaxes", "given")
        for layout in SF_LAYOUTS
        for vectorized in (True, False)
        for stochastic in (True, False)
    ]
    specs += [
        select.group_tile_spec(arch, dtype, "amax", "te", "128x4", columns, *flags)
        for dtype in INPUT_DTYPES
        for columns in (None, "linear")
        for flags in ((None, True, True), (None, False, False), (ANY_SIGNS, True, True), (RECIPE_SIGNS, True, True))
        if columns or flags[0] is None
    ]
    specs += [select.group_amax_spec(arch, dtype, True, True, None, True, True) for dtype in INPUT_DTYPES]
    specs.append(select.group_sums_spec(arch, 8))
    for spec in specs:
        assert check(spec) is None, spec
        assert spec.ctas >= 1
        assert spec.threads >= 32  # lanes of the warp that sums sizes
    assert len({spec.name for spec in specs}) == len(set(specs))


@pytest.mark.parametrize(
    "spec, reason",
    [
        (GroupSpec(QuantizeSpec("sm_80", "bf16", "per_row", "te", "128x4", 128, 4, 4)), "arch: got 'sm_80'"),
        (GroupSpec(QuantizeSpec("sm_90a", "bf16", "per_row", "te", "128x4", 128, 4, 4, noop=True)), "kernel: expected"),
        (GroupSpec(TileQuantizeSpec("sm_90a", "bf16", "amax", "te", "linear", None, square=True)), "square: got True"),
        (GroupSpec(TileQuantizeSpec("sm_90a", "bf16", "amax", "te", "values", None)), "rows: got 'values'"),
        (GroupSpec(TileQuantizeSpec("sm_90a", "bf16", "amax", "te", "linear", "sm90")), "columns: got 'sm90'"),
        (GroupSpec(TileAmaxSpec("sm_90a", "e4m3", True, True, gradient="relu")), "gradient: got one of e4m3"),
        (GroupSpec(TileAmaxSpec("sm_90a", "bf16", True, True, gradient="tanh")), "gradient: got 'tanh'"),
        (GroupSpec(TileAmaxSpec("sm_90a", "bf16", True, True), uniform=True), "uniform: got True"),
        (GroupSumsSpec("sm_90a", 3), "alignment: got 3"),
        (GroupSumsSpec("sm_90a", 8, 33), "threads: got 33"),
    ],
)
def test_check_says_why(spec, reason):
    assert reason in check(spec)


def test_default_variants_have_groups_of_each_kind():
    kinds = {type(spec.kernel).__name__ for spec in default_variants(["sm_90a"]) if isinstance(spec, GroupSpec)}
    assert kinds == {"QuantizeSpec", "TileQuantizeSpec", "TileAmaxSpec"}


def test_alignment():
    storage = torch.zeros(64 * 24 + 16, dtype=torch.bfloat16)
    aligned = storage[-storage.data_ptr() // 2 % 8 :]
    for shift, columns, want in ((0, 24, 8), (1, 24, 1), (0, 20, 1), (0, 32, 8)):
        x = aligned[shift : shift + 40 * columns].view(40, columns)
        assert check_group(x, 2, None, None, None, None, None).alignment == want
