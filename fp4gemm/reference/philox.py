"""Philox4x32-7 (Salmon et al., SC 2011) in torch: the random bytes of stochastic rounding.

Of their variants with four words it is the one with the fewest rounds that passes all tests of BigCrush.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, ...]:
    """Four random words (int64 tensors of 0 .. 2**32 - 1, as the counter words and the key words are)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which leaves their 64 bits right; a shift repeats the sign, which the mask drops.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            second >> 32 & _WORD ^ c1 ^ k0,
            second & _WORD,
            first >> 32 & _WORD ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def random_bytes(seed: Tensor | int, blocks: Tensor) -> Tensor:
    """uint8 [..., 16] for int64 block numbers [...]: byte i of word w (0 is the lowest) belongs to value 4w + i.

    ``seed`` is an int, or an int64 tensor of one element, which is not read on the host.
    """
    if isinstance(seed, Tensor):
        seed = seed.reshape(())
    zero = torch.zeros_like(blocks)
    words = philox((blocks & _WORD, blocks >> 32 & _WORD, zero, zero), (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack([word >> 8 * i & 0xFF for word in words for i in range(4)], dim=-1).to(torch.uint8)
