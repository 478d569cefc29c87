"""Dequantized values against the reference, bit for bit."""

from __future__ import annotations

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import reference
from fp4gemm.formats import SF_LAYOUTS

LAYOUTS = tuple(SF_LAYOUTS)
SHAPES = ((0, 32), (3, 0), (1, 16), (1, 1), (5, 17), (130, 48), (33, 1000), (129, 4112), (2, 40000))


def check(t: fp4gemm.FP4Tensor, dtype: torch.dtype, device: torch.device, what: str) -> None:
    want = reference.dequantize(t, dtype)
    on_device = t.to(device)
    cases.poison(device, want.numel() * want.element_size())
    got = fp4gemm.dequantize(on_device, dtype)
    cases.assert_same_bits(got, want, what)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_bytes(
    shape: tuple[int, int], scaling: str, sf_layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    check(cases.any_bytes(*shape, sf_layout, scaling, seed=sum(shape)), dtype, device, f"{shape}")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_code_under_every_scale(dtype: torch.dtype, device: torch.device) -> None:
    codes = torch.arange(16, dtype=torch.uint8).expand(127, 16).contiguous()
    scales = torch.arange(127, dtype=torch.uint8).reshape(127, 1)
    check(cases.packed(codes, scales, torch.ones(127), "128x4"), dtype, device, "outer 1")
    check(cases.packed(codes, scales, torch.full((127,), 1 / 2688), "128x4"), dtype, device, "outer 1/2688")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_extreme_outer_scales(dtype: torch.dtype, device: torch.device) -> None:
    """Overflow to Inf, subnormal results, a zero outer scale: as IEEE arithmetic has it."""
    outer = torch.tensor([0.0, 1e-45, 1e-39, 1e-30, 1e-7, 1.0, 30.0, 1e30, 3e38])
    rows = cases.any_bytes(len(outer), 96, "linear", "per_row", seed=9)
    t = fp4gemm.FP4Tensor(rows.data, rows.block_scale, outer, rows.shape, "linear")
    check(t, dtype, device, "extreme outer scales")


def test_uninitialized_memory_never_shows(device: torch.device) -> None:
    for dtype in cases.DTYPES:
        t = cases.any_bytes(37, 173, "8x4", "per_row", seed=6)
        on_device = t.to(device)
        with cases.filled_with_nan():
            got = fp4gemm.dequantize(on_device, dtype)
        cases.assert_same_bits(got, reference.dequantize(t, dtype), str(dtype))


def test_cuda_graph_and_other_stream(cuda: torch.device) -> None:
    one, two = (cases.any_bytes(130, 272, "128x4", "per_row", seed=seed) for seed in (7, 8))
    t = one.to(cuda)
    fp4gemm.dequantize(t, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp4gemm.dequantize(t, torch.bfloat16)
    stream = torch.cuda.Stream()
    for source in (one, two):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for target, leaf in ((t.data, source.data), (t.block_scale, source.block_scale)):
                target.copy_(leaf.to(cuda))
            t.outer_scale.copy_(source.outer_scale.to(cuda))
            graph.replay()
        stream.synchronize()
        cases.assert_same_bits(out, reference.dequantize(source, torch.bfloat16), "replay")
