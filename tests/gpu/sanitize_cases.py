"""A few small cases of every kernel, for compute-sanitizer; seconds each.

    compute-sanitizer --tool memcheck  --error-exitcode 1 python tests/gpu/sanitize_cases.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_cases.py

Results are compared with the reference too. The caching allocator is off, so memcheck sees where a tensor ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import gpu_cases as cases  # noqa: E402 - the two lines above must come first
import torch  # noqa: E402

import fp4gemm  # noqa: E402
from fp4gemm import reference  # noqa: E402
from fp4gemm.formats import SF_LAYOUTS  # noqa: E402

SHAPES = ((1, 16), (5, 33), (130, 272))


def quantize_cases(device: torch.device) -> Iterator[str]:
    """Every dtype, layout, scaling; whole and ragged K; one row too long for registers; given scales; transposed."""
    for (rows, k), dtype, scaling in product(SHAPES, cases.DTYPES, ("per_row", "per_tensor", "per_column")):
        for sf_layout in SF_LAYOUTS if dtype == torch.bfloat16 else ("128x4",):
            what = f"quantize {rows}x{k} {dtype} {scaling} {sf_layout}"
            yield _quantize(torch.randn(rows, k).to(dtype), device, what, scaling=scaling, sf_layout=sf_layout)
    yield _quantize(torch.randn(2, 40000).bfloat16(), device, "quantize 2x40000")
    yield _quantize(torch.randn(2, 33001).bfloat16(), device, "quantize 2x33001")
    for outer in (torch.tensor(1 / 512), torch.full((5,), 1 / 512)):
        yield _quantize(torch.randn(5, 48).bfloat16(), device, f"quantize given {outer.dim()}", outer)


def _quantize(
    x: torch.Tensor, device: torch.device, what: str, outer: torch.Tensor | None = None, **options: str
) -> str:
    want = reference.quantize(x, outer_scale=outer, **options)
    got = fp4gemm.quantize(x.to(device), outer_scale=None if outer is None else outer.to(device), **options)
    cases.assert_same(got, want, what)
    return what


def dequantize_cases(device: torch.device) -> Iterator[str]:
    """Every dtype and layout."""
    for (rows, k), dtype, sf_layout in product(SHAPES, cases.DTYPES, SF_LAYOUTS):
        what = f"dequantize {rows}x{k} {dtype} {sf_layout}"
        t = cases.any_bytes(rows, k, sf_layout, "per_row", seed=rows)
        cases.assert_same_bits(fp4gemm.dequantize(t.to(device), dtype), reference.dequantize(t, dtype), what)
        yield what


def gemm_cases(device: torch.device) -> Iterator[str]:
    """Every output dtype, with and without bias; one tile, ragged edges, and more than one tile each way."""
    for (M, N, K), out_dtype, with_bias in product(
        ((1, 8, 16), (33, 19, 72), (140, 264, 144)), cases.DTYPES, (False, True)
    ):
        what = f"gemm {M}x{N}x{K} {out_dtype} bias {with_bias}"
        a, b = cases.exact_operand(M, K, "128x4", "per_row", 1), cases.exact_operand(N, K, "8x4", "per_row", 2)
        bias = torch.randn(N).to(out_dtype) if with_bias else None
        want = reference.gemm(a, b, bias, out_dtype)
        on_device = None if bias is None else bias.to(device)
        got = fp4gemm.gemm(a.to(device), b.to(device), on_device, out_dtype=out_dtype)
        cases.assert_same_bits(got.cpu() + 0.0, want + 0.0, what)
        x = torch.randn(M, K).bfloat16()
        fused = fp4gemm.quantize_gemm(x.to(device), b.to(device), on_device, out_dtype=out_dtype)
        split = fp4gemm.gemm(reference.quantize(x).to(device), b.to(device), on_device, out_dtype=out_dtype)
        cases.assert_same_bits(fused, split, f"quantize_{what}")
        yield what


def main(device: torch.device) -> int:
    torch.manual_seed(0)
    done = [what for suite in (quantize_cases, dequantize_cases, gemm_cases) for what in suite(device)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(done)} cases on {device}: results equal the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")))
