"""The prepacked weight form of sm_90a in torch: what templates/include/fp4gemm/packed.hpp reads, and back.

Fragment order: lane l = 4g + t of the 16-row group w holds, for k-step j, the registers a0 = (row g, columns 2t, +1),
a1 = (row g + 8, the same), a2 = (row g, columns 2t + 8, +9), a3 = (row g + 8, those), rows counted from 16w and columns
from 16j; the lower column is the low half.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fp4gemm.formats import (
    PACKED_BLOCK,
    PACKED_BLOCK_BYTES,
    PACKED_CODE_BYTES,
    pack_e2m1,
    packed_shape,
    padded_k,
    scale_columns,
    unpack_e2m1,
)

_WORD = (1 << 32) - 1
_FRAGMENT_MASK = 0x81C081C0
_SHARED_BITS = 0x60306030
# Where bits 0..3 of a code stand in its half of a register: mantissa, exponent low 2, sign of a bf16.
_CODE_BITS = (6, 7, 8, 15)
_CHUNK = 1 << 24  # codes handled at a time: temporaries are eight times as many bytes at most


def _rotate_left(v: int, n: int) -> int:
    return (v << n | v >> (32 - n)) & _WORD


def split_codes(a: int, b: int) -> list[int]:
    """``split_codes`` of packed.hpp: two words to the eight registers a0..a3 of one k-step, then of the next."""
    x = (a & _SHARED_BITS) | (b & ~_SHARED_BITS)
    registers = (
        a,
        _rotate_left(a, 28),
        a << 6,
        _rotate_left(b, 30),
        _rotate_left(b, 26),
        b << 4,
        _rotate_left(x, 24),
        x << 2,
    )
    return [r & _FRAGMENT_MASK for r in registers]


@cache
def _moves() -> tuple[tuple[int, int, int], ...]:
    """(code, mask, shift): bits ``mask`` of code 0..15 stand ``shift`` higher in the word pair A | B << 32.

    Found by feeding :func:`split_codes` each of the 64 bits alone: it is linear, and a bijection of bits.
    """
    masks: dict[tuple[int, int], int] = {}
    for source in range(64):
        registers = split_codes(1 << source & _WORD, 1 << source >> 32)
        (target,) = [32 * i + bit for i, r in enumerate(registers) for bit in range(32) if r >> bit & 1]
        code, bit = target // 16, _CODE_BITS.index(target % 16)
        masks[code, source - bit] = masks.get((code, source - bit), 0) | 1 << bit
    return tuple((code, mask, shift) for (code, shift), mask in masks.items())


def _join_codes(codes: Tensor) -> Tensor:
    """uint8 codes [..., 16] in fragment order to int64 [...]: word A in the low half, word B in the high half."""
    wide = [code.long() for code in codes.unbind(-1)]
    words = torch.zeros_like(wide[0])
    for code, mask, shift in _moves():
        bits = wide[code] & mask
        words |= bits << shift if shift >= 0 else bits >> -shift
    return words


def _separate_codes(words: Tensor) -> Tensor:
    """Inverse of :func:`_join_codes`."""
    codes = [torch.zeros_like(words, dtype=torch.uint8) for _ in range(16)]
    for code, mask, shift in _moves():
        codes[code] |= ((words >> shift if shift >= 0 else words << -shift) & mask).to(torch.uint8)
    return torch.stack(codes, dim=-1)


def _packed_scale_bytes(device: torch.device) -> Tensor:
    """Packed byte of each e4m3 magnitude 0..127: bits 14..7 of fp16(scale * 2^7), 255 for NaN."""
    scales = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    bytes_ = (scales * 128).half().view(torch.int16) >> 7
    return torch.where(scales.isnan(), 255, bytes_).to(torch.uint8).to(device)


def _e4m3_bytes(device: torch.device) -> Tensor:
    """Inverse of :func:`_packed_scale_bytes` as a table of 256; bytes that no scale has give the nearest one."""
    halves = (torch.arange(256, dtype=torch.int16) << 7).view(torch.float16).float() / 128
    return halves.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).to(device)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    if matrix.shape == (rows, columns):
        return matrix
    result = matrix.new_zeros((rows, columns))
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


@torch.no_grad()
def pack(data: Tensor, linear_block_scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packs codes uint8 [N, ceil16(K)/2] and e4m3 scales [N, ceil(K/16)] of a (N, K) weight into the "sm90" form.

    Returns uint8 [ceil(N/64), ceil(K/64), 2304]; padded rows and columns have codes and scales 0. :func:`unpack` gives
    back all but the magnitude of codes whose scale is 0, and the sign of a scale, which moves to the codes.
    """
    n, k = shape
    scales = linear_block_scale.view(torch.uint8)
    result = data.new_empty(packed_shape(n, k))
    step = _bands(k)
    for first in range(0, result.shape[0] if k else 0, step):
        rows = slice(first * PACKED_BLOCK, (first + step) * PACKED_BLOCK)
        _pack_bands(data[rows], scales[rows], result[first : first + step])
    return result


