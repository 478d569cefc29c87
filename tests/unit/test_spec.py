"""Specs: frozen and hashable, named uniquely, and ``check`` says why a kernel cannot be."""

import dataclasses
from dataclasses import replace

import pytest

from fp4gemm import spec
from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.spec import ARCHS, AmaxSpec, DequantizeSpec, GemmSpec, PackSpec, QuantizeSpec, check, default_variants

QUANTIZE = QuantizeSpec("sm_90a", "bf16", "per_row", "te_per_token", "128x4", 128, 4, 4)
AMAX = AmaxSpec("sm_90a", "bf16")
DEQUANTIZE = DequantizeSpec("sm_90a", "bf16", "linear", outer=True)
PACK = PackSpec("sm_90a", "128x4", "pack")
GEMM = GemmSpec("sm_90a", "bf16", None, (128, 256, 64), (2, 1), "cooperative")
ALL = (QUANTIZE, AMAX, DEQUANTIZE, GEMM, PACK)


def kind(value):
    return type(value).__name__


@pytest.mark.parametrize("good", ALL, ids=kind)
def test_the_examples_are_possible(good):
    assert check(good) is None


@pytest.mark.parametrize(
    "good, changes, reason",
    [
        *((good, {"arch": "sm_80"}, "arch: got 'sm_80', expected one of sm_90a, sm_100a, sm_120a") for good in ALL),
        *((good, {"dtype": "fp8"}, "dtype: got 'fp8', expected one of bf16, fp16, fp32") for good in ALL[:3]),
        (QUANTIZE, {"scaling": "per_column"}, "scaling: got 'per_column', expected one of per_row, per_tensor, given"),
        (QUANTIZE, {"convention": "amd"}, "convention: got 'amd', expected one of te_per_token"),
        (QUANTIZE, {"sf_layout": "4x4"}, "sf_layout: got '4x4', expected one of linear, 128x4, 8x4"),
        (DEQUANTIZE, {"sf_layout": "4x4"}, "sf_layout: got '4x4', expected one of linear, 128x4, 8x4"),
        (QUANTIZE, {"threads": 48, "rows": 2}, "threads x rows: got 48 x 2"),
        (QUANTIZE, {"threads": 0}, "threads x rows: got 0 x 4"),
        (QUANTIZE, {"threads": 512}, "threads x rows: got 512 x 4"),
        (QUANTIZE, {"rows": 0}, "threads x rows: got 128 x 0"),
        (QUANTIZE, {"threads": 32, "rows": 3}, "rows: got 3, expected 1, 2, 4 or 8"),
        (QUANTIZE, {"threads": 32, "rows": 16}, "rows: got 16, expected 1, 2, 4 or 8"),
        (QUANTIZE, {"blocks": 0}, "blocks: got 0, expected 1 to 8"),
        (QUANTIZE, {"blocks": 9}, "blocks: got 9, expected 1 to 8"),
        *((good, {"threads": n}, f"threads: got {n}") for good in (AMAX, DEQUANTIZE) for n in (0, 48, 1056)),
        (DEQUANTIZE, {"units": 0}, "units: got 0"),
        (QUANTIZE, {"output": "int8"}, "output: got 'int8', expected one of packed, values"),
        (QUANTIZE, {"output": "values"}, "sf_layout of values: got '128x4', expected 'linear'"),
        (PACK, {"arch": "sm_100a"}, "arch: got 'sm_100a', expected 'sm_90a'"),
        (PACK, {"sf_layout": "4x4"}, "sf_layout: got '4x4', expected one of linear, 128x4, 8x4"),
        (PACK, {"direction": "both"}, "direction: got 'both', expected one of pack, unpack"),
        *((PACK, {"threads": n}, f"threads: got {n}, expected a multiple of 128") for n in (0, 64, 192, 1152)),
        (GEMM, {"out_dtype": "fp8"}, "out_dtype: got 'fp8'"),
        (GEMM, {"bias": "int8"}, "bias: got 'int8', expected one of bf16, fp16, fp32"),
        (GEMM, {"schedule": "static"}, "schedule on sm_90a: got 'static', expected one of cooperative, pingpong"),
        (GEMM, {"tile": (64, 128, 64)}, "tile M of cooperative on sm_90a: got 64"),
        (GEMM, {"tile": (256, 128, 64), "schedule": "pingpong"}, "tile M of pingpong on sm_90a: got 256"),
        (GEMM, {"arch": "sm_100a"}, "schedule on sm_100a: got 'cooperative', expected one of static"),
        (GEMM, {"arch": "sm_120a", "schedule": "static"}, r"cluster on sm_120a: got (2, 1), expected (1, 1)"),
        (GEMM, {"cluster": (3, 1)}, "cluster: got (3, 1), expected 1, 2 or 4 each way"),
        (GEMM, {"cluster": (1, 8)}, "cluster: got (1, 8), expected 1, 2 or 4 each way"),
        # 16 CTAs are more than a launch may ask for without CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED.
        (GEMM, {"cluster": (4, 4)}, "cluster: got (4, 4)"),
    ],
)
def test_check_names_the_field_and_what_it_expects(good, changes, reason):
    assert (check(replace(good, **changes)) or "").startswith(reason)


