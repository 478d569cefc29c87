"""Case generators and checks of tests/gpu, bound to no device: tests/unit runs a few of them on the CPU."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fp4gemm import engine, reference, select
from fp4gemm.engine import Activations, GroupedWeights, Output, Weight
from fp4gemm.formats import BLOCK, CONVENTIONS, SCALINGS, SF_LAYOUTS, padded_k, scale_columns
from fp4gemm.grouped import GroupedWeight
from fp4gemm.spec import PackedSpec, PackedWgmmaSpec, check
from fp4gemm.tensor import FP4Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIE_AMAXES = (3.5, 5.0, 6.0, 7.0, 12.0)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of `t` as integers of the same width: equality that tells -0 from 0 and NaN from nothing."""
    return t.contiguous().view(_BITS[t.element_size()])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Fails with the number of differing elements and the first of them."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    got_bits, want_bits = bits(got.cpu()), bits(want.cpu())
    if torch.equal(got_bits, want_bits):
        return
    wrong = (got_bits != want_bits).nonzero()
    at = tuple(wrong[0].tolist())
    values = f"{got.cpu()[at].float().item()} (bits {got_bits[at].item():#x})"
    expected = f"{want.cpu()[at].float().item()} (bits {want_bits[at].item():#x})"
    raise AssertionError(f"{what}: {len(wrong)} of {got.numel()} differ, first at {at}: {values}, expected {expected}")


def assert_same(got: FP4Tensor, want: FP4Tensor, what: str) -> None:
    """Data, block scales with their padding, and outer scales, byte for byte."""
    assert (got.shape, got.sf_layout) == (want.shape, want.sf_layout), what
    assert_same_bits(got.outer_scale, want.outer_scale, f"{what}: outer_scale")
    assert_same_bits(got.block_scale, want.block_scale, f"{what}: block_scale")
    assert_same_bits(got.data, want.data, f"{what}: data")


# --- memory that holds garbage ----------------------------------------------------------------------------------------


def poison(device: torch.device, *sizes: int) -> None:
    """Fills free blocks of these sizes with 0x7F (NaN in e4m3, code 7 in data): the next allocations get them."""
    if device.type == "cuda":
        blocks = [
            torch.full((size,), 0x7F, dtype=torch.uint8, device=device) for size in sizes for _ in range(3) if size
        ]
        del blocks


