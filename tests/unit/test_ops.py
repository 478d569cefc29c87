"""The operators on CPU tensors: the reference's results, inside torch.compile and autograd too, and bad input."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import fp4gemm
from fp4gemm import gemm_library, reference
from fp4gemm.formats import SF_LAYOUTS

M, N, K = 5, 7, 40  # nothing is a multiple of a block
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_same(got, expected):
    assert (got.shape, got.sf_layout) == (expected.shape, expected.sf_layout)
    for field in ("data", "block_scale", "outer_scale"):
        one, other = (getattr(t, field) for t in (got, expected))
        assert one.dtype == other.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), field


@pytest.fixture
def x():
    return values(M, K)


@pytest.fixture
def w():
    return reference.quantize(values(N, K, seed=1))


@pytest.fixture
def bias():
    return values(N, seed=2)


# --- results ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"sf_layout": name} for name in SF_LAYOUTS),
        {"scaling": "per_tensor"},
        {"scaling": "per_column", "convention": "torchao"},
        {"scaling": "per_tensor", "block": (16, 16), "convention": "modelopt"},
        {"outer_scale": torch.tensor(0.01)},
        {"outer_scale": torch.tensor([0.01]), "block": (16, 16)},
        {"outer_scale": torch.linspace(0.001, 0.1, M), "sf_layout": "linear"},
        {"outer_scale": torch.linspace(0.001, 0.1, K), "scaling": "per_column"},
        {"check_finite": True},
        {"transposed": True},
        {"transposed": True, "hadamard": 0xACE1, "seed": 3},
        {"seed": torch.tensor([5])},
        {"adaptive": "mse", "scaling": "per_tensor", "block": (16, 16)},
        {"amax": torch.tensor(2.5)},
        {"amax": torch.linspace(0.1, 3, M), "adaptive": "mae"},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_quantize_is_the_reference(x, dtype, options):
    assert_same(fp4gemm.quantize(x.to(dtype), **options), reference.quantize(x.to(dtype), **options))


RESIDUAL = {"residual": 32, "channel_order": torch.arange(47, -1, -1)}


@pytest.mark.parametrize("options", [{}, {"residual_side": "weight"}, {"seed": 2}])
def test_a_residual_is_the_reference(options):
    x = values(M, 48)
    got = fp4gemm.quantize(x, **RESIDUAL, **options)
    assert got.shape == (M, 80)
    assert_same(got, reference.quantize(x, **RESIDUAL, **options))


@pytest.mark.parametrize("name", SF_LAYOUTS)
def test_e4m3_is_quantized_as_its_values(x, name):
    x = x.to(torch.float8_e4m3fn)
    assert_same(fp4gemm.quantize(x, sf_layout=name), reference.quantize(x.float(), sf_layout=name))


BOTH = [
    {},
    {"scaling": "per_tensor", "block": (16, 16)},
    {"hadamard": 0xACE1, "seed": 7, "sf_layout": "8x4", "transposed_sf_layout": "linear"},
    {"outer_scale": torch.tensor(0.01), "adaptive": "mse"},
    {"amax": (torch.linspace(0.1, 3, M), torch.tensor(2.5)), "seed": torch.tensor(3)},
]


@pytest.mark.parametrize("options", BOTH, ids=lambda options: "-".join(options) or "default")
def test_quantize_both_is_the_reference(x, options):
    for got, expected in zip(fp4gemm.quantize_both(x, **options), reference.quantize_both(x, **options), strict=True):
        assert_same(got, expected)


def test_amax_is_the_reference(x):
    for options in (
        {},
        {"columns": True, "tensor": True, "hadamard": 3},
        {"rows": False, "tensor": True},
        {"sums": True},
    ):
        got, expected = fp4gemm.amax(x, **options), reference.amax(x, **options)
        assert len(got) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_quantize_writes_into_out(x):
    out = fp4gemm.quantize(x)
    data = out.data
    assert fp4gemm.quantize(-x, out=out) is out
    assert out.data is data
    assert_same(out, reference.quantize(-x))
    assert fp4gemm.quantize(x, out=out, noop=torch.tensor(True)) is out
    assert_same(out, reference.quantize(-x))
    fp4gemm.quantize(x, out=out, noop=torch.zeros(1))
    assert_same(out, reference.quantize(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("leading", [(M,), (2, 3)])
@pytest.mark.parametrize("outer_scale", [None, torch.tensor(0.01)])
def test_quantize_gemm_with_a_residual(bias, dtype, leading, outer_scale):
    x, weight = values(*leading, 48, dtype=dtype), values(N, 48, seed=1)
    w = fp4gemm.quantize(weight, **RESIDUAL, residual_side="weight")
    got = fp4gemm.quantize_gemm(x, w.prepack(), bias, outer_scale=outer_scale, **RESIDUAL)
    a = reference.quantize(x.reshape(-1, 48), outer_scale=outer_scale, **RESIDUAL)
    assert torch.equal(got, reference.gemm(a, w, bias, dtype).reshape(*leading, N))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_the_reference(w, dtype):
    for name in SF_LAYOUTS:
        got = fp4gemm.dequantize(w.with_layout(name), dtype)
        assert got.dtype == dtype
        assert torch.equal(got, reference.dequantize(w, dtype))
    assert torch.equal(fp4gemm.dequantize(w), reference.dequantize(w, torch.float32))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS])
@pytest.mark.parametrize("layouts", list(itertools.product(("linear", "128x4"), repeat=2)))
def test_gemm_is_the_reference(x, w, bias, out_dtype, bias_dtype, layouts):
    a, b = (t.with_layout(name) for t, name in zip((reference.quantize(x), w), layouts, strict=True))
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    got = fp4gemm.gemm(a, b, bias, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert torch.equal(got, reference.gemm(a, b, bias, out_dtype))


def test_gemm_gives_bf16_unless_told(x, w):
    assert fp4gemm.gemm(reference.quantize(x), w).dtype == torch.bfloat16


# --- plain activations, prepacked weights, C, out ---


@pytest.fixture(params=["plain", "prepacked"])
def either(request, w):
    """The same weight in both forms."""
    return w if request.param == "plain" else w.prepack()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, *FLOATS])
def test_gemm_of_plain_activations(x, w, either, bias, dtype, out_dtype):
    x = x.to(dtype)
    got = fp4gemm.gemm(x, either, bias, out_dtype=out_dtype)
    assert got.dtype == (out_dtype or dtype)
    assert torch.equal(got, reference.gemm(x, w, bias, out_dtype))
    exact = x.double() @ reference.dequantize(w).double().t() + bias.double()
    assert bool(((got.double() - exact).abs() <= 0.01 * exact.abs() + 0.01).all())


def test_prepacked_operands_give_the_same(x, w, either, bias):
    a = reference.quantize(x)
    expected = reference.gemm(a, w, bias, torch.float32)
    for one in (a, a.prepack()):
        assert torch.equal(fp4gemm.gemm(one, either, bias, out_dtype=torch.float32), expected)
    assert torch.equal(fp4gemm.quantize_gemm(x, either, bias), fp4gemm.quantize_gemm(x, w, bias))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("beta", [1.0, 0.0, -0.3])
def test_c_is_added(x, w, either, bias, out_dtype, beta):
    """beta * c and its sum are rounded on their own in float32, behind the bias."""
    x, c = x.bfloat16(), values(M, N, dtype=out_dtype, seed=3)
    got = fp4gemm.gemm(x, either, bias, c=c, beta=beta, out_dtype=out_dtype)
    base = reference.gemm(x, w, bias, torch.float32)
    assert torch.equal(got, (base + c.float() * beta).to(out_dtype))
    if beta == 1.0:
        assert torch.equal(fp4gemm.gemm(x, either, bias, c=c, out_dtype=out_dtype), got)


def test_without_c_beta_means_nothing(x, w):
    assert torch.equal(fp4gemm.gemm(x.half(), w, beta=float("nan")), fp4gemm.gemm(x.half(), w))


OUTS = {
    "whole": lambda: torch.empty(M, N),
    "slice": lambda: torch.empty(M + 2, N + 3)[1:-1, 2:-1],
    "column-major": lambda: torch.empty(N, M).t(),
    "column-major slice": lambda: torch.empty(N + 2, M + 3)[1:-1, 2:-1].t(),
}


@pytest.mark.parametrize("make", OUTS.values(), ids=OUTS)
def test_out_is_written_and_returned(x, w, either, bias, make):
    x, out = x.half(), make().fill_(float("nan"))
    assert fp4gemm.gemm(x, either, out=out) is out
    assert torch.equal(out, reference.gemm(x, w, out_dtype=torch.float32))
    c = out.clone()
    assert fp4gemm.gemm(x, either, bias, c=out, beta=0.5, out=out) is out  # in place
    assert torch.equal(out, reference.gemm(x, w, bias, torch.float32, c=c, beta=0.5))
    a = reference.quantize(x)
    assert torch.equal(fp4gemm.gemm(a, either, out=out, out_dtype=torch.float32), reference.gemm(a, w, None, out.dtype))


def test_column_major(x, w, either):
    for a in (x.bfloat16(), reference.quantize(x)):
        got = fp4gemm.gemm(a, either, column_major=True)
        assert got.t().is_contiguous()
        assert torch.equal(got, fp4gemm.gemm(a, w))
    none = fp4gemm.gemm(x[:0].half(), either, column_major=True)
    assert none.shape == (0, N)


ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_last_operation_before_the_cast(x, w, either, bias, name):
    a, c = reference.quantize(x), values(M, N, seed=4)
    full = reference.gemm(a, w, bias, torch.float32, c=c, beta=0.5)
    assert full.min() < 0 < full.max()
    got = fp4gemm.gemm(a, either, bias, c=c, beta=0.5, activation=name, out_dtype=torch.float32)
    torch.testing.assert_close(got, ACTIVATIONS[name](full))
    rounded = fp4gemm.gemm(a, either, bias, c=c.half(), beta=0.5, activation=name, out_dtype=torch.float16)
    full = reference.gemm(a, w, bias, torch.float32, c=c.half().float(), beta=0.5, activation=name)
    assert torch.equal(rounded, full.half())


def test_relu_keeps_nan(w):
    a = torch.full((1, K), torch.nan, dtype=torch.bfloat16)
    assert fp4gemm.gemm(a, w, activation="relu").isnan().all()


@pytest.mark.parametrize("sf_layout", ["128x4", "linear"])
@pytest.mark.parametrize("outer", [torch.tensor(0.1), torch.tensor([0.1]), torch.linspace(0.01, 0.5, M)],
                         ids=lambda t: str(list(t.shape)))  # fmt: skip
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gemm_fp4_is_quantize_of_gemm(x, w, either, bias, sf_layout, outer, activation):
    a = reference.quantize(x)
    got = fp4gemm.gemm_fp4(a, either, bias, outer_scale=outer, activation=activation, sf_layout=sf_layout)
    full = reference.gemm(a, w, bias, torch.float32, activation=activation)
    assert_same(got, reference.quantize(full, outer_scale=outer, sf_layout=sf_layout, convention="te_per_token"))


def test_gemm_fp4_compiles(x, w, bias):
    a, outer = reference.quantize(x), torch.linspace(0.01, 0.5, M)
    compiled = torch.compile(lambda a: fp4gemm.gemm_fp4(a, w, bias, outer_scale=outer), backend="eager", fullgraph=True)
    assert_same(compiled(a), fp4gemm.gemm_fp4(a, w, bias, outer_scale=outer))


def test_gemm_fp4_of_nothing(w):
    none = fp4gemm.gemm_fp4(fp4gemm.quantize(values(0, K)), w, outer_scale=torch.ones(()))
    assert none.shape == (0, N)


def test_transposed_operands_make_the_other_orientations():
    """x^T . y for x [K, M] and y [K, N]: FP4Tensors of the transposes, whose blocks run along K."""
    x, y = values(K, M), values(K, N, seed=5)
    a, b = (fp4gemm.quantize(t, transposed=True) for t in (x, y))
    got = fp4gemm.gemm(a, b, out_dtype=torch.float32)
    assert torch.equal(got, reference.gemm(reference.quantize(x.t()), reference.quantize(y.t()), None, torch.float32))
    assert (got - x.t() @ y).norm() < 0.2 * (x.t() @ y).norm()


def test_empty_products_with_c_and_out(bias):
    b, x, c = fp4gemm.quantize(torch.ones(N, 0)), torch.ones(M, 0).half(), values(M, N)
    for weight in (b, b.prepack()):
        assert torch.equal(fp4gemm.gemm(x, weight, bias, c=c, beta=2.0, out_dtype=torch.float32), bias + c * 2)
        out = torch.full((M, N), float("nan"))
        assert fp4gemm.gemm(x, weight, out=out).eq(0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("outer_scale", [None, torch.tensor(0.01), torch.linspace(0.001, 0.1, M)])
def test_quantize_gemm_is_gemm_of_quantize(x, w, bias, dtype, outer_scale):
    x = x.to(dtype)
    expected = reference.gemm(reference.quantize(x, outer_scale=outer_scale), w, bias, dtype)
    assert torch.equal(fp4gemm.quantize_gemm(x, w, bias, outer_scale=outer_scale), expected)
    got = fp4gemm.quantize_gemm(x, w, bias, out_dtype=torch.float16, outer_scale=outer_scale)
    assert torch.equal(got, reference.gemm(reference.quantize(x, outer_scale=outer_scale), w, bias, torch.float16))


@pytest.mark.parametrize("leading", [(1, 6), (2, 3), (1, 2, 1, 3), (0, 3), (6, 1)])
def test_leading_dimensions(w, bias, leading):
    x = values(*leading, K)
    expected = fp4gemm.quantize_gemm(x.reshape(-1, K), w, bias)
    assert torch.equal(fp4gemm.quantize_gemm(x, w, bias), expected.reshape(*leading, N))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack((x, -x), dim=-1)[..., 0],
        lambda x: torch.cat((x, x), dim=1)[:, :K],
        lambda x: x[:1].expand(M, K),
    ],
    ids=["transposed", "every-second", "slice", "expanded"],
)
def test_strides_do_not_matter(x, w, view):
    strided = view(x)
    assert not strided.is_contiguous()
    assert_same(fp4gemm.quantize(strided), fp4gemm.quantize(strided.contiguous()))
    assert torch.equal(fp4gemm.quantize_gemm(strided, w), fp4gemm.quantize_gemm(strided.contiguous(), w))


def test_zero_rows(w, x):
    none = fp4gemm.quantize(x[:0])
    assert none.shape == (0, K)
    assert fp4gemm.dequantize(none).shape == (0, K)
    assert fp4gemm.gemm(none, w).shape == fp4gemm.quantize_gemm(x[:0], w).shape == (0, N)
    assert fp4gemm.gemm(w, none).shape == (N, 0)


def test_k_of_zero_is_the_bias(x, w, bias):
    a, b = (fp4gemm.quantize(t[:, :0]) for t in (x, values(N, K)))
    assert torch.equal(fp4gemm.gemm(a, b, bias, out_dtype=torch.float32), bias.expand(M, N))
    assert torch.equal(fp4gemm.quantize_gemm(x[:, :0], b, bias), bias.expand(M, N))
    assert fp4gemm.quantize_gemm(x[:, :0], b).eq(0).all()


def test_a_module_parameter_is_a_tensor(x, w):
    parameter = torch.nn.Parameter(x, requires_grad=False)
    assert torch.equal(fp4gemm.quantize_gemm(parameter, w), fp4gemm.quantize_gemm(x, w))


def test_meta_tensors_give_shapes():
    a, b = (fp4gemm.quantize(torch.empty(rows, K, device="meta")) for rows in (M, N))
    assert (a.device.type, a.shape) == ("meta", (M, K))
    assert fp4gemm.gemm(a, b).shape == (M, N)
    assert fp4gemm.quantize_gemm(torch.empty(2, M, K, device="meta"), b).shape == (2, M, N)


# --- inside torch ---


def every_call(x, w, bias):
    q = fp4gemm.quantize(x * 2, scaling="per_tensor")
    d = fp4gemm.gemm(q, w, bias, out_dtype=torch.float32)
    return d, fp4gemm.dequantize(q), fp4gemm.quantize_gemm(x, w, bias), fp4gemm.quantize(x, sf_layout="linear").data


def test_compiles_whole_and_once_for_every_m(w, bias):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(every_call, fullgraph=True, dynamic=True, backend=counter)
    for rows in (M, 2, 33, 130):
        x = values(rows, K)
        for got, expected in zip(compiled(x, w, bias), every_call(x, w, bias), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


def every_option(x, out, seed, noop):
    q = fp4gemm.quantize(x, transposed=True, hadamard=0xACE1, seed=seed)
    r = fp4gemm.quantize(x, residual=16, channel_order=torch.arange(47, -1, -1), seed=5)
    row, column = fp4gemm.quantize_both(x, hadamard=1, seed=seed, amax=fp4gemm.amax(x, columns=True, hadamard=1))
    fp4gemm.quantize(x, seed=seed, noop=noop, out=out)
    d = fp4gemm.quantize_gemm(x, r, residual=16)
    return q, r, row, column, out, d, fp4gemm.amax(x, tensor=True), fp4gemm.quantize(x, adaptive="mse")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_compiles_with_every_option(dynamic, skip):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(every_option, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows in (M, 2, 33):
        x = values(rows, 48)
        outs = [fp4gemm.quantize(-x) for _ in range(2)]
        flags = torch.tensor(rows), torch.tensor(skip)
        results = [pytree.tree_leaves(f(x, out, *flags)) for f, out in zip((compiled, every_option), outs, strict=True)]
        for got, expected in zip(*results, strict=True):
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (got, expected)))
        assert_same(*outs)
        assert_same(outs[0], fp4gemm.quantize(-x) if skip else fp4gemm.quantize(x, seed=rows))
    assert counter.frame_count == (1 if dynamic else 3)


def test_compiles_once_for_every_seed():
    """An int that changes becomes a symbol: two compilations at the most."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, seed: fp4gemm.quantize(x, seed=seed), fullgraph=True, backend=counter)
    x = values(M, K)
    for seed in (3, 4, 5, 2**40):
        assert_same(compiled(x, seed), fp4gemm.quantize(x, seed=seed))
    assert counter.frame_count <= 2


