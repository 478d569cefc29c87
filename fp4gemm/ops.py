"""The public operators, as ``torch.library`` custom ops: CPU tensors go to the reference, CUDA tensors to the kernels.

A custom op passes plain tensors; the functions here check arguments and wrap results. Outside of tracing they call the
implementation directly, because the dispatcher of Python custom ops costs more than the whole launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm import gemm_library as library
from fp4gemm.dispatch import direct, refuse_gradients
from fp4gemm.engine import Activations
from fp4gemm.gemm_library import ACTIVATION_LAYOUT, flat
from fp4gemm.grouped_ops import gemm_grouped, quantize_gemm_grouped
from fp4gemm.quantize_ops import amax, quantize, quantize_both, quantize_rmsnorm
from fp4gemm.reference.activation import check_activation
from fp4gemm.reference.arguments import check_float, check_output_scale, check_quantize
from fp4gemm.reference.product_arguments import check_gemm, check_quantize_gemm
from fp4gemm.spec.gemm import FP4_LAYOUTS
from fp4gemm.tensor import FP4Tensor

__all__ = [
    "amax",
    "dequantize",
    "gemm",
    "gemm_fp4",
    "gemm_grouped",
    "prepack",
    "quantize",
    "quantize_both",
    "quantize_gemm",
    "quantize_gemm_grouped",
    "quantize_rmsnorm",
    "unpack",
]


def dequantize(t: FP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of ``t`` as a dense [M, K] tensor: (code * block scale) * outer scale in fp32, one rounding to ``dtype``.

    Raises TypeError where ``t`` is not an FP4Tensor or ``dtype`` not bf16, fp16 or fp32.
    """
    if not isinstance(t, FP4Tensor):
        raise TypeError(f"t: expected an FP4Tensor, got {type(t).__name__}")
    check_float("dtype", dtype)
    if t.prepacked is not None:
        t = unpack(t)
    implementation = library.dequantize if direct(t.data, t.outer_scale) else torch.ops.fp4gemm.dequantize
    result: Tensor = implementation(t.data, t.block_scale, t.outer_scale, t.sf_layout, t.k, dtype)
    return result


def prepack(t: FP4Tensor) -> FP4Tensor:
    """``t`` [N, K], not prepacked, in the prepacked form "sm90"; see :meth:`FP4Tensor.prepack`."""
    implementation = library.prepack if direct(t.data, t.outer_scale) else torch.ops.fp4gemm.prepack
    data = implementation(t.data, t.block_scale, t.sf_layout, t.k)
    return FP4Tensor(data, t.block_scale.new_empty(0), t.outer_scale, t.shape, t.sf_layout, "sm90")


def unpack(t: FP4Tensor) -> FP4Tensor:
    """Inverse of :func:`prepack`, block scales in ``t.sf_layout``."""
    implementation = library.unpack if direct(t.data, t.outer_scale) else torch.ops.fp4gemm.unpack
    data, block_scale = implementation(t.data, t.sf_layout, t.rows, t.k)
    return FP4Tensor(data, block_scale, t.outer_scale, t.shape, t.sf_layout)


def gemm(
    a: FP4Tensor | Tensor,
    b: FP4Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    c: Tensor | None = None,
    beta: float = 1.0,
    out: Tensor | None = None,
    column_major: bool = False,
) -> Tensor:
    """D [M, N] = a [M, K] . b [N, K]^T, rescaled per row and per column, in fp32 up to one rounding:

    cast(activation(outer_a * (outer_b * acc) [+ bias] [+ beta * c])). ``b`` is a weight, on Hopper best prepacked
    (``b.prepack()``) where it is used more than once; ``a`` is NVFP4, or, on Hopper and on the CPU, plain bf16 or fp16
    activations, which have no outer scale. Operands of other orientations are FP4Tensors of the transpose: what
    ``quantize(x, transposed=True)`` makes of x [K, M].

    Args:
        activation: ``relu``, ``gelu`` (with erf) or ``silu``, in fp32. Fused into the kernel on Blackwell.
        bias: [N], bf16, fp16 or fp32.
        out_dtype: bf16, fp16 or fp32; default: that of ``out``, of plain activations, else bf16.
        c: [M, N] of ``out_dtype``; it may be ``out``, to accumulate in place.
        out: where to write D: [M, N], rows or columns contiguous.
        column_major: without ``out``, make a D whose columns are contiguous.

    Raises:
        TypeError: an operand or a dtype is not one of the above.
        ValueError: K, the shape of ``bias``, ``c`` or ``out``, or the devices do not match, or a name is unknown.
        NotImplementedError: the operands are on a CUDA device for which there is no kernel.
        RuntimeError: ``out`` is given, and an argument requires a gradient.
    """
    dtype = check_gemm(a, b, bias, out_dtype, c, out)
    check_activation(activation)
    return product(a, b, bias, dtype, activation, c, beta, out, column_major)