def poison_for(t: FP4Tensor, device: torch.device) -> None:
    """The same for the sizes of an FP4Tensor that is about to be made."""
    poison(device, *(leaf.numel() * leaf.element_size() for leaf in (t.data, t.block_scale, t.outer_scale)))


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Every torch.empty inside returns NaN (floats) or the largest value (integers)."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.utils.deterministic fills by default in this mode
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- quantize ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizeCase:
    """A random problem, all of it a function of `seed`. `rows`, `k`: shape of the result, also for per_column."""

    seed: int
    dtype: torch.dtype
    rows: int
    k: int
    sf_layout: str
    scaling: str
    convention: str | None
    given: str  # "no", "scalar" or "rows": the outer scale that the caller gives
    values: str  # "normal", "grid" (many rounding ties) or "special" (NaN, Inf, -0, subnormal, zero rows, huge)

    @classmethod
    def draw(cls, seed: int) -> QuantizeCase:
        rng = random.Random(seed)
        rows, k = _draw_shape(rng)
        scaling = rng.choice(SCALINGS)
        given = rng.choice(("no", "no", "no", "scalar", "scalar" if scaling == "per_tensor" else "rows"))
        return cls(
            seed=seed,
            dtype=rng.choice(DTYPES),
            rows=rows,
            k=k,
            sf_layout=rng.choice(tuple(SF_LAYOUTS)),
            scaling=scaling,
            convention=rng.choice((None, *CONVENTIONS)),
            given=given,
            values=rng.choice(("normal", "grid", "special")),
        )

    def x(self) -> torch.Tensor:
        """The input, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        x = _values(self.values, self.rows, self.k, self.dtype, generator)
        if self.values == "special":
            _inject(x, generator, with_inf=self.seed % 2 == 0 or self.scaling != "per_tensor")
        return x.t().contiguous() if self.scaling == "per_column" else x

    def outer_scale(self) -> torch.Tensor | None:
        """The outer scale that the caller gives, on the CPU: around 1/2688, with a few extreme ones."""
        if self.given == "no":
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = () if self.given == "scalar" else (self.rows,)
        outer = torch.exp2(torch.rand(shape, generator=generator) * 24 - 20)
        if self.given == "rows":
            outer[::7], outer[3::11] = 1e-39, 3e30  # subnormal: the reciprocal overflows; huge: it almost vanishes
        return outer

    def arguments(self) -> dict[str, object]:
        """Keyword arguments but for the outer scale."""
        return {"scaling": self.scaling, "sf_layout": self.sf_layout, "convention": self.convention}


def _draw_shape(rng: random.Random) -> tuple[int, int]:
    """(rows, K): the corners that kernels get wrong, and a few that they like."""
    return rng.choice(
        (
            (1, 16 * rng.randint(1, 600)),
            (rng.randint(1, 300), 16),
            (rng.randint(1, 150), 2 * rng.randint(0, 400) + 1),
            (rng.randint(1, 150), 8 * rng.randint(0, 80) + rng.randint(1, 7)),
            (rng.randint(1, 150), 16 * rng.randint(0, 60) + 8),
            (rng.randint(1, 4), rng.randint(32769, 70000)),
            (rng.randint(1, 3), 16 * rng.randint(2049, 5000)),
            (rng.randint(1, 400), 16 * rng.randint(1, 70)),
            (128 * rng.randint(1, 3), 64 * rng.randint(1, 16)),
        )
    )


def _values(kind: str, rows: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if (
        kind == "grid"
    ):  # quarters up to 6: they meet the rounding bounds of e2m1 exactly whenever the scale is a power of two
        x = torch.randint(-24, 25, (rows, k), generator=generator) / 4
        if x.numel():
            x[:, 0] = torch.tensor(TIE_AMAXES)[torch.randint(0, 5, (rows,), generator=generator)]
        return x.to(dtype)
    magnitude = torch.exp2(torch.randint(-6, 7, (rows, 1), generator=generator).float())
    return (torch.randn(rows, k, generator=generator) * magnitude).to(dtype)


def _inject(x: torch.Tensor, generator: torch.Generator, with_inf: bool) -> None:
    """Puts special values at random places, in place; Inf in two rows, since it spoils all of a row."""
    info = torch.finfo(x.dtype)
    rows, k = x.shape
    for value in (float("nan"), -0.0, info.tiny, info.tiny / 4, -info.tiny / 2, info.max, -info.max / 2):
        share = 0.002 if abs(value) > 1 else 0.02
        x[torch.rand(rows, k, generator=generator) < share] = value
    x[torch.rand(rows, generator=generator) < 0.1] = 0.0
    x[torch.rand(rows, generator=generator) < 0.05] = float("nan")
    if with_inf:
        row, column = (int(torch.randint(0, n, (), generator=generator)) for n in (rows, k))
        x[row, column] = float("inf")
        x[row // 2, k - 1 - column] = float("-inf")


def tie_matrix(amax: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[rows, 1024]: every row starts with `amax`; its other blocks take each bf16 value up to it as block amax.

    Among them are the few block amaxes on which the possible orders of operations give different bytes.
    """
    last = int(torch.tensor(amax, dtype=torch.bfloat16).view(torch.int16))
    every = torch.arange(last + 1, dtype=torch.int16).view(torch.bfloat16).float()
    per_row = 1024 // BLOCK - 1
    rows = -(-len(every) // per_row)
    padded = torch.zeros(rows * per_row)
    padded[: len(every)] = every
    share = torch.linspace(-1, 1, BLOCK)
    share[3] = 1.0
    x = torch.zeros(rows, per_row + 1, BLOCK)
    x[:, 1:] = padded.reshape(rows, per_row, 1) * share
    x[:, 0, 0] = amax
    return x.reshape(rows, -1).to(dtype)


# --- packed operands built by hand ------------------------------------------------------------------------------------


def packed(codes: torch.Tensor, scale_bytes: torch.Tensor, outer: torch.Tensor, sf_layout: str) -> FP4Tensor:
    """An FP4Tensor from e2m1 codes uint8 [M, K] and e4m3 bytes uint8 [M, ceil(K/16)]."""
    rows, k = codes.shape
    full = torch.zeros(rows, padded_k(k), dtype=torch.uint8)
    full[:, :k] = codes
    data = full[:, 0::2] | (full[:, 1::2] << 4)
    scales = SF_LAYOUTS[sf_layout].from_linear(scale_bytes.view(torch.float8_e4m3fn))
    return FP4Tensor(data.contiguous(), scales, outer, (rows, k), sf_layout)


def identity(n: int, sf_layout: str = "128x4", scaling: str = "per_row") -> FP4Tensor:
    """The n x n identity: code 2 (1.0), block scale 0x38 (1.0), outer scale 1."""
    codes = torch.eye(n, dtype=torch.uint8) * 2
    scales = torch.full((n, scale_columns(n)), 0x38, dtype=torch.uint8)
    return packed(codes, scales, torch.ones(n if scaling == "per_row" else ()), sf_layout)


def any_bytes(rows: int, k: int, sf_layout: str, scaling: str, seed: int) -> FP4Tensor:
    """Random codes, all finite e4m3 bytes 0..0x7E, random outer scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (rows, scale_columns(k)), generator=generator, dtype=torch.uint8)
    outer = torch.randn(rows if scaling == "per_row" else (), generator=generator)
    return packed(codes, scales, outer, sf_layout)


def exact_operand(rows: int, k: int, sf_layout: str, scaling: str, seed: int) -> FP4Tensor:
    """Random codes under block scales 1 and 2 (only 1 past K = 28,000), random outer scales.

    A product of two such values is a multiple of 1/4 and at most 144 (36), so any partial sum over K is a multiple of
    1/4 below 2**22: exact in float32 in *every* order, with truncation or without. Then all of D has one right answer,
    bit for bit, and a lost or doubled term cannot hide under a tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), generator=generator, dtype=torch.uint8)
    two = torch.randint(0, 2 if k <= 28000 else 1, (rows, scale_columns(k)), generator=generator, dtype=torch.uint8)
    outer = torch.rand(rows if scaling == "per_row" else (), generator=generator) + 0.01
    return packed(codes, 0x38 + 8 * two, outer, sf_layout)


