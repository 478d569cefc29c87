"""4/6: a block scale that maps the largest value of a block to code 4 where that gives the smaller error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm.formats import BLOCK, decode_e2m1
from fp4gemm.reference.conventions import Convention
from fp4gemm.reference.rounding import encode_e2m1

STRETCH = 1.5
"""6 / 4: how much larger the block scale is under which the largest value has code 4."""


def block_errors(blocks: Tensor, scale: Tensor, level: Tensor, rule: Convention, measure: str) -> Tensor:
    """Error of each block [rows, G] of float32 ``blocks`` [rows, G, 16] under ``scale`` [rows, G, 1].

    In units of the scaled tensor: the sum, in order, of |d| ("mae") or d * d ("mse") with d = code * scale - x * S.
    NaN values do not count.
    """
    codes = encode_e2m1(rule.scaled(blocks, scale, level))
    difference = decode_e2m1(codes) * scale - blocks * level
    difference = torch.where(blocks.isnan(), 0.0, difference)
    terms = difference.abs() if measure == "mae" else difference * difference
    return _sum_in_order(terms, -1)


def sum_over_squares(errors: Tensor) -> Tensor:
    """Row errors [M, G] to those of 16 x 16 squares, summed in row order and repeated over the 16 rows."""
    m, columns = errors.shape
    squares = -(-m // BLOCK)
    padded = F.pad(errors, (0, 0, 0, squares * BLOCK - m)).reshape(squares, BLOCK, columns)
    return _sum_in_order(padded, 1).repeat_interleave(BLOCK, dim=0)[:m]


def _sum_in_order(terms: Tensor, dim: int) -> Tensor:
    first, *others = terms.unbind(dim)
    for term in others:
        first = first + term
    return first
