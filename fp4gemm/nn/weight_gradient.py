"""dw [E, N, K] of grouped products: dy_e^T [N, m] . x_e^T [K, m]^T of each expert, summed over its m tokens.

On the GPU torch's grouped product does it, in bf16: code * block scale is exact in bf16, sums are fp32 and are rounded
to bf16 once, and outer scales, those of rows and of columns of dw, follow in fp32. Nothing waits for the sizes: blocks
of 16 tokens are gathered into matrices as wide as they may be, in which an expert without tokens has a block of zeros,
since the product takes neither empty parts nor ones that begin between 16 bytes. On the CPU it is a loop of ``gemm``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4gemm import ops
from fp4gemm.formats import BLOCK
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.reference.grouped import members
from fp4gemm.tensor import FP4Tensor

_ALIGNMENT = 8  # bf16 values in the 16 bytes that rows of torch's grouped product begin on


def quantized(dyt: GroupedFP4Tensor, xt: GroupedFP4Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Of transposes with linear scales, as ``quantize_grouped`` makes them of dy [T, N] and x [T, K]; ``tokens``: T."""
    result: Tensor = torch.ops.fp4gemm.weight_gradient_grouped(*_leaves(dyt), *_leaves(xt), tokens, dtype)
    return result


def plain(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Of dy [T, N] and x [T, K] as they are, in bf16 or fp16; on the GPU fp16 is rounded to bf16."""
    result: Tensor = torch.ops.fp4gemm.plain_weight_gradient_grouped(dy, x, offsets, dtype)
    return result


def _leaves(t: GroupedFP4Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t.data, t.block_scale, t.outer_scale, t.index


class _Slots(NamedTuple):
    """Where blocks of 16 tokens stand in a matrix that holds those of all experts."""

    counts: Tensor  # int64 [E], blocks of each expert
    ends: Tensor  # slots up to its end
    expert: Tensor  # of each slot
    block: Tensor  # its number in that expert
    real: Tensor  # whether there is one

    @classmethod
    def of(cls, widths: Tensor, tokens: int) -> _Slots:
        """``widths``: int64 [E], tokens of each expert, -1 for one that was left out."""
        counts = (widths.clamp(min=0) + (BLOCK - 1)) // BLOCK
        slots = counts.clamp(min=1)
        ends = slots.cumsum(0)
        slot = torch.arange(tokens // BLOCK + len(widths), device=widths.device)
        expert = torch.searchsorted(ends, slot, right=True).clamp(max=len(widths) - 1)
        block = slot - (ends - slots)[expert]
        return cls(counts, ends, expert, block, block < counts[expert])

    def gather(self, t: GroupedFP4Tensor, lines: int) -> FP4Tensor:
        """``t``, members [lines, m], as one matrix [lines, 16 slots] without outer scales."""
        before = (self.counts.cumsum(0) - self.counts) * lines
        first = torch.where(self.real, before[self.expert] + self.block, 0)
        step = torch.where(self.real, self.counts[self.expert], 0)
        at = first + step * torch.arange(lines, device=step.device)[:, None]
        # A block of codes is 8 bytes. Where there is none, codes of another one times 0.
        data = t.data.view(torch.int64)[at].view(torch.uint8)
        scales = torch.where(self.real, t.block_scale.view(torch.uint8)[at], 0).view(torch.float8_e4m3fn)
        return FP4Tensor(data, scales, t.outer_scale.new_ones(()), (lines, BLOCK * len(self.block)), "linear")


def _multiply(
    dyt: GroupedFP4Tensor, xt: GroupedFP4Tensor, shape: tuple[int, int, int], tokens: int, dtype: torch.dtype
) -> Tensor:
    """The product on any device."""
    experts, n, k = shape
    slots = _Slots.of(dyt.widths, tokens)
    a, b = (ops.dequantize(slots.gather(t, lines), torch.bfloat16) for t, lines in ((dyt, n), (xt, k)))
    sums = F.grouped_mm(a, b.t(), offs=(BLOCK * slots.ends).int())
    some = (slots.counts > 0)[:, None]  # of an expert without tokens nobody wrote outer scales
    outer_n, outer_k = (torch.where(some, t.outer_scale.view(experts, lines), 0.0) for t, lines in ((dyt, n), (xt, k)))
    return torch.mul(sums * outer_k[:, None, :], outer_n[:, :, None], out=sums.new_empty(shape, dtype=dtype))


@torch.library.custom_op("fp4gemm::weight_gradient_grouped", mutates_args=())
def _quantized(
    dy_data: Tensor, dy_block_scale: Tensor, dy_outer_scale: Tensor, dy_index: Tensor,
    x_data: Tensor, x_block_scale: Tensor, x_outer_scale: Tensor, x_index: Tensor, tokens: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dyt = GroupedFP4Tensor(dy_data, dy_block_scale, dy_outer_scale, dy_index, "linear", "per_row")
    xt = GroupedFP4Tensor(x_data, x_block_scale, x_outer_scale, x_index, "linear", "per_row")
    shape = _shape(dy_outer_scale, x_outer_scale, dy_index)
    if tokens == 0 or 0 in shape:
        return dy_data.new_zeros(shape, dtype=dtype)
    if dy_data.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return _multiply(dyt, xt, shape, tokens, dtype)
    pairs = zip(dyt.members(), xt.members(), strict=True)
    return torch.stack([ops.gemm(a, b, out_dtype=dtype) for a, b in pairs])


@_quantized.register_fake
def _fake_quantized(
    dy_data: Tensor, dy_block_scale: Tensor, dy_outer_scale: Tensor, dy_index: Tensor,
    x_data: Tensor, x_block_scale: Tensor, x_outer_scale: Tensor, x_index: Tensor, tokens: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dy_data.new_empty(_shape(dy_outer_scale, x_outer_scale, dy_index), dtype=dtype)


def _shape(dy_outer_scale: Tensor, x_outer_scale: Tensor, index: Tensor) -> tuple[int, int, int]:
    """(E, N, K): of each expert as many lines as dy and x have columns."""
    experts = index.shape[1] - 1
    return experts, dy_outer_scale.shape[0] // experts, x_outer_scale.shape[0] // experts


@torch.library.custom_op("fp4gemm::plain_weight_gradient_grouped", mutates_args=())
def _plain(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    shape = len(offsets) - 1, dy.shape[1], x.shape[1]
    if dy.numel() == 0 or x.numel() == 0:
        return dy.new_zeros(shape, dtype=dtype)
    with torch.autocast(dy.device.type, enabled=False):
        if dy.is_cuda:
            return _multiply_plain(dy, x, offsets).to(dtype)
        return torch.stack([torch.mm(dy[rows].t(), x[rows]).to(dtype) for rows in members(offsets, len(x))])


def _multiply_plain(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """The product on any device, bf16. Of this orientation parts may be empty, and begin at any token."""
    a, b = (F.pad(t.bfloat16(), (0, -t.shape[1] % _ALIGNMENT)).contiguous() for t in (dy, x))
    sums = F.grouped_mm(a.t(), b, offs=offsets[1:].int())[:, : dy.shape[1], : x.shape[1]]
    return torch.where((offsets.diff() > 0)[:, None, None], sums, 0.0)


@_plain.register_fake
def _fake_plain(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((offsets.shape[0] - 1, dy.shape[1], x.shape[1]), dtype=dtype)


def saved(t: GroupedFP4Tensor | None) -> tuple[Tensor | None, ...]:
    """Four tensors for ``save_for_backward``; :func:`restored` is the way back."""
    return (None,) * 4 if t is None else _leaves(t)


def restored(leaves: Any) -> GroupedFP4Tensor:
    data, block_scale, outer_scale, index = leaves
    return GroupedFP4Tensor(data, block_scale, outer_scale, index, "linear", "per_row")