def with_prepacked(x, w, out, c):
    fp4gemm.gemm(x, w, out=out)
    d = fp4gemm.gemm(x + 1, w, c=c, beta=0.25, column_major=True)
    return d, fp4gemm.quantize_gemm(x, w), fp4gemm.gemm(fp4gemm.quantize(x), w), out * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_prepacked_weights_and_out(w, dynamic):
    torch._dynamo.reset()
    p = w.prepack()
    compiled = torch.compile(with_prepacked, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (M, 2, 33):
        x, c = values(rows, K).bfloat16(), values(rows, N).bfloat16()
        outs = [torch.full((rows, N), float("nan"), dtype=torch.bfloat16) for _ in range(2)]
        results = compiled(x, p, outs[0], c), with_prepacked(x, p, outs[1], c)
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
        assert torch.equal(*outs)


def test_compiled_accumulation_in_place(w):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, out: fp4gemm.gemm(x, w, c=out, out=out), fullgraph=True, backend="aot_eager")
    x, out = values(M, K).half(), values(M, N)
    want = fp4gemm.gemm(x, w, c=out, out_dtype=torch.float32)
    compiled(x, w.prepack(), out)
    assert torch.equal(out, want)


@pytest.mark.parametrize("form", ["plain", "prepacked"])
def test_compiles_once_for_every_m_and_beta_stays_out_of_it(w, form):
    """A default float traced as a symbol costs a second compilation: beta is one only where there is a C."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fp4gemm.gemm, fullgraph=True, dynamic=True, backend=counter)
    b = w if form == "plain" else w.prepack()
    for rows in (M, 2, 33, 130):
        x = values(rows, K).bfloat16()
        assert torch.equal(compiled(x, b), fp4gemm.gemm(x, w))
    assert counter.frame_count == 1


def test_compiled_graph_holds_the_operators(w, bias):
    """The operators are opaque to a compiler: it must not see, and so not change, what is inside."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(every_call, fullgraph=True, backend=counter)(values(M, K), w, bias)
    targets = {getattr(node.target, "_qualified_op_name", "") for node in counter.graphs[0].graph.nodes}
    assert targets - {""} == {f"fp4gemm::{name}" for name in ("quantize", "dequantize", "gemm", "quantize_gemm")}


