"""GEMMs by Blackwell's block-scaled tensor cores: packed a [M, K] . b [N, K]^T, rescaled, or a batch of them in one
launch: then tensors have a dimension L in front. ops has checked arguments.

CUTLASS reads rows of whole 16 bytes and block scales in ``128x4``, and stores rows of whole 16 bytes; what is otherwise
is copied to be so, on the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm import select
from fp4gemm.engine import Output, begins_on_16_bytes, has_tma_rows, is_row_major
from fp4gemm.formats import padded_k, scale_columns, scale_layout
from fp4gemm.grouped import GroupedWeight
from fp4gemm.launch import NO_BATCH, Batch, GemmProblem, Operands, beta_bits, gemm_plan
from fp4gemm.spec import GemmSpec, GroupedGemmSpec
from fp4gemm.tensor import FP4Batch, FP4Tensor

_ROW_VALUES = 32  # of 4 bits that are 16 bytes
_MMA_LAYOUT = "128x4"


class _Operand(NamedTuple):
    """A or B as CUTLASS reads it: rows of ``k`` values, whole 16 bytes, zeros past the end."""

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    rows: int
    k: int

    @property
    def per_row(self) -> bool:
        return self.outer_scale.dim() == self.data.dim() - 1


def gemm(
    a: FP4Tensor | FP4Batch | Tensor, b: FP4Tensor | FP4Batch, bias: Tensor | None, out: Output,
    activation: str | None = None,
) -> None:  # fmt: skip
    """D = cast(activation(outer_a * (outer_b * acc) [+ bias] [+ beta * C])) of non-empty operands, into ``out.d``.

    Raises NotImplementedError for operands that only Hopper's GEMMs read.
    """
    left, right = _readable("a", a), _readable("b", b)
    d = out.d
    bias_dtype = None if bias is None else bias.dtype
    column_major = not is_row_major(d)
    spec = _spec(
        d.device.index, left.rows, right.rows, left.k, d.dtype, bias_dtype, out.c is not None, activation, column_major,
        members=_members(left),
    )  # fmt: skip
    launch_spec(spec, left, right, bias, out)


def gemm_fp4(
    a: FP4Tensor | FP4Batch | Tensor, b: FP4Tensor | FP4Batch, bias: Tensor | None, outer_scale: Tensor, sf_layout: str,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and block scales of D in NVFP4 under ``outer_scale`` ([] or [M], of a batch [L] or [L, M]), in one launch;
    see ``ops.gemm_fp4``."""
    left, right = _readable("a", a), _readable("b", b)
    bias_dtype = None if bias is None else bias.dtype
    spec = _spec(
        left.data.device.index, left.rows, right.rows, left.k, None, bias_dtype, False, activation, False, sf_layout,
        _members(left),
    )  # fmt: skip
    return launch_fp4_spec(spec, left, right, bias, outer_scale)


def gemm_grouped(
    a: FP4Tensor | Tensor, b: FP4Batch | GroupedWeight, offsets: Tensor, bias: Tensor | None, tokens: int, out: Output
) -> None:
    """Rows offsets[e] to offsets[e + 1] of ``gemm`` of a and member e of b, bias [E, N], into a row-major ``out.d``,
    whose other rows stay; ``tokens``: about how many rows an expert has."""
    if isinstance(b, GroupedWeight):
        raise NotImplementedError("w: a GroupedWeight is prepacked for Hopper: on Blackwell weights are an FP4Batch")
    left, right = _readable("x", a), _readable("w", b)
    d = out.d
    bias_dtype = None if bias is None else bias.dtype
    spec = _grouped_spec(
        d.device.index, _members(right), tokens, right.rows, d.dtype, bias_dtype, out.c is not None
    )  # fmt: skip
    launch_grouped_spec(spec, left, right, offsets, bias, out)


@lru_cache(maxsize=8192)
def _spec(
    device: int, m: int, n: int, k: int, out_dtype: torch.dtype | None, bias: torch.dtype | None, source: bool,
    activation: str | None, column_major: bool, sf_layout: str | None = None, members: int = 1,
) -> GemmSpec:  # fmt: skip
    names = select.DTYPE_NAMES
    out = "fp4" if out_dtype is None else names[out_dtype]
    return select.gemm_spec(
        select.arch_of(device), select.gpu_of(device)[1], m, n, k, out, None if bias is None else names[bias],
        source, activation, column_major, sf_layout, members,
    )  # fmt: skip


