"""Block-scaled GEMMs without their GPU: what is padded, copied and swapped around a kernel that is made up of torch."""

import pytest
import torch

import fp4gemm
from fp4gemm import blockscaled, gemm_calls, reference, select
from fp4gemm.engine import Output
from fp4gemm.formats import scale_layout
from fp4gemm.launch import NO_BATCH, Batch, GemmProblem, Operands, beta_bits
from fp4gemm.reference.activation import activate
from fp4gemm.spec import GemmSpec, GroupedGemmSpec
from fp4gemm.tensor import FP4Batch, FP4Tensor

ARCHS = ("sm_100a", "sm_120a")
FP4_TILES = {"sm_100a": ((128, 64, 256), (1, 1), "static"), "sm_120a": ((128, 128, 128), (1, 1), "cooperative")}
SHAPES = [(1, 8, 32), (3, 1, 16), (200, 264, 288), (5, 33, 96), (129, 40, 100), (64, 128, 1), (2, 31, 48)]


def operand(t):
    """The FP4Tensor of what the kernel is given; its fields are what CUTLASS demands."""
    assert t.k % 32 == 0
    assert tuple(t.data.shape) == (t.rows, t.k // 2)
    assert t.data.is_contiguous()
    assert t.data.data_ptr() % 16 == t.block_scale.data_ptr() % 16 == 0
    scales = t.block_scale.reshape(scale_layout("128x4").shape(t.rows, t.k))
    return FP4Tensor(t.data, scales, t.outer_scale, (t.rows, t.k), "128x4")


def rows_on_16_bytes(t):
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and (t.shape[0] == 1 or t.stride(0) * t.element_size() % 16 == 0)


def at(t, i, stride, shape=None):
    """What ``i`` strides behind the first member of a batch is, as the kernel addresses it."""
    shape = t.shape[1:] if shape is None else shape
    return t.as_strided(shape, t.stride()[t.dim() - len(shape) :], t.storage_offset() + i * stride)


def batch_kernel(spec, problem, a, b, bias, *, d, c=None, beta=0.0, sfd=None, outer_d=None):
    """The kernel on each member of a batch, or on what there is without one."""
    if a.data.dim() == 2:
        assert problem.batch is NO_BATCH
        return kernel(spec, problem, a, b, bias, d=d, c=c, beta=beta, sfd=sfd, outer_d=outer_d)
    strides = problem.batch
    assert strides.members == len(a.data) == len(b.data) == len(d)
    assert all(stride * t.element_size() % 16 == 0 for t, stride in ((d, strides.d), (c, strides.c)) if t is not None)
    for i in range(strides.members):

        def operand(t, stride, outer, i=i):
            outer_scale = at(t.outer_scale, i, outer, (t.rows,) if t.per_row else ())
            scales = at(t.block_scale, i, t.block_scale[0].numel())
            return t._replace(data=at(t.data, i, stride // 2), block_scale=scales, outer_scale=outer_scale)

        kernel(
            spec,
            problem,
            operand(a, strides.a, strides.outer_a),
            operand(b, strides.b, strides.outer_b),
            None if bias is None else at(bias, i, strides.bias, (problem.n,)),
            d=at(d, i, strides.d // (2 if spec.sf_layout else 1)),
            c=None if c is None else at(c, i, strides.c),
            beta=beta,
            sfd=None if sfd is None else at(sfd, i, strides.sfd),
            outer_d=None
            if outer_d is None
            else at(outer_d, i, strides.outer_d, (problem.m,) if problem.outer_d_per_row else ()),
        )
    return None


def kernel(spec, problem, a, b, bias, *, d, c=None, beta=0.0, sfd=None, outer_d=None):
    """What a block-scaled kernel computes, with TMA's habit of zeroing what remains of 16 bytes."""
    left, right = operand(a), operand(b)
    assert (problem.m, problem.n, problem.k) == (a.rows, b.rows, a.k)
    assert (problem.lda, problem.ldb) == (a.k, b.k)
    if spec.column_major:
        d, c = d.t(), None if c is None else c.t()
    rows = d.t() if spec.column_major else d
    step = 32 if spec.sf_layout else 16 // d.element_size()
    assert rows_on_16_bytes(rows)
    assert problem.ldd % step == 0
    result = reference.gemm(left, right, bias, torch.float32, beta=beta, activation=spec.activation,
                            c=None if c is None else c.float())  # fmt: skip
    if spec.sf_layout is None:
        assert spec.source is None if c is None else problem.ldc * d.element_size() % 16 == 0
        if rows.shape[1] % step:
            rows.as_strided((rows.shape[0], problem.ldd), (problem.ldd, 1)).zero_()
        d.copy_(result)
        return
    assert problem.n % 32 == 0
    assert problem.outer_d_per_row == (outer_d.dim() == 1)
    made = fp4gemm.quantize(result, outer_scale=outer_d, sf_layout=spec.sf_layout, convention="te_per_token")
    d.copy_(made.data)
    sfd.copy_(made.block_scale)


@pytest.fixture
def plans(monkeypatch):
    """What reaches a plan: (spec, problem, stream, dependent, operands)."""
    seen = []

    def plan(spec, problem, device):
        return lambda stream, dependent, operands: seen.append((spec, problem, stream, dependent, operands))

    monkeypatch.setattr(blockscaled, "gemm_plan", plan)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return seen


def test_a_launch_names_its_operands(plans):
    spec = GemmSpec("sm_120a", "fp32", "fp32", (128, 128, 128), (1, 1), "cooperative", source="fp32", column_major=True)
    a, b = problem(48, 64, 96)
    a = FP4Tensor(a.data, a.block_scale, torch.tensor(0.5), a.shape)
    bias, d, c = torch.ones(64), torch.empty(64, 48).t(), torch.ones(64, 48).t()
    blockscaled.launch_spec(spec, a, b, bias, Output(d, c, 0.25))
    ((got, asked, stream, dependent, operands),) = plans
    assert (got, stream, dependent) == (spec, 7, False)
    assert asked == GemmProblem(48, 64, 96, 96, 96, 48, 48, False, True, False)
    assert operands == Operands(
        a=a.data.data_ptr(), b=b.data.data_ptr(), sfa=a.block_scale.data_ptr(), sfb=b.block_scale.data_ptr(),
        c=c.data_ptr(), d=d.data_ptr(), sfd=0, outer_a=a.outer_scale.data_ptr(), outer_b=b.outer_scale.data_ptr(),
        outer_d=0, bias=bias.data_ptr(), beta=beta_bits(0.25),
    )  # fmt: skip


def test_a_launch_of_an_fp4_result_names_its_operands(plans):
    spec = GemmSpec("sm_100a", "fp4", None, (128, 64, 256), (1, 1), "static", sf_layout="linear")
    a, b = problem(48, 64, 96)
    outer = torch.rand(48)
    data, scales = blockscaled.launch_fp4_spec(spec, a, b, None, outer)
    ((_, asked, _, _, operands),) = plans
    assert asked == GemmProblem(48, 64, 96, 96, 96, 0, 64, True, True, True)
    assert (operands.d, operands.sfd, operands.outer_d) == tuple(t.data_ptr() for t in (data, scales, outer))
    assert operands.c == operands.bias == 0


def test_a_launch_of_a_batch_says_how_far_members_are_apart(plans):
    spec = GemmSpec("sm_120a", "fp32", "fp32", (128, 128, 128), (1, 1), "cooperative", source="fp32")
    a, b = batches(48, 64, 96)
    whole = torch.empty(3, 50, 64)
    blockscaled.launch_spec(spec, a, b, torch.ones(3, 64), Output(whole[:, 1:49], torch.ones(3, 48, 64), 1.0))
    blockscaled.launch_spec(spec, a, b, torch.ones(64), Output(whole[:, :48], None, 0.0))
    fp4 = GemmSpec("sm_100a", "fp4", None, (128, 64, 256), (1, 1), "static", sf_layout="linear")
    blockscaled.launch_fp4_spec(fp4, a, b, None, torch.ones(3, 48))
    blockscaled.launch_fp4_spec(fp4, a, b, None, torch.ones(3))
    problems = [asked for _, asked, *_ in plans]
    assert problems[0].batch == Batch(3, 48 * 96, 64 * 96, c=48 * 64, d=50 * 64, outer_a=48, outer_b=1, bias=64)
    assert problems[1].batch == problems[0].batch._replace(c=0, bias=0)
    assert problems[2].batch == Batch(3, 48 * 96, 64 * 96, d=48 * 64, sfd=48 * 4, outer_a=48, outer_b=1, outer_d=48)
    assert problems[3].batch == problems[2].batch._replace(outer_d=1)
    assert [p.outer_d_per_row for p in problems] == [False, False, True, False]


def test_a_grouped_launch_says_what_experts_share(plans):
    spec = GroupedGemmSpec("sm_120a", "fp32", "fp32", (128, 128, 128), (1, 1), "cooperative", source="fp32")
    x, _ = problem(48, 8, 96)
    _, w = batches(8, 64, 96)
    offsets, bias, d, c = torch.tensor([0, 3, 3, 48]), torch.ones(3, 64), torch.empty(48, 64), torch.ones(48, 64)
    blockscaled.launch_grouped_spec(spec, x, w, offsets, bias, Output(d, c, 0.5))
    ((_, asked, _, _, operands),) = plans
    assert asked == GemmProblem(48, 64, 96, 96, 96, 64, 64, True, False, batch=Batch(3, b=64 * 96, outer_b=1, bias=64))
    named = {"a": x.data, "b": w.data, "sfa": x.block_scale, "sfb": w.block_scale, "c": c, "d": d, "bias": bias}
    named |= {"offsets": offsets, "outer_a": x.outer_scale, "outer_b": w.outer_scale}
    assert operands._asdict() == dict.fromkeys(Operands._fields, 0) | {
        "beta": beta_bits(0.5),
        **{name: t.data_ptr() for name, t in named.items()},
    }


def grouped_kernel(spec, problem, a, b, bias, *, d, c=None, beta=0.0, offsets=None):
    """What a grouped kernel computes: the dense one on the rows of each expert."""
    strides = problem.batch
    assert strides == Batch(
        len(b.data), b=b.data[0].numel() * 2, outer_b=b.rows if b.per_row else 1, bias=0 if bias is None else b.rows
    )
    assert (problem.m, problem.n, problem.k) == (a.rows, b.rows, a.k)
    assert problem.ldd * d.element_size() % 16 == 0
    assert rows_on_16_bytes(d)
    left, right = operand(a), [
        operand(b._replace(data=b.data[e], block_scale=b.block_scale[e], outer_scale=b.outer_scale[e]))
        for e in range(len(b.data))
    ]  # fmt: skip
    result = reference.gemm_grouped(left, FP4Batch.stack(right), offsets, bias, d.dtype, c=c, beta=beta)
    rows = slice(int(offsets[0]), int(offsets[-1]))
    d[rows] = result[rows]


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_grouped_products(arch, m, n, k, monkeypatch):
    """Whatever alignment D, C and K have; rows of no expert stay."""
    monkeypatch.setattr(blockscaled, "_launch", grouped_kernel)
    x = fp4gemm.quantize(torch.randint(-4, 5, (m + 3, k)).float(), sf_layout="linear")
    w = FP4Batch.stack([fp4gemm.quantize(torch.randint(-4, 5, (n, k)).float(), scaling="per_tensor") for _ in range(3)])
    offsets, bias, c = torch.tensor([2, 2 + m // 3, 2 + m // 3, 2 + m]), torch.ones(3, n), torch.ones(m + 3, n)
    d = torch.full((m + 3, n), -1.0)
    want = reference.gemm_grouped(x, w, offsets, bias, torch.float32, c=c, beta=0.5, out=d.clone())
    gemm_calls.gemm_grouped(x, w, offsets, bias, 1, Output(d, c, 0.5))
    assert torch.equal(d, want)
    assert bool((d[:2] == -1).all())
    assert bool((d[2 + m :] == -1).all())


def test_grouped_operands_that_only_hopper_reads_are_refused(arch):
    x, w = problem(8, 64, 64)
    out = Output(torch.empty(8, 64), None, 0.0)
    with pytest.raises(NotImplementedError, match="w: a GroupedWeight is prepacked for Hopper"):
        gemm_calls.gemm_grouped(x, fp4gemm.stack_weights([w]), torch.tensor([0, 8]), None, 8, out)
    with pytest.raises(NotImplementedError, match=r"x: plain torch\.bfloat16 activations: .* quantize them"):
        gemm_calls.gemm_grouped(torch.ones(8, 64).bfloat16(), FP4Batch.stack([w]), torch.tensor([0, 8]), None, 8, out)


@pytest.fixture(params=ARCHS)
def arch(request, monkeypatch):
    monkeypatch.setattr(select, "arch_of", lambda device: request.param)
    monkeypatch.setattr(select, "gpu_of", lambda device: ("Made-Up", 148))
    monkeypatch.setattr(blockscaled, "_launch", batch_kernel)
    blockscaled._spec.cache_clear()
    yield request.param
    blockscaled._spec.cache_clear()


def problem(m, n, k, layouts=("128x4", "128x4")):
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randint(-4, 5, (rows, k), generator=generator).float() for rows in (m, n))
    return tuple(fp4gemm.quantize(x, sf_layout=layout) for x, layout in zip((a, b), layouts, strict=True))


def batches(m, n, k, layouts=("128x4", "128x4")):
    """Three problems that differ, a scaled per row and b per tensor."""
    a, b = (
        torch.randint(-4, 5, (3, rows, k), generator=torch.Generator().manual_seed(rows)).float() for rows in (m, n)
    )
    return tuple(
        FP4Batch.stack([fp4gemm.quantize(x * 2**i, scaling=scaling, sf_layout=layout) for i, x in enumerate(each)])
        for each, scaling, layout in zip((a, b), ("per_row", "per_tensor"), layouts, strict=True)
    )


def strided(m, n, dtype, layout):
    """A D to write into: NaN, with rows or columns contiguous, aligned or not."""
    if layout == "column":
        return torch.full((n, m), torch.nan, dtype=dtype).t()
    if layout == "narrow":
        return torch.full((m, n + 3), torch.nan, dtype=dtype)[:, 1 : n + 1]
    return torch.full((m, n), torch.nan, dtype=dtype)


@pytest.mark.parametrize("layout", ["row", "column", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_any_shape_and_strides(arch, m, n, k, dtype, layout):
    a, b = problem(m, n, k, ("linear", "8x4"))
    bias = torch.arange(n).float()
    d, c = strided(m, n, dtype, layout), strided(m, n, dtype, "narrow").fill_(2)
    blockscaled.gemm(a, b, bias, Output(d, c, 0.5), "relu")
    assert torch.equal(d, reference.gemm(a, b, bias, dtype, c=c, beta=0.5, activation="relu"))


@pytest.mark.parametrize("layout", ["row", "column", "narrow"])
@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_batches(arch, m, n, k, own_bias, layout):
    a, b = batches(m, n, k, ("linear", "8x4"))
    bias = torch.arange(3 * n).float().view(3, n) if own_bias else torch.arange(n).float()
    d = torch.full((3, m, n), torch.nan)
    if layout == "column":
        d = torch.full((3, n, m), torch.nan).mT
    elif layout == "narrow":
        d = torch.full((3, m + 1, n + 3), torch.nan)[:, :m, 1 : n + 1]
    c = torch.arange(4.0 * m * n).view(4, m, n)[1:]
    gemm_calls.bmm(a, b, bias, Output(d, c, 0.5), "relu")
    assert torch.equal(d, reference.bmm(a, b, bias, torch.float32, c=c, beta=0.5, activation="relu"))


@pytest.mark.parametrize("sf_layout", ["128x4", "linear"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_fp4_batches(arch, m, n, k, per_row, sf_layout):
    a, b = batches(m, n, k)
    outer = torch.rand(3, m) / 8 + 0.01 if per_row else torch.tensor([0.05, 0.5, 5.0])
    bias = torch.linspace(-1, 1, 3 * n).view(3, n)
    out = GemmSpec(arch, "fp4", "fp32", *FP4_TILES[arch], activation="relu", sf_layout=sf_layout)
    parts = blockscaled.launch_fp4_spec(out, a, b, bias, outer)
    made = FP4Batch(*parts, outer, (3, m, n), sf_layout)
    for i, values in enumerate(reference.bmm(a, b, bias, torch.float32, activation="relu")):
        want = fp4gemm.quantize(values, outer_scale=outer[i], sf_layout=sf_layout, convention="te_per_token")
        assert torch.equal(made[i].data, want.data)
        assert torch.equal(made[i].block_scale.view(torch.uint8), want.block_scale.view(torch.uint8))


def test_what_surrounds_a_view_stays(arch):
    a, b = problem(20, 24, 64)
    whole = torch.full((20, 40), -1.0)
    blockscaled.gemm(a, b, None, Output(whole[:, 1:25], None, 0.0))
    assert torch.equal(whole[:, 1:25], reference.gemm(a, b, None, torch.float32))
    assert (whole[:, :1] == -1).all()
    assert (whole[:, 25:] == -1).all()


def test_accumulation_in_place(arch):
    a, b = problem(16, 24, 64)
    d = torch.ones(16, 24)
    expected = reference.gemm(a, b, None, torch.float32, c=d.clone())
    blockscaled.gemm(a, b, None, Output(d, d, 1.0))
    assert torch.equal(d, expected)


@pytest.mark.parametrize("sf_layout", ["128x4", "linear"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_fp4_results_are_the_bytes_of_the_quantizer(arch, m, n, k, per_row, sf_layout):
    a, b = problem(m, n, k)
    outer = torch.rand(m) / 8 + 0.01 if per_row else torch.tensor(0.05)
    bias = torch.linspace(-1, 1, n).to(torch.float16)
    data, scales = blockscaled.gemm_fp4(a, b, bias, outer, sf_layout, "relu")
    values = reference.gemm(a, b, bias, torch.float32, activation="relu")
    expected = fp4gemm.quantize(values, outer_scale=outer, sf_layout=sf_layout, convention="te_per_token")
    assert torch.equal(data, expected.data)
    assert torch.equal(scales.view(torch.uint8), expected.block_scale.view(torch.uint8))
    assert data.is_contiguous()
    assert scales.is_contiguous()


def test_operands_that_only_hopper_reads_are_refused(arch):
    a, b = problem(8, 64, 64)
    out = Output(torch.empty(8, 64), None, 0.0)
    with pytest.raises(NotImplementedError, match=r"a: plain torch\.bfloat16 activations: .* quantize them"):
        blockscaled.gemm(torch.ones(8, 64, dtype=torch.bfloat16), b, None, out)
    with pytest.raises(NotImplementedError, match=r"b: prepacked for sm90, which .* unpack it"):
        blockscaled.gemm(a, b.prepack(), None, out)


def test_calls_choose_these_kernels(arch):
    a, b = problem(8, 64, 96, ("linear", "128x4"))
    d = torch.empty(8, 64)
    gemm_calls.gemm(a, b, None, Output(d, None, 0.0), "gelu")
    assert torch.equal(d, reference.gemm(a, b, None, torch.float32, activation="gelu"))
    made = gemm_calls.gemm_fp4(a, b, None, torch.tensor(0.5), "linear", None)
    assert made.sf_layout == "linear"
    assert made.outer_scale == 0.5


def test_hopper_applies_activations_to_fp32(monkeypatch):
    monkeypatch.setattr(select, "arch_of", lambda device: "sm_90a")
    a, b = problem(8, 64, 96)
    seen = []

    def engine_gemm(activations, weight, bias, out, dependent):
        seen.append(out)
        out.d.copy_(reference.gemm(a, b, bias, torch.float32, c=out.c, beta=out.beta))

    monkeypatch.setattr(gemm_calls.engine, "gemm", engine_gemm)
    monkeypatch.setattr(gemm_calls, "_weight", lambda b: b)
    monkeypatch.setattr(gemm_calls, "_activations", lambda a: a)
    d, c = torch.empty(64, 8, dtype=torch.bfloat16).t(), torch.ones(8, 64, dtype=torch.bfloat16)
    gemm_calls.gemm(a, b, None, Output(d, c, 2.0), "silu")
    assert seen[0].d.dtype == seen[0].c.dtype == torch.float32
    full = reference.gemm(a, b, None, torch.float32, c=c.float(), beta=2.0)
    assert torch.equal(d, activate("silu", full).to(torch.bfloat16))