def plain(x):
    return x.bfloat16(), None, None, ""


def prepacked():
    return gemm_library.flat(reference.quantize(values(N, K, seed=1)).prepack())


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("quantize", lambda x, w, bias: (x, False, "128x4", "te_per_token", 1, None)),
        ("quantize", lambda x, w, bias: (x, True, "linear", "te", 16, None)),
        ("quantize", lambda x, w, bias: (x.t(), False, "8x4", "torchao", 1, torch.ones(K))),
        (
            "quantize",
            lambda x, w, bias: (x.t(), False, "8x4", "te", 1, None, torch.ones(K), 9, torch.tensor(1), None, None),
        ),
        (
            "quantize",
            lambda x, w, bias: (
                *(x[:, :32], True, "linear", "te", 1, None, None, None, None, 3, None, 16, "weight", torch.arange(32)),
            ),
        ),
        (
            "quantize",
            lambda x, w, bias: (
                *(x, False, "128x4", "te", 1, None, None, None, None, None, None, 0, "activation", None, "silu_mul"),
            ),
        ),
        (
            "quantize_rmsnorm",
            lambda x, w, bias: (x[0], 1e-5, values(M, K, seed=4), x, False, "8x4", "te_per_token", 1, None),
        ),
        ("quantize_rmsnorm", lambda x, w, bias: (x[0], 0.0, None, x, True, "128x4", "te", 1, None)),
        (
            "quantize_out",
            lambda x, w, bias: (
                *gemm_library.flat(fp4gemm.quantize(-x))[:3],
                *(torch.tensor(False), x, False, "128x4", "te_per_token", 1, None, None, None, None, 1),
            ),
        ),
        (
            "quantize_both",
            lambda x, w, bias: (
                *(x, False, True, "8x4", "linear", "te", 1, None, None, None, torch.tensor(3.0)),
                *(1, torch.tensor(3), None, None),
            ),
        ),
        ("amax", lambda x, w, bias: (x, True, True, True, 3)),
        ("amax", lambda x, w, bias: (x, False, True, False, None, True)),
        ("dequantize", lambda x, w, bias: (*w, K, torch.bfloat16)),
        ("prepack", lambda x, w, bias: (w[0], w[1], "128x4", K)),
        ("unpack", lambda x, w, bias: (reference.quantize(values(70, 130)).prepack().data, "8x4", 70, 130)),
        ("gemm", lambda x, w, bias: (*w, *w, N, K, bias, None, 0.0, None, torch.float32, False)),
        (
            "gemm",
            lambda x, w, bias: (*plain(x), *prepacked(), N, K, None, values(M, N), 0.5, "silu", torch.float32, True),
        ),
        ("gemm_out", lambda x, w, bias: (values(M, N), *plain(x), *w, N, K, bias, values(M, N), 1.0, None)),
        ("gemm_out", lambda x, w, bias: (values(N, N).t(), *w, *prepacked(), N, K, None, None, 0.0, "relu")),
        ("gemm_fp4", lambda x, w, bias: (*w, *w, N, K, bias, torch.tensor(0.1), "128x4", "gelu")),
        ("gemm_fp4", lambda x, w, bias: (*plain(x), *prepacked(), N, K, None, torch.ones(M), "linear", None)),
        ("quantize_gemm", lambda x, w, bias: (x, *w, N, bias, torch.float16, None)),
        ("quantize_gemm", lambda x, w, bias: (x, *prepacked(), N, None, torch.float32, torch.tensor(0.1))),
        (
            "quantize_gemm",
            lambda x, w, bias: (
                *(x[:, :32], *gemm_library.flat(reference.quantize(values(N, 32), residual=16)), N),
                *(None, torch.float32, None, 16, torch.arange(32)),
            ),
        ),
    ],
)
def test_opcheck(x, w, bias, name, arguments):
    """``w`` and the helpers below are operands as ``gemm_library.flat`` passes them."""
    # Not test_schema: it compares every tensor with a copy, for which float8 lacks an operation.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    kind = w.sf_layout if name == "dequantize" else ":" + w.sf_layout
    fields = (w.data, w.block_scale, w.outer_scale, kind)
    operator = getattr(torch.ops.fp4gemm, name).default
    torch.library.opcheck(operator, arguments(x, fields, bias), test_utils=checks)


