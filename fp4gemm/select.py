"""Problem -> spec: which kernel serves a call. Everything that depends on shape or device is decided here."""

from __future__ import annotations

from functools import cache

import torch

from fp4gemm.formats import BLOCK, SF_LAYOUTS, scale_columns
from fp4gemm.spec import AmaxSpec, DequantizeSpec, GemmSpec, KernelSpec, QuantizeSpec, sm90_gemms

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LAUNCHABLE = {(9, 0): "sm_90a"}  # compute capability -> arch
_COMPILED_ONLY = {(10, 0): "sm_100a", (12, 0): "sm_120a"}


@cache
def arch_of(device: int) -> str:
    """The arch whose kernels run on CUDA device ``device``. Raises NotImplementedError where there are none."""
    capability = torch.cuda.get_device_capability(device)
    if arch := LAUNCHABLE.get(capability):
        return arch
    name = torch.cuda.get_device_name(device)
    here = f"{name} has compute capability {capability[0]}.{capability[1]}"
    if arch := _COMPILED_ONLY.get(capability):
        raise NotImplementedError(
            f"{here}: fp4gemm compiles {arch} kernels but does not launch them yet; use CPU tensors"
        )
    raise NotImplementedError(f"{here}: fp4gemm has CUDA kernels for 9.0 (sm_90a) only; use CPU tensors")


def quantize_spec(
    arch: str, dtype: str, k: int, scaling: str, convention: str, sf_layout: str, vectorized: bool
) -> QuantizeSpec:
    """Whole rows on chip where they fit, as many rows to a CTA as give it 256 threads.

    A tiled layout wants four rows at least (layout.hpp), for which four blocks a thread leave room; fp32 takes twice
    the registers: two blocks. The figures are in docs/performance.md.
    """
    columns = (scale_columns(k) + 3) // 4 * 4  # with the padding a tiled layout has
    tiled = sf_layout != "linear"
    blocks = min(4 if tiled and dtype != "fp32" else 2, max(1, columns // 32))
    threads = max(32, 1 << (-(-columns // blocks) - 1).bit_length())
    resident = threads <= 1024
    if not resident:
        threads, blocks = 512, 2
    rows = max(4 if tiled and threads <= 128 else 1, 256 // threads)
    return QuantizeSpec(arch, dtype, scaling, convention, sf_layout, threads, blocks, rows, vectorized, resident)


_PREFETCH_BYTES = 64 << 10  # of rows ahead for each SM


def prefetch_ctas(spec: QuantizeSpec, k: int, device: int) -> int:
    """How many CTAs ahead a per-row quantizer fetches rows into L2; 0 where it does not."""
    if spec.scaling != "per_row" or not spec.resident or not spec.vectorized:
        return 0
    cta_bytes = spec.rows * k * (4 if spec.dtype == "fp32" else 2)
    sms: int = torch.cuda.get_device_properties(device).multi_processor_count
    return sms * max(1, round(_PREFETCH_BYTES / cta_bytes))


def bf16_specs(arch: str, k: int) -> list[KernelSpec]:
    """Every kernel but the GEMMs that bf16 tensors of ``k`` columns can ask for: what to build before serving."""
    quantizers = [
        quantize_spec(arch, "bf16", k, scaling, convention, sf_layout, vectorized=k % BLOCK == 0)
        for scaling, convention in (("per_row", "te_per_token"), ("per_tensor", "te"), ("given", "te_per_token"))
        for sf_layout in SF_LAYOUTS
    ]
    dequantizers = [
        dequantize_spec(arch, "bf16", sf_layout, outer) for sf_layout in SF_LAYOUTS for outer in (True, False)
    ]
    return [*quantizers, amax_spec(arch, "bf16", k % BLOCK == 0), *dequantizers]


def amax_spec(arch: str, dtype: str, vectorized: bool) -> AmaxSpec:
    return AmaxSpec(arch, dtype, vectorized)


def dequantize_spec(arch: str, dtype: str, sf_layout: str, outer: bool) -> DequantizeSpec:
    return DequantizeSpec(arch, dtype, sf_layout, outer)


def gemm_spec(arch: str, m: int, n: int, out_dtype: str, bias: str | None) -> GemmSpec:
    """Large tiles once they give most SMs one, small ones before."""
    if arch != "sm_90a":
        raise NotImplementedError(f"no GEMM is launched on {arch} yet")
    large, small = sm90_gemms(out_dtype, bias)
    tiles = -(-m // large.tile[0]) * -(-n // large.tile[1])
    return large if tiles >= 96 else small
