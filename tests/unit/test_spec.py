"""Specs: frozen and hashable, named uniquely, and ``check`` says why a kernel cannot be."""

import dataclasses
from dataclasses import replace

import pytest

from fp4gemm import spec
from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.spec import (
    ARCHS,
    AmaxSpec,
    DequantizeSpec,
    GemmSpec,
    GroupedGemmSpec,
    PackedCollectiveSpec,
    PackedMmaSpec,
    PackedWgmmaSpec,
    PackSpec,
    QuantizeSpec,
    check,
)
from fp4gemm.spec.gemm import SM100_CLUSTERS, SM100_TILES, SM120_TILES
from fp4gemm.variants import default_variants

QUANTIZE = QuantizeSpec("sm_90a", "bf16", "per_row", "te_per_token", "128x4", 128, 4, 4)
AMAX = AmaxSpec("sm_90a", "bf16")
DEQUANTIZE = DequantizeSpec("sm_90a", "bf16", "linear", outer=True)
PACK = PackSpec("sm_90a", "128x4", "pack")
GEMM = GemmSpec("sm_100a", "bf16", None, (128, 128, 256), (1, 1), "static")
GEMM120 = GemmSpec("sm_120a", "bf16", None, (128, 128, 128), (1, 1), "cooperative")
GROUPED = GroupedGemmSpec("sm_100a", "bf16", None, (128, 256, 256), (1, 1), "static")
FP4_GEMM = replace(GEMM, out_dtype="fp4", sf_layout="128x4")
PACKED_MMA = PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, 1, 8, 4, 2, 2, 0, 0)
PACKED_WGMMA = PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 128, 2, 2, 1, 1, 1, 6)
PACKED_GEMM = PackedCollectiveSpec("sm_90a", "bf16", "bf16", None, (128, 256, 64), (2, 1), "cooperative")
PACKED = (PACKED_MMA, PACKED_WGMMA, PACKED_GEMM)
ALL = (QUANTIZE, AMAX, DEQUANTIZE, GEMM, GROUPED, PACK, *PACKED)


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
        (QUANTIZE, {"scaling": "per_column"}, "scaling: got 'per_column', expected one of per_row, per_tensor, amaxes"),
        (QUANTIZE, {"adaptive": "max"}, "adaptive: got 'max', expected one of mse, mae"),
        (QUANTIZE, {"residual": "both"}, "residual: got 'both', expected one of activation, weight"),
        (QUANTIZE, {"adaptive": "mse", "convention": "torchao"}, "convention of adaptive or residual: got 'torchao'"),
        (QUANTIZE, {"residual": "weight", "convention": "modelopt"}, "convention of adaptive or residual: got 'mod"),
        (QUANTIZE, {"adaptive": "mse", "stochastic": True}, "adaptive: expected neither stochastic nor residual"),
        (QUANTIZE, {"adaptive": "mse", "residual": "weight"}, "adaptive: expected neither stochastic nor residual"),
        (QUANTIZE, {"gathered": True}, "gathered: expected a residual with it"),
        (QUANTIZE, {"producer": "silu"}, "producer: got 'silu', expected one of silu_mul, gelu_tanh, relu2, rmsnorm"),
        (QUANTIZE, {"producer": "relu2", "dtype": "e4m3"}, "producer: got 'relu2' of e4m3, expected bf16, fp16 or"),
        (QUANTIZE, {"producer": "relu2", "residual": "weight", "gathered": True}, "producer: got 'relu2' of bf16"),
        *(
            (QUANTIZE, {"producer": "rmsnorm", **more}, "producer: got 'rmsnorm', expected packed rows in registers")
            for more in (
                {"resident": False},
                {"scaling": "per_tensor"},
                {"output": "values", "sf_layout": "linear"},
                {"residual": "weight"},
            )
        ),
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
        (AMAX, {"producer": "rmsnorm"}, "producer: got 'rmsnorm', expected one of silu_mul"),
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
        (GEMM, {"schedule": "pingpong"}, "schedule on sm_100a: got 'pingpong', expected one of static, clc"),
        (GEMM120, {"schedule": "static"}, "schedule on sm_120a: got 'static', expected one of cooperative, pingpong"),
        *(
            (GEMM, {"tile": t}, f"tile of sm_100a: got {t}, expected one of (128, 64, 256), (128, 128, 256), (128, 192")
            for t in ((64, 128, 256), (128, 128, 128), (128, 96, 256), (256, 64, 256), (256, 192, 256))
        ),
        (GEMM120, {"tile": (128, 128, 64)}, "tile of cooperative on sm_120a: got (128, 128, 64), expected one of (128"),
        # Pingpong: one warpgroup would hold all 256 x 128 sums.
        (GEMM120, {"schedule": "pingpong", "tile": (256, 128, 128)}, "tile of pingpong on sm_120a: got (256, 128"),
        (GEMM, {"arch": "sm_90a"}, "arch: got 'sm_90a', which has no block-scaled tensor cores"),
        (GEMM120, {"cluster": (2, 1)}, r"cluster on sm_120a: got (2, 1), expected (1, 1)"),
        *(
            (GEMM, {"cluster": c}, f"cluster: got {c}, expected one of (1, 1), (2, 1), (2, 2), (4, 2)")
            for c in ((3, 1), (1, 2), (1, 8), (4, 1), (4, 4))
        ),
        (GEMM, {"tile": (256, 128, 256)}, "cluster of tile (256, 128, 256): got (1, 1), expected pairs of CTAs"),
        (GEMM, {"source": "fp32"}, "source of bf16: got 'fp32', expected None or 'bf16'"),
        *(
            (
                GEMM,
                {"source": "fp32", "out_dtype": "fp32", "tile": (m, 256, 256), "cluster": (2, 1)},
                f"tile with an fp32 source: got ({m}, 256, 256), expected at most 192 columns",
            )
            for m in (128, 256)
        ),
        (GEMM, {"activation": "tanh"}, "activation: got 'tanh', expected one of relu, gelu, silu"),
        (GEMM, {"sf_layout": "linear"}, "sf_layout of bf16: got 'linear', expected None"),
        (GEMM, {"out_dtype": "fp4"}, "sf_layout of fp4: got None, expected one of 128x4, linear"),
        (
            GROUPED,
            {"tile": (256, 256, 256), "cluster": (2, 1)},
            "tile of a grouped GEMM: got (256, 256, 256), expected",
        ),
        (GROUPED, {"arch": "sm_120a", "schedule": "cooperative"}, "tile of a grouped GEMM: got (128, 256, 256)"),
        (GROUPED, {"arch": "sm_90a"}, "arch: got 'sm_90a', which has no block-scaled tensor cores"),
        (GROUPED, {"cluster": (2, 1)}, "cluster, schedule of a grouped GEMM: got (2, 1), 'static', expected (1, 1)"),
        (GROUPED, {"schedule": "clc"}, "cluster, schedule of a grouped GEMM: got (1, 1), 'clc', expected (1, 1)"),
        (GROUPED, {"source": "fp16"}, "source of bf16: got 'fp16', expected None or 'bf16'"),
        *(
            (GROUPED, change, "out_dtype, column_major, activation of a grouped GEMM: expected a row-major D")
            for change in ({"out_dtype": "fp4"}, {"column_major": True}, {"activation": "relu"})
        ),
        (FP4_GEMM, {"sf_layout": "8x4"}, "sf_layout of fp4: got '8x4', expected one of 128x4, linear"),
        *(
            (FP4_GEMM, {name: value}, "source, column_major: expected neither for an fp4 D")
            for name, value in (("source", "bf16"), ("column_major", True))
        ),
        *((good, {"arch": "sm_100a"}, "arch: got 'sm_100a', expected 'sm_90a'") for good in PACKED),
        *((good, {"a_dtype": "fp32"}, "a_dtype: got 'fp32', expected one of bf16, fp16") for good in PACKED),
        *((good, {"out_dtype": "fp8"}, "out_dtype: got 'fp8', expected one of bf16, fp16, fp32") for good in PACKED),
        *((good, {"bias": "int8"}, "bias: got 'int8', expected one of bf16, fp16, fp32") for good in PACKED),
        *((PACKED_MMA, {"token_tiles": n}, f"token_tiles: got {n}, expected 1 or 2") for n in (0, 3, 4)),
        *((PACKED_MMA, {"warps": n}, f"warps x stages: got {n} x 4, expected at most 32 warps") for n in (0, 33)),
        (PACKED_MMA, {"warps": 26, "blocks": 1}, "warps x stages: got 26 x 4"),  # 104 barriers
        (PACKED_MMA, {"stages": 0}, "warps x stages: got 8 x 0"),
        (PACKED_MMA, {"blocks": 0}, "warps x stages: got 8 x 4"),
        *((PACKED_MMA, {"split": n}, f"split: got {n}, expected 1, 2 or 4") for n in (0, 3, 8)),
        (PACKED_MMA, {"token_tiles": 2, "stages": 1, "blocks": 1}, "stages x blocks: got 1 x 1, expected room for"),
        (PACKED_MMA, {"loaders": 25}, "loaders: got 25, expected at most 24 beside 8 warps"),
        (PACKED_MMA, {"loaders": -1}, "loaders: got -1, expected at most 24"),
        (PACKED_MMA, {"quantize": "fp8"}, "quantize: got 'fp8' to bf16, expected None, or one of"),
        (PACKED_MMA, {"quantize": "fp16", "a_dtype": "fp16"}, "quantize: got 'fp16' to fp16"),
        (PACKED_MMA, {"pairs": 1}, "pairs: got 1 with 2 blocks, expected 0, or 1 with 1 block"),
        (PACKED_MMA, {"pairs": 2, "blocks": 1}, "pairs: got 2 with 1 blocks"),
        (PACKED_MMA, {"warps": 13, "blocks": 2}, "shared memory: 240640 bytes, a CTA has 232448 at most"),
        *((PACKED_WGMMA, {"tokens": n}, f"tokens: got {n}, expected one of 8, 16, 32, 48") for n in (0, 4, 40, 512)),
        (PACKED_WGMMA, {"row_groups": 0}, "row_groups x depth_groups: got 0 x 1 for 2 panels, expected at most 4"),
        (PACKED_WGMMA, {"depth_groups": 3}, "row_groups x depth_groups: got 2 x 3 for 2 panels, expected at most 4"),
        (PACKED_WGMMA, {"row_groups": 3}, "row_groups x depth_groups: got 3 x 1 for 2 panels, expected at most 4"),
        (PACKED_WGMMA, {"panels": 1, "split": 2}, "row_groups x depth_groups: got 2 x 1 for 1 panels, expected at"),
        (PACKED_WGMMA, {"panels": 4, "source": True}, "source, bias: 4 panels x 128 tokens leave no registers for C"),
        (PACKED_WGMMA, {"multicast": 3}, "multicast x split: got 3 x 1, expected 1, 2 or 4 CTAs in all"),
        (PACKED_WGMMA, {"multicast": 4, "split": 2}, "multicast x split: got 4 x 2"),
        (PACKED_WGMMA, {"tokens": 16, "split": 4}, "multicast x split: got 1 x 4"),  # two tiles of eight tokens
        (PACKED_WGMMA, {"stages": 1}, "stages: got 1, expected a multiple of depth_groups, at least twice that"),
        (PACKED_WGMMA, {"stages": 2, "depth_groups": 2}, "stages: got 2, expected a multiple of depth_groups"),
        (PACKED_WGMMA, {"stages": 5, "depth_groups": 2}, "stages: got 5, expected a multiple of depth_groups"),
        (PACKED_WGMMA, {"tokens": 16, "stages": 61}, "stages: got 61, expected a multiple"),
        (PACKED_GEMM, {"schedule": "static"}, "schedule: got 'static', expected cooperative or pingpong"),
        (PACKED_GEMM, {"tile": (64, 256, 64)}, "tile of cooperative: got (64, 256, 64), expected (128, 64, 128 or 256"),
        (PACKED_GEMM, {"tile": (128, 192, 64)}, "tile of cooperative: got (128, 192, 64)"),
        (PACKED_GEMM, {"tile": (128, 256, 128)}, "tile of cooperative: got (128, 256, 128)"),
        (PACKED_GEMM, {"schedule": "pingpong"}, "tile of pingpong: got (128, 256, 64), expected (64, 64, 128 or 256"),
        *(
            (PACKED_GEMM, {"cluster": n}, f"cluster: got {n}, expected 1, 2 or 4 CTAs")
            for n in ((3, 1), (8, 1), (1, 4))
        ),
        (
            PACKED_GEMM,
            {"tile": (64, 256, 64), "schedule": "pingpong", "stream_k": True},
            "stream_k: got schedule 'pingpong', expected 'cooperative'",
        ),
        (
            PACKED_GEMM,
            {"stream_k": True, "cluster": (4, 1)},
            "cluster of stream_k: got (4, 1), expected one or two CTAs",
        ),
        (PACKED_GEMM, {"source": "fp16"}, "source of bf16, tile (128, 256, 64): got 'fp16', expected one of"),
        (PACKED_GEMM, {"source": "fp32"}, "source of bf16, tile (128, 256, 64): got 'fp32', expected one of"),
    ],
)
def test_check_names_the_field_and_what_it_expects(good, changes, reason):
    assert (check(replace(good, **changes)) or "").startswith(reason)