@pytest.mark.parametrize(
    "call",
    [lambda x, w: fp4gemm.quantize_gemm(x, w), lambda x, w: fp4gemm.quantize(x).outer_scale],
    ids=["quantize_gemm", "quantize"],
)
def test_no_gradient_is_dropped_in_silence(x, w, call):
    x.requires_grad_()
    result = call(x, w)
    assert result.requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        result.sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(x, w), result)
            assert not call(x, w).requires_grad


def test_a_product_into_out_refuses_gradients(x, w):
    """Its operator returns nothing that could have one."""
    out, batch = torch.zeros(len(x), w.rows), fp4gemm.FP4Batch.stack([w])
    a = fp4gemm.quantize(x)
    a = fp4gemm.FP4Tensor(a.data, a.block_scale, a.outer_scale.requires_grad_(), a.shape, a.sf_layout)
    weights, offsets = fp4gemm.stack_weights([w]), torch.tensor([0, len(x)])
    for call in (
        lambda: fp4gemm.gemm(a, w, out=out),
        lambda: fp4gemm.bmm(fp4gemm.FP4Batch.stack([a]), batch, out=out[None]),
        lambda: fp4gemm.gemm_grouped(a, weights, offsets, out=out),
    ):
        with pytest.raises(RuntimeError, match=r"^out: expected None where an argument requires a gradient"):
            call()
        assert not out.any()
        with torch.no_grad():
            call()
        assert out.any()
        out.zero_()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: fp4gemm.quantize_gemm(x, w),
        lambda x, w: fp4gemm.quantize(x).outer_scale,
        lambda x, w: fp4gemm.gemm(x.bfloat16(), w),
    ],
    ids=["quantize_gemm", "quantize", "gemm"],
)
def test_no_tangent_is_dropped_in_silence(x, w, call):
    with forward_ad.dual_level():
        assert torch.equal(call(x, w), call(x.clone(), w))  # without a tangent all is as ever
        with pytest.raises(NotImplementedError, match="tangent"):
            call(forward_ad.make_dual(x, torch.ones_like(x)), w)
    with pytest.raises(NotImplementedError, match="tangent"):
        torch.func.jvp(lambda x: call(x, w), (x,), (torch.ones_like(x),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(x, w, bias):
    batch = torch.stack((x, -x, 2 * x))
    result = torch.vmap(lambda x: fp4gemm.quantize_gemm(x, w, bias))(batch)
    assert torch.equal(result, torch.stack([fp4gemm.quantize_gemm(x, w, bias) for x in batch]))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, bias: fp4gemm.quantize_gemm(x, w, bias.requires_grad_()),
        lambda x, w, bias: fp4gemm.gemm(w, w, bias.requires_grad_(), out_dtype=torch.float32),
        lambda x, w, bias: fp4gemm.quantize(x, outer_scale=torch.ones(M, requires_grad=True)).outer_scale,
        lambda x, w, bias: fp4gemm.quantize_gemm(x, w, outer_scale=torch.tensor(1.0, requires_grad=True)),
        lambda x, w, bias: fp4gemm.dequantize(fp4gemm.quantize(x.requires_grad_())),
        lambda x, w, bias: fp4gemm.gemm(fp4gemm.quantize(x.requires_grad_()), w),
        lambda x, w, bias: fp4gemm.gemm(w, fp4gemm.quantize(x.requires_grad_())),
        lambda x, w, bias: fp4gemm.quantize_gemm(x, fp4gemm.quantize(x.clone().requires_grad_())),
    ],
    ids=[
        *("quantize_gemm-bias", "gemm-bias", "quantize-outer_scale", "quantize_gemm-outer_scale"),
        *("dequantize-t", "gemm-a", "gemm-b", "quantize_gemm-w"),
    ],
)
def test_no_gradient_of_another_operand_is_dropped_in_silence(x, w, bias, call):
    result = call(x, w, bias)
    assert result.requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        result.sum().backward()


