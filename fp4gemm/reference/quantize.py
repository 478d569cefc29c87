"""Quantization and dequantization in torch: what every kernel must reproduce byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fp4gemm.formats import BLOCK, decode_e2m1, pack_e2m1, padded_k, scale_columns, scale_layout, unpack_e2m1
from fp4gemm.reference.arguments import check_finite_values, check_float, check_quantize
from fp4gemm.reference.conventions import CONVENTIONS, Convention
from fp4gemm.reference.packed import unpack
from fp4gemm.reference.rounding import encode_e2m1, encode_e4m3
from fp4gemm.tensor import FP4Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Values handled at a time: temporaries stay below a few hundred megabytes on a CPU, and few enough operations are
# issued that thread barriers there, or launches on a GPU, do not dominate.
_CHUNK_CPU = 1 << 22
_CHUNK_DEVICE = 1 << 25


@torch.no_grad()
def quantize(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | None = None,
    check_finite: bool = False,
) -> FP4Tensor:
    """Quantizes ``x`` to NVFP4.

    Args:
        x: bfloat16, float16 or float32 [M, K], any strides, any M, K >= 0.
        scaling: ``per_row``, ``per_tensor`` or ``per_column``. The result of ``per_column`` is the FP4Tensor of the
            transpose: shape (K, M), one outer scale for each column of ``x``.
        sf_layout: layout of the block scales, a name in :data:`fp4gemm.formats.SF_LAYOUTS`.
        convention: ``te_per_token``, ``te``, ``torchao`` or ``modelopt``; None takes ``te`` for ``per_tensor`` and
            ``te_per_token`` otherwise.
        block: (1, 16), or (16, 16) for one block scale for 16 x 16 values (needs a single outer scale).
        outer_scale: decode multiplier, float32, [] or [1] (one for the tensor) or [rows of the result]. It is stored
            unchanged and no amax is taken. It should be finite and positive.
        check_finite: raise if ``x`` or ``outer_scale`` holds NaN or Inf, or ``outer_scale`` a negative value. Without
            it NaN and Inf have the results that docs/numerics.md gives.

    Raises:
        TypeError: ``x`` or ``outer_scale`` is not a tensor of an accepted dtype.
        ValueError: another argument is not one of the above, or ``check_finite`` found something.
    """
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, block=block, outer_scale=outer_scale
    )
    if check_finite:
        check_finite_values(x, args.outer_scale)
    rule = CONVENTIONS[args.convention]
    bmax = _block_amax(args.source)
    if args.outer_scale is None:
        amax = _amax(bmax, args.per_tensor)
        outer, level = rule.outer_scale(amax), rule.level(amax)
    else:
        # A copy: the result must not change when the caller reuses its calibration buffer.
        outer, level = args.outer_scale.clone(), rule.level_of(args.outer_scale)
    if args.block == (BLOCK, BLOCK):
        bmax = _share_over_rows(bmax)
    level = level.reshape(-1, 1)
    scales = encode_e4m3(rule.block_scale(bmax, level))
    data = _encode(args.source, scales, level, rule)
    m, k = args.source.shape
    return FP4Tensor(data, scale_layout(sf_layout).from_linear(scales), outer, (m, k), sf_layout)


@torch.no_grad()
def dequantize(t: FP4Tensor, dtype: torch.dtype = torch.float32, *, outer: bool = True) -> Tensor:
    """Values of ``t`` as a dense [M, K] tensor: (code * block scale) * outer scale in float32, then cast to ``dtype``.

    With ``outer=False`` the outer scale is left out; code * block scale has at most 6 significant bits and is exact in
    bfloat16, float16 and float32. Raises TypeError for any other ``dtype``.
    """
    check_float("dtype", dtype)
    m, k = t.shape
    if t.prepacked is not None:
        t = FP4Tensor(*unpack(t.data, t.shape), t.outer_scale, t.shape, "linear")
    scales = t.linear_block_scale().float().unsqueeze(-1)
    outer_scale = t.outer_scale.reshape(-1, 1)
    out = torch.empty(m, k, dtype=dtype, device=t.device)
    for rows in _row_chunks(t.data, padded_k(k)):
        values = decode_e2m1(unpack_e2m1(t.data[rows])).reshape(-1, scale_columns(k), BLOCK) * scales[rows]
        values = values.flatten(1)[:, :k]
        out[rows] = values * _rows_of(outer_scale, rows) if outer else values
    return out


def _row_chunks(x: Tensor, columns: int) -> Iterator[slice]:
    """Slices of rows that keep temporaries bounded; none for an empty matrix."""
    limit = _CHUNK_CPU if x.device.type == "cpu" else _CHUNK_DEVICE
    step = max(1, limit // max(1, columns))
    rows = x.shape[0] if columns else 0
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _rows_of(per_row: Tensor, rows: slice) -> Tensor:
    """Rows of a [M, 1] column, or the [1, 1] that all rows share."""
    return per_row if per_row.shape[0] == 1 else per_row[rows]


def _blocks(x: Tensor) -> Tensor:
    """float32 [rows, ceil(K/16), 16], zero-padded along K."""
    k = x.shape[1]
    values = x.float().contiguous()
    if padded_k(k) != k:
        values = F.pad(values, (0, padded_k(k) - k))
    return values.reshape(x.shape[0], scale_columns(k), BLOCK)


def _block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block, float32 [M, ceil(K/16)]; NaN counts as 0, as in CUDA's fmaxf."""
    m, k = x.shape
    bmax = torch.empty(m, scale_columns(k), dtype=torch.float32, device=x.device)
    for rows in _row_chunks(x, k):
        magnitude = torch.nan_to_num(_blocks(x[rows]).abs(), nan=0.0, posinf=float("inf"))
        bmax[rows] = magnitude.amax(dim=-1)
    return bmax


def _amax(bmax: Tensor, per_tensor: bool) -> Tensor:
    """[] or [M]; 0 where there is nothing to reduce."""
    if bmax.numel() == 0:
        return bmax.new_zeros(() if per_tensor else bmax.shape[:1])
    return bmax.amax() if per_tensor else bmax.amax(dim=1)


def _share_over_rows(bmax: Tensor) -> Tensor:
    """Each block maximum becomes that of its 16 x 16 square, repeated over the 16 rows."""
    m, columns = bmax.shape
    squares = (m + BLOCK - 1) // BLOCK
    padded = F.pad(bmax, (0, 0, 0, squares * BLOCK - m))
    return padded.reshape(squares, BLOCK, columns).amax(dim=1).repeat_interleave(BLOCK, dim=0)[:m]


def _encode(x: Tensor, scales: Tensor, level: Tensor, rule: Convention) -> Tensor:
    """Packed e2m1 codes, uint8 [M, ceil16(K) / 2]; codes past K are 0."""
    m, k = x.shape
    data = torch.empty(m, padded_k(k) // 2, dtype=torch.uint8, device=x.device)
    for rows in _row_chunks(x, k):
        scale = scales[rows].float().unsqueeze(-1)
        values = rule.scaled(_blocks(x[rows]), scale, _rows_of(level, rows).unsqueeze(-1))
        data[rows] = pack_e2m1(encode_e2m1(values).flatten(1))
    return data
