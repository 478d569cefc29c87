"""A few small cases of every kernel, for compute-sanitizer; seconds each.

    compute-sanitizer --tool memcheck  --error-exitcode 1 python tests/gpu/sanitize_cases.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_cases.py

Arguments choose suites (`quantize`, `engine`, ...), and `--kernel-name kernel_substring=gemm` the kernels that are
checked: memcheck of a suite then takes seconds. `--report-api-errors no`: a cuda-python newer than the driver asks it
for functions that it has not, which would count as errors. Results are compared with the reference too. The caching
allocator is off, so memcheck sees where a tensor ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import gpu_cases as cases  # noqa: E402 - the two lines above must come first
import group_cases as groups  # noqa: E402
import torch  # noqa: E402

import fp4gemm  # noqa: E402
from fp4gemm import calls, reference, search, select  # noqa: E402
from fp4gemm.engine import Activations  # noqa: E402
from fp4gemm.formats import LEFT, PREPACKED, PRODUCERS, RIGHT, SF_LAYOUTS, VALUES  # noqa: E402
from fp4gemm.operands import quantize_operands  # noqa: E402
from fp4gemm.reference.arguments import check_quantize_both  # noqa: E402
from fp4gemm.spec import check  # noqa: E402

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


OPTIONS: tuple[dict[str, Any], ...] = (
    {"seed": 5},
    {"adaptive": "mse"},
    {"adaptive": "mae", "scaling": "per_tensor"},
    {"residual": 32},
    {"residual": 16, "residual_side": "weight", "seed": 1},
    {"transposed": True},
    {"transposed": True, "hadamard": 0xACE1, "seed": 7},
    {"block": (16, 16), "scaling": "per_tensor"},
)


def options_cases(device: torch.device) -> Iterator[str]:
    """Every option alone, and those of training together, at whole and ragged edges."""
    for (rows, k), sf_layout, options in product(((1, 32), (130, 272), (33, 4112)), SF_LAYOUTS, OPTIONS):
        x = torch.randn(rows, k).bfloat16()
        yield _quantize(x, device, f"quantize {rows}x{k} {sf_layout} {options}", sf_layout=sf_layout, **options)
        if "residual" in options or "adaptive" in options or "transposed" in options:
            continue
        both = {**options, "sf_layout": sf_layout, "hadamard": None if "block" in options else 3}
        for got, want in zip(
            fp4gemm.quantize_both(x.to(device), **both), reference.quantize_both(x, **both), strict=True
        ):
            cases.assert_same(got, want, f"quantize_both {rows}x{k} {both}")
    for rows, k in ((1, 32), (5, 33), (33, 4112)):
        weight, residual = torch.randn(k).bfloat16(), torch.randn(rows, k).bfloat16()
        for producer in PRODUCERS:
            x = torch.randn(rows, 2 * k if producer == "silu_mul" else k).bfloat16()
            yield _quantize(x, device, f"quantize {rows}x{k} {producer}", producer=producer)
        for added in (None, residual):
            want, total = reference.quantize_rmsnorm(residual, weight, residual=added)
            on_device = None if added is None else added.to(device)
            got, h = fp4gemm.quantize_rmsnorm(residual.to(device), weight.to(device), residual=on_device)
            cases.assert_same(got, want, f"quantize_rmsnorm {rows}x{k}")
            cases.assert_same_bits(h, total, "x + residual")
            yield f"quantize_rmsnorm {rows}x{k}"
    for rows, k in ((5, 33), (33, 4097)):
        x = torch.randn(rows, k)
        for options in ({"transposed": True, "hadamard": 1}, {"seed": 2}):
            yield _quantize(x, device, f"quantize {rows}x{k} {options}", **options)


def _quantize(
    x: torch.Tensor, device: torch.device, what: str, outer: torch.Tensor | None = None, **options: Any
) -> str:
    want = reference.quantize(x, outer_scale=outer, **options)
    got = fp4gemm.quantize(x.to(device), outer_scale=None if outer is None else outer.to(device), **options)
    cases.assert_same(got, want, what)
    return what


def quantize_grouped_cases(device: torch.device) -> Iterator[str]:
    """Every kind and way: members that end inside of a tile, empty ones, more of them than lanes that sum their sizes,
    with poison around what is read and written."""
    drawn = product(
        groups.KINDS,
        (
            {},
            {"scaling": "per_tensor"},
            {"both": True, "hadamard": 0xACE1, "seed": 3, "dbias": True},
            {"gradient": "silu"},
        ),
        ((0, 3), (1, 70)),
    )
    for case in (
        *groups.UNIFORM,
        *(
            groups.GroupCase.draw(seed, kind, members, 280, torch.bfloat16, options)
            for kind, options, (seed, members) in drawn
        ),
    ):
        x, arguments = case.make(torch.device("cpu"))
        want = fp4gemm.quantize_grouped(x, **arguments)
        x, arguments = case.make(device)
        with groups.guarded():
            got = fp4gemm.quantize_grouped(x, **arguments)
        groups.assert_results(got, want, case.columns, str(case), guarded=device.type == "cuda")
        yield str(case)


def dequantize_cases(device: torch.device) -> Iterator[str]:
    """Every dtype and layout."""
    for (rows, k), dtype, sf_layout in product(SHAPES, cases.DTYPES, SF_LAYOUTS):
        what = f"dequantize {rows}x{k} {dtype} {sf_layout}"
        t = cases.any_bytes(rows, k, sf_layout, "per_row", seed=rows)
        cases.assert_same_bits(fp4gemm.dequantize(t.to(device), dtype), reference.dequantize(t, dtype), what)
        yield what


def packed_cases(device: torch.device) -> Iterator[str]:
    """Every layout, both ways."""
    for (rows, k), sf_layout in product((*SHAPES, (64, 64)), SF_LAYOUTS):
        t = cases.any_bytes(rows, k, sf_layout, "per_row", seed=rows)
        want, got = t.prepack(), t.to(device).prepack()
        cases.assert_same(got, want, f"prepack {rows}x{k} {sf_layout}")
        cases.assert_same(got.unpack(), want.unpack(), f"unpack {rows}x{k} {sf_layout}")
        yield f"prepack {rows}x{k} {sf_layout}"


def values_cases(device: torch.device) -> Iterator[str]:
    """One CTA a row, several, streamed rows; K that ends inside a block and inside 16 bytes; given scales."""
    if device.type != "cuda":
        return
    for rows, k in ((1, 16), (5, 33), (3, 8200), (40, 4096), (2, 40000)):
        for outer in (None, torch.tensor(1 / 512), torch.full((rows,), 1 / 512)):
            x = torch.randn(rows, k).bfloat16()
            want = reference.quantize(x, outer_scale=outer)
            on_device = None if outer is None else outer.to(device)
            scalar = outer is not None and outer.dim() == 0
            got, _ = calls.quantize_values(x.to(device), scalar, "te_per_token", on_device)
            what = f"values {rows}x{k} given {outer is not None}"
            cases.assert_same_bits(got[:, :k], reference.dequantize(want, torch.bfloat16, outer=False), what)
            yield what


def operands_cases(device: torch.device) -> Iterator[str]:
    """Values and the prepacked form, both ways, whole and ragged tiles, with noise and the Hadamard transform."""
    if device.type != "cuda":
        return
    forms = {LEFT: VALUES, RIGHT: PREPACKED}
    given = {"convention": None, "block": (1, 16), "outer_scale": None, "adaptive": None, "amax": None}
    options = ({"scaling": "per_row", "hadamard": None}, {"scaling": "per_tensor", "hadamard": 0xACE1})
    for (rows, k), sides, chosen, noisy in product(
        ((1, 16), (5, 33), (130, 272), (256, 128)), ((LEFT, RIGHT), (RIGHT, LEFT)), options, (False, True)
    ):
        x, what = torch.randn(rows, k).bfloat16(), f"operands {rows}x{k} {sides} {chosen} noise {noisy}"
        seed = torch.tensor([rows]) if noisy else None
        args = check_quantize_both(x, sf_layout="128x4", transposed_sf_layout=None, seed=seed, **given, **chosen)
        on_device = None if seed is None else seed.to(device)
        both = quantize_operands(x.to(device), True, True, seed=on_device, sides=sides, **chosen)
        for got, side, each in zip(both, sides, args, strict=True):
            data, _, outer = reference.quantize_operand(each._replace(sf_layout=forms[side]))
            values = got.values if isinstance(got, Activations) else got.data
            cases.assert_same_bits(values, data, what)
            cases.assert_same_bits(got.outer_scale, outer, what)
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


# Both kernels: K split or not, tokens shared or not, one warpgroup along K or several, stages of one block or two.
ENGINE_CONFIGS: tuple[cases.Config, ...] = (
    ("mma", (1, 8, 4, 1, 2, 0, 0)),
    ("mma", (1, 4, 8, 2, 4, 0, 0)),
    ("mma", (2, 14, 2, 1, 2, 2, 1)),
    ("mma", (2, 8, 4, 1, 1, 4, 0)),
    ("wgmma", (16, 1, 1, 4, 1, 2, 16)),
    ("wgmma", (16, 1, 1, 1, 4, 1, 8)),
    ("wgmma", (32, 2, 2, 2, 1, 1, 12)),
    ("wgmma", (64, 1, 1, 2, 4, 1, 8)),
    ("wgmma", (64, 7, 4, 1, 1, 2, 6)),
    ("wgmma", (96, 1, 1, 2, 1, 4, 8)),
    ("wgmma", (128, 1, 1, 1, 2, 2, 8)),
    ("wgmma", (128, 4, 2, 1, 1, 1, 8)),
    ("wgmma", (192, 2, 2, 1, 1, 1, 5)),
    ("wgmma", (256, 2, 2, 1, 2, 1, 4)),
    ("wgmma", (256, 1, 2, 1, 2, 1, 6)),
)


def engine_cases(device: torch.device) -> Iterator[str]:
    """Each kernel at its ragged edges, in place with a bias, row- and column-major; one with more tiles than CTAs."""
    if device.type != "cuda":
        return
    for (kernel, config), column_major in product(ENGINE_CONFIGS, (False, True)):
        m = 8 * config[0] - 1 if kernel == "mma" else config[0] + 1
        yield _engine((kernel, config), (m, 201, 1000), device, column_major)
    yield _engine(("wgmma", (16, 1, 1, 4, 1, 2, 16)), (17, 9000, 72), device, False)
    yield _engine(("wgmma", (256, 1, 2, 1, 2, 1, 6)), (257, 9000, 72), device, False)  # both warpgroups, in turn
    yield _engine(("mma", (1, 8, 4, 1, 2, 0, 0)), (3, 20000, 136), device, False)


def _engine(config: cases.Config, shape: tuple[int, int, int], device: torch.device, column_major: bool) -> str:
    m, n, k = shape
    what = f"{config} {shape} column-major {column_major}"
    x, w = cases.exact_activations(m, k, torch.bfloat16, 1), cases.exact_operand(n, k, "linear", "per_row", 2)
    bias, c = torch.randn(n).bfloat16(), torch.randn(m, n).bfloat16()
    spec = select.packed_of(*config, "bf16", "bf16", "bf16", True)
    if check(spec) is not None:  # no registers for C
        spec, c = replace(spec, source=False), c.zero_()
    want = reference.gemm(x, w, bias, c=c, beta=0.5)
    d = c.t().contiguous().t() if column_major else c
    d, packed = d.to(device), w.to(device).prepack()
    cases.force(spec, x.to(device), packed, bias.to(device), d if spec.source else None, 0.5, d)
    cases.assert_same_bits(d.cpu() + 0.0, want + 0.0, what)
    return what


def stream_k_cases(device: torch.device) -> Iterator[str]:
    """Fewer tiles than clusters, and a few more: what they leave for one another."""
    if device.type != "cuda":
        return
    spec = select.packed_of("stream_k", (128, 256, 2), "bf16", "bf16", None, False)
    for m, n, k in ((300, 1000, 1032), (257, 17000, 520)):
        x, w = cases.exact_activations(m, k, torch.bfloat16, 1), cases.exact_operand(n, k, "linear", "per_row", 2)
        want = reference.gemm(x, w)
        d = torch.empty_like(want, device=device)
        cases.force(spec, x.to(device), w.to(device).prepack(), None, None, 0.0, d)
        cases.assert_same_bits(d.cpu() + 0.0, want + 0.0, f"stream-K {m}x{n}x{k}")
        yield f"stream-K {m}x{n}x{k}"


def search_cases(device: torch.device) -> Iterator[str]:
    """Both errors and block sizes, every layout, ragged edges; one outer scale or many; feedback."""
    for (rows, k), block, sf_layout in product(((1, 16), (5, 33), (33, 144)), (16, 32), SF_LAYOUTS):
        w, units = torch.randn(rows, k).bfloat16(), -(-k // block)
        z = torch.randn(units, 4 * block, block)
        found = search.factor(z.mT @ z)
        there = search.Factor(*(part.to(device) for part in found))
        for options in ({}, {"candidates": "4/6"}, {"scaling": "per_tensor"}):
            what = f"search {rows}x{k} {block} {sf_layout} {options}"
            for metric, here, on_device in (("sse", None, None), ("hessian", found, there)):
                same = {"block": block, "sf_layout": sf_layout, **options}
                want = fp4gemm.search_scales(w, metric, hessian=here, **same)
                got = fp4gemm.search_scales(w.to(device), metric, hessian=on_device, **same)
                cases.assert_same(got, want, f"{what} {metric}")
                yield f"{what} {metric}"
    w, x = torch.randn(33, 40), torch.randn(200, 40)
    h = (x.mT @ x).to(device)
    got = fp4gemm.search_scales(w.to(device), "hessian", hessian=h, feedback=True)
    assert float((got.dequantize().cpu() - w).norm()) < 0.2 * float(w.norm())
    yield "search with feedback"


GROUPED_CONFIGS = (
    (8, 4, 2, 2, 1, 1, 20),
    (16, 1, 1, 4, 1, 2, 16),
    (32, 2, 1, 4, 2, 1, 12),
    (64, 6, 3, 1, 1, 1, 8),
    (128, 4, 2, 1, 1, 1, 8),
    (256, 1, 2, 1, 2, 1, 6),
)


def grouped_cases(device: torch.device) -> Iterator[str]:
    """Empty experts, single tokens, experts that end inside a tile, more experts than a warp has lanes; quantized."""
    for counts, (n, k) in (((3, 0, 1, 40, 0, 17), (201, 1000)), ((0, 2, 1) * 30, (8, 72)), ((3, 0, 5), (9000, 72))):
        offsets = torch.tensor((0, *counts)).cumsum(0).to(device)
        plain = [cases.exact_operand(n, k, "linear", "per_row", e) for e in range(len(counts))]
        w = fp4gemm.stack_weights(plain).to(device)
        x = cases.exact_activations(sum(counts), k, torch.bfloat16, 1).to(device)
        bias = torch.randn(len(counts), n).bfloat16().to(device)
        want = reference.gemm_grouped(x, w, offsets, bias)
        what = f"grouped {len(counts)} experts {n}x{k}"
        cases.assert_same_bits(fp4gemm.gemm_grouped(x, w, offsets, bias) + 0.0, want + 0.0, what)
        yield what
        split = fp4gemm.gemm_grouped(fp4gemm.quantize(x), w, offsets)
        cases.assert_same_bits(fp4gemm.quantize_gemm_grouped(x, w, offsets), split, f"{what}, quantized")
        for config in GROUPED_CONFIGS if device.type == "cuda" else ():
            d = torch.empty_like(want)
            spec = cases.grouped_spec(config, ("bf16", "bf16", "bf16", False))
            cases.force_grouped(spec, x, w, offsets, bias, None, 0.0, d)
            cases.assert_same_bits(d + 0.0, want + 0.0, f"{what} {config}")
            yield f"{what} {config}"


SUITES = {
    suite.__name__.removesuffix("_cases"): suite
    for suite in (
        quantize_cases,
        options_cases,
        search_cases,
        dequantize_cases,
        packed_cases,
        values_cases,
        operands_cases,
        gemm_cases,
        engine_cases,
        stream_k_cases,
        quantize_grouped_cases,
        grouped_cases,
    )
}


def main(names: Sequence[str], device: torch.device) -> int:
    torch.manual_seed(0)
    for name in names or SUITES:
        done = list(SUITES[name](device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: {len(done)} cases on {device}: results equal the reference", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], torch.device("cuda" if torch.cuda.is_available() else "cpu")))
