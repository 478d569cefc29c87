"""GEMMs on prepacked weights on a CUDA device: x [M, K] . w [N, K]^T, rescaled. ops has checked arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.launch import (
    GemmProblem,
    Operands,
    address_of_one,
    beta_bits,
    gemm_plan,
    is_programmatic,
    new_launch_number,
)
from fp4gemm.packed_plan import PackedProblem, packed_plan
from fp4gemm.spec import PackedCollectiveSpec, PackedSpec, PackedWgmmaSpec


class Activations(NamedTuple):
    """Tokens [M, K] in bf16 or fp16, and their outer scale, fp32 [] or [M]; None where they have none."""

    values: Tensor
    outer_scale: Tensor | None


class Weight(NamedTuple):
    """A prepacked weight [n, k], and its outer scale, fp32 [] or [n]."""

    data: Tensor
    outer_scale: Tensor
    n: int
    k: int


class GroupedWeights(NamedTuple):
    """``experts`` prepacked weights [n, k], one after the other, their outer scales, fp32 [experts] or [experts, n],
    and the first token of each, int64 [experts + 1]; ``tokens``: how many one of them is expected to have."""

    data: Tensor
    outer_scale: Tensor
    offsets: Tensor
    experts: int
    n: int
    k: int
    tokens: int


class Output(NamedTuple):
    """D [M, N], or [L, M, N] of a batch, row- or column-major, and C (or None), whose multiple beta * C is added."""

    d: Tensor
    c: Tensor | None
    beta: float


@lru_cache(maxsize=8192)
def _spec(
    device: int, m: int, n: int, k: int, a_dtype: torch.dtype, out_dtype: torch.dtype, bias: torch.dtype | None,
    source: bool, tma_output: bool,
) -> PackedSpec:  # fmt: skip
    if (arch := select.arch_of(device)) != "sm_90a":
        raise NotImplementedError(f"no GEMM on prepacked weights for {arch} yet")
    names = select.DTYPE_NAMES
    return select.packed_spec(
        select.gpu_of(device), m, n, k, names[a_dtype], names[out_dtype], None if bias is None else names[bias], source,
        tma_output,
    )  # fmt: skip


def tokens(x: Tensor) -> Tensor:
    """``x`` [M, K] with rows of whole 16 bytes, as TMA and 16-byte copies want them; a copy only where it has not."""
    rows, columns = x.stride()
    if columns == 1 and x.data_ptr() % 16 == 0 and (rows % 8 == 0 or x.shape[0] == 1):
        return x
    m, k = x.shape
    padded = x.new_empty((m, -(-k // 8) * 8))
    padded[:, :k] = x
    return padded


def is_row_major(d: Tensor) -> bool:
    """Whether rows of d [..., M, N] are contiguous; a matrix of one column counts, whatever its strides say."""
    return d.stride(-1) == 1 or d.shape[-1] == 1


def has_tma_rows(d: Tensor) -> bool:
    """Whether TMA can store ``d`` [..., M, N] and nothing else: row-major, and rows begin and end on 16 bytes.

    A store that ends inside of 16 bytes of a row writes zeros to the rest of them.
    """
    return begins_on_16_bytes(d) and d.shape[-1] % (16 // d.element_size()) == 0


def begins_on_16_bytes(t: Tensor) -> bool:
    """Whether TMA can load ``t`` [..., M, N]: row-major, and rows begin on 16 bytes."""
    *members, rows, _ = t.stride()
    step = 16 // t.element_size()
    return (
        is_row_major(t)
        and t.data_ptr() % 16 == 0
        and (rows % step == 0 or t.shape[-2] == 1)
        and (not members or members[0] % step == 0)
    )


def gemm(a: Activations, w: Weight, bias: Tensor | None, out: Output, dependent: bool | None = None) -> None:
    """D = cast(outer_a * (outer_b * acc) [+ bias] [+ beta * C]) of non-empty operands, into ``out.d``.

    ``dependent``: whether this kernel may ask for its weight before the one in front has ended: True where that one is
    the quantizer of ``a``, False where it has just written the weight, None (as ``launch.programmatic`` says) else.
    """
    x, d, c = tokens(a.values), out.d, out.c
    if c is not None and (c.stride() != d.stride() or c.data_ptr() % 16 != d.data_ptr() % 16):
        c = torch.empty_strided(d.shape, d.stride(), dtype=d.dtype, device=d.device).copy_(c)
    bias_dtype, tma_output = None if bias is None else bias.dtype, has_tma_rows(d)
    spec = _spec(x.device.index, d.shape[0], w.n, w.k, x.dtype, d.dtype, bias_dtype, c is not None, tma_output)
    launch_spec(spec, Activations(x, a.outer_scale), w, bias, Output(d, c, out.beta), dependent)


@lru_cache(maxsize=8192)
def _grouped_spec(
    device: int, experts: int, tokens: int, n: int, k: int, a_dtype: torch.dtype, out_dtype: torch.dtype,
    bias: torch.dtype | None, source: bool,
) -> PackedWgmmaSpec:  # fmt: skip
    names, sms = select.DTYPE_NAMES, select.gpu_of(device)[1]
    bias_name = None if bias is None else names[bias]
    return select.grouped_spec(sms, experts, tokens, n, k, names[a_dtype], names[out_dtype], bias_name, source)


def gemm_grouped(
    a: Activations, w: GroupedWeights, bias: Tensor | None, out: Output, dependent: bool | None = None
) -> None:
    """``gemm`` of the tokens of each expert by its weight, bias [experts, n], into a row-major ``out.d``; other rows of
    it stay as they are. One launch, which waits for nothing. ``dependent``: right behind the quantizer of ``a``."""
    x, d, c = tokens(a.values), out.d, out.c
    if c is not None and (c.stride() != d.stride() or c.data_ptr() % 16 != d.data_ptr() % 16):
        c = torch.empty_strided(d.shape, d.stride(), dtype=d.dtype, device=d.device).copy_(c)
    bias_dtype = None if bias is None else bias.dtype
    spec = _grouped_spec(x.device.index, w.experts, w.tokens, w.n, w.k, x.dtype, d.dtype, bias_dtype, c is not None)
    launch_grouped(spec, Activations(x, a.outer_scale), w, bias, Output(d, c, out.beta), dependent)


def launch_grouped(
    spec: PackedWgmmaSpec, a: Activations, w: GroupedWeights, bias: Tensor | None, out: Output,
    dependent: bool | None = None,
) -> None:  # fmt: skip
    """``gemm_grouped`` by this kernel: x aligned as ``tokens`` makes it, C of D's strides."""
    (x, outer_a), (d, c, beta), device, m = a, out, a.values.device.index, out.d.shape[0]
    x_stride = x.stride(0) if m > 1 else -(-x.shape[1] // 8) * 8
    ldd = d.stride(0) if m > 1 else w.n
    per_row = outer_a is not None and outer_a.dim() == 1, w.outer_scale.dim() == 2
    packed_plan(spec, PackedProblem(m, w.n, w.k, x_stride, ldd, False, *per_row, w.experts), device)(
        torch._C._cuda_getCurrentRawStream(device), False, bool(dependent), x.data_ptr(), w.data.data_ptr(),
        d.data_ptr(), 0 if c is None else c.data_ptr(), 0 if outer_a is None else outer_a.data_ptr(),
        w.outer_scale.data_ptr(), 0 if bias is None else bias.data_ptr(), w.offsets.data_ptr(), beta,
    )  # fmt: skip


def quantize_gemm(x: Tensor, outer_scale: Tensor, w: Weight, bias: Tensor | None, d: Tensor, dependent: bool) -> bool:
    """``gemm`` of what the quantizer makes of x with these outer scales, in one launch, where a kernel can.

    ``x`` [M, K] has rows of whole 16 bytes that begin on 16 bytes, and K % 16 == 0. Returns whether it was launched.
    """
    bias_dtype = None if bias is None else bias.dtype
    # The kernel that would multiply the values: the same sums, and so the same bits.
    spec = _spec(x.device.index, d.shape[0], w.n, w.k, torch.bfloat16, d.dtype, bias_dtype, False, has_tma_rows(d))
    fused = select.quantizing(spec, select.DTYPE_NAMES[x.dtype], d.shape[0])
    if fused is None:
        return False
    launch_spec(fused, Activations(x, outer_scale), w, bias, Output(d, None, 0.0), None if dependent else False)
    return True


def launch_spec(
    spec: PackedSpec, a: Activations, w: Weight, bias: Tensor | None, out: Output, dependent: bool | None = None
) -> None:
    """``gemm`` by this kernel: x aligned as ``tokens`` makes it, C of D's strides.

    Raises ValueError where the kernel cannot serve the problem.
    """
    (x, outer_a), outer_b, (d, c, beta) = a, w.outer_scale, out
    device, m, row_major = x.device.index, d.shape[0], is_row_major(d)
    x_stride = x.stride(0) if m > 1 else -(-x.shape[1] // 8) * 8
    ldd = (d.stride(0) if m > 1 else w.n) if row_major else (d.stride(1) if w.n > 1 else m)
    per_row = outer_a is not None and outer_a.dim() == 1, outer_b.dim() == 1
    stream = torch._C._cuda_getCurrentRawStream(device)
    bias_address = 0 if bias is None else bias.data_ptr()
    if isinstance(spec, PackedCollectiveSpec):
        plan = gemm_plan(spec, GemmProblem(m, w.n, w.k, x_stride, 0, ldd, ldd, *per_row), device)
        scale_address = address_of_one(device) if outer_a is None else outer_a.data_ptr()
        operands = Operands(
            a=x.data_ptr(), b=w.data.data_ptr(), sfa=0, sfb=0, c=0 if c is None else c.data_ptr(), d=d.data_ptr(),
            sfd=0, outer_a=scale_address, outer_b=outer_b.data_ptr(), outer_d=0, bias=bias_address,
            beta=beta_bits(beta),
        )  # fmt: skip
        if spec.stream_k:  # memory of its own: launches on two streams may run at once
            workspace = d.new_empty(spec.workspace_bytes(select.gpu_of(device)[1]), dtype=torch.uint8)
            operands = operands._replace(workspace=workspace.data_ptr(), launch_number=new_launch_number())
        plan(stream, True, operands)  # it waits before it touches anything
        return
    packed_plan(spec, PackedProblem(m, w.n, w.k, x_stride, ldd, not row_major, *per_row), device)(
        stream, is_programmatic() if dependent is None else dependent, bool(dependent), x.data_ptr(),
        w.data.data_ptr(), d.data_ptr(), 0 if c is None else c.data_ptr(),
        0 if outer_a is None else outer_a.data_ptr(), outer_b.data_ptr(), bias_address, 0, beta,
    )  # fmt: skip
