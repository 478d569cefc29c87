"""Random groups, bound to no device, and guards around what a kernel may write: tests/emulated runs them, too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gpu_cases as cases
import torch
from torch import Tensor

from fp4gemm.formats import CONVENTIONS, GRADIENTS, SF_LAYOUTS
from fp4gemm.group import calls
from fp4gemm.group.arguments import GroupedArguments
from fp4gemm.group.tensor import GroupedFP4Tensor

KINDS = ("same", "rows", "columns", "both")
KERNELS = 24  # combinations of dtypes and options of each kind: each is a second or two to build
_GUARD = 4096  # bytes before and behind each tensor
_POISON = 0x7F  # NaN in every float type, and a byte that no test expects


@dataclass(frozen=True)
class GroupCase:
    """A group of one of the KINDS, all of it a function of `seed`. `gaps`: rows or elements of poison between members,
    which then stand where `offsets` say; `spare`: behind the last one. Sizes are rows and columns of each member."""

    seed: int
    kind: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]
    gaps: tuple[int, ...]
    spare: int
    rows_from_offsets: bool
    values: str
    options: dict[str, Any] = field(hash=False)

    @classmethod
    def draw(
        cls, seed: int, kind: str, members: int | None = None, largest: int = 300, dtype: torch.dtype | None = None,
        options: dict[str, Any] | None = None,
    ) -> GroupCase:  # fmt: skip
        """`dtype` and `options` of quantize_grouped: None leaves them to chance."""
        rng = random.Random(f"{seed} {kind}")
        kernel = random.Random(f"{seed % KERNELS} {kind}")
        count = members or rng.choice((1, 2, 3, 4, 5, 9, 33, 64, 65, 128))
        if count > 16:
            largest = max(4, largest // 8)
        gradient = kernel.choice(GRADIENTS) if kernel.random() < 0.2 else None
        floats = (*cases.DTYPES, torch.bfloat16)
        drawn = kernel.choice(floats if gradient else (*floats, torch.float8_e4m3fn))
        varies = kind in ("columns", "both")
        width = 16 * rng.randrange(1, largest // 16 + 2) if varies or rng.random() < 0.6 else rng.randrange(1, largest)
        height = _height(rng, largest) or 1
        sizes = tuple(
            (
                _height(rng, largest) if kind in ("rows", "both") else height,
                (16 * rng.randrange(largest // 16 + 1) if rng.random() < 0.9 else 0) if varies else width,
            )
            for _ in range(count)
        )
        by_offsets = kind == "rows" and rng.random() < 0.2
        gapped = kind != "same" and not by_offsets and rng.random() < 0.4
        unit = 16 if varies else width
        gaps = tuple(unit * rng.randrange(3) if gapped else 0 for _ in range(count))
        spare = 0 if kind == "same" else (16 if varies else width) * rng.randrange(4)
        return cls(
            seed, kind, dtype or drawn, sizes, gaps, spare, by_offsets,
            rng.choice(("normal", "grid", "special")), _options(kernel, rng, gradient) if options is None else options,
        )  # fmt: skip

    @property
    def columns(self) -> int:
        """Of all members."""
        return sum(k for _, k in self.sizes)

    def make(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """x, a view of a buffer of poison, and the arguments of quantize_grouped."""
        generator = torch.Generator().manual_seed(self.seed)
        starts, end = [], 0
        for (m, k), gap in zip(self.sizes, self.gaps, strict=True):
            starts.append(end + gap)
            end += gap + m * k
        size = end + self.spare
        bytes_ = torch.full((size * self.dtype.itemsize + 2 * _GUARD,), _POISON, dtype=torch.uint8)
        x = bytes_[_GUARD:-_GUARD].view(self.dtype)
        for (m, k), at in zip(self.sizes, starts, strict=True):
            if m * k:
                x[at : at + m * k] = _member(self.values, m, k, generator).to(self.dtype).reshape(-1)
        x = bytes_.to(device)[_GUARD:-_GUARD].view(self.dtype)
        sizes = torch.tensor(self.sizes, device=device)
        arguments = dict(self.options)
        if "gradient" in arguments:
            bytes_ = torch.full((size * self.dtype.itemsize + 2 * _GUARD,), _POISON, dtype=torch.uint8)
            h = bytes_[_GUARD:-_GUARD].view(self.dtype)
            h.copy_(_member(self.values, size, 1, generator).view(-1))
            arguments["h"] = bytes_.to(device)[_GUARD:-_GUARD].view(self.dtype)
        if any(self.gaps) or self.rows_from_offsets:
            unit = self.sizes[0][1] if self.kind == "rows" else 1
            arguments["offsets"] = torch.tensor([*starts, end], device=device) // unit
        if self.kind in ("rows", "both") and not self.rows_from_offsets:
            arguments["first_dims"] = sizes[:, 0].contiguous()
        if self.kind in ("columns", "both"):
            arguments["last_dims"] = sizes[:, 1].contiguous()
        if self.kind == "columns":
            arguments["rows"] = self.sizes[0][0]
        if self.kind == "both":
            arguments["bounds"] = (sum(m for m, _ in self.sizes) + 3, self.columns + 16)
        if self.kind == "same":
            arguments["members"] = len(self.sizes)
        if self.kind in ("same", "rows"):
            x = x.view(-1, self.sizes[0][1])
            if "h" in arguments:
                arguments["h"] = arguments["h"].view(x.shape)
        return x, arguments


def _one_matrix(
    members: int, rows: int, columns: int, dtype: torch.dtype, sf_layout: str, **options: Any
) -> GroupCase:  # fmt: skip
    sizes, gaps = ((rows, columns),) * members, (0,) * members
    return GroupCase(members, "same", dtype, sizes, gaps, 0, False, "special", {"sf_layout": sf_layout, **options})


# Rows of each member are whole tiles of the layout; columns are not whole blocks or whole tiles, or many threads' row.
UNIFORM = (
    _one_matrix(3, 128, 80, torch.bfloat16, "128x4"),
    _one_matrix(2, 256, 24, torch.float32, "128x4", dbias=True),
    _one_matrix(70, 8, 40, torch.float16, "8x4", convention="te"),
    _one_matrix(5, 3, 2064, torch.float8_e4m3fn, "linear"),
    _one_matrix(1, 1, 9, torch.bfloat16, "linear"),
)


def _height(rng: random.Random, largest: int) -> int:
    return rng.choice((0, 0, 1, rng.randrange(largest), rng.randrange(largest), 16 * rng.randrange(largest // 16 + 1)))


def _options(kernel: random.Random, rng: random.Random, gradient: str | None) -> dict[str, Any]:
    both = kernel.random() < 0.5
    transposed = both or kernel.random() < 0.3
    per_tensor = kernel.random() < 0.4
    options = {
        "both": both,
        "transposed": transposed and not both,
        "scaling": "per_tensor" if per_tensor else "per_row",
        "sf_layout": kernel.choice(tuple(SF_LAYOUTS)),
        "convention": kernel.choice((None, *CONVENTIONS)),
        "dbias": kernel.random() < 0.3,
    }
    if gradient is not None:
        options["gradient"] = gradient
    if kernel.random() < 0.4:
        options["seed"] = rng.getrandbits(63)
    if transposed and kernel.random() < 0.5:
        options["hadamard"] = rng.choice((0, 0xACE1))
    if per_tensor:
        options["shared"] = rng.random() < 0.4
    return options


def _member(values: str, m: int, k: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(m, k, generator=generator) * 2.0 ** torch.randint(-4, 5, (m, 1), generator=generator)
    if values == "grid":
        x = torch.randint(-24, 25, (m, k), generator=generator) / 4
    if values == "special":
        kinds = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 3e38, 1e-40])
        chosen = kinds[torch.randint(7, (m, k), generator=generator)]
        x = torch.where(torch.rand(m, k, generator=generator) < 0.002, chosen, x)
    return x


class Guards:
    """What results are allocated in: poison, of which each result's own part is checked to be all that changes."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._allocate = calls.allocate

    def allocate(self, args: GroupedArguments, transposed: bool) -> GroupedFP4Tensor | None:
        t = self._allocate(args, transposed)
        if t is None:
            return None
        leaves = [self._guarded(leaf) for leaf in (t.data, t.block_scale, t.outer_scale, t.index)]
        return GroupedFP4Tensor(*leaves, t.sf_layout, t.scaling)

    def _guarded(self, t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        padding = -size % 16
        buffer = torch.full((size + padding + 2 * _GUARD,), _POISON, dtype=torch.uint8, device=t.device)
        inside = buffer[_GUARD : _GUARD + size].view(t.dtype).view(t.shape)
        self._buffers.append((buffer, inside))
        return inside

    def check(self) -> None:
        """That nothing was written around a tensor, nor behind the last member."""
        for buffer, inside in self._buffers:
            size = inside.numel() * inside.element_size()
            outside = torch.cat([buffer[:_GUARD], buffer[_GUARD + size :]])
            assert bool((outside == _POISON).all()), f"wrote outside of a tensor of {size} bytes"

    @staticmethod
    def check_rest(t: GroupedFP4Tensor, what: str) -> None:
        """That nothing was written behind the last member of a result that was allocated here."""
        ends = t.index[2:, -1].tolist()
        outer_end = ends[2] if t.scaling == "per_row" else t.count
        for name, leaf, end in (
            ("data", t.data, ends[0]),
            ("block_scale", t.block_scale, ends[1]),
            ("outer_scale", t.outer_scale, outer_end),
        ):
            rest = leaf[end:].contiguous().view(torch.uint8)
            assert bool((rest == _POISON).all()), f"{what}, {name}: wrote behind the last member, at {end} or later"


@contextmanager
def guarded() -> Iterator[Guards]:
    """Results of `quantize_grouped` inside are surrounded by poison, which is checked at the end."""
    guards = Guards()
    calls.allocate = guards.allocate
    try:
        yield guards
    finally:
        calls.allocate = guards._allocate
    guards.check()


def assert_same(got: GroupedFP4Tensor, want: GroupedFP4Tensor, what: str) -> None:
    """The index, and every byte of every member."""
    assert (got.sf_layout, got.scaling) == (want.sf_layout, want.scaling), what
    assert (got.data.shape, got.outer_scale.shape) == (want.data.shape, want.outer_scale.shape), what
    cases.assert_same_bits(got.index, want.index, f"{what}: index")
    for i, (one, other) in enumerate(zip(got.members(), want.members(), strict=True)):
        cases.assert_same(one, other, f"{what}, member {i} of {tuple(other.shape)}")


def assert_results(got: Any, want: Any, columns: int, what: str, *, guarded: bool) -> None:
    """Of one call, as quantize_grouped returns them; `columns`: of all members."""
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else ((got, want),)
    for i, (one, other) in enumerate(pairs):
        if isinstance(other, Tensor):
            assert one.shape == other.shape, f"{what}: dbias"
            _assert_sums(one.reshape(-1)[:columns], other.reshape(-1)[:columns], f"{what}: dbias")
            continue
        assert_same(one, other, f"{what}, result {i}")
        if guarded:
            Guards.check_rest(one, f"{what}, result {i}")


def _assert_sums(got: Tensor, want: Tensor, what: str) -> None:
    # The bits of a NaN are the device's.
    nan = want.cpu().isnan()
    assert torch.equal(got.cpu().isnan(), nan), what
    cases.assert_same_bits(got.cpu().nan_to_num(7.0), want.cpu().nan_to_num(7.0), what)