def exact_activations(rows: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random halves up to 4: against `exact_operand` they too give sums that are exact in every order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, (rows, k), generator=generator) / 2).to(dtype)


# --- the engine's kernels ---------------------------------------------------------------------------------------------

Config = tuple[str, tuple[int, ...]]  # kind and configuration, as a row of the table has them
Variant = tuple[str, str, str | None, bool]  # dtypes of x, D and bias, and whether there is a C

# What the table does not use yet but a tuner may: four CTAs that share tokens, half a swizzle atom each; tiles that are
# no powers of two; sharing and splitting at once; row tiles of uneven height; warpgroups that take turns at few tokens;
# a collective whose warpgroups share a tile, and one of single CTAs that share the K of tiles; every split of the
# mma.sync kernel, with and without warps that only load tokens, and warps in pairs.
EXTRA_CONFIGS: tuple[Config, ...] = (
    ("wgmma", (16, 1, 1, 1, 4, 1, 8)),
    ("wgmma", (64, 1, 1, 2, 4, 1, 8)),
    ("wgmma", (96, 1, 1, 2, 1, 4, 8)),
    ("wgmma", (128, 1, 1, 1, 2, 2, 8)),
    ("wgmma", (192, 2, 2, 1, 1, 1, 5)),
    ("wgmma", (16, 7, 4, 1, 1, 2, 10)),
    ("wgmma", (64, 3, 2, 1, 1, 1, 8)),
    ("wgmma", (64, 7, 4, 1, 1, 2, 6)),
    ("wgmma", (128, 4, 2, 1, 1, 1, 6)),
    ("wgmma", (64, 1, 2, 1, 1, 1, 8)),
    ("collective", (128, 256, 2)),
    ("stream_k", (128, 256, 1)),
    ("mma", (1, 4, 8, 2, 4, 0, 0)),
    ("mma", (1, 16, 2, 1, 2, 2, 0)),
    ("mma", (2, 8, 4, 2, 1, 0, 0)),
    ("mma", (2, 14, 2, 1, 2, 2, 1)),
    ("mma", (2, 8, 3, 1, 1, 0, 1)),
    ("mma", (2, 8, 4, 1, 1, 4, 0)),
    ("mma", (2, 12, 4, 1, 4, 0, 1)),
)
FORCED_VARIANTS: tuple[Variant, ...] = (
    ("bf16", "bf16", None, False),
    ("fp16", "fp32", "fp16", True),
    ("bf16", "fp16", None, False),
)
PLAIN_VARIANTS: tuple[Variant, ...] = (
    *FORCED_VARIANTS,
    ("fp16", "fp16", None, False),
    ("bf16", "bf16", "bf16", True),
    ("fp16", "fp16", "fp32", False),
)