@pytest.mark.parametrize(
    "good, changes",
    [
        *((good, {"a_dtype": a, "out_dtype": out, "bias": bias}) for good in PACKED
          for a in ("bf16", "fp16") for out in spec.DTYPES for bias in (None, *spec.DTYPES)),
        (PACKED_MMA, {"token_tiles": 1, "stages": 1, "blocks": 1}),  # just enough for partial sums
        (PACKED_MMA, {"warps": 12, "stages": 4, "blocks": 2}),
        (PACKED_MMA, {"loaders": 24, "blocks": 1, "pairs": 1}),
        (PACKED_MMA, {"warps": 1, "stages": 1, "blocks": 1}),
        *((PACKED_WGMMA, {"tokens": n, "split": split}) for n in spec.WGMMA_TOKENS[1:] for split in (1, 2)),
        (PACKED_WGMMA, {"tokens": 8}),
        (PACKED_WGMMA, {"stages": 2}),
        (PACKED_WGMMA, {"depth_groups": 2, "stages": 4}),
        (PACKED_WGMMA, {"panels": 7, "row_groups": 4}),
        *((PACKED_WGMMA, {"multicast": n, "split": split}) for n, split in ((4, 1), (2, 2), (1, 4))),
        (PACKED_GEMM, {"source": "bf16"}),
        (PACKED_GEMM, {"tile": (128, 128, 64), "source": "fp32"}),
        (PACKED_GEMM, {"stream_k": True}),
        *((GEMM, {"tile": tile, "cluster": cluster, "schedule": schedule}) for tile in SM100_TILES
          for cluster in SM100_CLUSTERS if cluster[0] > 1 or tile[0] == 128 for schedule in ("static", "clc")),
        *((GEMM120, {"tile": tile, "schedule": schedule}) for schedule, tiles in SM120_TILES.items() for tile in tiles),
        *((GEMM, {"out_dtype": out, "bias": bias, "source": out, "activation": activation, "column_major": True})
          for out in spec.DTYPES for bias in (None, *spec.DTYPES) for activation in (None, *spec.ACTIVATIONS)),
        *((FP4_GEMM, {"arch": g.arch, "tile": g.tile, "schedule": g.schedule, "bias": "fp16", "sf_layout": layout})
          for g in (GEMM, GEMM120) for layout in ("128x4", "linear")),
        (PACKED_GEMM, {"tile": (64, 64, 64), "schedule": "pingpong", "cluster": (4, 2)}),
    ],
)  # fmt: skip
def test_bounds_are_not_too_narrow(good, changes):
    assert check(replace(good, **changes)) is None


