"""The random Hadamard transform of 16 consecutive values."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm.formats import BLOCK


def rotate(blocks: Tensor, mask: int) -> Tensor:
    """blocks · diag(s) · H16 · 0.25 of float32 [..., 16]; s_i is -1 where bit i of ``mask`` is 1.

    Butterflies in natural order with strides 1, 2, 4, 8, each addition rounded on its own; the factor makes the
    transform orthogonal, so it cancels in a product of two operands that both have it.
    """
    signs = [-1.0 if mask >> i & 1 else 1.0 for i in range(BLOCK)]
    values = blocks * torch.tensor(signs, dtype=torch.float32, device=blocks.device)
    for stride in (1, 2, 4, 8):
        a, b = values.reshape(*blocks.shape[:-1], BLOCK // (2 * stride), 2, stride).unbind(-2)
        values = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    return values * 0.25