def product(
    a: FP4Tensor | Activations | Tensor, b: FP4Tensor, bias: Tensor | None, dtype: torch.dtype,
    activation: str | None = None, c: Tensor | None = None, beta: float = 1.0, out: Tensor | None = None,
    column_major: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`gemm` of checked arguments, which takes what ``operands`` makes, too."""
    source: Tensor
    outer_a: Tensor | None = None
    if isinstance(a, FP4Tensor):
        a = a.unpack()
        source, outer_a = a.data, a.outer_scale
    elif isinstance(a, Activations):
        source, outer_a = a
    else:
        source = a
    if not direct(source, outer_a, b.outer_scale, bias, c, out):
        # Without c a constant: torch.compile traces a default float as a symbol, and then again for its value.
        operands = (*flat(a), *flat(b), b.rows, b.k, bias, c, 0.0 if c is None else beta, activation)
        if out is None:
            result: Tensor = torch.ops.fp4gemm.gemm(*operands, dtype, column_major)
            return result
        refuse_gradients(source, outer_a, b.outer_scale, bias, c, out)
        torch.ops.fp4gemm.gemm_out(out, *operands)
        return out
    d = library.empty_output(source, (source.shape[0], b.rows), dtype, column_major) if out is None else out
    library.multiply(a, b, bias, c, beta, activation, d)
    return d


def gemm_fp4(
    a: FP4Tensor | Tensor,
    b: FP4Tensor,
    bias: Tensor | None = None,
    *,
    outer_scale: Tensor,
    activation: str | None = None,
    sf_layout: str = "128x4",
) -> FP4Tensor:
    """The NVFP4 of a . b^T under a given outer scale, the input of a next layer: one launch on Blackwell.

    It is ``quantize(gemm(..., out_dtype=torch.float32), outer_scale=outer_scale)``, to the byte where fp32 values are
    the same: nothing is rounded between, but backends differ in the order of fp32 sums, and in ``erf`` and ``exp``.

    Args:
        outer_scale: float32 decode multiplier of D, [], [1] or [M].
        sf_layout: of the block scales of D: ``128x4`` or ``linear``.

    Raises what ``gemm`` and ``quantize`` raise.
    """
    check_gemm(a, b, bias, None, None, None)
    check_activation(activation)
    if sf_layout not in FP4_LAYOUTS:
        raise ValueError(f"sf_layout: expected one of {', '.join(FP4_LAYOUTS)}, got {sf_layout!r}")
    a = a.unpack() if isinstance(a, FP4Tensor) else a
    source = a.data if isinstance(a, FP4Tensor) else a
    outer_scale = check_output_scale(outer_scale, a.shape[0], source.device)
    at_once = direct(source, b.outer_scale, bias, outer_scale)
    implementation = library.gemm_fp4 if at_once else torch.ops.fp4gemm.gemm_fp4
    parts = implementation(*flat(a), *flat(b), b.rows, b.k, bias, outer_scale, sf_layout, activation)
    data, block_scale, outer = parts
    return FP4Tensor(data, block_scale, outer, (a.shape[0], b.rows), sf_layout)


def quantize_gemm(
    x: Tensor,
    w: FP4Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    outer_scale: Tensor | None = None,
    residual: int = 0,
    channel_order: Tensor | None = None,
    producer: str | None = None,
) -> Tensor:
    """Quantize ``x`` [..., K] per row and multiply: x . w^T [..., N], in ``out_dtype`` (default: that of ``x``).

    Bit for bit ``gemm(quantize(x), w, bias)``, in two launches where ``w`` is prepacked, in one for a single row with
    ``outer_scale`` (float32, [], [1] or [rows], instead of the row amax). ``residual=KE`` and ``channel_order`` (int64
    or int32 [K]) are those of ``quantize``; ``w`` is then [N, K + KE], quantized with the same two and
    ``residual_side="weight"``. So is ``producer``: with ``silu_mul``, ``x`` is [..., 2 K]. Raises what ``quantize`` and
    ``gemm`` raise.
    """
    check_quantize_gemm(x, w, bias, out_dtype, residual, producer)
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    args = check_quantize(
        rows, sf_layout=ACTIVATION_LAYOUT, outer_scale=outer_scale, residual=residual, channel_order=channel_order,
        producer=producer,
    )  # fmt: skip
    dtype = out_dtype or x.dtype
    if direct(x, w.outer_scale, bias, args.outer_scale):
        result = library.quantize_multiply(args, w, bias, dtype)
    else:
        result = torch.ops.fp4gemm.quantize_gemm(
            rows, *flat(w), w.rows, bias, dtype, args.outer_scale, residual, channel_order, producer
        )
    return result if x.dim() == 2 else result.view(*x.shape[:-1], w.rows)