def test_uneven_row_tiles_need_registers_and_a_warpgroup_that_may_skip_a_panel():
    def changed(tokens, panels, row_groups, multicast=1, grouped=False):
        spec = replace(PACKED_WGMMA, tokens=tokens, panels=panels, row_groups=row_groups, multicast=multicast)
        return replace(spec, grouped=grouped)

    def uneven(*config, **more):
        spec = changed(*config, **more)
        assert spec.roomy or not spec.uneven
        return spec.uneven

    assert uneven(16, 7, 4)
    assert uneven(64, 3, 2)
    assert not uneven(64, 4, 4)  # each has one panel, none may skip its only one
    assert not uneven(64, 3, 2, multicast=2)
    assert uneven(64, 3, 2, multicast=2, grouped=True)  # cut on the device, the same for both CTAs
    assert not uneven(256, 4, 2)  # 256 accumulators of a thread
    for config, least in {(16, 7, 4): 4, (16, 4, 2): 2, (64, 3, 2): 2, (16, 2, 1): 1, (64, 4, 4): 4}.items():
        assert changed(*config).least_panels == least


def test_a_row_group_lags_where_the_other_has_much_to_write():
    def lag(tokens, panels, row_groups, split=1, stages=8):
        return replace(
            PACKED_WGMMA,
            tokens=tokens,
            panels=panels,
            row_groups=row_groups,
            depth_groups=1,
            split=split,
            stages=stages,
        ).lag

    assert lag(256, 2, 2, stages=5) == 1
    assert lag(128, 4, 2) == 3
    assert lag(128, 2, 2) == 0
    assert lag(256, 1, 1) == 0
    assert lag(256, 2, 2, split=2) == 0


