"""The row-wise quantizer against the reference, byte for byte: every option, convention, layout, dtype, ragged shapes.

``calls.quantize`` runs as it does on a GPU, but for the launch. Specials: NaN, Inf, zeros, tiny and huge values, and
outer scales far from what the values need.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import emulator as emulation
import pytest
import torch

from fp4gemm import calls, reference, select
from fp4gemm.formats import PLAIN, PRODUCERS, SF_LAYOUTS, QuantizeOptions
from fp4gemm.spec import QuantizeSpec, check

PROBLEMS = 12  # of each kind of option
DTYPES, LAYOUTS = tuple(select.INPUT_NAMES), tuple(SF_LAYOUTS)
KS = (1, 15, 16, 17, 48, 130, 256, 500, 512, 528, 1040)


@pytest.fixture
def kernels(emulator: emulation.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """``calls`` on CPU tensors: kernels are emulated, an amax of the tensor is torch's."""

    class Launcher(emulation.QuantizeLauncher):
        def __init__(self, spec: QuantizeSpec, arguments: Any, **_: Any) -> None:
            assert check(spec) is None
            super().__init__(emulator, spec, arguments)

    def tensor_amax(x: torch.Tensor, k: int, producer: str | None, *_: object) -> torch.Tensor:
        made = x if producer is None else reference.produce(x, producer)
        return reference.amax(made, rows=False, tensor=True)[0]

    monkeypatch.setattr(calls, "Launcher", Launcher)
    monkeypatch.setattr(calls, "_tensor_amax", tensor_amax)
    monkeypatch.setattr(calls, "_stream", lambda _: random.randrange(1 << 30))
    monkeypatch.setattr(select, "arch_of", lambda _: "sm_90a")
    monkeypatch.setattr(select, "gpu_of", lambda _: ("", 132))
    turns = itertools.cycle((0, 8))  # rows of a CTA wait for one another, or do not in grids of up to 32
    monkeypatch.setattr(select, "prefetch_ctas", lambda *_: next(turns))
    for cache in (calls._quantizer, calls._values_quantizer):
        cache.cache_clear()
    yield
    for cache in (calls._quantizer, calls._values_quantizer):
        cache.cache_clear()


