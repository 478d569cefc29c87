"""The CUDA side of products: allocate, select, launch. Nothing waits for the GPU; ops has checked arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm import blockscaled, calls, engine, select
from fp4gemm.calls import Packed
from fp4gemm.engine import Activations, Output, Weight
from fp4gemm.formats import PLAIN, QuantizeOptions
from fp4gemm.grouped import GroupedWeight
from fp4gemm.reference.activation import activate
from fp4gemm.tensor import FP4Batch, FP4Tensor

_FUSED_CONVENTION = "te_per_token"  # that of packed_mma.hpp


def _activations(a: FP4Tensor | Activations | Tensor) -> Activations:
    """NVFP4 activations, not prepacked, as values."""
    if isinstance(a, Activations):
        return a
    if isinstance(a, Tensor):
        return Activations(a, None)
    packed = Packed(a.data, a.block_scale, a.outer_scale, a.sf_layout)
    return Activations(calls.as_values(packed, a.rows, a.k), a.outer_scale)


def _weight(b: FP4Tensor) -> Weight:
    """A weight that is not prepacked is, for this call."""
    data = calls.aligned(b.data, 16) if b.prepacked else calls.prepack(b.data, b.block_scale, b.sf_layout, b.k)
    return Weight(data, b.outer_scale, *b.shape)


def on_hopper(device: int) -> bool:
    """Whether GEMMs multiply values by prepacked weights; else they take NVFP4 as it is."""
    return select.arch_of(device) == "sm_90a"


def gemm(
    a: FP4Tensor | Activations | Tensor, b: FP4Tensor, bias: Tensor | None, out: Output, activation: str | None = None
) -> None:
    """A . B^T of non-empty operands into ``out``; see ``ops.gemm``."""
    bias = None if bias is None else bias.contiguous()
    if not on_hopper(out.d.device.index):
        assert not isinstance(a, Activations)  # those are for this engine
        blockscaled.gemm(a, b, bias, out, activation)
        return
    if activation is not None:  # the engine's epilogues have none
        d = torch.empty_like(out.d, dtype=torch.float32)
        gemm(a, b, bias, Output(d, None if out.c is None else out.c.float(), out.beta))
        out.d.copy_(activate(activation, d))
        return
    weight = _weight(b)
    engine.gemm(_activations(a), weight, bias, out, None if b.prepacked else False)


def _grouped(w: GroupedWeight | FP4Batch, offsets: Tensor, tokens: int) -> engine.GroupedWeights:
    data = w.prepack().data if isinstance(w, FP4Batch) else w.data
    return engine.GroupedWeights(calls.aligned(data, 16), w.outer_scale, offsets.contiguous(), *w.shape, tokens)


def gemm_grouped(
    x: FP4Tensor | Tensor, w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None, tokens: int, out: Output
) -> None:
    """The product of each expert of non-empty operands into ``out``; see ``ops.gemm_grouped``."""
    bias = None if bias is None else bias.contiguous()
    if not on_hopper(out.d.device.index):
        blockscaled.gemm_grouped(x, w, offsets.contiguous(), bias, tokens, out)
        return
    engine.gemm_grouped(_activations(x), _grouped(w, offsets, tokens), bias, out)


def quantize_gemm_grouped(
    x: Tensor, w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None, outer_scale: Tensor | None,
    tokens: int, d: Tensor, options: QuantizeOptions = PLAIN,
) -> None:  # fmt: skip
    """The values of x, quantized, times the weight of their expert into ``d``; see ``ops.quantize_gemm_grouped``."""
    per_tensor = outer_scale is not None and outer_scale.dim() == 0
    if not on_hopper(x.device.index):
        codes = calls.quantize(x, per_tensor, "128x4", _FUSED_CONVENTION, outer_scale, None, options)
        left = FP4Tensor(*codes[:3], (x.shape[0], w.k), codes.sf_layout)
        gemm_grouped(left, w, offsets, bias, tokens, Output(d, None, 0.0))
        return
    weights = _grouped(w, offsets, tokens)
    values, outer = calls.quantize_values(x, per_tensor, _FUSED_CONVENTION, outer_scale, options)
    bias = None if bias is None else bias.contiguous()
    engine.gemm_grouped(Activations(values, outer), weights, bias, Output(d, None, 0.0), not isinstance(w, FP4Batch))


def bmm(a: FP4Batch, b: FP4Batch, bias: Tensor | None, out: Output, activation: str | None) -> None:
    """A . B^T of the non-empty members of two batches into ``out``; see ``batch.bmm``."""
    if not on_hopper(out.d.device.index):
        blockscaled.gemm(a, b, None if bias is None else bias.contiguous(), out, activation)
        return
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        own_bias = bias if bias is None or bias.dim() == 1 else bias[i]
        gemm(left, right, own_bias, Output(out.d[i], None if out.c is None else out.c[i], out.beta), activation)


def gemm_fp4(
    a: FP4Tensor | Tensor, b: FP4Tensor, bias: Tensor | None, outer_scale: Tensor, sf_layout: str,
    activation: str | None,
) -> Packed:  # fmt: skip
    """A . B^T of non-empty operands in NVFP4; see ``ops.gemm_fp4``."""
    bias = None if bias is None else bias.contiguous()
    if on_hopper(outer_scale.device.index):
        d = outer_scale.new_empty((a.shape[0], b.rows))
        gemm(a, b, bias, Output(d, None, 0.0), activation)
        return calls.quantize(d, outer_scale.dim() == 0, sf_layout, _FUSED_CONVENTION, outer_scale)
    data, block_scale = blockscaled.gemm_fp4(a, b, bias, outer_scale, sf_layout, activation)
    return Packed(data, block_scale, outer_scale.clone(), sf_layout)


def quantize_gemm(
    x: Tensor,
    w: FP4Tensor,
    bias: Tensor | None,
    per_tensor: bool,
    convention: str,
    outer_scale: Tensor | None,
    d: Tensor,
    options: QuantizeOptions = PLAIN,
    channel_order: Tensor | None = None,
) -> None:
    """The values of x, quantized, times a weight, non-empty both, into ``d``; see ``ops.quantize_gemm``."""
    if not on_hopper(x.device.index):
        codes = calls.quantize(x, per_tensor, "128x4", convention, outer_scale, None, options, None, channel_order)
        gemm(FP4Tensor(*codes[:3], (x.shape[0], w.k), codes.sf_layout), w, bias, Output(d, None, 0.0))
        return
    weight, packed = _weight(w), w.prepacked is not None
    bias = None if bias is None else bias.contiguous()
    if (
        outer_scale is not None
        and x.shape[0] <= select.QUANTIZED_ROWS
        and options is PLAIN
        and convention == _FUSED_CONVENTION
        and x.stride(1) == 1
        and calls.vectorized_rows(x, x.shape[1])
        and engine.quantize_gemm(x, outer_scale, weight, bias, d, packed)
    ):
        return
    values, outer = calls.quantize_values(x, per_tensor, convention, outer_scale, options, channel_order)
    engine.gemm(Activations(values, outer), weight, bias, Output(d, None, 0.0), packed)
