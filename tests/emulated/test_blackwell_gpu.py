"""Blackwell's GEMM kernels, their own source, on a Hopper GPU: see docs/emulation.md.

Bit for bit where one answer is right, within the derived bound of float64 elsewhere. The kernels are compiled beside
the tests (conftest.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import emulation
import gpu_cases as cases
import pytest
import torch
from specs import SPECS

from fp4gemm import reference
from fp4gemm.reference.activation import activate
from fp4gemm.spec import GemmSpec
from fp4gemm.tensor import FP4Batch, FP4Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(emulation.missing() is not None, reason=emulation.missing() or ""),
]

# K is less than a block of scales in memory has (64), and no multiple of it; M and N are less than a tile and more.
SHAPES = ((256, 256, 256), (1, 8, 32), (1, 264, 96), (136, 8, 96), (129, 128, 32), (200, 264, 288), (512, 384, 1024))
RAMPED = (256, 264, 288)
BATCHED = ((136, 264, 288), (1, 8, 32))
DEVICE = torch.device("cuda")
BETA = -0.7  # no float32 number

variants = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
unquantized = pytest.mark.parametrize("spec", [s for s in SPECS if s.sf_layout is None], ids=lambda spec: spec.name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@dataclass(frozen=True)
class Operands:
    """What a kernel reads, on the CPU; of its terms only those that it has. Of a batch everything is stacked."""

    a: FP4Tensor | FP4Batch
    b: FP4Tensor | FP4Batch
    bias: torch.Tensor | None
    c: torch.Tensor | None

    @classmethod
    def of(cls, spec: GemmSpec, a: FP4Tensor, b: FP4Tensor, seed: int = 0) -> Operands:
        """Terms are about 1, and so are sums where a function of them follows: there it is no straight line."""
        m, n = a.rows, b.rows
        generator = torch.Generator().manual_seed(m + n + seed)
        bias = None if spec.bias is None else torch.randn(n, generator=generator).to(emulation.DTYPES[spec.bias])
        c = None if spec.source is None else torch.randn(m, n, generator=generator).to(emulation.DTYPES[spec.source])
        if spec.activation is not None or spec.out_dtype == "fp16":
            sums = reference.gemm(a, b, out_dtype=torch.float32).abs()
            exponent = int(torch.frexp(sums.mean()).exponent)  # by a power of two: what was exact is
            a = replace(a, outer_scale=a.outer_scale * 2.0**-exponent)
        return cls(a, b, bias, c if c is None or not spec.column_major else c.t().contiguous().t())

    @classmethod
    def stacked(cls, members: Sequence[Operands]) -> Operands:
        """A batch. A bias that is one for all stays one, C stays column-major."""
        a, b = (FP4Batch.stack(getattr(member, name) for member in members) for name in ("a", "b"))
        bias, c = members[0].bias, members[0].c
        if any(member.bias is not bias for member in members):
            bias = torch.stack([member.bias for member in members if member.bias is not None])
        if c is not None:
            row_major, c = c.is_contiguous(), torch.stack([member.c for member in members if member.c is not None])
            c = c if row_major else c.mT.contiguous().mT
        return cls(a, b, bias, c)

    def linear(self) -> torch.Tensor:
        """All but the activation and the cast."""
        c = None if self.c is None else self.c.float()
        return reference.gemm(self.a, self.b, self.bias, torch.float32, c=c, beta=BETA)

    def run(self, spec: GemmSpec, **how: int) -> torch.Tensor:
        """D, on the CPU."""
        bias, c = (None if t is None else t.to(DEVICE) for t in (self.bias, self.c))
        beta = 0.0 if c is None else BETA
        return emulation.run(spec, self.a.to(DEVICE), self.b.to(DEVICE), bias, c, beta, **how).cpu()

    def run_fp4(self, spec: GemmSpec, outer: torch.Tensor, **how: int) -> FP4Tensor | FP4Batch:
        bias = None if self.bias is None else self.bias.to(DEVICE)
        with cases.filled_with_nan():
            d = emulation.run_fp4(spec, self.a.to(DEVICE), self.b.to(DEVICE), bias, outer.to(DEVICE), **how)
        return d.to("cpu")


def cast_error(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half an ulp of the output type, at values in float64."""
    info = torch.finfo(dtype)
    return info.eps / 2 * exact.abs() + info.tiny * info.eps / 2


def function_error(x: torch.Tensor) -> torch.Tensor:
    """What an activation in float32 may err at x: erff and expf are good to 2 ulp, their result is at most |x|."""
    return x.abs() * 2.0**-21