def _bands(k: int) -> int:
    """Rows of blocks handled at a time."""
    return max(1, _CHUNK // (PACKED_BLOCK * max(k, 1)))


def _pack_bands(data: Tensor, scales: Tensor, result: Tensor) -> None:
    bands, blocks, _ = result.shape
    rows, columns = bands * PACKED_BLOCK, blocks * PACKED_BLOCK
    codes = _padded(unpack_e2m1(data), rows, columns).view(rows, columns // 16, 16)
    scales = _padded(scales, rows, columns // 16)
    codes = codes ^ (scales >> 4 & 8)[..., None]
    magnitudes = scales & 0x7F
    codes = codes & torch.where(magnitudes == 0, 8, 15).to(torch.uint8)[..., None]
    # row = 64 band + 16 w + 8 a + g, column = 64 block + 32 h + 16 j + 8 c + 2 t + p
    grid = codes.view(bands, 4, 2, 8, blocks, 2, 2, 2, 4, 2)  # band w a g block h j c t p
    fragments = grid.permute(0, 4, 1, 3, 8, 5, 6, 7, 2, 9)  # band block w g t h j c a p
    words = _join_codes(fragments.reshape(bands, blocks, PACKED_CODE_BYTES // 8, 16))
    result[..., :PACKED_CODE_BYTES] = words.view(torch.uint8)
    scale_bytes = _packed_scale_bytes(data.device)[magnitudes.int()].view(
        bands, 4, 2, 8, blocks, 4
    )  # band w a g block s
    ordered = scale_bytes.permute(0, 4, 1, 3, 5, 2)  # band block w g s a
    result[..., PACKED_CODE_BYTES:] = ordered.reshape(bands, blocks, PACKED_BLOCK_BYTES - PACKED_CODE_BYTES)


@torch.no_grad()
def unpack(packed: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack`: codes uint8 [N, ceil16(K)/2] and linear float8_e4m3fn scales [N, ceil(K/16)]."""
    n, k = shape
    data = packed.new_empty((n, padded_k(k) // 2))
    scales = packed.new_empty((n, scale_columns(k)))
    step = _bands(k)
    for first in range(0, packed.shape[0] if k else 0, step):
        rows = slice(first * PACKED_BLOCK, (first + step) * PACKED_BLOCK)
        _unpack_bands(packed[first : first + step], data[rows], scales[rows])
    return data, scales.view(torch.float8_e4m3fn)


def _unpack_bands(packed: Tensor, data: Tensor, scales: Tensor) -> None:
    bands, blocks, _ = packed.shape
    rows, columns = bands * PACKED_BLOCK, blocks * PACKED_BLOCK
    words = packed[..., :PACKED_CODE_BYTES].contiguous().view(torch.int64)
    fragments = _separate_codes(words).view(bands, blocks, 4, 8, 4, 2, 2, 2, 2, 2)  # band block w g t h j c a p
    grid = fragments.permute(0, 2, 8, 3, 1, 5, 6, 7, 4, 9)  # band w a g block h j c t p
    data.copy_(pack_e2m1(grid.reshape(rows, columns))[: data.shape[0], : data.shape[1]])
    ordered = packed[..., PACKED_CODE_BYTES:].reshape(bands, blocks, 4, 8, 4, 2)  # band block w g s a
    scale_bytes = ordered.permute(0, 2, 5, 3, 1, 4).reshape(rows, columns // 16)[: scales.shape[0], : scales.shape[1]]
    scales.copy_(_e4m3_bytes(packed.device)[scale_bytes.int()])
