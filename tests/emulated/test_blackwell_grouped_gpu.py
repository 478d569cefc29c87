"""Blackwell's grouped GEMM kernels and the public functions that launch them, on a Hopper GPU: docs/emulation.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import emulation
import gpu_cases as cases
import pytest
import torch
from specs import GROUPED, ONLY_ON_REQUEST

import fp4gemm
from fp4gemm import blockscaled, reference, select
from fp4gemm.engine import Output
from fp4gemm.spec import GroupedGemmSpec
from fp4gemm.tensor import FP4Batch, FP4Tensor

DEVICE = torch.device("cuda")
BETA = -0.7  # no float32 number

# Rows in front of the first expert, of each expert, and behind the last. A tile has 128.
GROUPS = {
    "one": (0, (40,), 0),
    "whole tiles": (0, (128, 256, 128), 0),
    "on the border": (0, (1, 127, 129, 0, 128, 3), 0),
    "several in a tile": (3, (0, 5, 0, 1, 60, 0, 0, 2, 7), 9),
    "guarded": (130, (1, 126, 0, 200), 150),
    "long": (5, (300, 1, 400), 0),
    "more than a warp has lanes": (0, (0, 3, 0, 0, 9, 1) * 12, 2),
    "none": (20, (0, 0, 0), 30),
}
SHAPES = ((8, 32), (136, 96), (264, 288), (512, 1024))  # N, K


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    reason = emulation.missing()
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=reason or "")(test))


kernels = pytest.mark.parametrize("spec", GROUPED, ids=lambda spec: spec.name)
groups = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
one_of_each_arch = pytest.mark.parametrize("spec", GROUPED[:2], ids=lambda spec: spec.arch)
ARCHS = ("sm_100a", "sm_120a")


def offsets_of(group: tuple[int, tuple[int, ...], int]) -> torch.Tensor:
    before, counts, _ = group
    return torch.tensor((before, *counts)).cumsum(0)


@lru_cache(maxsize=128)
def operands(rows: int, experts: int, n: int, k: int, scaling: str = "per_row") -> tuple[FP4Tensor, FP4Batch]:
    """On the CPU, whose sums are exact in every order; experts differ."""
    x = cases.exact_operand(rows, k, "128x4", scaling, rows + k)
    return x, FP4Batch.stack(cases.exact_operand(n, k, "128x4", scaling, n + k + e) for e in range(experts))


def terms(spec: GroupedGemmSpec, rows: int, experts: int, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bias and C."""
    generator = torch.Generator().manual_seed(rows + n)
    bias = None if spec.bias is None else torch.randn(experts, n, generator=generator).to(emulation.DTYPES[spec.bias])
    c = None if spec.source is None else torch.randn(rows, n, generator=generator).to(emulation.DTYPES[spec.source])
    return bias, c


def expected(
    x: FP4Tensor, w: FP4Batch, ends: list[int], bias: torch.Tensor | None, c: torch.Tensor | None, d: torch.Tensor
) -> torch.Tensor:
    """``d`` with the rows of experts, of the product of all of x and each expert."""
    want = d.clone()
    for e, (begin, end) in enumerate(pairwise(ends)):
        if begin < end:
            whole = reference.gemm(x, w[e], None if bias is None else bias[e], d.dtype, c=c, beta=BETA)
            want[begin:end] = whole[begin:end]
    return want


