"""Left operands of products that follow at once: the bytes of the reference, and the products of NVFP4, to the bit."""

from __future__ import annotations

import random
from typing import Any

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import ops, reference
from fp4gemm.engine import Activations
from fp4gemm.operands import quantize_operands
from fp4gemm.reference.arguments import check_quantize_both

SIZES = (1, 8, 15, 16, 17, 40, 100, 127, 128, 129, 144, 200, 256, 300, 520)
PROBLEMS, CHUNK = 200, 20


def draw(seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """x on the CPU, rows or columns contiguous, with and without padding, and the options of a recipe."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    m, k = rng.choice(SIZES), rng.choice(SIZES)
    x = torch.randn(m, k + 8 * rng.randrange(3), generator=generator)[:, :k]
    if rng.random() < 0.2:
        x = x.t().contiguous().t()
    if rng.random() < 0.2:
        x = x * torch.where(torch.rand(x.shape, generator=generator) < 0.01, float("nan"), 1e30)
    options: dict[str, Any] = {
        "seed": None,
        "scaling": rng.choice(("per_row", "per_tensor")),
        "hadamard": rng.choice((None, 0xACE1)),
    }
    if rng.random() < 0.4:
        options["seed"] = torch.tensor([seed])
    return x.to(rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))), options


def moved(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}


@pytest.mark.parametrize("first", range(0, PROBLEMS, CHUNK))
def test_values_are_the_reference(first: int, cuda: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        x, options = draw(seed)
        given = {"convention": None, "block": (1, 16), "outer_scale": None, "adaptive": None, "amax": None}
        sides = check_quantize_both(x, sf_layout="128x4", transposed_sf_layout=None, **given, **options)
        on_device, chosen = x.to(cuda), moved(options, cuda)
        wanted = [reference.quantize_values(side) for side in sides]
        cases.poison(cuda, *(2 * values.numel() for values, _, _ in wanted))
        both = quantize_operands(on_device, True, True, **chosen)
        _, alone = quantize_operands(on_device, False, True, **chosen)
        for got, (values, _, outer) in zip((*both, alone), (*wanted, wanted[1]), strict=True):
            assert isinstance(got, Activations)
            cases.assert_same_bits(got.values, values, f"values of {seed}: {tuple(x.shape)} {options}")
            cases.assert_same_bits(got.outer_scale, outer, f"outer scales of {seed}")


@pytest.mark.parametrize("shape", [(64, 128, 256), (300, 200, 130), (1, 40, 16), (0, 40, 16), (40, 0, 16)], ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_those_of_nvfp4(
    compiled: bool, keep: bool, shape: tuple[int, int, int], device: torch.device
) -> None:
    """Of rows of x by one weight and of its columns by another."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    x, by_row, by_column = (
        torch.randn(*size, generator=generator).bfloat16().to(device) for size in ((m, k), (n, k), (n, m))
    )
    weights = [fp4gemm.quantize(w) for w in (by_row, by_column)]

    def products(x: torch.Tensor) -> list[torch.Tensor]:
        operands = quantize_operands(x, True, True, scaling="per_row", keep_transpose=keep)
        return [ops.product(a, w, None, torch.bfloat16) for a, w in zip(operands, weights, strict=True)]

    torch.compiler.reset()  # it gives up on a function that was compiled for eight shapes
    got = (torch.compile(products, fullgraph=True, backend="aot_eager") if compiled else products)(x)
    for a, w, d in zip(fp4gemm.quantize_both(x), weights, got, strict=True):
        cases.assert_same_bits(d, fp4gemm.gemm(a, w), str(shape))