def launch_spec(
    spec: GemmSpec, a: FP4Tensor | FP4Batch, b: FP4Tensor | FP4Batch, bias: Tensor | None, out: Output
) -> None:
    """``gemm`` by this kernel, whose terms and dtypes are those of the arguments."""
    left, right = _operand(a), _operand(b)
    d, c = (out.d, out.c) if not spec.column_major else (out.d.mT, None if out.c is None else out.c.mT)
    target = d if has_tma_rows(d) else _padded_rows(d)
    if c is not None and not begins_on_16_bytes(c):
        c = _padded_rows(c).copy_(c)
    batch = _batch(left, right, bias, d=target.stride(0), c=0 if c is None else c.stride(0))
    problem = _problem(left, right, batch, ldc=0 if c is None else _row_stride(c), ldd=_row_stride(target))
    _launch(spec, problem, left, right, bias, d=target, c=c, beta=out.beta)
    if target is not d:
        d.copy_(target)


@lru_cache(maxsize=8192)
def _grouped_spec(
    device: int, experts: int, tokens: int, n: int, out_dtype: torch.dtype, bias: torch.dtype | None, source: bool
) -> GroupedGemmSpec:
    names = select.DTYPE_NAMES
    bias_name = None if bias is None else names[bias]
    arch, sms = select.arch_of(device), select.gpu_of(device)[1]
    return select.grouped_gemm_spec(arch, sms, experts, tokens, n, names[out_dtype], bias_name, source)


def launch_grouped_spec(
    spec: GroupedGemmSpec, a: FP4Tensor | FP4Batch, b: FP4Tensor | FP4Batch, offsets: Tensor, bias: Tensor | None,
    out: Output,
) -> None:  # fmt: skip
    """``gemm_grouped`` by this kernel."""
    left, right = _operand(a), _operand(b)
    d, c = out.d, out.c
    target = d if has_tma_rows(d) else _padded_rows(d).copy_(d)  # with the rows of no expert
    if c is not None and not begins_on_16_bytes(c):
        c = _padded_rows(c).copy_(c)
    outer_b = right.rows if right.per_row else 1
    own_bias = 0 if bias is None else right.rows
    batch = Batch(right.data.shape[0], b=right.rows * right.k, outer_b=outer_b, bias=own_bias)
    problem = _problem(left, right, batch, ldc=0 if c is None else _row_stride(c), ldd=_row_stride(target))
    _launch(spec, problem, left, right, bias, d=target, c=c, beta=out.beta, offsets=offsets)
    if target is not d:
        d.copy_(target)


