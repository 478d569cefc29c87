"""Grouped GEMMs on prepacked weights against float64, expert by expert, and rows of no expert left alone.

Among the experts are empty ones and single tokens. All lie in one buffer, so that a tile has the next expert's tokens
in it; in front of the first expert and behind the last one tokens are NaN.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, replace

import emulator as emulation
import pytest
import torch

from fp4gemm import division, reference, select
from fp4gemm.packed_plan import PackedProblem
from fp4gemm.spec import PackedWgmmaSpec, check

DTYPES = {name: dtype for dtype, name in select.DTYPE_NAMES.items()}
NS = (8, 64, 65, 200, 520)
KS = (17, 64, 130, 328)
PROBLEMS = 6  # of each kernel


def spec_of(config: tuple[int, ...], *terms: object) -> PackedWgmmaSpec:
    spec = select.packed_of("wgmma", config, *terms)
    assert isinstance(spec, PackedWgmmaSpec)
    return replace(spec, grouped=True)


SPECS = (
    spec_of((8, 2, 1, 4, 1, 1, 28), "bf16", "bf16", None, False),
    spec_of((16, 4, 2, 2, 1, 1, 16), "bf16", "bf16", "bf16", True),  # row tiles of four panels, down to two
    spec_of((16, 1, 1, 4, 1, 2, 16), "bf16", "fp32", "bf16", False),  # K split in a cluster
    spec_of((16, 7, 4, 1, 1, 1, 10), "bf16", "bf16", None, False),  # seven panels, down to four
    spec_of((32, 2, 2, 2, 1, 1, 16), "fp16", "fp16", "fp32", True),
    spec_of((48, 7, 4, 1, 1, 1, 8), "fp16", "fp16", None, False),
    spec_of((64, 2, 2, 1, 2, 1, 8), "bf16", "bf16", None, False),  # tokens to two CTAs at once
    spec_of((64, 4, 2, 1, 2, 1, 8), "bf16", "bf16", None, True),  # the same with row tiles of any size, in place
    spec_of((64, 6, 3, 1, 1, 1, 8), "bf16", "bf16", None, False),
    spec_of((128, 2, 2, 1, 1, 1, 8), "bf16", "bf16", "bf16", False),
    spec_of((128, 4, 2, 1, 1, 1, 4), "bf16", "bf16", None, False),  # a row group lags behind the other
    spec_of((256, 2, 2, 1, 2, 1, 4), "bf16", "bf16", None, False),
    spec_of((256, 1, 2, 1, 2, 1, 6), "bf16", "bf16", None, False),  # row groups take turns
)


@dataclass(frozen=True)
class Problem:
    counts: tuple[int, ...]  # tokens of each expert
    before: int  # tokens in front of the first expert's
    after: int  # and behind the last one's
    n: int
    k: int
    sms: int
    per_row: bool  # outer scales of weights; of tokens
    token_scales: bool
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, tile: int) -> Problem:
        experts = rng.choice((1, 2, 5, 33, 70))
        few = (0, 0, 1, 2, 7) if experts > 8 else (0, 1, tile - 1, tile, tile + 1, 2 * tile + 3)
        return cls(
            counts=tuple(rng.choice(few) for _ in range(experts)),
            before=rng.choice((0, 3)),
            after=rng.choice((0, 5)),
            n=rng.choice(NS if experts <= 8 else NS[:3]),
            k=rng.choice(KS if experts <= 8 else KS[:2]),
            sms=rng.choice((2, 4, 8)),
            per_row=rng.random() < 0.5,
            token_scales=rng.random() < 0.5,
            seed=rng.randrange(1 << 20),
        )

    @property
    def tokens(self) -> int:
        return self.before + sum(self.counts) + self.after


def run(emulator: emulation.Emulator, spec: PackedWgmmaSpec, p: Problem, schedule: int) -> None:
    """Checks D against float64 under the bound of docs/numerics.md, and that nothing else is written."""
    experts, m = len(p.counts), p.tokens
    divided = division.divide(spec, m, p.n, p.k, p.sms, experts)
    assert divided is not None
    generator = torch.Generator().manual_seed(p.seed)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    out_dtype, x_stride = DTYPES[spec.out_dtype], -(-p.k // 8) * 8
    x = torch.full((m, x_stride), float("nan"), dtype=DTYPES[spec.a_dtype])  # what is past K must not be read
    inside = slice(p.before, p.before + sum(p.counts))
    x[inside, : p.k] = normal(sum(p.counts), p.k, dtype=DTYPES[spec.a_dtype])
    scaling = "per_row" if p.per_row else "per_tensor"
    weights = [reference.quantize(normal(p.n, p.k, dtype=torch.float32), scaling=scaling) for _ in p.counts]
    w = torch.stack([weight.prepack().data for weight in weights])
    outer_b = torch.stack([weight.outer_scale for weight in weights])
    offsets = torch.tensor((0, *p.counts)).cumsum(0) + p.before
    d = torch.full((m, p.n), float("nan"), dtype=out_dtype)
    c = None
    if spec.source:  # in place
        d[inside] = normal(sum(p.counts), p.n, dtype=out_dtype)
        c = d.clone()
    outer_a = torch.rand(m, generator=generator) + 0.1 if p.token_scales else None
    bias = None if spec.bias is None else normal(experts, p.n, dtype=DTYPES[spec.bias])
    problem = PackedProblem(m, p.n, p.k, x_stride, p.n, False, p.token_scales, p.per_row, experts)
    tensors = {"x": x, "w": w, "d": d, "c": None if c is None else d, "outer_a": outer_a, "outer_b": outer_b}
    tensors |= {"bias": bias, "offsets": offsets}
    wrong_run = emulator.run(spec, problem, tensors, emulation.How(divided, schedule, 0.37))
    assert wrong_run is None, wrong_run

    for e, weight in enumerate(weights):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        values, w_values = x[rows, : p.k].double(), reference.dequantize(weight, outer=False).double()
        scale = weight.outer_scale.double() * (1 if outer_a is None else outer_a[rows, None].double())
        want, terms = values @ w_values.t() * scale, values.abs() @ w_values.abs().t() * scale
        if bias is not None:
            want, terms = want + bias[e].double(), terms + bias[e].double().abs()
        if c is not None:
            want, terms = want + 0.37 * c[rows].double(), terms + c[rows].double().abs()
        bound = want.abs() * torch.finfo(out_dtype).eps + terms * (p.k + 8) * 2**-24 + torch.finfo(out_dtype).tiny
        assert bool(((d[rows].double() - want).abs() <= bound).all()), f"expert {e}"
    assert bool(d[: p.before].isnan().all()), "wrote in front of the first expert"
    assert bool(d[inside.stop :].isnan().all()), "wrote past the last expert"


_WALK = """
#include "fp4gemm/packed_tiles.hpp"
using namespace fp4gemm;
struct Config {
  static constexpr int kTokens = TOKENS, kPanels = PANELS, kLeastPanels = LEAST, kMulticast = MULTICAST, kSplit = 1;
  static constexpr int kThreads = 32;
  static constexpr bool kGrouped = true, kUneven = true;
};
static PackedGemmArguments args;
static int* log_;
extern "C" char const* walk(std::int64_t const* offsets, int experts, int m, int panels, int ctas, int* log) {
  args = {}, log_ = log;
  args.offsets = offsets, args.experts = experts, args.m = m, args.panels = panels, args.raster = 8;
  return run_grid([] {
    PackedTiles<Config> const tiles(args, shared_address(current->cta->shared), blockIdx.x % Config::kMulticast);
    tiles.tabulate_experts();
    if (threadIdx.x > 0) return;
    for (auto left = tiles.all(); left;) {
      auto const t = tiles.take(left);
      for (int v : {int(blockIdx.x), t.token, t.end, t.expert, t.panel, t.stored, t.panels}) *log_++ = v;
    }
    }, ctas, Config::kMulticast, Config::kThreads, 16384, 1);
}
"""


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.uneven], ids=lambda spec: spec.name)
def test_cuts(spec: PackedWgmmaSpec, emulator: emulation.Emulator) -> None:
    """Each panel of each token tile is stored once, and no CTA computes more than tiles of one size would give it."""
    source, rng, cut = _WALK, random.Random(spec.name), 0
    words = {"TOKENS": spec.tokens, "PANELS": spec.panels, "LEAST": spec.least_panels, "MULTICAST": spec.multicast}
    for name, value in words.items():
        source = source.replace(name, str(value))
    library = emulation.compile_cpp(emulator.folder, f"walk_{spec.name}", source)
    library.walk.restype = ctypes.c_char_p
    for _ in range(150):
        counts = [rng.choice((0, 1, spec.tokens, spec.tokens + 1, 3 * spec.tokens)) for _ in range(rng.randint(1, 12))]
        panels, clusters = rng.randint(1, 70), rng.randint(1, 12)
        offsets = torch.tensor((0, *counts)).cumsum(0)
        log = torch.full((20000, 7), -1, dtype=torch.int32)
        numbers = (len(counts), sum(counts), panels, clusters * spec.multicast)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (offsets, log))
        assert library.walk(next(pointers), *numbers, next(pointers)) is None
        seen: dict[tuple[int, int], int] = {}
        work = [0] * clusters * spec.multicast
        for cta, token, end, expert, panel, stored, computed in log[log[:, 0] >= 0].tolist():
            assert int(offsets[expert]) <= token < end == int(offsets[expert + 1])
            assert (token - int(offsets[expert])) % spec.tokens == 0
            assert max(stored, spec.least_panels) == computed <= spec.panels
            work[cta] += computed
            cut += computed < spec.panels
            for row in range(panel, min(panel + stored, panels)):
                seen[token, row] = seen.get((token, row), 0) + 1
        tiles = [
            t for first, n in zip(offsets.tolist(), counts, strict=False) for t in range(first, first + n, spec.tokens)
        ]
        assert seen == {(token, row): 1 for token in tiles for row in range(panels)}, f"{counts}, {numbers}"
        rounds = -(-len(tiles) * -(-panels // (spec.panels * spec.multicast)) // clusters)
        assert max(work) <= rounds * spec.panels, f"{counts}, {numbers}"
    assert cut > 100  # the device did cut


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_random_groups(spec: PackedWgmmaSpec, emulator: emulation.Emulator) -> None:
    assert check(spec) is None
    rng = random.Random(spec.name)
    for _ in range(PROBLEMS):
        problem = Problem.draw(rng, spec.tokens)
        if problem.tokens == 0:
            continue
        try:
            run(emulator, spec, problem, schedule=1)
        except AssertionError as error:
            raise AssertionError(f"{spec.name}, {problem}: {error}") from error


def test_a_thousand_experts(emulator: emulation.Emulator) -> None:
    """The table of experts is made in passes: with more experts than threads, each lane counts many of them."""
    counts = tuple(random.Random(0).choices((0, 0, 0, 1), k=1024))
    run(emulator, SPECS[0], Problem(counts, 2, 2, 8, 17, 2, False, True, 1), schedule=1)


def test_offsets_out_of_range_touch_nothing_else(emulator: emulation.Emulator) -> None:
    """Nobody checks what stands on the device: ends past the buffer are its end, ends before a start are empty."""
    spec, (m, n, k) = SPECS[0], (20, 64, 64)
    generator = torch.Generator().manual_seed(0)
    weight = reference.quantize(torch.randn(n, k, generator=generator), scaling="per_tensor")
    x = torch.randn(m, k, generator=generator).bfloat16()
    whole = torch.full((3 * m, n), float("nan"), dtype=torch.bfloat16)
    d = whole[m : 2 * m]
    divided = division.divide(spec, m, n, k, 2, 3)
    assert divided is not None
    tensors = {"x": x, "w": torch.stack([weight.prepack().data] * 3), "d": d, "c": None, "outer_a": None}
    tensors |= {"outer_b": weight.outer_scale.expand(3).contiguous(), "bias": None}
    tensors |= {"offsets": torch.tensor([-(2**40) - 7, 8, 5, 2**40 + 7])}
    problem = PackedProblem(m, n, k, k, n, False, False, False, 3)
    assert emulator.run(spec, problem, tensors, emulation.How(divided, 1, 0.0)) is None
    assert bool(d.isfinite().all())
    assert bool(whole[:m].isnan().all())
    assert bool(whole[2 * m :].isnan().all())
