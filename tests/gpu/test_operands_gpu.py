"""Operands of products: the bytes of the reference, and the products of NVFP4, to the bit."""

from __future__ import annotations

import random
from typing import Any

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import ops, reference
from fp4gemm.engine import Activations
from fp4gemm.formats import LEFT, PREPACKED, RIGHT, VALUES
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
def test_bytes_are_the_reference(first: int, cuda: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        x, options = draw(seed)
        sides = random.Random(seed).choice([(LEFT, LEFT), (LEFT, RIGHT), (RIGHT, RIGHT)])
        given = {"convention": None, "block": (1, 16), "outer_scale": None, "adaptive": None, "amax": None}
        args = check_quantize_both(x, sf_layout="128x4", transposed_sf_layout=None, **given, **options)
        forms = {LEFT: VALUES, RIGHT: PREPACKED}
        wanted = [
            reference.quantize_operand(each._replace(sf_layout=forms[side]))
            for each, side in zip(args, sides, strict=True)
        ]
        on_device, chosen = x.to(cuda), {**moved(options, cuda), "sides": sides}
        cases.poison(cuda, *(data.nbytes for data, _, _ in wanted))
        both = quantize_operands(on_device, True, True, **chosen)
        _, alone = quantize_operands(on_device, False, True, **chosen)
        for got, side, (data, _, outer) in zip((*both, alone), (*sides, sides[1]), (*wanted, wanted[1]), strict=True):
            assert isinstance(got, Activations) == (side == LEFT)
            what = f"{side} of {seed}: {tuple(x.shape)} {options}"
            cases.assert_same_bits(got.values if isinstance(got, Activations) else got.data, data, what)
            cases.assert_same_bits(got.outer_scale, outer, f"outer scales, {what}")


@pytest.mark.parametrize("shape", [(64, 128, 256), (300, 200, 130), (1, 40, 16), (0, 40, 16), (40, 0, 16)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_those_of_nvfp4(compiled: bool, shape: tuple[int, int, int], device: torch.device) -> None:
    """x . w^T and x^T . v^T, of operands of the left and of the right."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    x, w, v = (torch.randn(*size, generator=generator).bfloat16().to(device) for size in ((m, k), (n, k), (n, m)))

    def products(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        left = quantize_operands(x, True, True, scaling="per_row")
        right = [quantize_operands(t, True, True, scaling="per_row", sides=(RIGHT, LEFT))[0] for t in (w, v)]
        return [ops.product(a, b, None, torch.bfloat16) for a, b in zip(left, right, strict=True)]

    torch.compiler.reset()  # it gives up on a function that was compiled for eight shapes
    got = (torch.compile(products, fullgraph=True, backend="aot_eager") if compiled else products)(x, w, v)
    for a, b, d in zip(fp4gemm.quantize_both(x), (w, v), got, strict=True):
        cases.assert_same_bits(d, fp4gemm.gemm(a, fp4gemm.quantize(b)), str(shape))
