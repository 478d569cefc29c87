"""The tile quantizer and its amaxes, their own source on a CPU, against the reference: every byte, padding too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import emulator as emulation
import pytest
import tiles
import torch
from torch import Tensor

from fp4gemm import reference, select, tile_calls
from fp4gemm.formats import PREPACKED, RECIPE_SIGNS, VALUES
from fp4gemm.reference.arguments import check_quantize
from fp4gemm.spec import ANY_SIGNS, TILE, TileAmaxSpec, TileQuantizeSpec, check
from fp4gemm.tile_calls import Output, Parts, vectorized

DTYPES = {name: dtype for dtype, name in select.INPUT_NAMES.items()}
SIZES = (1, 2, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 136, 144, 160, 200, 256, 264, 300)
PROBLEMS = 8  # of each kernel


def spec_of(dtype: str, scaling: str, convention: str, *rest: object, **options: int | None) -> TileQuantizeSpec:
    return select.tile_quantize_spec("sm_90a", dtype, scaling, convention, *rest, **options)


SPECS = (
    spec_of("bf16", "amax", "te_per_token", "128x4", "128x4"),
    spec_of("bf16", "amax", "te", "linear", "8x4", vectorized=False),
    spec_of("bf16", "amax", "te", None, "linear"),
    spec_of("bf16", "given", "te_per_token", "8x4", "linear"),
    spec_of("fp16", "amax", "torchao", "128x4", "8x4"),
    spec_of("fp32", "amax", "modelopt", "linear", "128x4"),
    spec_of("fp32", "given", "te", "128x4", "linear", vectorized=False),
    spec_of("bf16", "amax", "te_per_token", "128x4", "128x4", hadamard=ANY_SIGNS),
    spec_of("bf16", "amax", "te_per_token", "128x4", "128x4", hadamard=RECIPE_SIGNS),
    spec_of("fp16", "given", "te", None, "8x4", hadamard=ANY_SIGNS),
    spec_of("fp16", "amax", "te", None, "linear", hadamard=RECIPE_SIGNS),
    spec_of("fp32", "amax", "modelopt", None, "linear", hadamard=ANY_SIGNS),
    spec_of("fp32", "amax", "te_per_token", None, "128x4", hadamard=RECIPE_SIGNS, stochastic=True),
    spec_of("bf16", "amax", "te", "8x4", "128x4", hadamard=RECIPE_SIGNS, stochastic=True),
    spec_of("bf16", "amax", "te_per_token", "linear", "128x4", hadamard=ANY_SIGNS, stochastic=True),
    spec_of("fp32", "amax", "te_per_token", "128x4", "8x4", stochastic=True),
    spec_of("bf16", "amax", "te", "128x4", "128x4", square=True),
    spec_of("fp16", "given", "te_per_token", "128x4", None, square=True),
    spec_of("bf16", "amax", "te", "linear", "linear", square=True, stochastic=True),
    spec_of("e4m3", "amax", "te_per_token", "128x4", "128x4", hadamard=ANY_SIGNS),
    spec_of("e4m3", "given", "te", "linear", "8x4", vectorized=False),
    spec_of("bf16", "amax", "te_per_token", VALUES, VALUES),
    spec_of("bf16", "amax", "te_per_token", VALUES, "128x4", hadamard=RECIPE_SIGNS),
    spec_of("bf16", "amax", "te", VALUES, VALUES, hadamard=RECIPE_SIGNS, stochastic=True),
    spec_of("fp32", "given", "te_per_token", None, VALUES, vectorized=False),
    spec_of("fp16", "amax", "te_per_token", "8x4", VALUES, stochastic=True),
    spec_of("bf16", "amax", "te_per_token", VALUES, PREPACKED, hadamard=RECIPE_SIGNS),
    spec_of("bf16", "amax", "te", PREPACKED, PREPACKED, square=True),
    spec_of("bf16", "amax", "te_per_token", PREPACKED, PREPACKED, stochastic=True, vectorized=False),
    spec_of("fp32", "given", "te_per_token", PREPACKED, VALUES),
    spec_of("fp16", "amax", "te", "linear", PREPACKED),
)


@dataclass(frozen=True)
class Problem:
    m: int
    k: int
    per_tensor: bool
    padding: int  # of rows of x
    column_major: bool
    mask: int
    values: str
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, spec: TileQuantizeSpec | TileAmaxSpec) -> Problem:
        return cls(
            m=rng.choice(SIZES),
            k=rng.choice(SIZES),
            per_tensor=getattr(spec, "square", False) or rng.random() < 0.4,
            padding=8 * rng.randrange(3) if spec.vectorized else rng.randrange(9),
            column_major=not spec.vectorized and rng.random() < 0.3,
            mask=rng.choice((0, 0xACE1, rng.randrange(1 << 16))),
            values=rng.choice(("normal", "wide", "tiny", "ties", "special", "zeros")),
            seed=rng.randrange(1 << 63),
        )

    def make(self, dtype: torch.dtype, is_vectorized: bool) -> Tensor:
        """x [m, k]; what stands beside it in memory is NaN."""
        random_ = torch.Generator().manual_seed(self.seed)
        shape = (self.k, self.m) if self.column_major else (self.m, self.k)
        stride = shape[1] + self.padding
        if is_vectorized:
            stride = -(-stride // 16) * 16
        x = torch.full((shape[0], stride + 8), float("nan")).to(dtype)
        # A tensor of one row or column is aligned whatever its strides: shift it where it must not be.
        x = x.flatten()[0 if is_vectorized else 1 :][: shape[0] * stride].view(shape[0], stride)[:, : shape[1]]
        v = torch.randn(shape, generator=random_)
        if self.values == "wide":
            v = v * torch.exp2(torch.randint(-12, 12, shape, generator=random_))
        elif self.values == "tiny":
            v = v * 1e-38
        elif self.values == "ties":  # amaxes and values that fall on rounding ties
            v = torch.tensor([0.0, -0.25, 0.5, 0.75, 1.25, 1.75, -2.5, 3.5, 5.0, 6.0, 7.0, 12.0])[
                torch.randint(12, shape, generator=random_)
            ]
        elif self.values == "special":
            kinds = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e38, 1e-40])
            v = torch.where(
                torch.rand(shape, generator=random_) < 0.01, kinds[torch.randint(6, shape, generator=random_)], v
            )
        elif self.values == "zeros":
            v = v * (torch.rand(shape, generator=random_) < 0.02)
        x.copy_(v)
        return x.t() if self.column_major else x


def expected(x: Tensor, **arguments: Any) -> tuple[tuple[int, int], Parts]:
    """The shape of what quantize makes, and its parts, by the reference; the layout may be VALUES or PREPACKED."""
    layout = arguments.pop("sf_layout")
    args = check_quantize(x, **arguments)
    if layout in (VALUES, PREPACKED):
        return args.shape, reference.quantize_operand(args._replace(sf_layout=layout))
    t = reference.quantize(x, **arguments, sf_layout=layout)
    return args.shape, (t.data, t.block_scale, t.outer_scale)


def compare(what: str, got: Output, want: Parts) -> None:
    for name, a, b in zip(("data", "block scale", "outer scale"), got.parts, want, strict=True):
        assert a.dtype == b.dtype, f"{what}, {name}: {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"{what}, {name}: shape {a.shape}, expected {b.shape}"
        a, b = (t.flatten().view(torch.uint8) for t in (a, b))
        if not torch.equal(a, b):
            at = (a != b).nonzero().flatten()
            raise AssertionError(f"{what}, {name}: {len(at)} of {len(a)} bytes differ, first at {int(at[0])}")


def poisoned(lines: int, k: int, layout: str, scale_in: Tensor) -> Output:
    out = Output.allocate(lines, k, layout, scale_in)
    for t in (out.data, out.block_scale):
        t.view(torch.uint8).fill_(0xA5)
    out.outer_scale.fill_(float("nan"))
    return out


def mask_of(spec: TileQuantizeSpec | TileAmaxSpec, p: Problem) -> int | None:
    """The signs of a launch."""
    return p.mask if spec.hadamard == ANY_SIGNS else spec.hadamard


def run(emulator: emulation.Emulator, spec: TileQuantizeSpec, p: Problem, noop: Tensor | None = None) -> None:
    x = p.make(DTYPES[spec.dtype], spec.vectorized)
    assert vectorized(x) or not spec.vectorized
    mask = mask_of(spec, p)
    seed: Tensor | int | None = None
    if spec.stochastic:
        seed = torch.tensor([p.seed]) if p.seed % 2 else p.seed
    shared = {"convention": spec.convention, "block": (16, 16) if spec.square else (1, 16), "seed": seed}
    shared["scaling"] = "per_tensor" if p.per_tensor else "per_row"
    outputs: list[Output | None] = []
    wanted: list[Parts | None] = []
    random_ = torch.Generator().manual_seed(p.seed)
    for transposed, layout in enumerate((spec.rows, spec.columns)):
        if layout is None:
            outputs.append(None), wanted.append(None)
            continue
        lines = x.shape[transposed]
        options = {"transposed": bool(transposed), "hadamard": mask if transposed else None, "sf_layout": layout}
        if spec.scaling == "given":
            scale_in = torch.rand([] if p.per_tensor else [lines], generator=random_) * 0.01 + 1e-4
            shape, want = expected(x, **shared, **options, outer_scale=scale_in)
        else:
            amaxes = reference.amax(x, columns=True, hadamard=mask)
            scale_in = amaxes[transposed].amax() if p.per_tensor else amaxes[transposed]
            shape, want = expected(x, **shared, **options)
        wanted.append(want)
        outputs.append(poisoned(*shape, layout, scale_in))
    tiles.quantize(emulator.folder, spec, x, *outputs, hadamard=mask, seed=seed, noop=noop, schedule=p.seed % 1000)
    for what, got, want in zip(("rows", "columns"), outputs, wanted, strict=True):
        if got is None or want is None:
            continue
        if noop is not None and bool(noop != 0):
            assert bool((got.data.view(torch.uint8) == 0xA5).all()), "wrote in spite of noop"
            assert bool(got.outer_scale.isnan().all())
        else:
            compare(what, got, want)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_random_problems(spec: TileQuantizeSpec, emulator: emulation.Emulator) -> None:
    assert check(spec) is None
    rng = random.Random(spec.name)
    for _ in range(PROBLEMS):
        problem = Problem.draw(rng, spec)
        try:
            run(emulator, spec, problem)
        except AssertionError as error:
            raise AssertionError(f"{spec.name}, {problem}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0])
def test_noop(dtype: torch.dtype, value: float, emulator: emulation.Emulator) -> None:
    problem = Problem(20, 40, False, 0, False, 0, "normal", 7)
    run(emulator, SPECS[0], problem, torch.tensor([value], dtype=dtype))


AMAX_SPECS = (
    select.tile_amax_spec("sm_90a", "bf16", True, True, ANY_SIGNS),
    select.tile_amax_spec("sm_90a", "fp16", True, True),
    select.tile_amax_spec("sm_90a", "fp32", False, True, RECIPE_SIGNS),
    select.tile_amax_spec("sm_90a", "fp32", False, True, ANY_SIGNS),
    select.tile_amax_spec("sm_90a", "bf16", True, False, None, False),
    select.tile_amax_spec("sm_90a", "e4m3", True, True),
    select.tile_amax_spec("sm_90a", "bf16", True, True, RECIPE_SIGNS, sums=True),
    select.tile_amax_spec("sm_90a", "fp32", False, True, None, False, sums=True),
)


@pytest.mark.parametrize("spec", AMAX_SPECS, ids=lambda spec: spec.name)
def test_amax(spec: TileAmaxSpec, emulator: emulation.Emulator) -> None:
    assert check(spec) is None
    rng = random.Random(spec.name)
    for _ in range(PROBLEMS):
        p = Problem.draw(rng, spec)
        x, mask = p.make(DTYPES[spec.dtype], spec.vectorized), mask_of(spec, p)
        rows, columns, tensor = reference.amax(x, columns=True, tensor=True, hadamard=mask)
        want = [
            rows if spec.rows else None, columns if spec.columns else None,
            tensor if spec.rows else None, columns.amax() if spec.columns else None,
        ]  # fmt: skip
        got = [None if t is None else torch.zeros_like(t) for t in want]
        partial_sums = torch.full((-(-x.shape[0] // TILE), x.shape[1]), float("nan")) if spec.sums else None
        tiles.amax(emulator.folder, spec, x, tuple(got), mask, partial_sums)
        if partial_sums is not None:
            each = [rows.double() for rows in x.float().split(TILE)]
            sums, bound = (torch.stack([f(rows).sum(0) for rows in each]) for f in (torch.clone, torch.abs))
            torch.testing.assert_close(
                partial_sums.double().nan_to_num(0, 0, 0),
                sums.nan_to_num(0, 0, 0),
                rtol=0,
                atol=float(bound.nan_to_num(0, 0, 0).max()) * TILE * 2.0**-24,
            )
        for name, a, b in zip(("rows", "columns", "tensor", "transformed"), got, want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), f"{name} of {p}"


@pytest.fixture
def launches(emulator: emulation.Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``tile_calls`` as on a GPU, with CPU tensors."""
    monkeypatch.setattr(tile_calls, "Launcher", partial(tiles.Launcher, emulator.folder))
    monkeypatch.setattr(select, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1, raising=False)
    caches = tile_calls._quantizer, tile_calls._amax
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("hadamard", [None, 0xACE1])
@pytest.mark.parametrize(
    "layouts", [("128x4", "8x4"), (None, "linear"), ("linear", None), (VALUES, PREPACKED)], ids=str
)
def test_calls(layouts: tuple[str | None, str | None], hadamard: int | None, per_tensor: bool) -> None:
    """One call with its amaxes taken, and the same with amaxes or outer scales given."""
    x = torch.randn(130, 70, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    mask = hadamard if layouts[1] else None
    shared = {"convention": "te_per_token", "scaling": "per_tensor" if per_tensor else "per_row"}
    options = ({}, {"transposed": True, "hadamard": mask})
    wanted = [
        None if layout is None else expected(x, sf_layout=layout, **shared, **option)[1]
        for layout, option in zip(layouts, options, strict=True)
    ]
    how = {"per_tensor": per_tensor, "convention": "te_per_token", "hadamard": mask}
    results = tile_calls.quantize(x, layouts, **how)
    amaxes = tuple(None if t is None else t.scale_in for t in results)
    outers = tuple(None if t is None else t[2] for t in wanted)
    given = [
        None if layout is None else expected(x, sf_layout=layout, outer_scale=outer, **shared, **option)[1]
        for layout, outer, option in zip(layouts, outers, options, strict=True)
    ]
    for got, want in (
        (results, wanted),
        (tile_calls.quantize(x, layouts, amaxes=amaxes, **how), wanted),
        (tile_calls.quantize(x, layouts, outer_scales=outers, **how), given),
    ):
        for what, a, b in zip(("rows", "columns"), got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                compare(what, a, b)
