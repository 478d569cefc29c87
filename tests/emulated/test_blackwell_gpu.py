"""Blackwell's GEMM kernels, their own source, on a Hopper GPU: see docs/emulation.md.

Bit for bit where one answer is right, within the derived bound of float64 elsewhere. `prebuild.py` builds the kernels
beforehand, several at once.
"""

from __future__ import annotations

import emulation
import gpu_cases as cases
import pytest
import torch

from fp4gemm import reference
from fp4gemm.spec import GemmSpec
from fp4gemm.tensor import FP4Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(emulation.missing() is not None, reason=emulation.missing() or ""),
]

# K is less than a block of scales in memory has (64), and no multiple of it; M and N are less than a tile and more.
SHAPES = ((256, 256, 256), (1, 8, 32), (1, 264, 96), (136, 8, 96), (129, 128, 32), (200, 264, 288), (512, 384, 1024))
RAMPED = (256, 264, 288)

variants = pytest.mark.parametrize("spec", emulation.VARIANTS, ids=lambda spec: spec.name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
DEVICE = torch.device("cuda")


def bias_of(spec: GemmSpec, n: int) -> torch.Tensor | None:
    if spec.bias is None:
        return None
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(emulation.DTYPES[spec.bias])


def check_bits(spec: GemmSpec, a: FP4Tensor, b: FP4Tensor, what: str, **how: int) -> None:
    """Operands on the CPU whose float32 sums are exact in every order."""
    bias = bias_of(spec, b.rows)
    want = reference.gemm(a, b, bias, emulation.DTYPES[spec.out_dtype])
    on_device = None if bias is None else bias.to(DEVICE)
    got = emulation.run(spec, a.to(DEVICE), b.to(DEVICE), on_device, **how).cpu()
    wrong = cases.bits(got + 0.0) != cases.bits(want + 0.0)  # a sum of zero may be +0 or -0
    assert not wrong.any(), f"{spec.name} {what}: {emulation.describe(got, want, wrong)}"


@variants
@shapes
def test_exact_sums(spec: GemmSpec, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for scaling in ("per_row", "per_tensor"):
        a = cases.exact_operand(m, k, "128x4", scaling, m + k)
        b = cases.exact_operand(n, k, "128x4", scaling, n - k)
        check_bits(spec, a, b, f"{shape} {scaling}")


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
    check_bits(spec, ramp(m, k, 7, 3), ones(n, k), "block scales of A")
    check_bits(spec, ones(m, k), ramp(n, k, 5, 11), "block scales of B")


@variants
def test_rows_of_one_value(spec: GemmSpec) -> None:
    """Each row of A picks a column of B: all codes and all scales, and any mix-up of rows or of K shows."""
    m, n, k = RAMPED
    row = torch.arange(m)
    codes = torch.zeros(m, k, dtype=torch.uint8)
    codes[row, row * 37 % k] = 7
    scales = (1 + row.reshape(-1, 1) * 5 + torch.arange(k // 16)) % 0x7F
    a = cases.packed(codes, scales.to(torch.uint8), torch.ones(()), "128x4")
    for seed in range(2):
        b = cases.any_bytes(n, k, "128x4", "per_row", seed)
        check_bits(spec, a, b, f"seed {seed}")


@variants
@shapes
def test_random_bytes_within_the_bound(spec: GemmSpec, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = (cases.any_bytes(rows, k, "128x4", "per_row", rows + k).to(DEVICE) for rows in (m, n))
    bias, dtype = bias_of(spec, n), emulation.DTYPES[spec.out_dtype]
    bias = None if bias is None else bias.to(DEVICE)
    got = emulation.run(spec, a, b, bias)
    exact, bound = cases.gemm_exact_and_bound(a, b, bias, dtype)
    wrong = ~((got.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{spec.name} {shape}: {emulation.describe(got, exact, wrong)}"


@variants
def test_several_tiles_for_each_cta(spec: GemmSpec) -> None:
    """A GPU of few SMs: tiles follow each other in a CTA, with the barriers and the tensor memory of the last one."""
    clusters = 2
    sms = clusters * spec.cluster[0] * spec.cluster[1]
    a, b = (cases.exact_operand(rows, 544, "128x4", "per_row", rows) for rows in (768, 1032))
    check_bits(spec, a, b, f"{sms} SMs", sms=sms)
