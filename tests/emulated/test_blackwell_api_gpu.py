"""fp4gemm's public functions as on Blackwell, on a Hopper GPU: kernels are chosen, given their operands and launched by
the package, and run emulated. See docs/emulation.md.

Against the reference, bit for bit where sums are exact, else within the bound of float64; and against Hopper's engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import emulation
import gpu_cases as cases
import pytest
import torch
from specs import CHOSEN, VARIANTS

import fp4gemm
from fp4gemm import reference, select
from fp4gemm.formats import SF_LAYOUTS
from fp4gemm.reference.activation import activate
from fp4gemm.spec import GemmSpec
from fp4gemm.tensor import FP4Batch, FP4Tensor

ARCHS = ("sm_100a", "sm_120a")
DEVICE = torch.device("cuda")
BETA = -0.7  # no float32 number
on_gpu = pytest.mark.gpu


@dataclass(frozen=True)
class Terms:
    """What D is made of: arguments of gemm."""

    out_dtype: torch.dtype
    bias: torch.dtype | None = None
    source: bool = False
    activation: str | None = None
    column_major: bool = False


PLAIN = Terms(torch.bfloat16)
BIAS = Terms(torch.float16, torch.float16)
EVERYTHING = Terms(torch.float32, torch.bfloat16, source=True, activation="relu", column_major=True)
TERMS = {"plain": PLAIN, "bias": BIAS, "everything": EVERYTHING}
# Rows of less than 16 bytes, K that is no whole block or an odd number of them, one row, tails of every tile.
SHAPES = ((1, 8, 16), (1, 19, 32), (5, 8, 40), (130, 19, 96), (3, 200, 288), (129, 200, 96), (200, 248, 288))
# Where select takes the widest tile, on sm_100a more of them than a GPU has SMs.
LARGE = {
    "sm_100a": ((4096, 2048, 288), Terms(torch.float32, torch.float32)),
    "sm_120a": ((300, 2056, 288), PLAIN),
}
# An NVFP4 D: shape, dtype of bias, activation, layout of its block scales.
FP4_SHAPES = ((1, 8, 16), (5, 19, 40), (130, 33, 96), (200, 248, 288))
FP4 = {
    "sm_100a": [(shape, None, None, "128x4") for shape in FP4_SHAPES] + [((2048, 2040, 96), None, "relu", "linear")],
    "sm_120a": [(shape, None, "relu", "128x4") for shape in FP4_SHAPES]
    + [(shape, torch.bfloat16, None, "linear") for shape in FP4_SHAPES],
}

MEMBERS, BATCHED = 3, ((5, 19, 40), (136, 24, 96))

each_arch = pytest.mark.parametrize("arch", ARCHS)
NAMES = {terms: name for name, terms in TERMS.items()}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
# A D of one row is row-major, whatever was asked for.
CASES = [(shape, terms) for shape in SHAPES for terms in TERMS.values() if shape[0] > 1 or not terms.column_major]
each_terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())


def chosen(arch: str, shape: tuple[int, int, int], terms: Terms, members: int = 1) -> GemmSpec:
    out, bias = (None if dtype is None else select.DTYPE_NAMES[dtype] for dtype in (terms.out_dtype, terms.bias))
    assert out is not None
    flags = (terms.source, terms.activation, terms.column_major)
    return select.gemm_spec(arch, emulation.SMS, *shape, out, bias, *flags, members=members)


@each_arch
def test_the_kernels_are_those_that_are_built(arch: str) -> None:
    wanted = {chosen(arch, *case) for case in (*CASES, LARGE[arch])}
    wanted |= {chosen(arch, shape, terms, MEMBERS) for shape, terms in product(BATCHED, TERMS.values())}
    for shape, bias, activation, sf_layout in FP4[arch]:
        name = None if bias is None else select.DTYPE_NAMES[bias]
        wanted.add(select.gemm_spec(arch, emulation.SMS, *shape, "fp4", name, False, activation, False, sf_layout))
    for shape, _, activation, sf_layout in FP4[arch][:4]:
        fp4 = ("fp4", None, False, activation, False, sf_layout, MEMBERS)
        wanted.add(select.gemm_spec(arch, emulation.SMS, *shape, *fp4))
    assert wanted <= {*VARIANTS, *CHOSEN}
    assert {spec for spec in CHOSEN if spec.arch == arch} <= wanted
    largest = max((spec.tile for spec in wanted), key=lambda tile: tile[0] * tile[1])
    assert largest == {"sm_100a": (256, 256, 256), "sm_120a": (256, 128, 128)}[arch]


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> Iterator[str]:
    """The GPU is one of this arch."""
    if reason := emulation.missing():
        pytest.skip(reason)
    with emulation.blackwell(request.param) as launched:
        yield request.param
    assert set(launched) <= {*VARIANTS, *CHOSEN}, "not built by build_kernels.py"


# --- operands, on the CPU ---------------------------------------------------------------------------------------------


def layouts(shape: tuple[int, int, int]) -> tuple[str, str]:
    """Of the block scales of a and of b: other ones from shape to shape."""
    pairs = list(product(SF_LAYOUTS, SF_LAYOUTS))
    return pairs[sum(shape) % len(pairs)]


def exact(shape: tuple[int, int, int], scaling: str) -> tuple[FP4Tensor, FP4Tensor]:
    """Sums are exact in every order."""
    m, n, k = shape
    of_a, of_b = layouts(shape)
    return cases.exact_operand(m, k, of_a, scaling, m + k), cases.exact_operand(n, k, of_b, scaling, n - k)


def randoms(shape: tuple[int, int, int], scaling: str) -> tuple[FP4Tensor, FP4Tensor]:
    m, n, k = shape
    of_a, of_b = layouts(shape)
    a = reference.quantize(normal(m, k, m), scaling=scaling, sf_layout=of_a)
    return a, reference.quantize(normal(n, k, n), scaling=scaling, sf_layout=of_b)


def normal(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def extras(shape: tuple[int, int, int], terms: Terms) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bias and C."""
    m, n, _ = shape
    bias = None if terms.bias is None else normal(1, n, 7, terms.bias)[0]
    return bias, normal(m, n, 8, terms.out_dtype) if terms.source else None