def chosen_configs() -> list[Config]:
    """Every kernel that selection may choose, and what stands in for those that do not serve every result and C."""
    kernels = set(select.chosen_kernels())
    specs = (select.packed_of(*kernel, "bf16", "bf16", None, False) for kernel in kernels)
    turning = (spec for spec in specs if isinstance(spec, PackedWgmmaSpec) and spec.turns)
    return sorted(kernels | {select.stand_in(spec) for spec in turning})


def kernels(variants: Iterable[Variant]) -> list[tuple[Config, Variant]]:
    """Every kernel that may be chosen and every extra one, in those of the variants that exist."""
    configs = [*chosen_configs(), *EXTRA_CONFIGS]
    return [
        (config, variant)
        for config in configs
        for variant in variants
        if check(select.packed_of(*config, *variant)) is None
    ]


GROUPED_VARIANTS: tuple[Variant, ...] = (
    ("bf16", "bf16", None, False),
    ("fp16", "fp32", "fp16", True),
    ("bf16", "fp16", "fp32", False),
)


def grouped_spec(config: tuple[int, ...], variant: Variant) -> PackedWgmmaSpec:
    spec = select.packed_of("wgmma", config, *variant)
    assert isinstance(spec, PackedWgmmaSpec)
    return replace(spec, grouped=True)


def grouped_kernels() -> list[tuple[tuple[int, ...], Variant]]:
    """Every configuration that the rule for grouped products may choose, in those of the variants that exist."""
    pairs = ((config, variant) for config in select.grouped_configs() for variant in GROUPED_VARIANTS)
    return [(config, variant) for config, variant in pairs if check(grouped_spec(config, variant)) is None]


def force_grouped(
    spec: PackedWgmmaSpec,
    x: torch.Tensor,
    w: GroupedWeight,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    c: torch.Tensor | None,
    beta: float,
    d: torch.Tensor,
) -> None:
    """`engine.gemm_grouped` into d with the kernel given; c has the strides of d."""
    weights = GroupedWeights(w.data, w.outer_scale, offsets, *w.shape, tokens=1)
    engine.launch_grouped(spec, Activations(engine.tokens(x), None), weights, bias, Output(d, c, beta))


def force(
    spec: PackedSpec,
    x: torch.Tensor,
    w: FP4Tensor,
    bias: torch.Tensor | None,
    c: torch.Tensor | None,
    beta: float,
    d: torch.Tensor,
    outer_a: torch.Tensor | None = None,
) -> None:
    """`engine.gemm` into d with the kernel given; w is prepacked, and c has the strides of d."""
    activations, b = Activations(engine.tokens(x), outer_a), Weight(w.data, w.outer_scale, *w.shape)
    engine.launch_spec(spec, activations, b, bias, Output(d, c, beta))


# --- the GEMM's error bound -------------------------------------------------------------------------------------------


