"""GEMMs by Blackwell's block-scaled tensor cores: packed a [M, K] . b [N, K]^T, rescaled. ops has checked arguments.

CUTLASS reads rows of whole 16 bytes and block scales in ``128x4``, and stores rows of whole 16 bytes; what is otherwise
is copied to be so, on the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.engine import Output, has_tma_rows, is_row_major
from fp4gemm.formats import padded_k, scale_columns, scale_layout
from fp4gemm.launch import GemmProblem, Operands, beta_bits, gemm_plan
from fp4gemm.spec import GemmSpec
from fp4gemm.tensor import FP4Tensor

_ROW_VALUES = 32  # of 4 bits that are 16 bytes
_MMA_LAYOUT = "128x4"


class _Operand(NamedTuple):
    """A or B as CUTLASS reads it: rows of ``k`` values, whole 16 bytes, zeros past the end."""

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    rows: int
    k: int


def gemm(a: FP4Tensor | Tensor, b: FP4Tensor, bias: Tensor | None, out: Output, activation: str | None = None) -> None:
    """D = cast(activation(outer_a * (outer_b * acc) [+ bias] [+ beta * C])) of non-empty operands, into ``out.d``.

    Raises NotImplementedError for operands that only Hopper's GEMMs read.
    """
    left, right = _readable("a", a), _readable("b", b)
    d = out.d
    bias_dtype = None if bias is None else bias.dtype
    column_major = not is_row_major(d)
    spec = _spec(
        d.device.index, left.rows, right.rows, left.k, d.dtype, bias_dtype, out.c is not None, activation, column_major
    )
    launch_spec(spec, left, right, bias, out)


def gemm_fp4(
    a: FP4Tensor | Tensor, b: FP4Tensor, bias: Tensor | None, outer_scale: Tensor, sf_layout: str,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and block scales of D in NVFP4 under ``outer_scale`` ([] or [M]), in one launch; see ``ops.gemm_fp4``."""
    left, right = _readable("a", a), _readable("b", b)
    bias_dtype = None if bias is None else bias.dtype
    device = left.data.device.index
    spec = _spec(device, left.rows, right.rows, left.k, None, bias_dtype, False, activation, False, sf_layout)
    return launch_fp4_spec(spec, left, right, bias, outer_scale)


@lru_cache(maxsize=8192)
def _spec(
    device: int, m: int, n: int, k: int, out_dtype: torch.dtype | None, bias: torch.dtype | None, source: bool,
    activation: str | None, column_major: bool, sf_layout: str | None = None,
) -> GemmSpec:  # fmt: skip
    names = select.DTYPE_NAMES
    out = "fp4" if out_dtype is None else names[out_dtype]
    return select.gemm_spec(
        select.arch_of(device), select.gpu_of(device)[1], m, n, k, out, None if bias is None else names[bias],
        source, activation, column_major, sf_layout,
    )  # fmt: skip


def launch_spec(spec: GemmSpec, a: FP4Tensor, b: FP4Tensor, bias: Tensor | None, out: Output) -> None:
    """``gemm`` by this kernel, whose terms and dtypes are those of the arguments."""
    left, right = _operand(a), _operand(b)
    d, c = (out.d, out.c) if not spec.column_major else (out.d.t(), None if out.c is None else out.c.t())
    target = d if has_tma_rows(d) else _padded_rows(d)
    if c is not None and not _rows_on_16_bytes(c):
        c = _padded_rows(c).copy_(c)
    problem = _problem(left, right, ldc=0 if c is None else _row_stride(c), ldd=_row_stride(target))
    _launch(spec, problem, left, right, bias, d=target, c=c, beta=out.beta)
    if target is not d:
        d.copy_(target)


