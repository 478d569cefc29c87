"""Quantization and dequantization in torch: what every kernel must reproduce byte for byte."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fp4gemm.formats import (
    BLOCK,
    PREPACKED,
    QuantizeOptions,
    decode_packed,
    pack_e2m1,
    padded_k,
    scale_columns,
    scale_layout,
)
from fp4gemm.reference.adaptive import STRETCH, block_errors, sum_over_squares
from fp4gemm.reference.arguments import (
    QuantizeArguments,
    check_amax,
    check_finite_values,
    check_float,
    check_out,
    check_quantize,
    check_quantize_both,
    check_rmsnorm,
)
from fp4gemm.reference.conventions import ADAPTIVE_CONVENTIONS, CONVENTIONS, Convention
from fp4gemm.reference.hadamard import rotate
from fp4gemm.reference.packed import pack, unpack
from fp4gemm.reference.philox import random_bytes
from fp4gemm.reference.producers import produce, rmsnorm
from fp4gemm.reference.residual import companions, interleave, places_of, without_zeros
from fp4gemm.reference.rounding import encode_e2m1, encode_e2m1_stochastic, encode_e4m3
from fp4gemm.tensor import FP4Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Values handled at a time: temporaries stay below a few hundred megabytes on a CPU, and few enough operations are
# issued that thread barriers there, or launches on a GPU, do not dominate.
_CHUNK_CPU = 1 << 22
_CHUNK_DEVICE = 1 << 25
_CHUNK_PRODUCED = 1 << 18  # on a CPU: of an activation in double precision


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
    transposed: bool = False,
    hadamard: int | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
    residual: int = 0,
    residual_side: str = "activation",
    channel_order: Tensor | None = None,
    amax: Tensor | None = None,
    producer: str | None = None,
    noop: Tensor | None = None,
    out: FP4Tensor | None = None,
) -> FP4Tensor:
    """Quantizes ``x`` to NVFP4; arguments, results and errors are those of :func:`fp4gemm.quantize`.

    Here ``x`` may be on any device.
    """
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, block=block, outer_scale=outer_scale,
        transposed=transposed, hadamard=hadamard, seed=seed, adaptive=adaptive, residual=residual,
        residual_side=residual_side, channel_order=channel_order, amax=amax, producer=producer,
    )  # fmt: skip
    check_out(args, out, noop)
    if check_finite:
        check_finite_values(x, args.outer_scale, args.amax)
    return quantize_checked(args) if out is None else write(out, quantize_checked(args), noop)


@torch.no_grad()
def quantize_both(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    transposed_sf_layout: str | None = None,
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | tuple[Tensor, Tensor] | None = None,
    hadamard: int | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
    amax: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[FP4Tensor, FP4Tensor]:
    """The FP4Tensors of ``x`` and of its transpose; see :func:`fp4gemm.quantize_both`."""
    rows, columns = check_quantize_both(
        x, scaling=scaling, sf_layout=sf_layout, transposed_sf_layout=transposed_sf_layout, convention=convention,
        block=block, outer_scale=outer_scale, hadamard=hadamard, seed=seed, adaptive=adaptive, amax=amax,
    )  # fmt: skip
    return quantize_checked(rows), quantize_checked(columns)


def quantize_operand(args: QuantizeArguments) -> tuple[Tensor, Tensor, Tensor]:
    """What checked arguments with ``sf_layout`` VALUES or PREPACKED make: data, no block scales, and outer scales."""
    t = quantize_checked(args._replace(sf_layout="linear"))
    if args.sf_layout == PREPACKED:
        return pack(t.data, t.block_scale, args.shape), t.block_scale.new_empty(0), t.outer_scale
    m, half_k = t.data.shape
    codes = FP4Tensor(t.data, t.block_scale, torch.ones_like(t.outer_scale), (m, 2 * half_k), t.sf_layout)
    return dequantize(codes, torch.bfloat16), t.block_scale.new_empty(0), t.outer_scale


@torch.no_grad()
def quantize_rmsnorm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    outer_scale: Tensor | None = None,
    seed: Tensor | int | None = None,
    adaptive: str | None = None,
) -> tuple[FP4Tensor, Tensor]:
    """The FP4Tensor of the RMSNorm of x + residual, and that sum; see :func:`fp4gemm.quantize_rmsnorm`."""
    check_rmsnorm(x, weight, eps, residual)
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, outer_scale=outer_scale, seed=seed,
        adaptive=adaptive,
    )  # fmt: skip
    normalized, h = rmsnorm(x, weight, eps, residual)
    return quantize_checked(args._replace(source=normalized)), h


@torch.no_grad()
def amax(
    x: Tensor,
    *,
    rows: bool = True,
    columns: bool = False,
    tensor: bool = False,
    hadamard: int | None = None,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Largest magnitudes of ``x`` [M, K], float32: rows [M], columns [K], tensor [], those asked for, in this order;
    then, if asked for, the sums of columns [K].

    ``hadamard``: columns are transformed first, as for a transposed result. See :func:`fp4gemm.amax`.
    """
    check_amax(x, columns, hadamard)
    by_row = _amax(_block_amax(x), False)
    results = [by_row] if rows else []
    if columns:
        results.append(_amax(_block_amax(x.t(), hadamard), False))
    if tensor:
        results.append(_amax(by_row, True))
    if sums:
        results.append(x.float().sum(0))
    return tuple(results)


