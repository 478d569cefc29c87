"""Scale arithmetic of each quantizer convention: one object holds all that tells it from the others.

Order of operations is part of a convention: formulas that are equal on paper differ in the last bit, and on a rounding
tie in the stored byte. Everything here is float32, round to nearest even, one torch operation per rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import torch

from fp4gemm.formats import E2M1_MAX, E4M3_MAX, E4M3_MIN, E4M3_MIN_NORMAL
from fp4gemm.reference.rounding import FLT_MAX, constant, divide

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

RANGE = E2M1_MAX * E4M3_MAX  # 2688: the largest code times the largest block scale
ADAPTIVE_RANGE = E2M1_MAX * 256  # 256 * 1.5 is still a block scale: 4/6 stretches scales by that
AMAX_FLOOR = 1e-12


@dataclass(frozen=True)
class Convention(ABC):
    """Scale and encode rules of one quantizer.

    ``level`` is what a convention carries from the outer scale to the blocks: an encode multiplier S or a decode
    multiplier. Shapes: ``amax`` and ``outer`` are [] or [M]; ``bmax`` and ``level`` broadcast to [M, blocks]; ``x``,
    ``scale`` and ``level`` of :meth:`scaled` broadcast to [M, blocks, 16].
    """

    name: ClassVar[str]

    @abstractmethod
    def outer_scale(self, amax: Tensor) -> Tensor:
        """The decode multiplier that is stored."""

    @abstractmethod
    def level(self, amax: Tensor) -> Tensor:
        """The outer level that encoding uses, from the largest magnitude it covers."""

    @abstractmethod
    def level_of(self, outer: Tensor) -> Tensor:
        """The same from a decode multiplier that the caller gives."""

    @abstractmethod
    def block_scale(self, bmax: Tensor, level: Tensor) -> Tensor:
        """Block scale of a block whose largest magnitude is ``bmax``, before ``encode_e4m3`` rounds it."""

    @abstractmethod
    def scaled(self, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        """``x`` in units of e2m1, given the rounded block scale."""


@dataclass(frozen=True)
class _EncodeLevel(Convention):
    """Conventions of Transformer Engine: the level is S = range / amax, and x is multiplied by a coefficient."""

    range: float = RANGE

    def outer_scale(self, amax: Tensor) -> Tensor:
        return amax * (1 / self.range)

    def level_of(self, outer: Tensor) -> Tensor:
        return torch.fmin(divide(1.0, outer), constant(FLT_MAX, outer))

    def block_scale(self, bmax: Tensor, level: Tensor) -> Tensor:
        return bmax * (level * (1 / E2M1_MAX))


class TransformerEnginePerToken(_EncodeLevel):
    """``te_per_token``, the default: a floor under amax, one division for the coefficient, a zero scale gives zeros."""

    name = "te_per_token"

    def level(self, amax: Tensor) -> Tensor:
        return torch.fmin(divide(self.range, amax.clamp(min=AMAX_FLOOR)), constant(FLT_MAX, amax))

    def scaled(self, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        return x * torch.where(scale == 0, 0.0, divide(level, scale))


class TransformerEngine(_EncodeLevel):
    """``te``, the per-tensor default: S = 1 for a zero tensor, and the coefficient is two reciprocals and a product."""

    name = "te"

    def level(self, amax: Tensor) -> Tensor:
        level = torch.fmin(divide(self.range, amax), constant(FLT_MAX, amax))
        return torch.where(amax == 0, 1.0, level)

    def scaled(self, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        coefficient = divide(1.0, scale * divide(1.0, level))
        return x * torch.fmin(coefficient, constant(FLT_MAX, x))


class _DecodeLevel(Convention):
    """Conventions whose level is the decode multiplier amax / 2688 itself. A zero level encodes as if it were 1."""

    def outer_scale(self, amax: Tensor) -> Tensor:
        return divide(amax, constant(RANGE, amax))

    def level(self, amax: Tensor) -> Tensor:
        return self.level_of(self.outer_scale(amax))

    def level_of(self, outer: Tensor) -> Tensor:
        # The peers divide 0 by 0 here and store NaN.
        return torch.where(outer == 0, 1.0, outer)


class TorchAO(_DecodeLevel):
    """``torchao``: block scales stay normal (2**-6 at least), x is multiplied by (1 / level) / scale."""

    name = "torchao"

    def block_scale(self, bmax: Tensor, level: Tensor) -> Tensor:
        return divide(divide(bmax, constant(E2M1_MAX, bmax)), level).clamp(min=E4M3_MIN_NORMAL)

    def scaled(self, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        # The bounds act only where level < 2**-122, and there keep 0 * Inf out.
        largest = constant(FLT_MAX, x)
        reciprocal = torch.fmin(divide(1.0, level), largest)
        return x * torch.fmin(divide(reciprocal, scale), largest)


class ModelOpt(_DecodeLevel):
    """``modelopt``: true division by scale * level; a zero block has scale 1; scales are at least 2**-9."""

    name = "modelopt"

    def block_scale(self, bmax: Tensor, level: Tensor) -> Tensor:
        scale = divide(bmax, level * E2M1_MAX)
        return torch.where(scale == 0, 1.0, scale).clamp(min=E4M3_MIN)

    def scaled(self, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        # A divisor that underflows to 0 leaves zeros alone; 0 / 0 would make them code 7.
        return torch.where(x == 0, x, divide(x, scale * level))


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {rule.name: rule for rule in (TransformerEnginePerToken(), TransformerEngine(), TorchAO(), ModelOpt())}
)

ADAPTIVE_CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {rule.name: rule for rule in (TransformerEnginePerToken(ADAPTIVE_RANGE), TransformerEngine(ADAPTIVE_RANGE))}
)
"""The conventions that 4/6 is defined for."""