def check(spec: GemmSpec, a: FP4Tensor, b: FP4Tensor, what: str, **how: int) -> None:
    """Operands on the CPU whose float32 sums are exact in every order: all else has one answer but for erf and exp."""
    operands = Operands.of(spec, a, b)
    if spec.sf_layout is None:
        compare(spec, operands, operands.run(spec, **how), what)
    else:
        outer = fp4_scales(spec, operands)
        compare_fp4(spec, operands, outer, operands.run_fp4(spec, outer, **how), what)


def check_batch(spec: GemmSpec, members: Sequence[Operands], what: str, **how: int) -> None:
    """The same for the members of a batch."""
    batch = Operands.stacked(members)
    if spec.sf_layout is None:
        for i, (member, d) in enumerate(zip(members, batch.run(spec, **how), strict=True)):
            compare(spec, member, d, f"{what}, member {i}")
        return
    outer = torch.stack([fp4_scales(spec, member) for member in members])
    for i, (member, d) in enumerate(zip(members, batch.run_fp4(spec, outer, **how), strict=True)):
        compare_fp4(spec, member, outer[i], d, f"{what}, member {i}")


def compare(spec: GemmSpec, operands: Operands, got: torch.Tensor, what: str) -> None:
    linear, dtype = operands.linear(), emulation.DTYPES[spec.out_dtype]
    if spec.activation in (None, "relu"):
        want = activate(spec.activation, linear).to(dtype)
        wrong = cases.bits(got + 0.0) != cases.bits(want + 0.0)  # a sum of zero may be +0 or -0
    else:
        want = activate(spec.activation, linear.double())
        wrong = ~((got.double() - want).abs() <= 1.001 * (function_error(linear.double()) + cast_error(want, dtype)))
    assert not wrong.any(), f"{spec.name} {what}: {emulation.describe(got, want, wrong)}"


def fp4_scales(spec: GemmSpec, operands: Operands) -> torch.Tensor:
    """Outer scales of an NVFP4 D: just right, and where each row has one also some that saturate, and some that leave
    block scales small or zero."""
    values = activate(spec.activation, operands.linear())
    if operands.a.outer_scale.dim() == 0:
        return values.abs().amax().clamp_min(1e-20) / 2688
    factors = torch.exp2(torch.arange(len(values)) % 24 - 3.0)
    return values.abs().amax(1).clamp_min(1e-20) / 2688 * factors


def compare_fp4(spec: GemmSpec, operands: Operands, outer: torch.Tensor, got: FP4Tensor, what: str) -> None:
    """Codes, block scales and padding are those of the quantizer, to the byte."""
    want = reference.quantize(
        activate(spec.activation, operands.linear()), scaling="per_row" if outer.dim() else "per_tensor",
        sf_layout=str(spec.sf_layout), convention="te_per_token", outer_scale=outer,
    )  # fmt: skip
    got, want = (replace(t, data=without_minus_zero(t.data)) for t in (got, want))
    if not torch.equal(got.data, want.data):
        x, y = (t.dequantize() for t in (got, want))
        raise AssertionError(f"{spec.name} {what}: {emulation.describe(x, y, x != y)}")
    cases.assert_same(got, want, f"{spec.name} {what}")


def without_minus_zero(data: torch.Tensor) -> torch.Tensor:
    """Codes with 0 for -0: a sum of zero may be either."""
    low, high = data & 0x0F, data >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


