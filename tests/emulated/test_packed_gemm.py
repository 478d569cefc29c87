"""GEMMs on prepacked weights against float64: ragged M, N and K, every term and dtype, several rounds of tiles.

Warps run in random orders, so a result that depended on one, or a barrier that is miscounted, shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import emulator as emulation
import pytest
import torch

from fp4gemm import FP4Tensor, division, reference, select
from fp4gemm.packed_plan import PackedProblem
from fp4gemm.spec import PackedMmaSpec, PackedWgmmaSpec, check

Spec = PackedMmaSpec | PackedWgmmaSpec
DTYPES = {name: dtype for dtype, name in select.DTYPE_NAMES.items()}
NS = (1, 8, 63, 64, 65, 100, 128, 200, 256, 520, 1000)
KS = (16, 17, 64, 65, 128, 130, 200, 272, 328, 520)
LONG_KS = (2064, 4096, 4104)  # tokens come in several pieces
PROBLEMS = 6  # of each kernel


def spec_of(kernel: str, config: tuple[int, ...], *terms: object, quantize: str | None = None) -> Spec:
    spec = select.packed_of(kernel, config, *terms)
    assert isinstance(spec, Spec)
    return spec if quantize is None else replace(spec, quantize=quantize)


SPECS = (
    spec_of("mma", (1, 28, 2, 1, 2, 0, 0), "bf16", "bf16", None, False),
    spec_of("mma", (1, 8, 4, 1, 2, 0, 0), "fp16", "fp32", "bf16", True),
    spec_of("mma", (1, 16, 2, 1, 2, 2, 0), "bf16", "bf16", None, False, quantize="bf16"),
    spec_of("mma", (2, 14, 2, 1, 2, 2, 1), "bf16", "fp16", "fp32", False, quantize="fp32"),
    spec_of("mma", (2, 12, 3, 1, 2, 4, 0), "bf16", "bf16", "bf16", True),
    spec_of("mma", (1, 8, 3, 2, 1, 0, 0), "bf16", "fp32", None, False),  # K not split, two blocks a stage
    spec_of("wgmma", (16, 1, 1, 4, 1, 2, 16), "bf16", "bf16", None, False),
    spec_of("wgmma", (32, 7, 4, 1, 1, 2, 9), "bf16", "bf16", "fp32", False),  # row tiles of seven panels, or six
    spec_of("wgmma", (48, 7, 4, 1, 1, 2, 6), "bf16", "bf16", None, False),
    spec_of("wgmma", (64, 2, 2, 2, 1, 2, 12), "fp16", "fp16", None, True),
    spec_of("wgmma", (64, 7, 4, 1, 1, 2, 6), "bf16", "bf16", None, False),
    spec_of("wgmma", (128, 4, 2, 1, 1, 2, 6), "bf16", "bf16", "bf16", False),
    spec_of("wgmma", (128, 2, 2, 1, 1, 1, 6), "bf16", "fp32", "fp32", True),
    spec_of("wgmma", (128, 4, 2, 1, 1, 1, 6), "bf16", "bf16", None, False),  # a row group lags behind the other
    spec_of("wgmma", (256, 1, 1, 1, 1, 2, 5), "bf16", "bf16", None, False),
    spec_of("wgmma", (128, 1, 2, 1, 1, 1, 4), "bf16", "bf16", "bf16", False),  # row groups take turns
    spec_of("wgmma", (64, 1, 2, 1, 2, 1, 5), "fp16", "fp32", None, True),
    spec_of("wgmma", (64, 2, 2, 1, 2, 1, 8), "bf16", "bf16", None, False),  # tokens to two CTAs at once
    # chosen by rates alone
    spec_of("mma", (2, 16, 2, 1, 2, 4, 0), "bf16", "bf16", None, False),
    spec_of("wgmma", (16, 1, 1, 4, 1, 1, 40), "bf16", "bf16", None, False),
    spec_of("wgmma", (32, 4, 4, 1, 1, 2, 10), "bf16", "bf16", None, False),
    spec_of("wgmma", (48, 1, 1, 4, 1, 2, 16), "bf16", "bf16", None, False),
    spec_of("wgmma", (48, 4, 4, 1, 1, 2, 8), "bf16", "bf16", None, False),
    spec_of("wgmma", (64, 4, 4, 1, 1, 2, 8), "bf16", "bf16", None, False),
    spec_of("wgmma", (128, 4, 2, 1, 1, 1, 8), "bf16", "bf16", None, False),
    spec_of("wgmma", (256, 1, 2, 1, 2, 1, 6), "bf16", "bf16", None, False),
)


@dataclass(frozen=True)
class Problem:
    m: int
    n: int
    k: int
    sms: int  # few of them: several rounds
    column_major: bool
    padding: int  # of D's rows or columns
    wide: bool  # x has more columns than K
    per_row: bool
    plain: bool  # x has no outer scale
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, spec: Spec) -> Problem:
        mma = isinstance(spec, PackedMmaSpec)
        tile = 8 * spec.token_tiles if isinstance(spec, PackedMmaSpec) else spec.tokens
        quantizes = isinstance(spec, PackedMmaSpec) and spec.quantize is not None
        return cls(
            m=rng.choice((1, tile // 2 + 1, tile - 1, tile, *(() if mma else (tile + 1, 2 * tile + 3)))),
            n=rng.choice(NS),
            k=rng.choice([k for k in (*KS, *(LONG_KS * 2 if mma else ())) if k % 16 == 0 or not quantizes]),
            sms=rng.choice((2, 4, 8, 132)),
            column_major=rng.random() < 0.3,
            padding=rng.choice((0, 3, 8)),
            wide=rng.random() < 0.5,
            per_row=rng.random() < 0.7,
            plain=not quantizes and rng.random() < 0.3,
            seed=rng.randrange(1 << 20),
        )


@lru_cache(maxsize=64)
def weight(n: int, k: int) -> tuple[FP4Tensor, torch.Tensor]:
    w = reference.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n * 7919 + k)))
    return w.prepack(), reference.dequantize(w, outer=False).double()


def run(emulator: emulation.Emulator, spec: Spec, p: Problem, schedule: int) -> torch.Tensor:
    """Checks D against float64 under the bound of docs/numerics.md, and returns it."""
    divided = division.divide(spec, p.m, p.n, p.k, p.sms)
    assert divided is not None
    random_ = torch.Generator().manual_seed(p.seed)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=random_).to(dtype)

    quantizes = isinstance(spec, PackedMmaSpec) and spec.quantize is not None
    x_dtype = DTYPES[spec.quantize if isinstance(spec, PackedMmaSpec) and spec.quantize else spec.a_dtype]
    x_stride = -(-p.k // 8) * 8 + 8 * p.wide
    x = torch.full((p.m, x_stride), float("nan"), dtype=x_dtype)  # what is past K must not be read
    x[:, : p.k] = normal(p.m, p.k, dtype=x_dtype)
    w, w_values = weight(p.n, p.k)
    out_dtype, ldd = DTYPES[spec.out_dtype], (p.m if p.column_major else p.n) + p.padding
    whole = torch.full((p.n if p.column_major else p.m, ldd), float("nan"), dtype=out_dtype)
    inside = whole[:, : ldd - p.padding]
    d = inside.t() if p.column_major else inside
    c = None
    if spec.source:  # in place
        d.copy_(normal(p.m, p.n, dtype=out_dtype))
        c = d.clone()
    outer_a = None if p.plain else torch.rand(p.m if p.per_row else 1, generator=random_) * 0.01 + 1e-3
    bias = None if spec.bias is None else normal(p.n, dtype=DTYPES[spec.bias])
    problem = PackedProblem(
        p.m, p.n, p.k, x_stride, ldd, p.column_major, outer_a is not None and p.per_row, outer_b_per_row=True
    )
    tensors = {"x": x, "w": w.data, "d": d, "c": None if c is None else d, "outer_a": outer_a}
    tensors |= {"outer_b": w.outer_scale, "bias": bias}
    wrong_run = emulator.run(spec, problem, tensors, emulation.How(divided, schedule, 0.37))
    assert wrong_run is None, wrong_run

    values = x[:, : p.k]
    if quantizes:
        assert outer_a is not None
        given = outer_a if p.per_row else outer_a.reshape(())
        values = reference.dequantize(reference.quantize(values, outer_scale=given), outer=False)
    rows = torch.ones(1, 1) if outer_a is None else outer_a.reshape(-1, 1)
    scale = rows.double() * w.outer_scale.double()
    want, terms = values.double() @ w_values.t() * scale, values.double().abs() @ w_values.abs().t() * scale
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    if c is not None:
        want, terms = want + 0.37 * c.double(), terms + c.double().abs()
    bound = want.abs() * torch.finfo(out_dtype).eps + terms * (p.k + 8) * 2**-24 + torch.finfo(out_dtype).tiny
    wrong = ~((d.double() - want).abs() <= bound)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"
    assert bool(whole[:, ldd - p.padding :].isnan().all()), "wrote past its end"
    return d


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_random_problems(spec: Spec, emulator: emulation.Emulator) -> None:
    assert check(spec) is None
    rng = random.Random(spec.name)
    done = 0
    while done < PROBLEMS:
        problem = Problem.draw(rng, spec)
        if division.divide(spec, problem.m, problem.n, problem.k, problem.sms) is None:
            continue
        done += 1
        try:
            first = run(emulator, spec, problem, schedule=1)
            again = run(emulator, spec, problem, schedule=2)
        except AssertionError as error:
            raise AssertionError(f"{spec.name}, {problem}: {error}") from error
        assert torch.equal(first, again), f"{spec.name}, {problem}: the order of warps changes the result"