def test_two_row_groups_of_one_panel_take_turns():
    turning = replace(PACKED_WGMMA, panels=1)
    assert turning.turns
    assert check(turning) is None
    assert not turning.uneven
    assert turning.lag == 0
    assert not PACKED_WGMMA.turns
    for changes in ({"row_groups": 3}, {"depth_groups": 2}, {"split": 2}):
        assert not replace(turning, **changes).turns
        assert check(replace(turning, **changes)) is not None


def test_a_packed_spec_is_its_configuration():
    for good in (PACKED_MMA, PACKED_WGMMA):
        fields = [field.name for field in dataclasses.fields(good)]
        given = [name for name in fields[fields.index("source") + 1 :] if name not in ("quantize", "grouped")]
        assert good.config == tuple(getattr(good, name) for name in given)
        assert type(good)("sm_90a", "bf16", "bf16", None, False, *good.config) == good


def test_every_default_variant_is_possible():
    assert {variant.name: problem for variant in default_variants() if (problem := check(variant))} == {}


def test_default_gemms_have_every_tile_cluster_schedule_and_term_once_or_more():
    for arch in ("sm_100a", "sm_120a"):
        gemms = [v for v in default_variants([arch]) if isinstance(v, GemmSpec)]
        assert len(gemms) <= 8  # CI compiles all of them on two cores
        assert {v.out_dtype for v in gemms} == {*spec.DTYPES, "fp4"}
        assert {v.activation for v in gemms} == {None, *spec.ACTIVATIONS}
        assert {v.sf_layout for v in gemms} == {None, "128x4", "linear"}
        assert {v.column_major for v in gemms} == {False, True}
        assert any(v.source for v in gemms)
        assert any(v.bias for v in gemms)
        assert sum(isinstance(v, GroupedGemmSpec) for v in gemms) == 1
        if arch == "sm_100a":
            assert {v.tile for v in gemms} == set(SM100_TILES)
            assert {v.cluster for v in gemms} == set(SM100_CLUSTERS)
            assert {v.schedule for v in gemms} == {"static", "clc"}
        else:
            assert {(v.schedule, v.tile) for v in gemms} == {(s, t) for s, tiles in SM120_TILES.items() for t in tiles}