@dataclass(frozen=True)
class Problem:
    m: int
    k: int
    dtype: torch.dtype
    scaling: str  # per_row, per_tensor, given, given_scalar, amax, amax_scalar
    convention: str
    sf_layout: str
    special: str
    offset: int  # of x in its storage: rows need not be aligned
    options: QuantizeOptions
    ordered: bool
    seed_in_memory: bool
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, kind: str) -> Problem:
        k = rng.choice(KS)
        options = PLAIN
        conventions = ("te", "te_per_token")
        if kind in ("plain", "stochastic"):
            conventions += ("torchao", "modelopt")
        if kind.startswith("residual"):
            k = -(-k // 16) * 16
            extra = rng.choice((16, k, rng.randrange(1, k // 16 + 1) * 16))
            side = rng.choice(("activation", "activation", "weight"))
            options = QuantizeOptions(residual=extra, residual_side=side, stochastic=kind == "residual_stochastic")
        elif kind == "stochastic":
            options = QuantizeOptions(stochastic=True)
        elif kind in ("mse", "mae"):
            options = QuantizeOptions(adaptive=kind)
        elif kind in PRODUCERS:
            extra = rng.choice(({}, {}, {"stochastic": True}, {"residual": 16}, {"adaptive": "mse"}))
            k = -(-k // 16) * 16 if "residual" in extra else k
            options = QuantizeOptions(producer=kind, **extra)
        return cls(
            m=rng.choice((1, 3, 8, 33, 130) if k < 300 else (1, 2, 5)),
            k=k,
            dtype=rng.choice(DTYPES[:3] if kind in PRODUCERS else DTYPES),
            scaling=rng.choice(("per_row", "per_row", "per_tensor", "given", "given_scalar", "amax", "amax_scalar")),
            convention=rng.choice(conventions),
            sf_layout=rng.choice(LAYOUTS),
            special=rng.choice(("none", "none", "none", "nan", "inf", "zeros", "tiny", "ties", "outliers")),
            offset=rng.choice((0, 0, 1)),
            options=options,
            ordered=bool(options.residual) and not options.producer and rng.random() < 0.5,
            seed_in_memory=rng.random() < 0.5,
            seed=rng.getrandbits(62),
        )

    def values(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed % (1 << 31))
        columns = self.k * (2 if self.options.producer == "silu_mul" else 1)
        x = torch.randn(self.m, columns, generator=generator)
        if self.special in ("nan", "inf"):
            where = torch.rand(x.shape, generator=generator) < 0.02
            x[where] = float(self.special)
            x[torch.rand(x.shape, generator=generator) < 0.01] *= -1
        elif self.special == "zeros":
            x *= torch.rand(x.shape, generator=generator) < 0.05
            x[self.m // 2] = -0.0
        elif self.special == "tiny":
            x *= 10.0 ** (-40 * torch.rand(self.m, 1, generator=generator))
            x[:, self.k // 2 :] *= 1e-6
        elif self.special == "ties":
            x = torch.randint(-14, 15, x.shape, generator=generator) / 2.0
        elif self.special == "outliers":
            x *= torch.where(torch.rand(x.shape, generator=generator) < 0.02, 300.0, 1.0)
        storage = torch.empty(x.numel() + 64, dtype=self.dtype)
        view = storage[self.offset :][: x.numel()].view(x.shape)
        return view.copy_(x.to(self.dtype))

    def arguments(self) -> dict[str, Any]:
        """Of ``reference.quantize``."""
        generator = torch.Generator().manual_seed(self.seed % (1 << 31) + 1)
        scalar = self.scaling.endswith("_scalar") or self.scaling == "per_tensor"
        given = torch.rand(() if scalar else (self.m,), generator=generator)
        arguments: dict[str, Any] = {
            "scaling": "per_tensor" if scalar else "per_row",
            "convention": self.convention,
            "sf_layout": self.sf_layout,
            "adaptive": self.options.adaptive,
            "residual": self.options.residual,
            "residual_side": self.options.residual_side,
            "producer": self.options.producer,
        }
        if self.scaling.startswith("given"):  # from far too small to far too large
            arguments["outer_scale"] = 10.0 ** (given * 8 - 6)
        if self.scaling.startswith("amax"):
            arguments["amax"] = given * 8
        if self.options.stochastic:
            arguments["seed"] = self.seed
        if self.ordered:
            arguments["channel_order"] = torch.randperm(self.k, generator=generator)
        return arguments

    def run(self, x: torch.Tensor, arguments: dict[str, Any], **more: Any) -> calls.Packed:
        seed = arguments.get("seed")
        if seed is not None and self.seed_in_memory:
            seed = torch.tensor([seed])
        return calls.quantize(
            x, arguments["scaling"] == "per_tensor", self.sf_layout, self.convention, arguments.get("outer_scale"),
            arguments.get("amax"), self.options, seed, arguments.get("channel_order"), **more,
        )  # fmt: skip


def compare(got: calls.Packed, want: Any) -> None:
    for name in ("outer_scale", "block_scale", "data"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.shape == b.shape
        wrong = (a.flatten().view(torch.uint8) != b.flatten().view(torch.uint8)).nonzero()
        assert len(wrong) == 0, f"{name}: {len(wrong)} bytes wrong, first at {wrong[0].tolist()}"


KINDS = ("plain", "stochastic", "mse", "mae", "residual", "residual_stochastic", *PRODUCERS)


HARDWARE = ("plain", "mse", "mae", "residual")  # kinds that Blackwell rounds by an instruction


@pytest.mark.parametrize(
    "arch, kind", [*(("sm_90a", kind) for kind in KINDS), *(("sm_100a", kind) for kind in HARDWARE)]
)
def test_random_problems(arch: str, kind: str, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "arch_of", lambda _: arch)
    rng = random.Random(kind)
    for _ in range(PROBLEMS):
        problem = Problem.draw(rng, kind)
        x, arguments = problem.values(), problem.arguments()
        try:
            compare(problem.run(x, arguments), reference.quantize(x, **arguments))
        except AssertionError as error:
            raise AssertionError(f"{problem}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_fit(kind: str, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is read in several steps, and twice for its amax."""
    whole = select.quantize_spec

    def streamed(*args: Any, **options: Any) -> QuantizeSpec:
        return replace(whole(*args, **options), threads=32, blocks=1, rows=4, resident=False)

    monkeypatch.setattr(select, "quantize_spec", streamed)
    rng = random.Random(kind)
    for scaling in ("per_row", "per_tensor"):
        problem = replace(Problem.draw(rng, kind), m=5, k=1104, scaling=scaling, sf_layout=rng.choice(LAYOUTS))
        x, arguments = problem.values(), problem.arguments()
        compare(problem.run(x, arguments), reference.quantize(x, **arguments))


@pytest.mark.parametrize(
    "kind, threads, blocks",
    [("plain", 160, 1), ("stochastic", 96, 1), ("mse", 128, 1), ("residual", 128, 1), ("residual_stochastic", 32, 2)],
)
@pytest.mark.parametrize("layout", ["8x4", "128x4"])
def test_two_rows_of_a_cta(
    kind: str, threads: int, blocks: int, layout: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide rows have it: scales leave through shared memory, 8 bytes at a time. Those of companions do not, whose
    pairs come behind all other columns where rows are wide; narrow ones have it where there is noise."""
    whole = select.quantize_spec

    def pairs_of_rows(*args: Any, **options: Any) -> QuantizeSpec:
        return replace(whole(*args, **options), threads=threads, blocks=blocks, rows=2, resident=True)

    monkeypatch.setattr(select, "quantize_spec", pairs_of_rows)
    rng = random.Random(kind + layout)
    cases = itertools.product(((131, "per_row"), (33, "given")), (16, 48, 1024) if "residual" in kind else (0,))
    for (m, scaling), extra in cases:
        problem = replace(Problem.draw(rng, kind), m=m, k=1024, scaling=scaling, sf_layout=layout)
        problem = replace(problem, options=replace(problem.options, residual=extra))
        x, arguments = problem.values(), problem.arguments()
        compare(problem.run(x, arguments), reference.quantize(x, **arguments))


@pytest.mark.parametrize("kind", ["plain", "stochastic", "mse", "silu_mul"])
@pytest.mark.parametrize(
    "k, dtype, layout",
    [(5120, "bf16", "linear"), (7168, "fp32", "128x4"), (14336, "bf16", "128x4"), (18944, "bf16", "linear")],
)
def test_many_long_rows(
    k: int, dtype: str, layout: str, kind: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rows are divided that are not whole powers of two."""
    monkeypatch.setattr(select, "FEW_ROWS", 0)
    torch_dtype = next(each for each, name in select.DTYPE_NAMES.items() if name == dtype)
    problem = replace(Problem.draw(random.Random(kind), kind), m=3, k=k, scaling="per_row", sf_layout=layout)
    problem = replace(problem, dtype=torch_dtype, special="outliers", offset=0)
    x, arguments = problem.values(), problem.arguments()
    compare(problem.run(x, arguments), reference.quantize(x, **arguments))


@pytest.mark.parametrize("case", range(24))
def test_rmsnorm(case: int, kernels: None) -> None:
    """With a residual and without, every dtype, ragged rows, zeros and what is not finite."""
    rng = random.Random(case)
    m, k, dtype = rng.choice((1, 3, 33)), rng.choice((*KS, 2064)), rng.choice(tuple(select.DTYPE_NAMES))
    layout, scaling = rng.choice(LAYOUTS), rng.choice(("per_row", "given"))
    x, weight, residual = (torch.randn(shape).to(dtype) for shape in ((m, k), (k,), (m, k + 5)))
    x[0, : rng.choice((0, 1, k))] = rng.choice((0.0, float("inf"), float("nan"), 1e-30))
    eps = rng.choice((0.0, 1e-6))
    added = residual[:, :k] if case % 2 else None
    sums = None if added is None else torch.full((m, k), float("nan"), dtype=dtype)
    outer = torch.rand(m) if scaling == "given" else None
    options = QuantizeOptions(stochastic=rng.random() < 0.3, producer="rmsnorm" if added is None else "add_rmsnorm")
    seed = 7 if options.stochastic else None
    norm = calls.Norm(weight, added, sums, eps)
    got = calls.quantize(x, False, layout, "te_per_token", outer, options=options, seed=seed, norm=norm)
    want, h = reference.quantize_rmsnorm(
        x, weight, eps=eps, residual=added, sf_layout=layout, outer_scale=outer, seed=seed
    )
    compare(got, want)
    if sums is not None:
        assert torch.equal(sums.nan_to_num(7.0), h.nan_to_num(7.0))


@pytest.mark.parametrize("adaptive", [None, "mse"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    "k, layout", [(4080, "128x4"), (8192, "128x4"), (8192, "linear"), (5120, "8x4"), (12288, "128x4")]
)
def test_rmsnorm_of_many_wide_rows(
    k: int, layout: str, added: bool, adaptive: str | None, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the CTAs that many rows have, of up to 1024 threads."""
    monkeypatch.setattr(select, "FEW_ROWS", 0)
    x, weight, residual = (torch.randn(shape).bfloat16() for shape in ((5, k), (k,), (5, k)))
    x[0, 7], x[1] = float("inf"), 0.0
    norm = calls.Norm(weight, residual if added else None, torch.empty_like(x) if added else None, 1e-6)
    options = QuantizeOptions(producer=norm.producer, adaptive=adaptive)
    got = calls.quantize(x, False, layout, "te_per_token", None, options=options, norm=norm)
    want, h = reference.quantize_rmsnorm(x, weight, residual=norm.residual, sf_layout=layout, adaptive=adaptive)
    compare(got, want)
    assert norm.sum is None or torch.equal(norm.sum, h)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32], ids=str)
def test_noop(dtype: torch.dtype, kernels: None) -> None:
    x, before = torch.randn(5, 64), torch.randn(5, 64) * 3
    kept, written = reference.quantize(before), reference.quantize(x)
    for flag, want in ((1, kept), (0, written), (-0.0, written)):
        out = calls.Packed(kept.data.clone(), kept.block_scale.clone(), kept.outer_scale.clone(), "128x4")
        noop = torch.tensor(flag).to(dtype)
        got = calls.quantize(x, False, "128x4", "te_per_token", None, noop=noop, out=out)
        assert got is out
        compare(got, want)


@pytest.mark.parametrize("residual", [0, 16, 48, 272])
@pytest.mark.parametrize("given", ["no", "scalar", "rows"])
@pytest.mark.parametrize("m, k", [(3, 272), (3, 4112), (130, 528)])
def test_values(residual: int, m: int, k: int, given: str, kernels: None) -> None:
    """code * block scale in bf16, companions included: few rows, those that CTAs share, and many rows."""
    check_values(residual, m, k, given)


def test_values_of_wide_rows_with_companions(kernels: None) -> None:
    """Pairs behind all other columns: two rows of 128 threads to a CTA."""
    m, k, options = 129, 6160, QuantizeOptions(residual=48)
    spec, _ = select.values_spec("sm_90a", "bf16", m, k, "per_row", "te_per_token", True, options)
    assert (spec.threads, spec.rows) == (128, 2)
    check_values(options.residual, m, k, "no")


def check_values(residual: int, m: int, k: int, given: str) -> None:
    options = QuantizeOptions(residual=residual) if residual else PLAIN
    x, order = torch.randn(m, k, dtype=torch.bfloat16), torch.randperm(k) if residual > 16 else None
    outer_scale = {"no": None, "scalar": torch.tensor(1 / 512), "rows": torch.rand(m) / 512 + 1 / 512}[given]
    per_tensor = given == "scalar"
    values, outer = calls.quantize_values(x, per_tensor, "te_per_token", outer_scale, options, order)
    want = reference.quantize(x, residual=residual, channel_order=order, outer_scale=outer_scale)
    assert torch.equal(outer, want.outer_scale)
    assert torch.equal(values[:, : k + residual].float(), reference.dequantize(want, outer=False))