def test_every_default_variant_is_possible():
    assert {variant.name: problem for variant in default_variants() if (problem := check(variant))} == {}


def test_names_are_unique_and_are_file_names():
    names = [variant.name for variant in default_variants()]
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").isalnum() for name in names)


@pytest.mark.parametrize(
    "good, field, other",
    [
        *((QUANTIZE, field, other) for field, other in
          (("arch", "sm_100a"), ("dtype", "fp32"), ("scaling", "given"), ("convention", "te"), ("sf_layout", "8x4"),
           ("threads", 64), ("blocks", 2), ("rows", 2), ("vectorized", False), ("resident", False),
           ("output", "values"))),
        *((PACK, field, other) for field, other in
          (("arch", "sm_100a"), ("sf_layout", "8x4"), ("direction", "unpack"), ("threads", 128))),
        *((AMAX, field, other) for field, other in
          (("arch", "sm_100a"), ("dtype", "fp32"), ("vectorized", False), ("threads", 64))),
        *((DEQUANTIZE, field, other) for field, other in
          (("arch", "sm_100a"), ("dtype", "fp32"), ("sf_layout", "8x4"), ("outer", False), ("threads", 64),
           ("units", 2))),
        *((GEMM, field, other) for field, other in
          (("arch", "sm_100a"), ("out_dtype", "fp32"), ("bias", "bf16"), ("tile", (128, 128, 64)),
           ("cluster", (1, 1)), ("schedule", "pingpong"))),
    ],
)  # fmt: skip
def test_every_field_is_part_of_the_name(good, field, other):
    assert replace(good, **{field: other}).name != good.name


def test_the_table_above_holds_every_field():
    mark = test_every_field_is_part_of_the_name.pytestmark[0]
    tabled = {(kind(good), field) for good, field, _ in mark.args[1]}
    assert tabled == {(kind(good), field.name) for good in ALL for field in dataclasses.fields(good)}


@pytest.mark.parametrize("good", ALL, ids=kind)
def test_specs_are_frozen_and_hash_by_value(good):
    with pytest.raises(dataclasses.FrozenInstanceError):
        good.arch = "sm_100a"
    assert {good: 1}[replace(good)] == 1
    assert replace(good, arch="sm_100a") != good


def test_default_variants_serve_each_arch():
    for arch in ARCHS:
        chosen = default_variants([arch])
        assert {variant.arch for variant in chosen} == {arch}
        layouts = {(v.scaling, v.sf_layout) for v in chosen if isinstance(v, QuantizeSpec)}
        assert layouts == {(scaling, name) for scaling in spec.KERNEL_SCALINGS for name in SF_LAYOUTS}
        assert {v.sf_layout for v in chosen if isinstance(v, DequantizeSpec)} == set(SF_LAYOUTS)
        packers = {(v.direction, v.sf_layout) for v in chosen if isinstance(v, PackSpec)}
        assert len(packers) == (2 * len(SF_LAYOUTS) if arch == "sm_90a" else 0)
        values = {v.scaling for v in chosen if isinstance(v, QuantizeSpec) and v.output == "values"}
        assert values == ({"per_row", "given"} if arch == "sm_90a" else set())
        assert any(isinstance(v, GemmSpec) and v.out_dtype == "bf16" for v in chosen)
    assert default_variants() == [v for arch in ARCHS for v in default_variants([arch])]
