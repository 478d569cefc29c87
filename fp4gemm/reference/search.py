"""Block scales of the lowest error, in torch: what the search kernels must reproduce byte for byte.

docs/numerics.md ("Searching for block scales") is the definition, docs/search.md has the proofs of what is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm.formats import BLOCK, decode_e2m1, pack_e2m1, padded_k, scale_columns, scale_layout
from fp4gemm.reference.adaptive import STRETCH
from fp4gemm.reference.conventions import ADAPTIVE_CONVENTIONS, CONVENTIONS, Convention
from fp4gemm.reference.producers import fma
from fp4gemm.reference.rounding import encode_e2m1, encode_e4m3
from fp4gemm.tensor import FP4Tensor

LAST = 126  # the e4m3 byte of 448
LEAST_LEVEL = 2.0**-30  # |x| * S below it counts as 0 in an error
_LEAST_ENCODE = 2.0**-100  # an S below it could make S / scale subnormal
_INFINITE = float("inf")
_CHUNK = 1 << 20  # values at a time


@dataclass(frozen=True)
class SearchArguments:
    """Checked arguments of a search.

    ``source`` [rows, K] may be a view of a transpose; ``scale`` is [] or [rows]: amaxes, or decode multipliers where
    ``given``; ``factor`` [units, n, n], float32 and upper triangular, for the Hessian; ``first`` and ``last``: bytes.
    """

    source: Tensor
    scale: Tensor
    given: bool
    sf_layout: str
    metric: str
    block: int
    factor: Tensor | None
    reach: Tensor | None
    four_six: bool = False
    first: int = 1
    last: int = LAST

    @property
    def units(self) -> int:
        """How many scales are chosen for a row."""
        return -(-self.source.shape[1] // self.block)

    @property
    def rule(self) -> Convention:
        return (ADAPTIVE_CONVENTIONS if self.four_six else CONVENTIONS)["te_per_token"]

    @property
    def outer(self) -> Tensor:
        """Decode multipliers, [] or [rows]."""
        return self.scale if self.given else self.rule.outer_scale(self.scale)

    @property
    def encode(self) -> Tensor:
        """S, [] or [rows]."""
        return self.rule.level_of(self.scale) if self.given else self.rule.level(self.scale)


class Found(NamedTuple):
    """The result, the error of each choice [rows, units] in units of (S x)^2, and how many candidates were tried."""

    tensor: FP4Tensor
    errors: Tensor
    tried: int


@torch.no_grad()
def search(args: SearchArguments, *, exhaustive: bool = False) -> Found:
    """The search; ``exhaustive`` tries every candidate, with the same result."""
    rule, encode = args.rule, args.encode
    outer = args.outer.clone() if args.given else args.outer
    m, k = args.source.shape
    columns = scale_columns(k)
    data = args.source.new_empty((m, padded_k(k) // 2), dtype=torch.uint8)
    scales = args.source.new_empty((m, columns), dtype=torch.uint8)
    errors = args.source.new_empty((m, args.units), dtype=torch.float32)
    step, tried = max(1, _CHUNK // max(1, k)), 0
    for start in range(0, m if k else 0, step):
        rows = slice(start, min(start + step, m))
        units = _units(args.source[rows], args.block)
        s = (encode if encode.dim() == 0 else encode[rows]).reshape(-1, 1)
        chosen = _Search(args, units, s)
        chosen.run(exhaustive)
        tried += chosen.tried
        errors[rows] = chosen.error
        per_block = chosen.byte.repeat_interleave(args.block // BLOCK, dim=1)[:, :columns].to(torch.uint8)
        scales[rows] = per_block
        blocks = units.reshape(units.shape[0], -1, BLOCK)[:, :columns]
        scale = per_block.view(torch.float8_e4m3fn).float().unsqueeze(-1)
        codes = encode_e2m1(rule.scaled(blocks, scale, s.unsqueeze(-1)))
        data[rows] = pack_e2m1(codes.flatten(1))
    stored = scale_layout(args.sf_layout).from_linear(scales.view(torch.float8_e4m3fn))
    return Found(FP4Tensor(data, stored, outer, (m, k), args.sf_layout), errors, tried)


def _units(x: Tensor, block: int) -> Tensor:
    """float32 [rows, units, block], zero-padded along K."""
    values = x.float().contiguous()
    values = F.pad(values, (0, -values.shape[1] % block))
    return values.reshape(x.shape[0], -1, block)


def to_scale(byte: Tensor) -> Tensor:
    """Bytes of any integer dtype, 0..126, as float32."""
    return byte.to(torch.uint8).view(torch.float8_e4m3fn).float()


def to_byte(scale: Tensor) -> Tensor:
    """The nearest e4m3, as int32."""
    return encode_e4m3(scale).view(torch.uint8).int()


class _Search:
    """One search of ``units`` [rows, units, n]; ``byte`` and ``error`` [rows, units] are the best so far."""

    def __init__(self, args: SearchArguments, units: Tensor, encode: Tensor) -> None:
        self._args, self._encode = args, encode
        levels = units.abs() * encode.unsqueeze(-1)
        self._x = torch.where(levels >= LEAST_LEVEL, units, 0.0)  # NaN is neither
        self._levels = self._x.abs() * encode.unsqueeze(-1)
        largest = torch.nan_to_num(units.abs(), nan=0.0, posinf=_INFINITE).amax(-1)
        self._largest, self._level = largest, largest * encode
        self._searched = largest.isfinite() & (self._level >= LEAST_LEVEL)
        self.byte = torch.full_like(largest, LAST, dtype=torch.int32)
        self.error = torch.full_like(largest, _INFINITE)
        self.tried = 0

    def run(self, exhaustive: bool) -> None:
        zero = self._largest.isfinite() & ~(self._level >= LEAST_LEVEL)
        if self._args.four_six:
            base = self._largest * (self._encode * (1 / 6))
            for candidate in (base, base * STRETCH):
                self._attempt(to_byte(candidate).clamp(min=1), self._searched)
        elif exhaustive:
            for byte in range(self._args.first, self._args.last + 1):
                self._attempt(torch.full_like(self.byte, byte), self._searched)
        elif self._args.metric == "sse":
            self._by_squares()
        else:
            self._by_hessian()
        self.byte = torch.where(zero, 0, self.byte)
        self.error = torch.where(zero, 0.0, self.error)

    def _attempt(self, byte: Tensor, where: Tensor) -> None:
        """Tries these bytes, those that ``where`` says; the lowest scale wins among equals."""
        self.tried += int(where.sum())
        scale = to_scale(byte)
        error = self._error(scale)
        better = (error < self.error) | ((error == self.error) & error.isfinite() & (byte < self.byte))
        better = better & where
        self.byte, self.error = torch.where(better, byte, self.byte), torch.where(better, error, self.error)

    def _error(self, scale: Tensor) -> Tensor:
        c = (self._encode / scale).unsqueeze(-1)
        v = self._x.abs() * c
        d = decode_e2m1(encode_e2m1(v)) - v
        if self._args.factor is None:
            terms = list(d.unbind(-1))
        else:
            d = d * torch.where(self._x.signbit(), -1.0, 1.0)
            terms = _rows_of_product(self._args.factor, d)
        total = torch.zeros_like(scale)
        for term in terms:
            total = fma(term, term, total)
        return total * (scale * scale)

    def _descend(self, start: Tensor, until: Callable[[Tensor], Tensor]) -> None:
        """Tries bytes from ``start`` down to ``first``, in each unit until ``until(byte)`` says that it is done."""
        byte, going = start.clone(), self._searched & (start >= self._args.first)
        while bool((going := going & ~until(byte)).any()):
            self._attempt(byte.clamp(min=1), going)
            byte = byte - 1
            going = going & (byte >= self._args.first)

    def _seventh(self) -> Tensor:
        return to_byte((self._level * (1 / 7)).clamp(max=448.0))

    def _by_squares(self) -> None:
        args, bounded = self._args, self._encode >= _LEAST_ENCODE
        top = (self._seventh() + 8).clamp(min=max(args.first + 7, 15)).clamp(max=args.last)
        top = torch.where(bounded, top, args.last)

        def saturates(byte: Tensor) -> Tensor:
            slack = 1 - 2.0**-20
            clipped = self._level * slack - 6 * to_scale(byte.clamp(min=0))
            return bounded & (clipped > 0) & (clipped * clipped * slack > self.error)

        self._descend(top, saturates)

    def _by_hessian(self) -> None:
        args, bounded = self._args, self._encode >= _LEAST_ENCODE
        middle = self._seventh().clamp(args.first, args.last)
        top = (middle + 8).clamp(max=args.last)
        self._descend(top, lambda byte: byte < middle)
        low, high = self._bounds(args.reach)
        low = torch.where(bounded, low, args.first)
        high = torch.where(bounded, high, args.last)
        self._descend(middle - 1, lambda byte: byte < low)
        self._descend(torch.full_like(top, args.last).minimum(high), lambda byte: byte <= top)

    def _bounds(self, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reach is not None
        root = self.error.clamp(min=2.0**-80).sqrt() * (1 + 2.0**-20)
        beyond = torch.nan_to_num(self._levels * (1 - 2.0**-20) - root.unsqueeze(-1) * reach, nan=-1.0)
        least = beyond.amax(-1).clamp(min=0)
        most = torch.where(beyond > 0, self._levels, _INFINITE).amin(-1)
        return to_byte((least / 6).clamp(max=448.0)), to_byte((most * 4).clamp(max=448.0))


def _rows_of_product(factor: Tensor, d: Tensor) -> list[Tensor]:
    """Rows of U d, the last one first: sums from the last column on, the first product rounded, the rest fused."""
    n = d.shape[-1]
    columns = d.unbind(-1)
    rows = []
    for i in range(n - 1, -1, -1):
        t = factor[:, i, n - 1] * columns[n - 1]
        for j in range(n - 2, i - 1, -1):
            t = fma(factor[:, i, j].expand_as(t), columns[j], t)
        rows.append(t)
    return rows