def launch_fp4_spec(
    spec: GemmSpec, a: FP4Tensor, b: FP4Tensor, bias: Tensor | None, outer_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``gemm_fp4`` by this kernel."""
    assert spec.sf_layout is not None
    m, n, layout = a.rows, b.rows, scale_layout(spec.sf_layout)
    padded_n = _round_up(n, _ROW_VALUES)
    left, right = _operand(a), _operand(b)
    if padded_n != n:  # rows of b that are 0: so are the columns of D
        right = right._replace(data=_zero_rows(right.data, padded_n), rows=padded_n)
        right = right._replace(outer_scale=_longer(right.outer_scale, padded_n))
        bias = None if bias is None else _longer(bias, padded_n)
    data = a.data.new_empty((m, padded_n // 2))
    scales = a.block_scale.new_empty(layout.shape(m, padded_n))
    problem = _problem(left, right, ldc=0, ldd=padded_n, outer_d_per_row=outer_scale.dim() == 1)
    _launch(spec, problem, left, right, bias, d=data, sfd=scales, outer_d=outer_scale)
    if data.shape[1] != padded_k(n) // 2:
        data = data[:, : padded_k(n) // 2].contiguous()
    if scales.shape != layout.shape(m, n):  # linear; a tiled layout has the same padding for both
        scales = scales[:, : scale_columns(n)].contiguous()
    return data, scales


def _readable(name: str, t: FP4Tensor | Tensor) -> FP4Tensor:
    if isinstance(t, Tensor):
        raise NotImplementedError(
            f"{name}: plain {t.dtype} activations: Blackwell's kernels multiply NVFP4: quantize them"
        )
    if t.prepacked is not None:
        raise NotImplementedError(
            f"{name}: prepacked for {t.prepacked}, which Blackwell's kernels do not read: unpack it"
        )
    return t


def _operand(t: FP4Tensor) -> _Operand:
    t = t.with_layout(_MMA_LAYOUT)
    data, k = t.data, 2 * t.data.shape[1]
    if k % _ROW_VALUES:  # an odd number of blocks; their scales are there, as the layout's padding
        k = _round_up(k, _ROW_VALUES)
        data = data.new_zeros((t.rows, k // 2))
        data[:, : t.data.shape[1]] = t.data
    return _Operand(_on_16_bytes(data), _on_16_bytes(t.block_scale), t.outer_scale, t.rows, k)


def _problem(a: _Operand, b: _Operand, *, ldc: int, ldd: int, outer_d_per_row: bool = False) -> GemmProblem:
    per_row = a.outer_scale.dim() == 1, b.outer_scale.dim() == 1, outer_d_per_row
    return GemmProblem(a.rows, b.rows, a.k, a.k, b.k, ldc, ldd, *per_row)


def _launch(
    spec: GemmSpec, problem: GemmProblem, a: _Operand, b: _Operand, bias: Tensor | None, *, d: Tensor,
    c: Tensor | None = None, beta: float = 0.0, sfd: Tensor | None = None, outer_d: Tensor | None = None,
) -> None:  # fmt: skip
    def address(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    device = d.device.index
    operands = Operands(
        a=address(a.data), b=address(b.data), sfa=address(a.block_scale), sfb=address(b.block_scale), c=address(c),
        d=address(d), sfd=address(sfd), outer_a=address(a.outer_scale), outer_b=address(b.outer_scale),
        outer_d=address(outer_d), bias=address(bias), beta=beta_bits(beta),
    )  # fmt: skip
    gemm_plan(spec, problem, device)(torch._C._cuda_getCurrentRawStream(device), False, operands)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _on_16_bytes(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _rows_on_16_bytes(t: Tensor) -> bool:
    """Whether TMA can load ``t``."""
    return is_row_major(t) and t.data_ptr() % 16 == 0 and (t.shape[0] == 1 or t.stride(0) * t.element_size() % 16 == 0)


def _padded_rows(like: Tensor) -> Tensor:
    """An empty matrix of the shape, with rows of whole 16 bytes."""
    rows, columns = like.shape
    return like.new_empty((rows, _round_up(columns, 16 // like.element_size())))[:, :columns]


def _row_stride(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else _round_up(t.shape[1], 16 // t.element_size())


def _zero_rows(t: Tensor, rows: int) -> Tensor:
    longer = t.new_zeros((rows, t.shape[1]))
    longer[: t.shape[0]] = t
    return longer


def _longer(vector: Tensor, size: int) -> Tensor:
    """A vector with zeros behind; what is one value stays that."""
    return vector if vector.dim() == 0 else torch.cat([vector, vector.new_zeros(size - vector.shape[0])])