def run(a: FP4Tensor, b: FP4Tensor, bias: torch.Tensor | None, c: torch.Tensor | None, terms: Terms) -> torch.Tensor:
    """D of operands on the CPU, on the CPU; whatever the package allocates holds NaN before."""
    bias, c = (None if t is None else t.to(DEVICE) for t in (bias, c))
    with cases.filled_with_nan():
        d = fp4gemm.gemm(
            a.to(DEVICE), b.to(DEVICE), bias, c=c, beta=BETA, activation=terms.activation, out_dtype=terms.out_dtype,
            column_major=terms.column_major,
        )  # fmt: skip
    assert d.shape == (a.rows, b.rows)
    assert d.t().is_contiguous() if terms.column_major else d.is_contiguous()
    return d.cpu()


def exactly(
    a: FP4Tensor, b: FP4Tensor, bias: torch.Tensor | None, c: torch.Tensor | None, terms: Terms
) -> torch.Tensor:
    return reference.gemm(a, b, bias, terms.out_dtype, c=c, beta=BETA, activation=terms.activation)


def exact_and_bound(
    a: FP4Tensor, b: FP4Tensor, bias: torch.Tensor | None, c: torch.Tensor | None, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """D in float64 and how far a right one may be from it; relu brings nothing further apart."""
    values, bound = cases.gemm_exact_and_bound(a, b, bias, terms.out_dtype, c, BETA)
    return activate(terms.activation, values), bound


def assert_near(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    wrong = ~((got.double() - want).abs() <= bound)
    assert not wrong.any(), f"{what}: {emulation.describe(got, want, wrong)}"


# --- gemm -------------------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize(
    "shape, terms", CASES, ids=["x".join(map(str, shape)) + "-" + NAMES[terms] for shape, terms in CASES]
)
def test_gemm(arch: str, shape: tuple[int, int, int], terms: Terms) -> None:
    bias, c = extras(shape, terms)
    for scaling in ("per_row", "per_tensor"):
        what = f"{shape} {scaling}"
        a, b = exact(shape, scaling)
        want = exactly(a, b, bias, c, terms)
        cases.assert_same_bits(run(a, b, bias, c, terms) + 0.0, want + 0.0, what)  # a sum of zero may be +0 or -0
        a, b = randoms(shape, scaling)
        assert_near(run(a, b, bias, c, terms), *exact_and_bound(a, b, bias, c, terms), what)


@on_gpu
def test_every_layout_of_block_scales(arch: str) -> None:
    shape = m, n, k = 40, 19, 96
    for of_a, of_b in product(SF_LAYOUTS, SF_LAYOUTS):
        a, b = cases.exact_operand(m, k, of_a, "per_row", 1), cases.exact_operand(n, k, of_b, "per_row", 2)
        want = exactly(a, b, None, None, PLAIN)
        cases.assert_same_bits(run(a, b, None, None, PLAIN) + 0.0, want + 0.0, f"{shape} {of_a} {of_b}")


@on_gpu
def test_more_tiles_than_sms(arch: str) -> None:
    shape, terms = LARGE[arch]
    a, b = exact(shape, "per_row")
    bias, c = extras(shape, terms)
    cases.assert_same_bits(run(a, b, bias, c, terms) + 0.0, exactly(a, b, bias, c, terms) + 0.0, f"{shape}")


@on_gpu
@pytest.mark.parametrize("leading", [248, 251])
def test_accumulates_in_place(arch: str, leading: int) -> None:
    """D is C, a part of a larger matrix whose columns are contiguous; around it nothing changes."""
    shape = m, n, _ = 200, 131, 96
    a, b = exact(shape, "per_row")
    bias, c = extras(shape, EVERYTHING)
    assert c is not None
    matrix = torch.full((n + 2, leading), float("nan"), device=DEVICE)
    d = matrix[1 : n + 1, :m].t()
    d.copy_(c)
    assert bias is not None
    result = fp4gemm.gemm(a.to(DEVICE), b.to(DEVICE), bias.to(DEVICE), c=d, beta=BETA, activation="relu", out=d)
    assert result.data_ptr() == d.data_ptr()
    cases.assert_same_bits(d.cpu() + 0.0, exactly(a, b, bias, c, EVERYTHING) + 0.0, f"{shape} leading {leading}")
    d.fill_(float("nan"))
    assert bool(matrix.isnan().all())


@on_gpu
@pytest.mark.parametrize("k", [32, 40, 288])
@pytest.mark.parametrize("turned", [(True, False), (False, True), (True, True)], ids=["a", "b", "both"])
def test_transposed_operands(arch: str, turned: tuple[bool, bool], k: int) -> None:
    """Operands of another orientation are what the quantizer makes of their transpose."""
    operands = []
    for rows, seed, transposed in zip((130, 72), (1, 2), turned, strict=True):
        x = normal(rows, k, seed, torch.bfloat16)
        x = x.t().contiguous() if transposed else x
        got = fp4gemm.quantize(x.to(DEVICE), transposed=transposed)
        want = reference.quantize(x, transposed=transposed)
        cases.assert_same(got.to("cpu"), want, f"K = {k}, transposed {transposed}")
        operands.append(want)
    a, b = operands
    assert_near(run(a, b, None, None, PLAIN), *exact_and_bound(a, b, None, None, PLAIN), f"K = {k}")


@each_arch
@on_gpu
@pytest.mark.skipif(emulation.missing() is not None, reason=emulation.missing() or "")
@each_terms
def test_agrees_with_hopper(arch: str, terms: Terms) -> None:
    """Where sums are exact to the bit, else each within the bound."""
    for shape in ((2, 19, 40), (129, 200, 288)):
        bias, c = extras(shape, terms)
        pairs = exact(shape, "per_row"), randoms(shape, "per_row")
        with emulation.blackwell(arch) as launched:
            emulated = [run(a, b, bias, c, terms) for a, b in pairs]
        assert [spec.arch for spec in launched] == [arch, arch]
        hopper = [run(a, b, bias, c, terms) for a, b in pairs]
        assert len(launched) == 2
        cases.assert_same_bits(emulated[0] + 0.0, hopper[0] + 0.0, f"{shape}")
        _, bound = exact_and_bound(*pairs[1], bias, c, terms)
        assert_near(emulated[1], hopper[1].double(), 2 * bound, f"{shape}")


@on_gpu
def test_in_a_graph(arch: str) -> None:
    """The plan is made while the stream is captured; a replay reads what the operands hold then."""
    m, n, k = 40, 72, 320
    a, b = (cases.exact_operand(rows, k, "128x4", "per_row", rows).to(DEVICE) for rows in (m, n))
    fp4gemm.gemm(b, b)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d = fp4gemm.gemm(a, b)
    a.data.copy_(a.data.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    cases.assert_same_bits(d.cpu() + 0.0, reference.gemm(a.to("cpu"), b.to("cpu")) + 0.0, "replayed")


# --- quantizers, and both ---------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("k", [40, 288])
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor", "given"])
def test_quantizers(arch: str, scaling: str, k: int) -> None:
    """Kernels of the arch, with e2m1 in software."""
    x = normal(70, k, 3, torch.bfloat16)
    outer = torch.linspace(1e-3, 1e-2, 70) if scaling == "given" else None
    how = "per_row" if scaling == "given" else scaling
    for sf_layout in SF_LAYOUTS:
        want = reference.quantize(x, scaling=how, sf_layout=sf_layout, outer_scale=outer)
        with cases.filled_with_nan():
            given = None if outer is None else outer.to(DEVICE)
            got = fp4gemm.quantize(x.to(DEVICE), scaling=how, sf_layout=sf_layout, outer_scale=given)
            values = fp4gemm.dequantize(got)
        cases.assert_same(got.to("cpu"), want, f"{scaling} {sf_layout}")
        cases.assert_same_bits(values.cpu(), reference.dequantize(want, values.dtype), f"{scaling} {sf_layout}")


@on_gpu
@pytest.mark.parametrize("given", [False, True])
@each_shape
def test_quantize_gemm(arch: str, shape: tuple[int, int, int], given: bool) -> None:
    """Bit for bit gemm of what the reference quantizes."""
    m, n, k = shape
    w = reference.quantize(normal(n, k, 5))
    outer = torch.linspace(1e-3, 1e-2, m) if given else None
    for terms in (PLAIN, BIAS):
        x, (bias, _) = normal(m, k, 6, terms.out_dtype), extras(shape, terms)
        on_device = None if bias is None else bias.to(DEVICE)
        with cases.filled_with_nan():
            scale = None if outer is None else outer.to(DEVICE)
            got = fp4gemm.quantize_gemm(x.to(DEVICE).reshape(1, m, k), w.to(DEVICE), on_device, outer_scale=scale)
        a = reference.quantize(x, outer_scale=outer)
        assert (got.dtype, got.shape) == (terms.out_dtype, (1, m, n))
        cases.assert_same_bits(got[0].cpu(), run(a, w, bias, None, terms), f"{shape} {terms.out_dtype}")
        assert_near(got[0].cpu(), *exact_and_bound(a, w, bias, None, terms), f"{shape} {terms.out_dtype}")


@on_gpu
@pytest.mark.parametrize("per_row", [False, True])
def test_gemm_fp4(arch: str, per_row: bool) -> None:
    """The bytes of the reference's quantizer, but for the sign of zero; and D as an operand of the next GEMM."""
    for shape, bias_dtype, activation, sf_layout in FP4[arch]:
        m, n, _ = shape
        a, b = exact(shape, "per_row")
        bias = None if bias_dtype is None else normal(1, n, 7, bias_dtype)[0]
        outer = torch.rand(m, generator=torch.Generator().manual_seed(m)) + 0.5 if per_row else torch.tensor(0.7)
        on_device = None if bias is None else bias.to(DEVICE)
        with cases.filled_with_nan():
            got = fp4gemm.gemm_fp4(
                a.to(DEVICE), b.to(DEVICE), on_device, outer_scale=outer.to(DEVICE), activation=activation,
                sf_layout=sf_layout,
            )  # fmt: skip
        values = reference.gemm(a, b, bias, torch.float32, activation=activation)
        want = reference.quantize(values, outer_scale=outer, sf_layout=sf_layout, convention="te_per_token")
        what = f"{shape} {sf_layout}"
        d = got.to("cpu")
        cases.assert_same_bits(d.block_scale, want.block_scale, f"{what}: block scales")
        cases.assert_same_bits(d.outer_scale, want.outer_scale, f"{what}: outer scales")
        cases.assert_same_bits(d.dequantize() + 0.0, want.dequantize() + 0.0, f"{what}: values")
        if n <= 256:
            w = reference.quantize(normal(24, n, 9))
            assert_near(run(d, w, None, None, PLAIN), *exact_and_bound(d, w, None, None, PLAIN), f"{what}: next")


# --- batches ----------------------------------------------------------------------------------------------------------


@on_gpu
@each_terms
@pytest.mark.parametrize("one_for_all", [False, True])
@pytest.mark.parametrize("shape", BATCHED, ids=lambda shape: "x".join(map(str, shape)))
def test_bmm(arch: str, shape: tuple[int, int, int], one_for_all: bool, terms: Terms) -> None:
    """Different problems in a launch; bias and C are a member's own, or one for all."""
    m, n, k = shape
    a = FP4Batch.stack(cases.exact_operand(m, k, "linear", "per_row", i) for i in range(MEMBERS))
    b = FP4Batch.stack(cases.exact_operand(n, k, "128x4", "per_tensor", 9 + i) for i in range(MEMBERS))
    bias = None if terms.bias is None else normal(MEMBERS, n, 7, terms.bias)
    c = normal(MEMBERS * n, m, 8, terms.out_dtype).view(MEMBERS, n, m).mT if terms.source else None
    if one_for_all:
        bias, c = None if bias is None else bias[0], None if c is None else c[:1]
    on_device, source = (None if t is None else t.to(DEVICE) for t in (bias, c))
    if source is not None and c is not None:
        source, c = (t.expand(MEMBERS, m, n) for t in (source, c))
    with cases.filled_with_nan():
        got = fp4gemm.bmm(
            a.to(DEVICE), b.to(DEVICE), on_device, c=source, beta=BETA, activation=terms.activation,
            out_dtype=terms.out_dtype, column_major=terms.column_major,
        )  # fmt: skip
    assert (got.mT if terms.column_major else got).is_contiguous()
    want = reference.bmm(a, b, bias, terms.out_dtype, c=c, beta=BETA, activation=terms.activation)
    cases.assert_same_bits(got.cpu() + 0.0, want + 0.0, f"{shape}")


@on_gpu
def test_bmm_fp4(arch: str) -> None:
    """The bytes of the quantizer for each member, but for the sign of zero."""
    for (m, n, k), bias_dtype, activation, sf_layout in FP4[arch][:4]:
        a = FP4Batch.stack(cases.exact_operand(m, k, "128x4", "per_row", i) for i in range(MEMBERS))
        b = FP4Batch.stack(cases.exact_operand(n, k, "128x4", "per_row", 9 + i) for i in range(MEMBERS))
        assert bias_dtype is None
        for outer in (torch.linspace(0.5, 2, MEMBERS * m).view(MEMBERS, m), torch.tensor([0.5, 1, 3])):
            with cases.filled_with_nan():
                got = fp4gemm.bmm_fp4(
                    a.to(DEVICE), b.to(DEVICE), outer_scale=outer.to(DEVICE), activation=activation, sf_layout=sf_layout
                )
            for i, d in enumerate(got.to("cpu")):
                values = reference.gemm(a[i], b[i], None, torch.float32, activation=activation)
                want = reference.quantize(
                    values, outer_scale=outer[i], sf_layout=sf_layout, convention="te_per_token"
                )  # fmt: skip
                what = f"{(m, n, k)} {sf_layout}, member {i}"
                cases.assert_same_bits(d.block_scale, want.block_scale, f"{what}: block scales")
                cases.assert_same_bits(d.dequantize() + 0.0, want.dequantize() + 0.0, f"{what}: values")


@on_gpu
@pytest.mark.parametrize("rows", [33, 128])
def test_quantize_batch(arch: str, rows: int) -> None:
    x = normal(MEMBERS * rows, 72, 3, torch.bfloat16).view(MEMBERS, rows, 72)
    with cases.filled_with_nan():
        got = fp4gemm.quantize_batch(x.to(DEVICE))
    for i, member in enumerate(got):
        cases.assert_same(member.to("cpu"), reference.quantize(x[i]), f"member {i}")


# --- what is not there ------------------------------------------------------------------------------------------------


@on_gpu
def test_empty_operands(arch: str) -> None:
    for m, n, k in ((0, 8, 32), (8, 0, 32), (8, 24, 0)):
        a, b = (reference.quantize(torch.zeros(rows, k)) for rows in (m, n))
        bias = torch.arange(n).to(torch.float16)
        want = reference.gemm(a, b, bias, torch.float16)
        cases.assert_same_bits(run(a, b, bias, None, BIAS), want, f"{m}x{n}x{k}")


@on_gpu
def test_what_only_hopper_reads_is_refused(arch: str) -> None:
    a, b = (t.to(DEVICE) for t in exact((8, 64, 64), "per_row"))
    with pytest.raises(NotImplementedError, match="b: prepacked for sm90"):
        fp4gemm.gemm(a, b.prepack())
    with pytest.raises(NotImplementedError, match="a: plain"):
        fp4gemm.gemm(torch.zeros(8, 64, dtype=torch.bfloat16, device=DEVICE), b)
    unpacked = b.prepack().unpack()
    cases.assert_same_bits(fp4gemm.gemm(a, unpacked), fp4gemm.gemm(a, b), "packed by torch and back")
