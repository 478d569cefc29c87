"""Selection: every problem gets a kernel that can be built, and that covers its rows."""

import itertools
from dataclasses import replace

import pytest
import torch

from fp4gemm import select, table
from fp4gemm.division import divide
from fp4gemm.formats import ADAPTIVE, NORMS, PRODUCERS, RESIDUAL_SIDES, SF_LAYOUTS, QuantizeOptions, scale_columns
from fp4gemm.spec import (
    ARCHS,
    DTYPES,
    INPUT_DTYPES,
    KERNEL_SCALINGS,
    PackedCollectiveSpec,
    PackedWgmmaSpec,
    PackSpec,
    QuantizeSpec,
    check,
)
from fp4gemm.variants import default_variants

# Around every power of two, where the number of threads or blocks changes, and some in between.
KS = sorted({16, 17, 48, 1000, 12345, 99999, 100000, *(2**i + d for i in range(5, 17) for d in (-16, -1, 0, 1, 16))})


def quantize_spec(k, dtype="bf16", sf_layout="128x4", scaling="per_row", arch="sm_90a"):
    return select.quantize_spec(arch, dtype, k, scaling, "te_per_token", sf_layout, k % 16 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sf_layout", sorted(SF_LAYOUTS))
def test_quantizers_of_every_k(dtype, sf_layout):
    for k in KS:
        spec = quantize_spec(k, dtype, sf_layout)
        assert check(spec) is None, k
        assert (spec.dtype, spec.sf_layout, spec.vectorized) == (dtype, sf_layout, k % 16 == 0)
        columns = -(-scale_columns(k) // 4) * 4  # with the padding, which the same threads zero
        assert spec.resident == (spec.threads * spec.blocks >= columns), k
        if spec.resident and spec.threads > 32:  # and no row has more threads than it can use
            assert (spec.threads - 32) * spec.blocks < columns, k
        if sf_layout != "linear" and spec.threads <= 128:
            assert spec.rows % 4 == 0  # a warp writes whole words of scales


def test_long_rows_are_streamed_and_short_ones_are_not():
    assert quantize_spec(16).resident
    assert quantize_spec(2 * 1024 * 16, "fp32").resident
    assert not quantize_spec(2 * 1024 * 16 + 1, "fp32").resident
    assert quantize_spec(4 * 1024 * 16).resident
    assert not quantize_spec(4 * 1024 * 16 + 1).resident


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("adaptive", [None, "mse"])
@pytest.mark.parametrize("producer", NORMS)
def test_rows_of_norms_are_on_chip(producer, adaptive, arch):
    """No kernel reads a row twice for its norm: up to the longest that registers hold, whatever else is asked for."""
    options = QuantizeOptions(producer=producer, adaptive=adaptive)
    for k, dtype, sf_layout in itertools.product(KS, DTYPES, ("linear", "128x4")):
        spec = select.quantize_spec(arch, dtype, k, "per_row", "te_per_token", sf_layout, k % 16 == 0, options)
        assert (check(spec) is None) == (k <= (32768 if dtype == "fp32" else 65536)), (k, dtype, sf_layout)


@pytest.mark.parametrize("producer", [None, "gelu_tanh", "add_rmsnorm"])
@pytest.mark.parametrize("sf_layout", sorted(SF_LAYOUTS))
def test_few_long_rows_have_a_cta_each(sf_layout, producer):
    for k in KS:
        options = QuantizeOptions(producer=producer)
        few, many = (
            select.quantize_spec("sm_90a", "bf16", k, "per_row", "te", sf_layout, k % 16 == 0, options, few=few)
            for few in (True, False)
        )
        assert check(few) is None or check(many) is not None
        if not 1985 <= k <= 16384:
            assert few == many
            continue
        columns = -(-scale_columns(k) // 4) * 4
        assert few.rows == 1
        assert few.threads <= 512
        assert few.threads * few.blocks >= columns
        assert few.blocks == (1 if producer == "gelu_tanh" and k <= 8192 else 2)


OPTIONS = (
    {"options": QuantizeOptions(stochastic=True)},
    {"options": QuantizeOptions(adaptive="mse")},
    {"options": QuantizeOptions(residual=64)},
    {"options": QuantizeOptions(residual=64, residual_side="weight"), "gathered": True},
    {"noop": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sf_layout", SF_LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_quantizers_with_options(dtype, sf_layout, options):
    for k in (16, 512, 4096, 8192, 1 << 17):
        spec = select.quantize_spec("sm_90a", dtype, k, "per_row", "te", sf_layout, True, **options)
        assert check(spec) is None
        assert not spec.plain
        if spec.resident:  # companions need no threads of their own
            assert spec.threads * spec.blocks >= k // 16
        else:
            assert k > 8192


@pytest.mark.parametrize("scaling", KERNEL_SCALINGS)
def test_scaling_is_passed_on(scaling):
    assert quantize_spec(4096, scaling=scaling).scaling == scaling


def test_selected_kernels_are_among_the_default_variants():
    """What ``fp4gemm build`` builds must be what calls then look for."""
    selected = [
        *(quantize_spec(8192, sf_layout=name, arch=arch) for arch in ARCHS for name in SF_LAYOUTS),
        *(select.dequantize_spec("sm_90a", "bf16", name, outer=False) for name in SF_LAYOUTS),
        select.amax_spec("sm_90a", "bf16", vectorized=True),
        *(select.pack_spec("sm_90a", name, way) for name in SF_LAYOUTS for way in ("pack", "unpack")),
        *(
            select.values_spec("sm_90a", "bf16", m, 8192, scaling, "te_per_token", True)[0]
            for m in (1, 8192)
            for scaling in ("per_row", "given")
        ),
    ]
    per_row = ("bf16", 8192, "per_row", "te_per_token", "128x4", True)
    options = [QuantizeOptions(stochastic=True), *(QuantizeOptions(adaptive=name) for name in ADAPTIVE)]
    options += [QuantizeOptions(residual=512, residual_side=side) for side in RESIDUAL_SIDES]
    options += [QuantizeOptions(producer=name) for name in (*PRODUCERS, *NORMS)]
    selected += [select.quantize_spec(arch, *per_row, each) for arch in ARCHS for each in options]
    assert set(selected) - set(default_variants()) == set()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", KERNEL_SCALINGS)
@pytest.mark.parametrize("m", [1, 16, 128, 129, 4096])
def test_every_value_is_written_once(m, scaling, dtype):
    for k in (1, 8, 16, 1000, 4096, 8192, 11008, 16384, 28672, 32768, 32769, 65536, 200000):
        spec, share = select.values_spec("sm_90a", dtype, m, k, scaling, "te_per_token", k % 16 == 0)
        assert check(spec) is None
        assert (spec.output, spec.sf_layout) == ("values", "linear")
        columns, step = -(-k // 16), spec.threads * spec.blocks
        if scaling != "per_row":
            assert share == -(-columns // step)
        elif spec.resident:
            assert step >= columns
            assert share in (1, spec.blocks)
        if m > 128 and scaling == "per_row":
            assert share == 1
        # Whole rows of 16 values in registers: a CTA's threads must leave them room.
        assert spec.threads * spec.blocks * (16 if dtype == "fp32" else 8) <= 32768


def test_ctas_share_long_rows_where_there_are_few():
    def share(m, k, scaling="per_row"):
        return select.values_spec("sm_90a", "bf16", m, k, scaling, "te_per_token", True)[1]

    assert [share(1, k) for k in (2048, 4096, 8192, 28672, 65536)] == [1, 2, 4, 4, 8]
    assert [share(m, 8192) for m in (16, 17, 128, 129, 1024)] == [4, 2, 2, 1, 1]
    assert share(1, 16384, "given") == 8


def test_quantizers_of_few_ctas_begin_early():
    def early(m, k, scaling="per_row"):
        spec, share = select.values_spec("sm_90a", "bf16", m, k, scaling, "te_per_token", True)
        return select.early(m, -(-m // spec.rows) * share, 132)

    assert [early(m, 8192) for m in (1, 16, 66, 67, 128, 264, 265, 1024)] == [1, 1, 1, 2, 2, 2, None, None]
    assert [early(m, 4096) for m in (1, 512, 1024)] == [1, 2, None]
    assert [early(m, 14336, "given") for m in (16, 128, 256)] == [1, 7, 2]
    assert early(128, 28672, "given") is None  # 14 of them: the SMs would be full anyway


def test_kernels_of_k_are_those_that_calls_ask_for():
    built = select.bf16_specs("sm_90a", 8192)
    for m in (1, 64, 128, 129, 5000):
        for scaling in ("per_row", "given"):
            assert select.values_spec("sm_90a", "bf16", m, 8192, scaling, "te_per_token", True)[0] in built
    assert {select.pack_spec("sm_90a", name, "pack") for name in SF_LAYOUTS} < set(built)
    assert not any(isinstance(spec, PackSpec) for spec in select.bf16_specs("sm_100a", 8192))
    for arch in ("sm_100a", "sm_120a"):
        built = select.bf16_specs(arch, 8192)
        assert all(check(spec) is None for spec in built)
        for m in (1, 64, 300, 5000):
            for n in (64, 4096, 50000):
                assert select.gemm_spec(arch, 148, m, n, 8192, "bf16", None, False, None, False) in built


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, *DTYPES])
@pytest.mark.parametrize("source", [False, True])
def test_packed_gemms_of_every_size(out_dtype, bias, source):
    for m in (1, 9, 64, 129, 300, 4096, 100000):
        for n in (1, 8, 255, 4096, 100000):
            for k in (16, 4096, 100000):
                spec = select.packed_spec(("NVIDIA H200", 132), m, n, k, "bf16", out_dtype, bias, source, n % 8 == 0)
                assert check(spec) is None
                assert (spec.out_dtype, spec.bias, bool(spec.source)) == (out_dtype, bias, source)
                if isinstance(spec, PackedCollectiveSpec):
                    assert n % 8 == 0
                else:
                    assert divide(spec, m, n, k, 132) is not None


def test_kernels_for_one_token_quantize_it():
    mma = select.packed_of("mma", (1, 16, 3, 1, 2, 0, 0), "bf16", "bf16", None, False)
    for dtype in DTYPES:
        fused = select.quantizing(mma, dtype, 1)
        assert fused is not None
        assert fused.quantize == dtype
        assert fused.name != mma.name
    assert select.quantizing(replace(mma, a_dtype="fp16"), "fp16", 1) is None
    assert select.quantizing(mma, "bf16", 2) is None
    for other in (("wgmma", (64, 2, 2, 2, 1, 2, 12)), ("collective", (128, 256, 2)), ("stream_k", (128, 256, 2))):
        assert select.quantizing(select.packed_of(*other, "bf16", "bf16", None, False), "bf16", 1) is None


@pytest.mark.parametrize("out_dtype, source", [("fp32", False), ("bf16", True), ("fp32", True)])
def test_the_collective_stands_in_for_warpgroups_that_take_turns(out_dtype, source):
    """Which have no registers for C, and write fp32 in parts of lines."""

    def chosen(problem, *terms):
        return select.packed_spec(("another GPU", 132), *problem, "bf16", *terms)

    rows = [(row.m, row.n, row.k) for row in table.read(table.PACKAGED)]
    others = itertools.product((64, 256, 512, 1024, 4096), (4608, 10240, 37888), (1536, 5120))
    turning = 0
    for problem in (*rows, *others):
        spec, plain = chosen(problem, out_dtype, None, source), chosen(problem, "bf16", None, False)
        if not isinstance(plain, PackedWgmmaSpec) or not plain.turns:
            continue
        turning += 1
        config = (64, plain.tokens, plain.multicast)
        assert spec == select.packed_of("collective", config, "bf16", out_dtype, None, source)
        assert select.stand_in(plain) == ("collective", config)
        unaligned = chosen(problem, out_dtype, None, source, False)  # TMA cannot store it
        assert isinstance(unaligned, PackedWgmmaSpec)
        assert check(unaligned) is None
    assert turning > 1


def test_measured_shapes_get_the_kernel_that_was_measured():
    for row in table.read(table.PACKAGED):
        spec = select.packed_spec(("another GPU", 132), row.m, row.n, row.k, "bf16", "bf16", None, False)
        assert spec == select.packed_of(row.kernel, row.config, "bf16", "bf16", None, False)


@pytest.fixture
def gpu(monkeypatch):
    """Makes up the GPU that torch sees."""

    def of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Made-Up")
        return select.arch_of.__wrapped__(0)

    return of


@pytest.mark.parametrize("capability, arch", [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")])
def test_arch_with_kernels(gpu, capability, arch):
    assert gpu(capability) == arch


@pytest.mark.parametrize(
    "capability, message",
    [
        ((8, 0), r"NVIDIA Made-Up has compute capability 8.0: fp4gemm has CUDA kernels for 9.0 .* use CPU tensors"),
        (
            (12, 1),
            r"capability 12.1: fp4gemm has CUDA kernels for 9.0 \(sm_90a\), 10.0 \(sm_100a\), 12.0 \(sm_120a\); use",
        ),
        ((10, 3), r"capability 10.3: fp4gemm has CUDA kernels for 9.0"),  # sm_100a code does not run there
    ],
)
def test_arch_without_kernels(gpu, capability, message):
    with pytest.raises(NotImplementedError, match=message):
        gpu(capability)


def test_prefetch_is_for_rows_read_whole(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert select.prefetch_ctas(quantize_spec(4096), 4096, 0) % 132 == 0
    assert select.prefetch_ctas(quantize_spec(4096), 4096, 0) > 0
    assert select.prefetch_ctas(quantize_spec(4096, scaling="given"), 4096, 0) > 0
    for spec in (quantize_spec(4100), quantize_spec(1 << 20)):
        assert isinstance(spec, QuantizeSpec)
        assert select.prefetch_ctas(spec, 4096, 0) == 0


SHAPES = [(1, 8, 32), (16, 4096, 4096), (200, 264, 288), (1000, 192, 512), (8192, 8192, 8192), (100000, 64, 64)]


@pytest.mark.parametrize("arch", ["sm_100a", "sm_120a"])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_block_scaled_gemms_are_possible_whatever_their_terms(arch, m, n, k):
    for out in ("bf16", "fp32"):
        for column_major in (False, True):
            for source in (False, True):
                spec = select.gemm_spec(arch, 148, m, n, k, out, "bf16", source, "silu", column_major)
                assert check(spec) is None
                assert spec.source == (out if source else None)
                assert (spec.out_dtype, spec.bias, spec.activation) == (out, "bf16", "silu")
                assert spec.column_major == column_major
    for layout in ("128x4", "linear"):
        assert check(select.gemm_spec(arch, 148, m, n, k, "fp4", None, False, None, False, layout)) is None


def test_block_scaled_tiles_follow_the_shape():
    def tile(arch, m, n, column_major=False):
        return select.gemm_spec(arch, 148, m, n, 4096, "bf16", None, False, None, column_major).tile

    assert tile("sm_100a", 8192, 8192) == (256, 256, 256)
    assert tile("sm_100a", 16, 4096) == (128, 64, 256)  # one wave of the narrowest
    assert tile("sm_120a", 256, 4096) == (128, 128, 128)
    assert tile("sm_120a", 257, 4096) == (256, 128, 128)
    assert tile("sm_120a", 4096, 16, column_major=True) == (128, 128, 128)  # rows of D^T


@pytest.mark.parametrize("arch", ["sm_100a", "sm_120a"])
@pytest.mark.parametrize("out, bias, source", [("bf16", None, False), ("fp32", "bf16", True), ("fp16", "fp32", True)])
def test_grouped_gemms_are_possible_whatever_their_terms(arch, out, bias, source):
    for experts in (1, 8, 1024):
        for tokens in (1, 129, 10_000):
            spec = select.grouped_gemm_spec(arch, 148, experts, tokens, 1000, out, bias, source)
            assert check(spec) is None
            assert (spec.out_dtype, spec.bias, spec.source) == (out, bias, out if source else None)


def test_grouped_tiles_follow_the_shape():
    def tile(experts, tokens, n):
        return select.grouped_gemm_spec("sm_100a", 148, experts, tokens, n, "bf16", None, False).tile

    assert tile(8, 4096, 8192) == (128, 256, 256)
    assert tile(8, 1, 2048) == (128, 128, 256)  # one wave of the narrower


def test_the_prepacked_form_is_that_of_hopper():
    with pytest.raises(NotImplementedError, match="sm_120a: the prepacked form is Hopper's"):
        select.pack_spec("sm_120a", "linear", "pack")