@torch.no_grad()
def quantize_checked(args: QuantizeArguments) -> FP4Tensor:
    """``quantize`` of arguments that ``check_quantize`` has resolved."""
    options, source = args.options, args.source
    if options.producer is not None:
        source = _produced(source, options)
    if args.channel_order is not None:
        source = _columns(source, args.channel_order)
    rule = (ADAPTIVE_CONVENTIONS if options.adaptive else CONVENTIONS)[args.convention]
    bmax = _block_amax(source, options.hadamard)
    if args.outer_scale is None:
        largest = _amax(bmax, args.per_tensor) if args.amax is None else args.amax
        outer, level = rule.outer_scale(largest), rule.level(largest)
    else:
        # A copy: the result must not change when the caller reuses its calibration buffer.
        outer, level = args.outer_scale.clone(), rule.level_of(args.outer_scale)
    square = args.block == (BLOCK, BLOCK)
    if square:
        bmax = _share_over_rows(bmax)
    level = level.reshape(-1, 1)
    scales = rule.block_scale(bmax, level)
    if options.adaptive is None:
        scales = encode_e4m3(scales)
    else:
        scales = _adapt(source, scales, level, rule, options.adaptive, square)
    if options.residual:
        pairs = slice(scales.shape[1] - options.residual // BLOCK, None)
        scales[:, pairs] = without_zeros(scales[:, pairs])
    data, scales = _encode(source, scales, level, rule, options, args.seed)
    return FP4Tensor(data, scale_layout(args.sf_layout).from_linear(scales), outer, args.shape, args.sf_layout)


def write(out: FP4Tensor, result: FP4Tensor, noop: Tensor | None) -> FP4Tensor:
    """``out``, which holds ``result`` afterwards, or what it held where ``noop`` is nonzero; nothing is read back."""
    for old, new in zip((out.data, out.block_scale, out.outer_scale), _tensors(result), strict=True):
        old, new = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (old, new))
        old.copy_(new if noop is None else torch.where(noop.reshape(()) != 0, old, new))
    return out


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
        values = decode_packed(t.data[rows]).reshape(-1, scale_columns(k), BLOCK) * scales[rows]
        values = values.flatten(1)[:, :k]
        out[rows] = values * _rows_of(outer_scale, rows) if outer else values
    return out


