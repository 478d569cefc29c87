"""Companion blocks of the last KE columns (ARCQuant): each holds the error of the block before it, or repeats it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp4gemm.formats import BLOCK, E2M1_MAX, decode_e2m1
from fp4gemm.reference.rounding import divide, encode_e4m3


def places_of(groups: int, residual: int, device: torch.device) -> Tensor:
    """Where the groups of 16 columns stand in the result, int64 [groups]: companions follow each of the last KE/16."""
    g = torch.arange(groups, device=device)
    return g + (g - (groups - residual // BLOCK)).clamp(min=0)


def without_zeros(scales: Tensor) -> Tensor:
    """e4m3 block scales with 2**-9 for 0."""
    return scales.view(torch.uint8).clamp(min=1).view(torch.float8_e4m3fn)


def companions(
    blocks: Tensor, codes: Tensor, scale: Tensor, level: Tensor, encode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes [rows, G, 16] and e4m3 scales [rows, G] of the error that ``codes`` under ``scale`` [rows, G, 1] leave.

    ``blocks`` are the values, float32 [rows, G, 16]; ``level`` is S; ``encode`` rounds scaled values to codes.
    """
    error = blocks * level - decode_e2m1(codes) * scale
    error = torch.where(error.isnan(), 0.0, error)
    scales = without_zeros(encode_e4m3(error.abs().amax(dim=-1) * (1 / E2M1_MAX)))
    return encode(divide(error, scales.float().unsqueeze(-1))), scales


def interleave(firsts: Tensor, seconds: Tensor, single: int) -> Tensor:
    """``firsts`` [rows, G, ...] with each of ``seconds`` [rows, G - single, ...] behind its own."""
    # e4m3 travels as bytes: it has no torch.cat.
    first, second = (t.view(torch.uint8) for t in (firsts, seconds))
    pairs = torch.stack((first[:, single:], second), dim=2).flatten(1, 2)
    return torch.cat((first[:, :single], pairs), dim=1).view(firsts.dtype)