def gemm_exact_and_bound(
    a: FP4Tensor | torch.Tensor,
    b: FP4Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    c: torch.Tensor | None = None,
    beta: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """D in float64, and the largest error that a right GEMM may have, element by element.

    With u = 2**-24 and p_k the products of code * block scale (6 bits) with its like, or with a bf16 or fp16 activation
    (8 or 11 bits), which are exact in float32, P = sum |p_k|.

    1. Accumulation. A tensor core adds 16 products and the accumulator in one step: it aligns the 17 addends to the
       largest and truncates each (an error below one ulp of the largest, 2u times it), then truncates the sum (2u
       again). No magnitude in there exceeds P (1 + small). That makes 18 errors of 2u P for 16 products: with
       n = 18 ceil(K/16), |acc' - acc| <= g P, g = 2un / (1 - 2un). Rounded additions in any order, split K included,
       err less.
    2. Outer scales: two rounded products, relative error (1 + u)**2 - 1; each may also underflow by 2**-149.
    3. Bias, and beta * C: a rounded product of two exact factors, and a rounded addition, u of the result, for each.
    4. The cast: half an ulp of the output type, relative eps / 2, or half its smallest subnormal; nothing for float32.

    The float64 sum that it is compared with errs by K 2**-53 P, which is added.
    """
    u, k = 2.0**-24, b.k
    exact_b, outer_b = reference.dequantize(b, outer=False).double(), b.outer_scale.double().reshape(1, -1)
    if isinstance(a, torch.Tensor):
        exact_a, outer_a = a.double(), torch.ones((), dtype=torch.float64, device=a.device)
    else:
        exact_a, outer_a = reference.dequantize(a, outer=False).double(), a.outer_scale.double().reshape(-1, 1)
    alpha = outer_a * outer_b
    total = exact_a.abs() @ exact_b.abs().t()
    steps = 2 * u * 18 * scale_columns(k)
    assert steps < 0.5, f"K = {k} is too large for this bound"
    error = alpha.abs() * total * (steps / (1 - steps) + k * 2.0**-53)
    exact = alpha * (exact_a @ exact_b.t())
    growth = (1 + u) ** 2
    error = error * growth + exact.abs() * (growth - 1) + (outer_a.abs() + 1) * 2.0**-149
    if bias is not None:
        exact = exact + bias.double()
        error = error + u * (exact.abs() + error)
    if c is not None:
        term = float(torch.tensor(beta)) * c.double()
        exact = exact + term
        error = error + u * term.abs() + 2.0**-149
        error = error + u * (exact.abs() + error)
    if out_dtype != torch.float32:
        info = torch.finfo(out_dtype)
        error = error + info.eps / 2 * (exact.abs() + error) + info.tiny * info.eps / 2
    return exact, error


def assert_within_bound(
    D: torch.Tensor,
    a: FP4Tensor | torch.Tensor,
    b: FP4Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    what: str,
    c: torch.Tensor | None = None,
    beta: float = 1.0,
) -> None:
    """|D - float64| <= the derived bound everywhere; all operands on one device."""
    assert D.dtype == out_dtype, what
    assert tuple(D.shape) == (a.shape[0], b.rows), what
    exact, bound = gemm_exact_and_bound(a, b, bias, out_dtype, c, beta)
    excess = (D.double() - exact).abs() / bound
    if D.numel() and not bool((excess <= 1).all()):  # "not <=" also catches NaN
        worst = int(torch.nan_to_num(excess, nan=float("inf")).argmax())
        row, column = divmod(worst, D.shape[1])
        got, want = D[row, column].item(), exact[row, column].item()
        raise AssertionError(
            f"{what}: {int((~(excess <= 1)).sum())} of {D.numel()} outside the bound, worst at [{row}, {column}]: "
            f"{got}, float64 {want}, {excess[row, column].item():.3g} times the bound"
        )


def repro(test: str, parameter: object) -> str:
    """The command that repeats a failing case."""
    return f'repeat with: pytest "tests/gpu/{test}[{parameter}]"'
