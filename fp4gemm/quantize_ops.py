"""The quantizers among the public operators; see ``ops``, from where they are imported."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm.dispatch import direct
from fp4gemm.formats import BLOCK
from fp4gemm.quantize_dispatch import run, run_amax, run_both, run_into, run_rmsnorm
from fp4gemm.quantize_library import flat, flat_both
from fp4gemm.reference.arguments import (
    QuantizeArguments,
    check_amax,
    check_finite_values,
    check_out,
    check_quantize,
    check_quantize_both,
    check_rmsnorm,
)
from fp4gemm.tensor import FP4Tensor, unchecked


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
    """Quantize ``x`` [M, K] (bf16, fp16, fp32 or e4m3, any strides) to NVFP4; bytes are the same on every device.

    docs/numerics.md describes every option to the bit, and the results for NaN and Inf. FP4 has no gradient: of an
    ``x`` that requires one the result has a graph that raises (``FP4Tensor.detach``, or ``torch.no_grad`` around it).

    Args:
        scaling: ``per_row``, ``per_tensor``, or ``per_column``, which is ``per_row`` with ``transposed``.
        sf_layout: layout of the block scales: ``128x4``, ``8x4`` or ``linear``.
        convention: whose arithmetic; default ``te`` for ``per_tensor``, else ``te_per_token``.
        block: (1, 16), or (16, 16) for one block scale for 16 x 16 values (weights; needs a single outer scale).
        outer_scale: float32 decode multiplier, [], [1] or [rows of the result], in place of the amax: calibration.
        check_finite: raise for NaN and Inf; waits for the device.
        transposed: the result is the FP4Tensor of the transpose, [K, M].
        hadamard: transform 16 values at a time along K of the result first, which must be transposed and becomes [K,
            ceil16(M)]; a mask of 16 signs, 0..65535 (recipes take 0xACE1). Cancels where both operands have it.
        seed: round stochastically. An int 0..2**63-1, or an int64 tensor [] or [1] that the device reads.
        adaptive: ``mse`` or ``mae``: 4/6, each block scale takes the better of two (``te``, ``te_per_token``; not with
            hadamard, seed or residual).
        residual: KE, a multiple of 16 as K is then: each of the last KE/16 blocks of a row gets a companion, and the
            result K + KE columns (``te``, ``te_per_token``; 1 x 16 blocks; not with hadamard).
        residual_side: companions hold the error of their block (``activation``) or repeat it (``weight``).
        channel_order: int64 or int32 [K], a permutation: columns are put into this order first (only with residual).
        amax: float32, [], [1] or [rows of the result]: what :func:`amax` returned, so that x is read only once here.
        producer: what makes the quantized values of x, rounded to its dtype: ``silu_mul`` of [M, 2 K], gate and up,
            ``gelu_tanh`` or ``relu2`` (bf16, fp16, fp32; not transposed, nor with 16 x 16 blocks or channel_order).
        noop: bool, uint8, int32 or float32 tensor, [] or [1]: where it is nonzero, ``out`` stays as it is. The device
            reads it, so a captured graph can skip the work. Needs ``out``.
        out: an FP4Tensor of the shape, layout and outer scales of the result to write into; it is returned.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, a name or a device does not fit; the message says which argument.
        NotImplementedError: ``x`` is on a CUDA device for which there is no kernel.
    """
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, block=block, outer_scale=outer_scale,
        transposed=transposed, hadamard=hadamard, seed=seed, adaptive=adaptive, residual=residual,
        residual_side=residual_side, channel_order=channel_order, amax=amax, producer=producer,
    )  # fmt: skip
    if out is not None or noop is not None:
        check_out(args, out, noop)
    if check_finite:
        check_finite_values(x, args.outer_scale, args.amax)
    at_once = direct(x, args.outer_scale, args.amax)
    if out is None:
        if at_once:
            return unchecked(FP4Tensor, run(args), args.shape, sf_layout)
        data, block_scale, outer = torch.ops.fp4gemm.quantize(*flat(args))
        return FP4Tensor(data, block_scale, outer, args.shape, sf_layout)
    if at_once:
        run_into(out, args, noop)
    else:
        torch.ops.fp4gemm.quantize_out(out.data, out.block_scale, out.outer_scale, noop, *flat(args))
    return out


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
    """The FP4Tensor of RMSNorm(h) * weight, h = x + residual, and h: [M, K] both, in one launch.

    Bit for bit ``quantize`` of what ``reference.rmsnorm`` makes, which rounds h and the normalized rows to the dtype of
    ``x``; docs/numerics.md has the order of the sums.

    Args:
        x: [M, K], bf16, fp16 or fp32; ``weight`` [K] and ``residual`` [M, K] have its dtype.
        eps: added to the mean square of a row.
        residual: None: h is ``x`` itself.

    The other arguments, and what is raised, are those of :func:`quantize`.
    """
    check_rmsnorm(x, weight, eps, residual)
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, outer_scale=outer_scale, seed=seed,
        adaptive=adaptive,
    )  # fmt: skip
    if args.source is not x:
        raise ValueError(f"scaling: expected per_row or per_tensor, as rows are what is normalized, got {scaling!r}")
    if direct(x, weight, residual, args.outer_scale):
        parts = run_rmsnorm(args, weight, eps, residual)
    else:
        parts = torch.ops.fp4gemm.quantize_rmsnorm(weight, eps, residual, *flat(args))
    data, block_scale, outer, h = parts
    return FP4Tensor(data, block_scale, outer, args.shape, sf_layout), x if residual is None else h


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
    """The FP4Tensors of ``x`` [M, K] and of its transpose [K, M], as a training step needs them.

    Bit for bit ``quantize(x, ...)`` and ``quantize(x, transposed=True, hadamard=hadamard, ...)``, with ``hadamard`` for
    the transposed one alone.

    Args:
        scaling: ``per_row``: an outer scale for each row of each result; ``per_tensor``: one for each result.
        transposed_sf_layout: that of the transposed result, default ``sf_layout``.
        outer_scale: float32 [] or [1] for both, or a pair, each [], [1] or [rows of its result].
        amax: the same, of amaxes that :func:`amax` returned, in place of ``outer_scale``.

    The other arguments, and what is raised, are those of :func:`quantize`.
    """
    rows, columns = check_quantize_both(
        x, scaling=scaling, sf_layout=sf_layout, transposed_sf_layout=transposed_sf_layout, convention=convention,
        block=block, outer_scale=outer_scale, hadamard=hadamard, seed=seed, adaptive=adaptive, amax=amax,
    )  # fmt: skip
    row_data, row_scales, row_outer, column_data, column_scales, column_outer = run_or_call_both(rows, columns)
    return (
        FP4Tensor(row_data, row_scales, row_outer, rows.shape, rows.sf_layout),
        FP4Tensor(column_data, column_scales, column_outer, columns.shape, columns.sf_layout),
    )


def run_or_call_both(rows: QuantizeArguments, columns: QuantizeArguments) -> tuple[Tensor, ...]:
    """The three tensors of each result of checked arguments."""
    if direct(rows.source, rows.outer_scale, columns.outer_scale, rows.amax, columns.amax):
        return run_both(rows, columns)
    parts: tuple[Tensor, ...] = torch.ops.fp4gemm.quantize_both(*flat_both(rows, columns))
    return parts


def amax(
    x: Tensor,
    *,
    rows: bool = True,
    columns: bool = False,
    tensor: bool = False,
    hadamard: int | None = None,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """Largest magnitudes of ``x`` [M, K] (bf16, fp16, fp32 or e4m3), float32; NaN counts as 0.

    A tuple of those asked for, in this order: rows [M], columns [K], tensor []. ``hadamard``: columns are transformed
    16 values at a time first, as :func:`quantize` does for a transposed result. Passed to ``quantize(amax=)`` these are
    the first half of its two: the same bytes. ``sums``: behind them the sums of columns [K], which the transform does
    not touch: of dY, the gradient of a bias. They are float32 sums in an order of the device's, the same in each run.
    Raises TypeError or ValueError that names the argument.
    """
    check_amax(x, columns, hadamard)
    implementation = run_amax if direct(x) else torch.ops.fp4gemm.amax
    return tuple(implementation(x, rows, columns, tensor, hadamard, sums))