def launch_fp4_spec(
    spec: GemmSpec, a: FP4Tensor | FP4Batch, b: FP4Tensor | FP4Batch, bias: Tensor | None, outer_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``gemm_fp4`` by this kernel."""
    assert spec.sf_layout is not None
    m, n, layout, members = a.rows, b.rows, scale_layout(spec.sf_layout), a.data.shape[:-2]
    padded_n = _round_up(n, _ROW_VALUES)
    left, right = _operand(a), _operand(b)
    if padded_n != n:  # rows of b that are 0: so are the columns of D
        right = right._replace(data=_zero_rows(right.data, padded_n), rows=padded_n)
        if right.per_row:
            right = right._replace(outer_scale=_longer(right.outer_scale, padded_n))
        bias = None if bias is None else _longer(bias, padded_n)
    data = a.data.new_empty((*members, m, padded_n // 2))
    scales = a.block_scale.new_empty((*members, *layout.shape(m, padded_n)))
    per_row = outer_scale.dim() == data.dim() - 1
    batch = _batch(left, right, bias, d=m * padded_n, sfd=scales.stride(0), outer_d=m if per_row else 1)
    problem = _problem(left, right, batch, ldc=0, ldd=padded_n, outer_d_per_row=per_row)
    _launch(spec, problem, left, right, bias, d=data, sfd=scales, outer_d=outer_scale)
    if data.shape[-1] != padded_k(n) // 2:
        data = data[..., : padded_k(n) // 2].contiguous()
    if scales.shape != (*members, *layout.shape(m, n)):  # linear; a tiled layout has the same padding for both
        scales = scales[..., : scale_columns(n)].contiguous()
    return data, scales


def _readable(name: str, t: FP4Tensor | FP4Batch | Tensor) -> FP4Tensor | FP4Batch:
    if isinstance(t, Tensor):
        raise NotImplementedError(
            f"{name}: plain {t.dtype} activations: Blackwell's kernels multiply NVFP4: quantize them"
        )
    if t.prepacked is not None:
        raise NotImplementedError(
            f"{name}: prepacked for {t.prepacked}, which Blackwell's kernels do not read: unpack it"
        )
    return t


def _members(t: FP4Tensor | FP4Batch) -> int:
    return len(t) if isinstance(t, FP4Batch) else 1


def _operand(t: FP4Tensor | FP4Batch) -> _Operand:
    t = t.with_layout(_MMA_LAYOUT)
    data, k = t.data, 2 * t.data.shape[-1]
    if k % _ROW_VALUES:  # an odd number of blocks; their scales are there, as the layout's padding
        k = _round_up(k, _ROW_VALUES)
        data = data.new_zeros((*data.shape[:-1], k // 2))
        data[..., : t.data.shape[-1]] = t.data
    return _Operand(_on_16_bytes(data), _on_16_bytes(t.block_scale), t.outer_scale, t.rows, k)


def _problem(
    a: _Operand, b: _Operand, batch: Batch, *, ldc: int, ldd: int, outer_d_per_row: bool = False
) -> GemmProblem:
    return GemmProblem(a.rows, b.rows, a.k, a.k, b.k, ldc, ldd, a.per_row, b.per_row, outer_d_per_row, batch)


def _batch(
    a: _Operand, b: _Operand, bias: Tensor | None, *, d: int, c: int = 0, sfd: int = 0, outer_d: int = 0
) -> Batch:
    """The batch of operands with a dimension L; vectors are contiguous, a bias [N] is that of every member."""
    if a.data.dim() == 2:
        return NO_BATCH
    outer_a, outer_b = (t.rows if t.per_row else 1 for t in (a, b))
    own_bias = 0 if bias is None or bias.dim() == 1 else bias.shape[1]
    return Batch(a.data.shape[0], a.rows * a.k, b.rows * b.k, c, d, sfd, outer_a, outer_b, outer_d, own_bias)


def _launch(
    spec: GemmSpec, problem: GemmProblem, a: _Operand, b: _Operand, bias: Tensor | None, *, d: Tensor,
    c: Tensor | None = None, beta: float = 0.0, sfd: Tensor | None = None, outer_d: Tensor | None = None,
    offsets: Tensor | None = None,
) -> None:  # fmt: skip
    def address(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    device = d.device.index
    operands = Operands(
        a=address(a.data), b=address(b.data), sfa=address(a.block_scale), sfb=address(b.block_scale), c=address(c),
        d=address(d), sfd=address(sfd), outer_a=address(a.outer_scale), outer_b=address(b.outer_scale),
        outer_d=address(outer_d), bias=address(bias), beta=beta_bits(beta), offsets=address(offsets),
    )  # fmt: skip
    gemm_plan(spec, problem, device)(torch._C._cuda_getCurrentRawStream(device), False, operands)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _on_16_bytes(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _padded_rows(like: Tensor) -> Tensor:
    """Empty, of the same shape, with rows of whole 16 bytes."""
    columns = like.shape[-1]
    return like.new_empty((*like.shape[:-1], _round_up(columns, 16 // like.element_size())))[..., :columns]


def _row_stride(t: Tensor) -> int:
    return t.stride(-2) if t.shape[-2] > 1 else _round_up(t.shape[-1], 16 // t.element_size())


def _zero_rows(t: Tensor, rows: int) -> Tensor:
    return F.pad(t, (0, 0, 0, rows - t.shape[-2]))


def _longer(vector: Tensor, size: int) -> Tensor:
    return F.pad(vector, (0, size - vector.shape[-1]))