def _row_chunks(x: Tensor, columns: int, on_cpu: int = _CHUNK_CPU) -> Iterator[slice]:
    """Slices of rows that keep temporaries bounded; none for an empty matrix."""
    limit = on_cpu if x.device.type == "cpu" else _CHUNK_DEVICE
    step = max(1, limit // max(1, columns))
    rows = x.shape[0] if columns else 0
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _rows_of(per_row: Tensor, rows: slice) -> Tensor:
    """Rows of a [M, 1] column, or the [1, 1] that all rows share."""
    return per_row if per_row.shape[0] == 1 else per_row[rows]


def _tensors(t: FP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return t.data, t.block_scale, t.outer_scale


def _produced(x: Tensor, options: QuantizeOptions) -> Tensor:
    assert options.producer is not None
    result = torch.empty(x.shape[0], options.columns(x.shape[1]), dtype=x.dtype, device=x.device)
    for rows in _row_chunks(x, x.shape[1], _CHUNK_PRODUCED):
        result[rows] = produce(x[rows], options.producer)
    return result


def _columns(x: Tensor, order: Tensor) -> Tensor:
    """Columns of ``x`` in this order."""
    if x.dtype == torch.float8_e4m3fn:  # has no gather
        return x.view(torch.uint8)[:, order.long()].view(x.dtype)
    return x[:, order.long()]


def _blocks(x: Tensor, hadamard: int | None = None) -> Tensor:
    """float32 [rows, ceil(K/16), 16], zero-padded along K, then transformed."""
    k = x.shape[1]
    values = x.float().contiguous()
    if padded_k(k) != k:
        values = F.pad(values, (0, padded_k(k) - k))
    values = values.reshape(x.shape[0], scale_columns(k), BLOCK)
    return values if hadamard is None else rotate(values, hadamard)


def _block_amax(x: Tensor, hadamard: int | None = None) -> Tensor:
    """Largest magnitude of each block, float32 [M, ceil(K/16)]; NaN counts as 0, as in CUDA's fmaxf."""
    m, k = x.shape
    bmax = torch.empty(m, scale_columns(k), dtype=torch.float32, device=x.device)
    for rows in _row_chunks(x, k):
        magnitude = torch.nan_to_num(_blocks(x[rows], hadamard).abs(), nan=0.0, posinf=float("inf"))
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


def _adapt(x: Tensor, scales: Tensor, level: Tensor, rule: Convention, measure: str, square: bool) -> Tensor:
    """e4m3 block scales of 4/6 from those that map to 6, not yet rounded."""
    candidates = [encode_e4m3(scales), encode_e4m3(scales * STRETCH)]
    errors = []
    for candidate in candidates:
        error = torch.empty_like(scales)
        for rows in _row_chunks(x, x.shape[1]):
            scale, s = candidate[rows].float().unsqueeze(-1), _rows_of(level, rows).unsqueeze(-1)
            error[rows] = block_errors(_blocks(x[rows]), scale, s, rule, measure)
        errors.append(sum_over_squares(error) if square else error)
    six, four = (candidate.view(torch.uint8) for candidate in candidates)
    return torch.where(errors[1] < errors[0], four, six).view(torch.float8_e4m3fn)


def _encode(
    x: Tensor, scales: Tensor, level: Tensor, rule: Convention, options: QuantizeOptions, seed: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """Packed e2m1 codes, uint8 [M, columns of the result / 2], and scales; companions in place, codes past K are 0."""
    m, k = x.shape
    extra = options.residual // BLOCK
    columns, single = scales.shape[1] + extra, scales.shape[1] - extra
    places = places_of(scales.shape[1], options.residual, x.device)
    data = torch.empty(m, columns * BLOCK // 2, dtype=torch.uint8, device=x.device)
    result = torch.empty(m, columns, dtype=torch.float8_e4m3fn, device=x.device) if extra else scales
    for rows in _row_chunks(x, k):
        blocks, s = _blocks(x[rows], options.hadamard), _rows_of(level, rows).unsqueeze(-1)
        scale = scales[rows].float().unsqueeze(-1)
        codes = _round(rule.scaled(blocks, scale, s), seed, rows, places, columns)
        if extra:
            pairs = slice(single, None)
            second = codes[:, pairs], scales[rows, pairs]
            if options.residual_side == "activation":
                encode = partial(_round, seed=seed, rows=rows, places=places[pairs] + 1, columns=columns)
                second = companions(blocks[:, pairs], codes[:, pairs], scale[:, pairs], s, encode)
            codes = interleave(codes, second[0], single)
            result[rows] = interleave(scales[rows], second[1], single)
        data[rows] = pack_e2m1(codes.flatten(1))
    return data, result


def _round(values: Tensor, seed: Tensor | int | None, rows: slice, places: Tensor, columns: int) -> Tensor:
    """Codes of scaled values [rows, G, 16] whose blocks are number ``places`` [G] of the ``columns`` of their row."""
    if seed is None:
        return encode_e2m1(values)
    row = torch.arange(rows.start, rows.stop, device=values.device).unsqueeze(-1)
    return encode_e2m1_stochastic(values, random_bytes(seed, row * columns + places))
