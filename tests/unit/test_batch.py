"""Batches on the CPU: the container, quantize_batch and bmm, member by member what FP4Tensor, quantize and gemm are."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

import fp4gemm
from fp4gemm import FP4Batch, reference
from fp4gemm.formats import SF_LAYOUTS

L, M, N, K = 3, 5, 7, 40
PARTS = ("data", "block_scale", "outer_scale")


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def batch(rows=M, k=K, **options):
    return FP4Batch.stack([reference.quantize(values(rows, k, seed=i), **options) for i in range(L)])


def assert_same(got, want):
    assert (got.shape, got.sf_layout, got.prepacked) == (want.shape, want.sf_layout, want.prepacked)
    for name in PARTS:
        one, other = getattr(got, name), getattr(want, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


# --- the container ---


@pytest.mark.parametrize("sf_layout", SF_LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_members_are_what_was_stacked(sf_layout, scaling):
    members = [reference.quantize(values(M, K, seed=i), scaling=scaling, sf_layout=sf_layout) for i in range(L)]
    b = FP4Batch.stack(members)
    assert (b.shape, len(b), b.rows, b.k) == ((L, M, K), L, M, K)
    for got, want in zip(b, members, strict=True):
        assert_same(got, want)
    assert_same(b[-1], members[-1])
    assert b[1].data.data_ptr() == b.data[1].data_ptr()
    assert torch.equal(b.dequantize(torch.float16), torch.stack([t.dequantize(torch.float16) for t in members]))
    for form in (b.prepack(), b.with_layout("8x4"), b.prepack().with_layout("8x4"), b.prepack().unpack()):
        assert torch.equal(form.dequantize(), b.dequantize())
    assert_same(b.prepack()[2], members[2].prepack())
    assert repr(b) == f"FP4Batch(shape=(3, 5, 40), sf_layout={sf_layout!r}, device=cpu)"


def test_conversions_that_change_nothing_are_the_batch_itself():
    b = batch()
    assert b.with_layout("128x4") is b
    assert b.unpack() is b
    packed = b.prepack()
    assert packed.prepack() is packed
    assert b.to("cpu").data is b.data


def test_passes_through_pytrees_copies_and_files():
    b = batch().prepack()
    leaves, spec = pytree.tree_flatten(b)
    assert [id(leaf) for leaf in leaves] == [id(getattr(b, name)) for name in PARTS]
    assert_same(pytree.tree_unflatten(leaves, spec), b)
    assert_same(copy.deepcopy(b), b)
    assert_same(pickle.loads(pickle.dumps(b)), b)
    file = io.BytesIO()
    torch.save(b, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": (M, K)}, r"shape: expected \(L, M, K\) with L >= 1 and M, K >= 0, got \(5, 40\)"),
        ({"shape": (0, M, K)}, r"shape: expected \(L, M, K\) with L >= 1"),
        ({"shape": (L + 1, M, K)}, r"data: expected shape \(4, 5, 24\), got \(3, 5, 24\)"),
        ({"block_scale": torch.zeros(L, 8, dtype=torch.float8_e4m3fn)}, r"block_scale: expected shape \(3, 512\)"),
        ({"outer_scale": torch.ones(())}, r"outer_scale: expected shape \(3, 5\), got \(\)"),
        ({"outer_scale": torch.ones(2)}, r"outer_scale: expected shape \(3,\), got \(2,\)"),
        ({"sf_layout": "4x4"}, "sf_layout: expected one of"),
        ({"prepacked": "sm80"}, "prepacked: expected one of sm90, got 'sm80'"),
    ],
)
def test_a_batch_checks_its_parts(change, message):
    with pytest.raises(ValueError, match=message):
        replace(batch(), **change)


@pytest.mark.parametrize(
    "other, message",
    [
        (reference.quantize(values(M, K + 1)), r"members\[1\]: expected shape \(5, 40\) \(that of .*\), got \(5, 41\)"),
        (reference.quantize(values(M, K), scaling="per_tensor"), r"members\[1\]: expected scaling 'per_row'"),
        (reference.quantize(values(M, K), sf_layout="8x4"), r"members\[1\]: expected sf_layout '128x4'"),
        (reference.quantize(values(M, K)).prepack(), r"members\[1\]: expected prepacked None .*, got 'sm90'"),
        (torch.ones(M, K), r"members\[1\]: expected an FP4Tensor, got Tensor"),
    ],
)
def test_only_what_is_alike_is_stacked(other, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FP4Batch.stack([reference.quantize(values(M, K)), other])


def test_nothing_is_not_stacked():
    with pytest.raises(ValueError, match="members: expected at least one FP4Tensor, got none"):
        FP4Batch.stack([])


# --- quantize_batch ---


@pytest.mark.parametrize("rows", [M, 128])
@pytest.mark.parametrize("sf_layout", SF_LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("given", [False, True])
def test_quantize_batch_is_quantize_of_members(rows, sf_layout, scaling, given):
    x = values(K, L, rows, dtype=torch.bfloat16).permute(1, 2, 0)
    outer = torch.linspace(0.01, 0.1, L * rows).view(L, rows) if given else None
    if given and scaling == "per_tensor":
        outer = outer[:, 0]
    got = fp4gemm.quantize_batch(x, scaling=scaling, sf_layout=sf_layout, convention="te", outer_scale=outer)
    options = {"scaling": scaling, "sf_layout": sf_layout, "convention": "te"}
    members = [
        reference.quantize(member, outer_scale=None if outer is None else outer[i], **options)
        for i, member in enumerate(x)
    ]
    assert_same(got, FP4Batch.stack(members))


def test_quantize_batch_in_one_call_where_it_can(monkeypatch):
    calls = []

    def counted(x, **options):
        calls.append(tuple(x.shape))
        return fp4gemm.quantize(x, **options)

    monkeypatch.setattr("fp4gemm.batch.quantize", counted)
    for rows, options in ((128, {}), (8, {"sf_layout": "8x4"}), (5, {"sf_layout": "linear"})):
        fp4gemm.quantize_batch(values(L, rows, K), **options)
    assert calls == [(L * 128, K), (L * 8, K), (L * 5, K)]
    calls.clear()
    for rows, options in ((100, {}), (128, {"scaling": "per_tensor"}), (0, {})):
        fp4gemm.quantize_batch(values(L, rows, K), **options)
    assert calls == [(100, K)] * L + [(128, K)] * L + [(0, K)] * L


@pytest.mark.parametrize(
    "x, options, message",
    [
        (values(M, K), {}, r"x: expected 3 dimensions \[L, M, K\], L >= 1, got shape \(5, 40\)"),
        (values(0, M, K), {}, r"x: expected 3 dimensions \[L, M, K\], L >= 1, got shape \(0, 5, 40\)"),
        (None, {}, "x: expected a torch.Tensor, got NoneType"),
        (values(L, M, K).double(), {}, "x.dtype: expected one of"),
        (values(L, M, K), {"scaling": "per_column"}, "scaling: expected one of per_row, per_tensor, got 'per_column'"),
        (values(L, M, K), {"outer_scale": 1.0}, "outer_scale: expected a torch.Tensor, got float"),
        (values(L, M, K), {"outer_scale": torch.ones(L).half()}, "outer_scale: expected dtype torch.float32"),
        (values(L, M, K), {"outer_scale": torch.ones(L, device="meta")}, "outer_scale: expected device cpu, got meta"),
        (values(L, M, K), {"outer_scale": torch.ones(M)}, r"expected shape \[3\] or \[3, 5\], got \[5\]"),
        (
            values(L, M, K),
            {"outer_scale": torch.ones(L, M), "scaling": "per_tensor"},
            r"outer_scale: expected shape \[3\], got \[3, 5\]",
        ),
    ],
)
def test_quantize_batch_refuses(x, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fp4gemm.quantize_batch(x, **options)


# --- bmm ---


def members_of(a, b, bias, c, **options):
    return torch.stack(
        [
            fp4gemm.gemm(
                a[i], b[i], None if bias is None else bias[i] if bias.dim() == 2 else bias,
                c=None if c is None else c[i], **options,
            )
            for i in range(L)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("bias_shape", [None, (N,), (L, N)])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_bmm_is_gemm_of_members(scaling, column_major, bias_shape):
    a, b = batch(M, scaling=scaling), batch(N, scaling=scaling, sf_layout="linear")
    bias = None if bias_shape is None else values(*bias_shape)
    c = values(L, M, N, dtype=torch.float16)
    options = {"activation": "silu", "out_dtype": torch.float16, "beta": 0.5}
    want = members_of(a, b, bias, c, **options)
    got = fp4gemm.bmm(a, b, bias, c=c, column_major=column_major, **options)
    assert torch.equal(got, want)
    assert got.dtype == torch.float16
    assert (got.mT if column_major else got).is_contiguous()
    assert torch.equal(fp4gemm.bmm(a.prepack(), b.prepack(), bias, c=c, **options), want)
    assert torch.equal(reference.bmm(a, b, bias, torch.float16, c=c, beta=0.5, activation="silu"), want)


@pytest.mark.parametrize("sf_layout", ["128x4", "linear"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("columns", [N, 0])
def test_bmm_fp4_is_gemm_fp4_of_members(columns, per_row, sf_layout):
    a, b = batch(M), batch(columns, scaling="per_tensor")
    bias, outer = values(L, columns), torch.linspace(0.1, 1, L * M).view(L, M)[:, : M if per_row else 1].squeeze(-1)
    options = {"activation": "relu", "sf_layout": sf_layout}
    for own_bias in (bias, bias[0], None):
        got = fp4gemm.bmm_fp4(a, b.prepack(), own_bias, outer_scale=outer, **options)
        for i in range(L):
            member_bias = own_bias if own_bias is None or own_bias.dim() == 1 else own_bias[i]
            assert_same(got[i], fp4gemm.gemm_fp4(a[i], b[i], member_bias, outer_scale=outer[i], **options))


def test_bmm_fp4_refuses():
    a, b = batch(M), batch(N)
    with pytest.raises(ValueError, match="sf_layout: expected one of 128x4, linear, got '8x4'"):
        fp4gemm.bmm_fp4(a, b, outer_scale=torch.ones(L), sf_layout="8x4")
    with pytest.raises(ValueError, match=r"outer_scale: expected shape \[3\] or \[3, 5\], got \[\]"):
        fp4gemm.bmm_fp4(a, b, outer_scale=torch.ones(()))


def test_bmm_into_a_part_of_something():
    a, b = batch(M), batch(N)
    whole = torch.full((L, M + 2, N + 3), -1.0)
    out = whole[:, 1:-1, :N]
    result = fp4gemm.bmm(a, b, c=out, beta=2.0, out=out)
    assert result is out
    want = members_of(a, b, None, torch.full((L, M, N), -1.0), beta=2.0, out_dtype=torch.float32)
    assert torch.equal(out, want)
    out.fill_(-1)
    assert (whole == -1).all()


def test_bmm_of_nothing():
    for rows, columns, k in ((0, N, K), (M, 0, K), (M, N, 0)):
        a, b = fp4gemm.quantize_batch(torch.zeros(L, rows, k)), fp4gemm.quantize_batch(torch.zeros(L, columns, k))
        bias = values(L, columns, dtype=torch.bfloat16)
        assert torch.equal(fp4gemm.bmm(a, b, bias), bias[:, None].expand(L, rows, columns))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic):
    x, w, bias, w_next = values(L, M, K), batch(N), values(L, N), batch(6, N)

    def both(x, w, bias, out):
        a = fp4gemm.quantize_batch(x)
        made = fp4gemm.bmm_fp4(a, w, bias, outer_scale=torch.ones(L), sf_layout="linear")
        d = fp4gemm.bmm(made, w_next, column_major=True)
        return d, fp4gemm.bmm(a, w, bias[0], c=out, out=out).clone()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(compiled(x, w, bias, torch.ones(L, M, N)), both(x, w, bias, torch.ones(L, M, N)), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_opcheck():
    a, b = batch(M), batch(N).prepack()
    flat = (a.data, a.block_scale, a.outer_scale, a.sf_layout, b.data, b.block_scale, b.outer_scale, b.sf_layout)
    rest = ("sm90", N, K, values(L, N), None, 0.0, "relu")
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # as in test_ops.py
    torch.library.opcheck(torch.ops.fp4gemm.bmm.default, (*flat, *rest, torch.float32, True), test_utils=checks)
    fp4 = (*flat, "sm90", N, K, None, torch.ones(L, M), "linear", "gelu")
    torch.library.opcheck(torch.ops.fp4gemm.bmm_fp4.default, fp4, test_utils=checks)
    torch.library.opcheck(torch.ops.fp4gemm.bmm_out.default, (values(L, M, N), *flat, *rest), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": reference.quantize(values(M, K))}, "a: expected an FP4Batch, got FP4Tensor"),
        ({"b": torch.ones(L, N, K)}, "b: expected an FP4Batch, got Tensor"),
        ({"a": batch(k=48)}, r"a: expected shape \[L, M, K\] with L = 3, K = 40 .*, got \(3, 5, 48\)"),
        ({"a": FP4Batch.stack(list(batch())[:2])}, r"a: expected shape .* L = 3, .*, got \(2, 5, 40\)"),
        ({"b": batch(N).to("meta")}, r"b: expected device cpu \(that of a\), got meta"),
        ({"bias": torch.ones(L)}, r"bias: expected shape \[7\] or \[3, 7\] \(rows of b\), got \[3\]"),
        ({"bias": torch.ones(N).double()}, "bias.dtype: expected one of"),
        ({"c": torch.ones(M, N)}, "c: expected dtype torch.bfloat16"),
        ({"c": torch.ones(M, N).bfloat16()}, r"c: expected shape \[3, 5, 7\], got \[5, 7\]"),
        ({"out": torch.ones(L, N, M)}, r"out: expected shape \[3, 5, 7\], got \[3, 7, 5\]"),
        ({"out": torch.ones(M, N, L).permute(2, 0, 1)}, "out: expected contiguous rows or columns"),
        ({"out_dtype": torch.int8}, "out_dtype: expected one of"),
        ({"activation": "tanh"}, "activation: expected one of"),
    ],
)
def test_bmm_refuses(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fp4gemm.bmm(**{"a": batch(M), "b": batch(N), **change})


def test_gradients_are_refused_or_absent():
    a, b = batch(M), batch(N)
    bias = values(N).requires_grad_()
    d = fp4gemm.bmm(a, b, bias)
    with pytest.raises(RuntimeError):
        d.sum().backward()