# --- bad input ---


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, w: fp4gemm.quantize(x.double()), TypeError, r"x.dtype: expected one of .*, got torch.float64"),
        (lambda x, w: fp4gemm.quantize(x.int()), TypeError, r"x.dtype: expected one of .*, got torch.int32"),
        (lambda x, w: fp4gemm.quantize([[1.0]]), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda x, w: fp4gemm.quantize(x[0]), ValueError, r"x: expected 2 dimensions \[M, K\], got shape \(40,\)"),
        (lambda x, w: fp4gemm.quantize(x[None]), ValueError, r"x: expected 2 dimensions .*\(1, 5, 40\)"),
        (lambda x, w: fp4gemm.quantize(x, scaling="row"), ValueError, "scaling: expected one of per_row.*got 'row'"),
        (lambda x, w: fp4gemm.quantize(x, sf_layout="4x4"), ValueError, "sf_layout: expected one of linear"),
        (
            lambda x, w: fp4gemm.quantize(x, outer_scale=torch.tensor(1.0, device="meta")),
            ValueError,
            r"outer_scale: expected device cpu \(that of x\), got meta",
        ),
        (lambda x, w: fp4gemm.dequantize(w.data), TypeError, "t: expected an FP4Tensor, got Tensor"),
        (lambda x, w: fp4gemm.dequantize(w, torch.float64), TypeError, "dtype: expected one of .*float64"),
        (lambda x, w: fp4gemm.gemm(x, w), TypeError, "a: expected an FP4Tensor, or a bf16 or fp16 tensor, got dtype"),
        (lambda x, w: fp4gemm.gemm([1.0], w), TypeError, "a: expected an FP4Tensor, or a bf16 .*, got list"),
        (lambda x, w: fp4gemm.gemm(x[0].half(), w), ValueError, r"a: expected shape \[M, K\] with K = 40 .*\(40,\)"),
        (lambda x, w: fp4gemm.gemm(w, x), TypeError, "b: expected an FP4Tensor, got Tensor"),
        (lambda x, w: fp4gemm.gemm(fp4gemm.quantize(x[:, :39]), w), ValueError, r"a: .* K = 40 .*\(5, 39\)"),
        (lambda x, w: fp4gemm.gemm(w, w.to("meta")), ValueError, r"b: expected device cpu \(that of a\), got meta"),
        (lambda x, w: fp4gemm.gemm(w, w, out_dtype=torch.float64), TypeError, "out_dtype: expected one of"),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, c=torch.ones(M, N)),
            TypeError,
            r"c: expected dtype torch.float16 \(that",
        ),
        (lambda x, w: fp4gemm.gemm(x.half(), w, c=torch.ones(N).half()), ValueError, r"c: expected shape \[5, 7\]"),
        (lambda x, w: fp4gemm.gemm(x.half(), w, c=[0.0]), TypeError, "c: expected a torch.Tensor or None, got list"),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, out=[0.0]),
            TypeError,
            "out: expected a torch.Tensor or None, got list",
        ),
        (lambda x, w: fp4gemm.gemm(x.half(), w, out=torch.ones(N, M)), ValueError, r"out: expected shape \[5, 7\]"),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, out=torch.ones(M, N, dtype=torch.int32)),
            TypeError,
            "out.dtype: expected one of",
        ),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, out=torch.ones(M, N), out_dtype=torch.float16),
            TypeError,
            r"out: expected dtype torch.float16 \(that of D\), got torch.float32",
        ),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, out=torch.ones(2 * M, 2 * N)[::2, ::2]),
            ValueError,
            "out: expected contiguous rows or columns",
        ),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, out=torch.ones(M, N, device="meta")),
            ValueError,
            "out: expected device cpu .* got meta",
        ),
        (lambda x, w: fp4gemm.gemm(w, w, torch.ones(8)), ValueError, r"bias: expected shape \[7\] .*got \[8\]"),
        (lambda x, w: fp4gemm.quantize_gemm(x, x), TypeError, "w: expected an FP4Tensor, got Tensor"),
        (lambda x, w: fp4gemm.quantize_gemm([1.0], w), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda x, w: fp4gemm.quantize_gemm(x.double(), w), TypeError, "x.dtype: expected one of .*torch.float64"),
        (lambda x, w: fp4gemm.quantize_gemm(x[0], w), ValueError, r"x: expected at least 2 dimensions .*\(40,\)"),
        (lambda x, w: fp4gemm.quantize_gemm(x[:, :32], w), ValueError, r"with K = 40 .*got shape \(5, 32\)"),
        (lambda x, w: fp4gemm.quantize_gemm(x, w.to("meta")), ValueError, r"w: expected device cpu .*got meta"),
        (lambda x, w: fp4gemm.quantize_gemm(x.to("meta"), w), ValueError, r"w: expected device meta .*got cpu"),
        (
            lambda x, w: fp4gemm.quantize_gemm(x, w, torch.ones(N, device="meta")),
            ValueError,
            "bias: expected device cpu .*got meta",
        ),
        (lambda x, w: fp4gemm.quantize_gemm(x, w, torch.ones(N).double()), TypeError, "bias.dtype: expected one of"),
        (lambda x, w: fp4gemm.quantize_gemm(x, w, torch.ones(1, N)), ValueError, r"bias: expected shape \[7\]"),
        (lambda x, w: fp4gemm.quantize_gemm(x, w, out_dtype=torch.int8), TypeError, "out_dtype: expected one of"),
        (
            lambda x, w: fp4gemm.quantize_gemm(x, w, residual=16),
            ValueError,
            r"x: expected \[..., K\] with K = 24 .* less the residual 16\)",
        ),
        (lambda x, w: fp4gemm.quantize_gemm(x, w, residual=8), ValueError, "residual: expected a multiple of 16"),
        (
            lambda x, w: fp4gemm.quantize_gemm(x, w, channel_order=torch.arange(K)),
            ValueError,
            "channel_order: expected None without a residual",
        ),
        (
            lambda x, w: fp4gemm.gemm(x.half(), w, activation="tanh"),
            ValueError,
            "activation: expected one of relu, gelu,",
        ),
        (
            lambda x, w: fp4gemm.gemm_fp4(x.half(), w, outer_scale=torch.ones(3)),
            ValueError,
            r"outer_scale: expected shape \[\], \[1\] or \[5\] .*got \[3\]",
        ),
        (
            lambda x, w: fp4gemm.gemm_fp4(x.half(), w, outer_scale=2.0),
            TypeError,
            "outer_scale: expected a torch.Tensor",
        ),
        (
            lambda x, w: fp4gemm.gemm_fp4(x.half(), w, outer_scale=torch.ones(()), sf_layout="8x4"),
            ValueError,
            "sf_layout: expected one of 128x4, linear, got '8x4'",
        ),
        (lambda x, w: fp4gemm.quantize_gemm(x.to(torch.float8_e4m3fn), w), TypeError, "x.dtype: expected one of"),
        (lambda x, w: fp4gemm.gemm(x.to(torch.float8_e4m3fn), w), TypeError, "a: expected an FP4Tensor, or a bf16"),
        (lambda x, w: fp4gemm.quantize(x, hadamard=1), ValueError, "hadamard: needs transposed=True"),
        (lambda x, w: fp4gemm.quantize(x, noop=torch.tensor(1.0)), ValueError, "noop: expected None where out is None"),
        (lambda x, w: fp4gemm.quantize(x, out=w), ValueError, r"out: expected shape \(5, 40\), got \(7, 40\)"),
        (lambda x, w: fp4gemm.quantize_both(x, scaling="per_column"), ValueError, "scaling: expected one of per_row"),
        (lambda x, w: fp4gemm.amax(x, hadamard=1), ValueError, "hadamard: needs columns=True"),
        (
            lambda x, w: fp4gemm.quantize_gemm(x[None], w, outer_scale=torch.ones(1, M)),
            ValueError,
            r"outer_scale: expected shape \[\], \[1\] or \[5\]",
        ),
    ],
)
def test_bad_input_names_the_argument(x, w, call, error, message):
    with pytest.raises(error, match=message):
        call(x, w)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(x, value):
    x[2, 3] = value
    with pytest.raises(ValueError, match=r"x: expected finite values .*got 1 NaN or Inf"):
        fp4gemm.quantize(x, check_finite=True)
    assert_same(fp4gemm.quantize(x), reference.quantize(x))  # the documented result


def test_bad_input_inside_a_compiled_function(x, w):
    torch._dynamo.reset()
    compiled = torch.compile(fp4gemm.quantize_gemm, backend="eager")
    with pytest.raises(Exception, match="K = 40"):
        compiled(x[:, :32], w)
