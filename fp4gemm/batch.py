"""Batches: quantize_batch, bmm and bmm_fp4, built as the operators of ``ops`` are."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm import blockscaled, gemm_calls, reference
from fp4gemm.dispatch import direct, on_its_device, on_kernels, refuse_gradients
from fp4gemm.engine import Output
from fp4gemm.formats import padded_k, scale_layout
from fp4gemm.quantize_ops import quantize
from fp4gemm.reference.activation import check_activation
from fp4gemm.reference.arguments import check_batch_scale, check_quantize_batch
from fp4gemm.reference.product_arguments import check_bmm
from fp4gemm.spec.gemm import FP4_LAYOUTS
from fp4gemm.tensor import FP4Batch

_Flat = tuple[Tensor, Tensor, Tensor, str, Tensor, Tensor, Tensor, str, str | None, int, int]


def quantize_batch(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    outer_scale: Tensor | None = None,
) -> FP4Batch:
    """Quantize every member of ``x`` [L, M, K]: bit for bit ``FP4Batch.stack([quantize(member) for member in x])``.

    One launch makes them all where rows have scales of their own and members are whole tiles of ``sf_layout`` (M is a
    multiple of 128 for ``128x4``, of 8 for ``8x4``; any for ``linear``); else each is a launch, into its place.

    Args:
        scaling: ``per_row`` or ``per_tensor``, of each member.
        outer_scale: float32 decode multipliers [L] or [L, M], in place of amaxes.

    The other arguments, and what is raised, are those of :func:`quantize`.
    """
    outer_scale = check_quantize_batch(x, scaling, outer_scale)
    (members, m, k), layout = x.shape, scale_layout(sf_layout)
    shape = layout.shape(m, k)
    per_row = scaling == "per_row" if outer_scale is None else outer_scale.dim() == 2
    if per_row and m % layout.row_tile == 0 and x.numel() > 0:
        rows = None if outer_scale is None else outer_scale.flatten()
        t = quantize(x.flatten(0, 1), scaling=scaling, sf_layout=sf_layout, convention=convention, outer_scale=rows)
        data, outer = t.data.view(members, m, -1), t.outer_scale.view(members, m)
        return FP4Batch(data, t.block_scale.view(members, *shape), outer, (members, m, k), sf_layout)
    data = x.new_empty((members, m, padded_k(k) // 2), dtype=torch.uint8)
    scales = x.new_empty((members, *shape), dtype=torch.float8_e4m3fn)
    outer = x.new_empty((members, m) if per_row else (members,), dtype=torch.float32)
    out = FP4Batch(data, scales, outer, (members, m, k), sf_layout)
    for i, member in enumerate(out):
        own = None if outer_scale is None else outer_scale[i]
        quantize(x[i], scaling=scaling, sf_layout=sf_layout, convention=convention, outer_scale=own, out=member)
    return out


def bmm(
    a: FP4Batch,
    b: FP4Batch,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    c: Tensor | None = None,
    beta: float = 1.0,
    out: Tensor | None = None,
    column_major: bool = False,
) -> Tensor:
    """D [L, M, N], of which D[i] is ``gemm(a[i], b[i], ...)``: one launch on Blackwell, one for each member on Hopper.

    Args:
        a: [L, M, K], b: [L, N, K], on Hopper best prepacked where it is used more than once.
        bias: [N] for all members, or [L, N].
        c: [L, M, N] of ``out_dtype``; it may be ``out``.
        out: where to write D: [L, M, N], rows or columns of members contiguous, members any distance apart.
        column_major: without ``out``, make members whose columns are contiguous.

    The other arguments are those of ``gemm``, and so is what is raised; also ValueError where L do not match.
    """
    dtype = check_bmm(a, b, bias, out_dtype, c, out)
    check_activation(activation)
    a = a.unpack()
    if direct(a.data, a.outer_scale, b.outer_scale, bias, c, out):
        d = _empty(a.data, b.rows, dtype, column_major) if out is None else out
        _multiply(a, b, bias, c, beta, activation, d)
        return d
    operands = (*_flat(a, b), bias, c, 0.0 if c is None else beta, activation)
    if out is None:
        result: Tensor = torch.ops.fp4gemm.bmm(*operands, dtype, column_major)
        return result
    refuse_gradients(a.data, a.outer_scale, b.outer_scale, bias, c, out)
    torch.ops.fp4gemm.bmm_out(out, *operands)
    return out


def bmm_fp4(
    a: FP4Batch,
    b: FP4Batch,
    bias: Tensor | None = None,
    *,
    outer_scale: Tensor,
    activation: str | None = None,
    sf_layout: str = "128x4",
) -> FP4Batch:
    """The NVFP4 of a batch, of which member i is ``gemm_fp4(a[i], b[i], ...)``: one launch on Blackwell.

    Args:
        bias: [N] for all members, or [L, N].
        outer_scale: float32 decode multipliers of D, [L] or [L, M].

    The other arguments, and what is raised, are those of ``gemm_fp4`` and of :func:`bmm`.
    """
    check_bmm(a, b, bias, None, None, None)
    check_activation(activation)
    if sf_layout not in FP4_LAYOUTS:
        raise ValueError(f"sf_layout: expected one of {', '.join(FP4_LAYOUTS)}, got {sf_layout!r}")
    outer_scale = check_batch_scale(outer_scale, a.shape[:2], a.device)
    a = a.unpack()
    at_once = direct(a.data, a.outer_scale, b.outer_scale, bias, outer_scale)
    implementation = _bmm_fp4 if at_once else torch.ops.fp4gemm.bmm_fp4
    data, block_scale, outer = implementation(*_flat(a, b), bias, outer_scale, sf_layout, activation)
    return FP4Batch(data, block_scale, outer, (len(a), a.rows, b.rows), sf_layout)


def _flat(a: FP4Batch, b: FP4Batch) -> _Flat:
    """Operands as a custom op passes them; ``a`` is not prepacked."""
    of_a, of_b = ((t.data, t.block_scale, t.outer_scale, t.sf_layout) for t in (a, b))
    return *of_a, *of_b, b.prepacked, b.rows, b.k


def _empty(a: Tensor, n: int, dtype: torch.dtype, column_major: bool) -> Tensor:
    members, m, _ = a.shape
    shape = (members, n, m) if column_major else (members, m, n)
    d = a.new_empty(shape, dtype=dtype)
    return d.mT if column_major else d


def _multiply(
    a: FP4Batch, b: FP4Batch, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None, d: Tensor
) -> None:
    """D into ``d``."""
    if d.is_cuda and d.numel() > 0 and b.k > 0:
        on_its_device(d, gemm_calls.bmm, a, b, bias, Output(d, c, beta), activation)
    else:
        d.copy_(reference.bmm(a, b, bias, d.dtype, c=c, beta=beta, activation=activation))


def _bmm(
    a: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_layout: str,
    b: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_layout: str, b_prepacked: str | None,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
    out_dtype: torch.dtype, column_major: bool,
) -> Tensor:  # fmt: skip
    d = _empty(a, n, out_dtype, column_major)
    right = (b, b_block_scale, b_outer_scale, b_layout, b_prepacked)
    _bmm_out(d, a, a_block_scale, a_outer_scale, a_layout, *right, n, k, bias, c, beta, activation)
    return d


def _bmm_out(
    out: Tensor,
    a: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_layout: str,
    b: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_layout: str, b_prepacked: str | None,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
) -> None:  # fmt: skip
    members, m, _ = a.shape
    left = FP4Batch(a, a_block_scale, a_outer_scale, (members, m, k), a_layout)
    right = FP4Batch(b, b_block_scale, b_outer_scale, (members, n, k), b_layout, b_prepacked)
    _multiply(left, right, bias, c, beta, activation, out)


def _bmm_fp4(
    a: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_layout: str,
    b: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_layout: str, b_prepacked: str | None,
    n: int, k: int, bias: Tensor | None, outer_scale: Tensor, sf_layout: str, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    members, m, _ = a.shape
    if on_kernels(a) and n > 0 and not gemm_calls.on_hopper(a.device.index):
        left = FP4Batch(a, a_block_scale, a_outer_scale, (members, m, k), a_layout)
        right = FP4Batch(b, b_block_scale, b_outer_scale, (members, n, k), b_layout, b_prepacked)
        own_bias = None if bias is None else bias.contiguous()
        parts = on_its_device(a, blockscaled.gemm_fp4, left, right, own_bias, outer_scale, sf_layout, activation)
        return *parts, outer_scale.clone()
    d = a.new_empty((members, m, n), dtype=torch.float32)
    right_parts = (b, b_block_scale, b_outer_scale, b_layout, b_prepacked)
    _bmm_out(d, a, a_block_scale, a_outer_scale, a_layout, *right_parts, n, k, bias, None, 0.0, activation)
    made = quantize_batch(d, sf_layout=sf_layout, convention="te_per_token", outer_scale=outer_scale)
    return made.data, made.block_scale, made.outer_scale


def _fake_bmm(
    a: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_layout: str,
    b: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_layout: str, b_prepacked: str | None,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
    out_dtype: torch.dtype, column_major: bool,
) -> Tensor:  # fmt: skip
    return _empty(a, n, out_dtype, column_major)


def _fake_bmm_fp4(
    a: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_layout: str,
    b: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_layout: str, b_prepacked: str | None,
    n: int, k: int, bias: Tensor | None, outer_scale: Tensor, sf_layout: str, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    members, m, _ = a.shape
    return (
        a.new_empty((members, m, padded_k(n) // 2)),
        a.new_empty((members, *scale_layout(sf_layout).shape(m, n)), dtype=torch.float8_e4m3fn),
        torch.empty_like(outer_scale),
    )


torch.library.custom_op("fp4gemm::bmm_fp4", _bmm_fp4, mutates_args=()).register_fake(_fake_bmm_fp4)
torch.library.custom_op("fp4gemm::bmm", _bmm, mutates_args=()).register_fake(_fake_bmm)
torch.library.custom_op("fp4gemm::bmm_out", _bmm_out, mutates_args=("out",))  # returns nothing: needs no fake