def test_a_pair_of_sms_shares_a_tile_of_256_rows():
    pair = replace(GEMM, tile=(256, 128, 256), cluster=(2, 1))
    assert (pair.two_sm, pair.cta_tile) == (True, (128, 128, 256))
    assert (GEMM.two_sm, GEMM.cta_tile) == (False, GEMM.tile)
    large = replace(GEMM120, tile=(256, 128, 128))
    assert (large.two_sm, large.cta_tile) == (False, (256, 128, 128))


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
           ("output", "values"), ("stochastic", True), ("adaptive", "mse"), ("residual", "weight"), ("gathered", True),
           ("noop", True), ("producer", "relu2"))),
        *((PACK, field, other) for field, other in
          (("arch", "sm_100a"), ("sf_layout", "8x4"), ("direction", "unpack"), ("threads", 128))),
        *((AMAX, field, other) for field, other in
          (("arch", "sm_100a"), ("dtype", "fp32"), ("vectorized", False), ("producer", "relu2"), ("threads", 64))),
        *((DEQUANTIZE, field, other) for field, other in
          (("arch", "sm_100a"), ("dtype", "fp32"), ("sf_layout", "8x4"), ("outer", False), ("threads", 64),
           ("units", 2))),
        *((good, field, other) for good in (GEMM, GROUPED) for field, other in
          (("arch", "sm_120a"), ("out_dtype", "fp32"), ("bias", "bf16"), ("tile", (128, 128, 64)),
           ("cluster", (2, 1)), ("schedule", "pingpong"), ("source", "bf16"), ("activation", "relu"),
           ("column_major", True), ("sf_layout", "linear"))),
        *((PACKED_GEMM, field, other) for field, other in
          (("arch", "sm_100a"), ("a_dtype", "fp16"), ("out_dtype", "fp32"), ("bias", "bf16"), ("tile", (128, 128, 64)),
           ("cluster", (1, 1)), ("schedule", "pingpong"), ("source", "bf16"), ("stream_k", True))),
        *((good, field, other) for good in (PACKED_MMA, PACKED_WGMMA) for field, other in
          (("arch", "sm_100a"), ("a_dtype", "fp16"), ("out_dtype", "fp32"), ("bias", "bf16"), ("source", True),
           ("split", 4), ("stages", 5))),
        *((PACKED_MMA, field, other) for field, other in
          (("token_tiles", 2), ("warps", 16), ("blocks", 1), ("loaders", 2), ("pairs", 1),
           ("quantize", "fp16"))),
        *((PACKED_WGMMA, field, other) for field, other in
          (("tokens", 64), ("panels", 3), ("row_groups", 1), ("depth_groups", 2), ("multicast", 2),
           ("grouped", True))),
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
        good.arch = "sm_120a"
    assert {good: 1}[replace(good)] == 1
    assert replace(good, arch="sm_120a") != good