def check(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """The same bits, but for the sign of zero; NaN, which no kernel wrote, where it should be."""
    assert torch.equal(got.isnan(), want.isnan()), (
        f"{what}: {emulation.describe(got, want, got.isnan() != want.isnan())}"
    )
    wrong = (cases.bits(got + 0.0) != cases.bits(want + 0.0)) & ~want.isnan()
    assert not wrong.any(), f"{what}: {emulation.describe(got, want, wrong)}"


def run(
    spec: GroupedGemmSpec, x: FP4Tensor, w: FP4Batch, offsets: torch.Tensor, ends: list[int], what: str, **how: int
) -> None:
    """A kernel on operands of the CPU. ``ends``: what the device makes of the offsets."""
    bias, c = terms(spec, x.rows, len(w), w.rows)
    on_device = [None if t is None else t.to(DEVICE) for t in (bias, c)]
    d = emulation.run_grouped(spec, x.to(DEVICE), w.to(DEVICE), offsets.to(DEVICE), *on_device, BETA, **how).cpu()
    check(d, expected(x, w, ends, bias, c, torch.full_like(d, float("nan"))), f"{spec.name} {what} {ends}")
    assert emulation.ctas[spec] <= how.get("sms", emulation.ctas[spec])


# --- kernels ----------------------------------------------------------------------------------------------------------


@kernels
@groups
@on_gpu
def test_every_kernel(spec: GroupedGemmSpec, group: tuple[int, tuple[int, ...], int]) -> None:
    """Every row is its expert's; rows of none are left alone. Also as on a GPU of few SMs, whose CTAs have tiles of
    several experts."""
    offsets = offsets_of(group)
    rows, experts = int(offsets[-1]) + group[2], len(group[1])
    for n, k in SHAPES if experts < 10 else SHAPES[:2]:
        for scaling in ("per_row", "per_tensor"):
            x, w = operands(rows, experts, n, k, scaling)
            run(spec, x, w, offsets, offsets.tolist(), f"{n}x{k} {scaling}")
            run(spec, x, w, offsets, offsets.tolist(), f"{n}x{k} {scaling}, 2 SMs", sms=2)


@kernels
@on_gpu
def test_random_groups(spec: GroupedGemmSpec) -> None:
    generator = torch.Generator().manual_seed(3)
    n, k = 136, 96
    for experts in (2, 33, 70):
        counts = torch.randint(-60, 90, (experts,), generator=generator).clamp_min(0)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        x, w = operands(int(offsets[-1]) + 1, experts, n, k)
        run(spec, x, w, offsets, offsets.tolist(), f"{counts.tolist()}", sms=7)


@one_of_each_arch
@on_gpu
def test_offsets_are_clamped(spec: GroupedGemmSpec) -> None:
    """To 0..T; an expert that ends before it begins has no rows."""
    x, w = operands(100, 4, 136, 96)
    run(spec, x, w, torch.tensor([-(2**40), 30, 30, 2**40, 50]), [0, 30, 30, 100, 50], "outside of x")


@one_of_each_arch
@on_gpu
def test_random_bytes_within_the_bound(spec: GroupedGemmSpec) -> None:
    """All codes and scales, of sums that round."""
    offsets, (n, k) = [0, 60, 131, 300], (264, 288)
    x = cases.any_bytes(300, k, "128x4", "per_row", 1)
    w = FP4Batch.stack(cases.any_bytes(n, k, "128x4", "per_row", 2 + e) for e in range(3))
    d = emulation.run_grouped(spec, x.to(DEVICE), w.to(DEVICE), torch.tensor(offsets).to(DEVICE)).cpu()
    for e, (begin, end) in enumerate(pairwise(offsets)):
        exact, bound = cases.gemm_exact_and_bound(x, w[e], None, d.dtype)
        got, exact, bound = (t[begin:end] for t in (d, exact, bound))
        wrong = ~((got.double() - exact).abs() <= bound)
        assert not wrong.any(), f"{spec.name} expert {e}: {emulation.describe(got, exact, wrong)}"


@one_of_each_arch
@on_gpu
def test_a_graph_follows_the_offsets(spec: GroupedGemmSpec) -> None:
    rows, experts, n, k = 400, 5, 264, 288
    x, w = operands(rows, experts, n, k)
    first = torch.tensor([0, 10, 10, 138, 256, 400])
    offsets, on_device = first.to(DEVICE), (x.to(DEVICE), w.to(DEVICE))
    d = torch.empty(rows, n, dtype=emulation.DTYPES[spec.out_dtype], device=DEVICE)
    with emulation.launched_as(spec):
        blockscaled.launch_grouped_spec(spec, *on_device, offsets, None, Output(d, None, 0.0))  # loads the kernel
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            blockscaled.launch_grouped_spec(spec, *on_device, offsets, None, Output(d, None, 0.0))
        for ends in (first.tolist(), [3, 3, 130, 131, 131, 390], [0] * 6, [0, 0, 0, 0, 0, 400]):
            offsets.copy_(torch.tensor(ends))
            d.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            got = d.cpu()
            check(got, expected(x, w, ends, None, None, torch.full_like(got, float("nan"))), f"replayed with {ends}")


# --- the public functions ---------------------------------------------------------------------------------------------


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> Iterator[str]:
    """The GPU is one of this arch."""
    with emulation.blackwell(request.param) as launched:
        yield request.param
    assert set(launched) <= {*GROUPED} - ONLY_ON_REQUEST, "not built by build_kernels.py"


@on_gpu
@pytest.mark.parametrize("n", [19, 136])  # rows of D that TMA cannot store, and such as it can
@pytest.mark.parametrize("k", [40, 288])
@pytest.mark.parametrize("in_place", [False, True])
def test_gemm_grouped(arch: str, n: int, k: int, in_place: bool) -> None:
    ends = [2, 2, 131, 132, 200]
    x = cases.exact_operand(210, k, "linear", "per_row", 1)
    w = FP4Batch.stack(cases.exact_operand(n, k, "8x4", "per_tensor", e) for e in range(4))
    offsets = torch.tensor(ends).to(DEVICE)
    if not in_place:
        with cases.filled_with_nan():
            got = fp4gemm.gemm_grouped(x.to(DEVICE), w.to(DEVICE), offsets).cpu()
        check(got, expected(x, w, ends, None, None, torch.full_like(got, float("nan"))), f"{n}x{k}")
        return
    bias = torch.randn(4, n, generator=torch.Generator().manual_seed(n)).bfloat16()
    c = torch.randn(210, n, generator=torch.Generator().manual_seed(k))
    d = c.to(DEVICE)
    with cases.filled_with_nan():
        fp4gemm.gemm_grouped(x.to(DEVICE), w.to(DEVICE), offsets, bias.to(DEVICE), c=d, beta=BETA, out=d)
    check(d.cpu(), expected(x, w, ends, bias, c, c), f"{n}x{k} in place")


@on_gpu
def test_quantize_gemm_grouped(arch: str) -> None:
    """Bit for bit gemm_grouped of what quantize makes, rows of no expert left out."""
    x = torch.randn(210, 288, generator=torch.Generator().manual_seed(1)).bfloat16()
    w = FP4Batch.stack(reference.quantize(torch.randn(136, 288)) for _ in range(4))
    offsets, w_here = torch.tensor([0, 0, 131, 132, 210]).to(DEVICE), w.to(DEVICE)
    got = fp4gemm.quantize_gemm_grouped(x.to(DEVICE), w_here, offsets)
    quantized = fp4gemm.quantize(x.to(DEVICE))
    cases.assert_same_bits(got, fp4gemm.gemm_grouped(quantized, w_here, offsets), "quantized on the way")
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin < end:
            exact, bound = cases.gemm_exact_and_bound(quantized.to("cpu"), w[e], None, got.dtype)
            assert bool(((got.cpu().double() - exact).abs() <= bound)[begin:end].all()), f"expert {e}"


@on_gpu
def test_what_only_hopper_reads_is_refused(arch: str) -> None:
    x = cases.exact_operand(8, 64, "128x4", "per_row", 1).to(DEVICE)
    w = FP4Batch.stack([x])
    offsets = torch.tensor([0, 8], device=DEVICE)
    with pytest.raises(NotImplementedError, match="w: a GroupedWeight is prepacked for Hopper"):
        fp4gemm.gemm_grouped(x, w.prepack(), offsets)
    with pytest.raises(NotImplementedError, match="x: plain"):
        fp4gemm.gemm_grouped(torch.zeros(8, 64, dtype=torch.bfloat16, device=DEVICE), w, offsets)


@pytest.mark.parametrize("arch_name", ARCHS)
def test_the_kernels_are_those_that_are_built(arch_name: str) -> None:
    wanted = {
        select.grouped_gemm_spec(arch_name, emulation.SMS, 4, tokens, n, *variant)
        for tokens in (1, 53, 5000)
        for n in (19, 136)
        for variant in (("bf16", None, False), ("fp32", "bf16", True))
    }
    assert wanted <= {*GROUPED} - ONLY_ON_REQUEST