@variants
@shapes
def test_exact_sums(spec: GemmSpec, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for scaling in ("per_row", "per_tensor"):
        a = cases.exact_operand(m, k, "128x4", scaling, m + k)
        b = cases.exact_operand(n, k, "128x4", scaling, n - k)
        check(spec, a, b, f"{shape} {scaling}")


def ones(rows: int, k: int) -> FP4Tensor:
    """Every value is 1, but for a factor that differs from block to block along K."""
    codes = (1 + torch.arange(k) // 16 % 7).to(torch.uint8).repeat(rows, 1)
    return cases.packed(codes, torch.full((rows, -(-k // 16)), 0x38, dtype=torch.uint8), torch.ones(()), "128x4")


def ramp(rows: int, k: int, down: int, along: int) -> FP4Tensor:
    """Ones under block scales that differ from row to row and from block to block."""
    blocks = -(-k // 16)
    steps = down * torch.arange(rows).reshape(-1, 1) + along * torch.arange(blocks)
    scales = (0x20 + steps % 0x30).to(torch.uint8)
    return cases.packed(torch.full((rows, k), 2, dtype=torch.uint8), scales, torch.ones(()), "128x4")


@variants
def test_ramps_of_scales(spec: GemmSpec) -> None:
    m, n, k = RAMPED
    check(spec, ramp(m, k, 7, 3), ones(n, k), "block scales of A")
    check(spec, ones(m, k), ramp(n, k, 5, 11), "block scales of B")


def one_hot(rows: int, k: int) -> FP4Tensor:
    """Each row has one value, each in another column, under block scales that differ."""
    row = torch.arange(rows)
    codes = torch.zeros(rows, k, dtype=torch.uint8)
    codes[row, row * 37 % k] = 7
    scales = (1 + row.reshape(-1, 1) * 5 + torch.arange(k // 16)) % 0x7F
    return cases.packed(codes, scales.to(torch.uint8), torch.ones(()), "128x4")


@variants
def test_rows_of_one_value(spec: GemmSpec) -> None:
    """Each row of A picks a column of B: all codes and all scales, and any mix-up of rows or of K shows."""
    m, n, k = RAMPED
    a = one_hot(m, k)
    for seed in range(2):
        b = cases.any_bytes(n, k, "128x4", "per_row", seed)
        check(spec, a, b, f"seed {seed}")


@variants
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("shape", BATCHED, ids=lambda shape: "x".join(map(str, shape)))
def test_batches(spec: GemmSpec, shape: tuple[int, int, int], scaling: str) -> None:
    """Three problems that differ in one launch, also with CTAs that take tiles of several; each has its own terms, and
    then one bias is that of all."""
    m, n, k = shape
    pairs = [
        (ramp(m, k, 7, 3), ones(n, k)),
        (ones(m, k), ramp(n, k, 5, 11)),
        (one_hot(m, k), cases.any_bytes(n, k, "128x4", "per_tensor", 1)),
    ]
    members = [
        Operands.of(spec, scaled(a, scaling, 1 + i), scaled(b, scaling, 5 - i), seed=i)
        for i, (a, b) in enumerate(pairs)
    ]
    check_batch(spec, members, f"{shape} {scaling}")
    few = {"clusters": 1} if spec.schedule == "clc" else {"sms": spec.cluster[0] * spec.cluster[1]}
    shared = [replace(member, bias=members[1].bias) for member in members]
    check_batch(spec, shared, f"{shape} {scaling}, {few}", **few)


def scaled(t: FP4Tensor, scaling: str, power: int) -> FP4Tensor:
    """Values times powers of two, other ones from row to row where rows have a scale."""
    exponents = torch.tensor(power) if scaling == "per_tensor" else power + torch.arange(t.rows) % 3
    return replace(t, outer_scale=torch.exp2(exponents - 3.0))


@unquantized
@shapes
def test_random_bytes_within_the_bound(spec: GemmSpec, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = (cases.any_bytes(rows, k, "128x4", "per_row", rows + k) for rows in (m, n))
    operands = Operands.of(spec, a, b)
    a, b, bias, c = operands.a, operands.b, operands.bias, operands.c
    got, dtype = operands.run(spec), emulation.DTYPES[spec.out_dtype]
    if spec.activation is None:
        exact, bound = cases.gemm_exact_and_bound(a, b, bias, dtype, c, BETA)
    else:
        linear, bound = cases.gemm_exact_and_bound(a, b, bias, torch.float32, c, BETA)
        exact = activate(spec.activation, linear)
        bound = 1.13 * bound + function_error(linear)  # no activation is steeper
        bound = bound + cast_error(exact.abs() + bound, dtype)
    wrong = ~((got.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{spec.name} {shape}: {emulation.describe(got, exact, wrong)}"


@variants
@pytest.mark.parametrize("k", [544, 64])
def test_several_tiles_for_each_cta(spec: GemmSpec, k: int) -> None:
    """A GPU of few SMs: tiles follow each other in a CTA, with the barriers and the tensor memory of the last one.

    With K = 64 a tile is a single step of the main loop, and the epilogue is what the next one waits for.
    """
    sms = 2 * spec.cluster[0] * spec.cluster[1]
    m, n = (1032, 768) if spec.column_major else (768, 1032)
    a, b = (cases.exact_operand(rows, k, "128x4", "per_row", rows) for rows in (m, n))
    check(spec, a, b, f"{sms} SMs", sms=sms)
    if spec.schedule != "clc":  # which launches all CTAs
        rows, columns = (n, m) if spec.column_major else (m, n)
        tiles = -(-rows // spec.cta_tile[0]) * -(-columns // spec.cta_tile[1])
        assert emulation.ctas[spec] <= sms < tiles / 1.5
        return
    check(spec, a, b, "one cluster along x", clusters=1)
    assert emulation.granted[spec] > 0