def test_default_variants_serve_each_arch():
    for arch in ARCHS:
        chosen = default_variants([arch])
        assert {variant.arch for variant in chosen} == {arch}
        layouts = {(v.scaling, v.sf_layout) for v in chosen if isinstance(v, QuantizeSpec)}
        assert layouts == {(scaling, name) for scaling in ("per_row", "per_tensor", "given") for name in SF_LAYOUTS}
        assert {v.sf_layout for v in chosen if isinstance(v, DequantizeSpec)} == set(SF_LAYOUTS)
        packers = {(v.direction, v.sf_layout) for v in chosen if isinstance(v, PackSpec)}
        assert len(packers) == (2 * len(SF_LAYOUTS) if arch == "sm_90a" else 0)
        values = {v.scaling for v in chosen if isinstance(v, QuantizeSpec) and v.output == "values"}
        assert values == ({"per_row", "given"} if arch == "sm_90a" else set())
        assert any(isinstance(v, GemmSpec) and v.out_dtype == "bf16" for v in chosen) == (arch != "sm_90a")
        packed = {(type(v), v.a_dtype) for v in chosen if isinstance(v, (PackedMmaSpec, PackedWgmmaSpec))}
        assert len(packed) == (4 if arch == "sm_90a" else 0)
        assert {v.schedule for v in chosen if isinstance(v, PackedCollectiveSpec)} == (
            {"cooperative", "pingpong"} if arch == "sm_90a" else set()
        )
        assert any(v.stream_k for v in chosen if isinstance(v, PackedCollectiveSpec)) == (arch == "sm_90a")
    assert default_variants() == [v for arch in ARCHS for v in default_variants([arch])]
