"""The public operators, as ``torch.library`` custom ops: CPU tensors go to the reference, CUDA tensors to the kernels.

A custom op passes plain tensors; the functions here check arguments and wrap results. Outside of tracing they call the
implementation directly, because the dispatcher of Python custom ops costs more than the whole launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm import calls, gemm_calls, reference
from fp4gemm.calls import Packed
from fp4gemm.dispatch import direct, on_its_device, on_kernels, refuse_gradients
from fp4gemm.engine import Activations, Output
from fp4gemm.formats import BLOCK, PLAIN, QuantizeOptions, packed_shape, padded_k, scale_layout
from fp4gemm.grouped_ops import gemm_grouped, quantize_gemm_grouped
from fp4gemm.quantize_dispatch import run
from fp4gemm.quantize_ops import amax, quantize, quantize_both, quantize_rmsnorm
from fp4gemm.reference import packed as packed_form
from fp4gemm.reference.activation import check_activation
from fp4gemm.reference.arguments import QuantizeArguments, check_float, check_output_scale, check_quantize
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

# On Hopper a quantized activation never leaves quantize_gemm, so its scales take the layout that has no padding.
_ACTIVATION_LAYOUT = "linear"
_ACTIVATION_CONVENTION = "te_per_token"


def dequantize(t: FP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of ``t`` as a dense [M, K] tensor: (code * block scale) * outer scale in fp32, one rounding to ``dtype``.

    Raises TypeError where ``t`` is not an FP4Tensor or ``dtype`` not bf16, fp16 or fp32.
    """
    if not isinstance(t, FP4Tensor):
        raise TypeError(f"t: expected an FP4Tensor, got {type(t).__name__}")
    check_float("dtype", dtype)
    if t.prepacked is not None:
        t = unpack(t)
    implementation = _dequantize if direct(t.data, t.outer_scale) else torch.ops.fp4gemm.dequantize
    result: Tensor = implementation(t.data, t.block_scale, t.outer_scale, t.sf_layout, t.k, dtype)
    return result


def prepack(t: FP4Tensor) -> FP4Tensor:
    """``t`` [N, K], not prepacked, in the prepacked form "sm90"; see :meth:`FP4Tensor.prepack`."""
    implementation = _prepack if direct(t.data, t.outer_scale) else torch.ops.fp4gemm.prepack
    data = implementation(t.data, t.block_scale, t.sf_layout, t.k)
    return FP4Tensor(data, t.block_scale.new_empty(0), t.outer_scale, t.shape, t.sf_layout, "sm90")


def unpack(t: FP4Tensor) -> FP4Tensor:
    """Inverse of :func:`prepack`, block scales in ``t.sf_layout``."""
    implementation = _unpack if direct(t.data, t.outer_scale) else torch.ops.fp4gemm.unpack
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
        operands = (*_flat(a), *_flat(b), b.rows, b.k, bias, c, 0.0 if c is None else beta, activation)
        if out is None:
            result: Tensor = torch.ops.fp4gemm.gemm(*operands, dtype, column_major)
            return result
        refuse_gradients(source, outer_a, b.outer_scale, bias, c, out)
        torch.ops.fp4gemm.gemm_out(out, *operands)
        return out
    d = _empty(source, (source.shape[0], b.rows), dtype, column_major) if out is None else out
    _multiply(a, b, bias, c, beta, activation, d)
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
    implementation = _gemm_fp4 if direct(source, b.outer_scale, bias, outer_scale) else torch.ops.fp4gemm.gemm_fp4
    parts = implementation(*_flat(a), *_flat(b), b.rows, b.k, bias, outer_scale, sf_layout, activation)
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
        rows, sf_layout=_ACTIVATION_LAYOUT, outer_scale=outer_scale, residual=residual, channel_order=channel_order,
        producer=producer,
    )  # fmt: skip
    dtype = out_dtype or x.dtype
    if direct(x, w.outer_scale, bias, args.outer_scale):
        result = _quantize_multiply(args, w, bias, dtype)
    else:
        result = torch.ops.fp4gemm.quantize_gemm(
            rows, *_flat(w), w.rows, bias, dtype, args.outer_scale, residual, channel_order, producer
        )
    return result if x.dim() == 2 else result.view(*x.shape[:-1], w.rows)


def _dequantize(
    data: Tensor, block_scale: Tensor, outer_scale: Tensor, sf_layout: str, k: int, dtype: torch.dtype
) -> Tensor:
    if on_kernels(data):
        packed = Packed(data, block_scale, outer_scale, sf_layout)
        return on_its_device(data, calls.dequantize, packed, k, dtype)
    return reference.dequantize(FP4Tensor(data, block_scale, outer_scale, (data.shape[0], k), sf_layout), dtype)


def _has_packers(data: Tensor) -> bool:
    """Whether kernels convert to and from the prepacked form: on Hopper, whose form it is; torch does elsewhere."""
    return on_kernels(data) and gemm_calls.on_hopper(data.device.index)


def _prepack(data: Tensor, block_scale: Tensor, sf_layout: str, k: int) -> Tensor:
    if _has_packers(data):
        return on_its_device(data, calls.prepack, data, block_scale, sf_layout, k)
    shape = data.shape[0], k
    return packed_form.pack(data, scale_layout(sf_layout).to_linear(block_scale, *shape), shape)


def _unpack(data: Tensor, sf_layout: str, rows: int, k: int) -> tuple[Tensor, Tensor]:
    if _has_packers(data):
        return on_its_device(data, calls.unpack, data, sf_layout, rows, k)
    codes, scales = packed_form.unpack(data, (rows, k))
    return codes, scale_layout(sf_layout).from_linear(scales)


_Flat = tuple[Tensor, Tensor | None, Tensor | None, str]


def _flat(t: FP4Tensor | Activations | Tensor) -> _Flat:
    """An operand as a custom op passes it; the text is empty for one that is not NVFP4, else form:layout."""
    if isinstance(t, Tensor):
        return t, None, None, ""
    if isinstance(t, Activations):
        return t.values, None, t.outer_scale, ""
    return t.data, t.block_scale, t.outer_scale, f"{t.prepacked or ''}:{t.sf_layout}"


def _operand(flat: _Flat, rows: int, k: int) -> FP4Tensor | Activations | Tensor:
    """Inverse of ``_flat``."""
    data, block_scale, outer_scale, kind = flat
    if outer_scale is None:
        return data
    if block_scale is None:
        return Activations(data, outer_scale)
    form, _, sf_layout = kind.partition(":")
    return FP4Tensor(data, block_scale, outer_scale, (rows, k), sf_layout, form or None)


def _weight(flat: _Flat, rows: int, k: int) -> FP4Tensor:
    w = _operand(flat, rows, k)
    assert isinstance(w, FP4Tensor)  # checked before the operator was called
    return w


def _empty(like: Tensor, shape: tuple[int, int], dtype: torch.dtype, column_major: bool) -> Tensor:
    m, n = shape
    return like.new_empty((n, m), dtype=dtype).t() if column_major else like.new_empty(shape, dtype=dtype)


def _multiply(
    a: FP4Tensor | Activations | Tensor, b: FP4Tensor, bias: Tensor | None, c: Tensor | None, beta: float,
    activation: str | None, d: Tensor,
) -> None:  # fmt: skip
    """D into ``d``."""
    if d.is_cuda and d.numel() > 0 and b.k > 0:
        on_its_device(d, gemm_calls.gemm, a, b, bias, Output(d, c, beta), activation)
    else:
        if isinstance(a, Activations):  # which are made on Hopper: sums of nothing, that nothing scales
            a = a.values[:, : b.k]
        d.copy_(reference.gemm(a, b, bias, d.dtype, c=c, beta=beta, activation=activation))


def _quantize_multiply(args: QuantizeArguments, w: FP4Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    x, per_tensor, outer_scale = args.source, args.per_tensor, args.outer_scale
    d = x.new_empty((x.shape[0], w.rows), dtype=out_dtype)
    if on_kernels(x) and w.rows > 0:
        extras = (args.options, args.channel_order)
        on_its_device(
            x, gemm_calls.quantize_gemm, x, w, bias, per_tensor, _ACTIVATION_CONVENTION, outer_scale, d, *extras
        )
        return d
    _multiply(FP4Tensor(*run(args), (x.shape[0], w.k), _ACTIVATION_LAYOUT), w, bias, None, 0.0, None, d)
    return d


def _gemm(
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
    out_dtype: torch.dtype, column_major: bool,
) -> Tensor:  # fmt: skip
    d = _empty(a, (a.shape[0], n), out_dtype, column_major)
    right = (b, b_block_scale, b_outer_scale, b_kind)
    _gemm_out(d, a, a_block_scale, a_outer_scale, a_kind, *right, n, k, bias, c, beta, activation)
    return d


def _gemm_out(
    out: Tensor,
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
) -> None:  # fmt: skip
    left = _operand((a, a_block_scale, a_outer_scale, a_kind), a.shape[0], k)
    _multiply(left, _weight((b, b_block_scale, b_outer_scale, b_kind), n, k), bias, c, beta, activation, out)


def _gemm_fp4(
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, outer_scale: Tensor, sf_layout: str, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    left = _operand((a, a_block_scale, a_outer_scale, a_kind), a.shape[0], k)
    assert not isinstance(left, Activations)
    weight = _weight((b, b_block_scale, b_outer_scale, b_kind), n, k)
    if a.is_cuda and a.shape[0] * n * k > 0:
        return on_its_device(a, gemm_calls.gemm_fp4, left, weight, bias, outer_scale, sf_layout, activation)[:3]
    d = reference.gemm(left, weight, bias, torch.float32, activation=activation)
    return run(check_quantize(d, sf_layout=sf_layout, convention=_ACTIVATION_CONVENTION, outer_scale=outer_scale))


def _quantize_gemm(
    x: Tensor, w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor | None, w_kind: str, n: int,
    bias: Tensor | None, out_dtype: torch.dtype, outer_scale: Tensor | None,
    residual: int = 0, channel_order: Tensor | None = None, producer: str | None = None,
) -> Tensor:  # fmt: skip
    options = QuantizeOptions(residual=residual, producer=producer)
    weight = _weight((w, w_block_scale, w_outer_scale, w_kind), n, options.columns(x.shape[1]) + residual)
    args = QuantizeArguments(
        x, outer_scale is not None and outer_scale.dim() == 0, _ACTIVATION_LAYOUT, _ACTIVATION_CONVENTION, (1, BLOCK),
        outer_scale, options=PLAIN if options == PLAIN else options, channel_order=channel_order,
    )  # fmt: skip
    return _quantize_multiply(args, weight, bias, out_dtype)


def _fake_dequantize(
    data: Tensor, block_scale: Tensor, outer_scale: Tensor, sf_layout: str, k: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty((data.shape[0], k), dtype=dtype)


def _fake_prepack(data: Tensor, block_scale: Tensor, sf_layout: str, k: int) -> Tensor:
    return data.new_empty(packed_shape(data.shape[0], k))


def _fake_unpack(data: Tensor, sf_layout: str, rows: int, k: int) -> tuple[Tensor, Tensor]:
    return (
        data.new_empty((rows, padded_k(k) // 2)),
        data.new_empty(scale_layout(sf_layout).shape(rows, k), dtype=torch.float8_e4m3fn),
    )


def _fake_gemm(
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
    out_dtype: torch.dtype, column_major: bool,
) -> Tensor:  # fmt: skip
    return _empty(a, (a.shape[0], n), out_dtype, column_major)


def _fake_gemm_fp4(
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, outer_scale: Tensor, sf_layout: str, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m, layout = a.shape[0], scale_layout(sf_layout)
    return (
        a.new_empty((m, padded_k(n) // 2), dtype=torch.uint8),
        a.new_empty(layout.shape(m, n), dtype=torch.float8_e4m3fn),
        torch.empty_like(outer_scale),
    )


def _fake_quantize_gemm(
    x: Tensor, w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor | None, w_kind: str, n: int,
    bias: Tensor | None, out_dtype: torch.dtype, outer_scale: Tensor | None,
    residual: int = 0, channel_order: Tensor | None = None, producer: str | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


for _implementation, _fake in (
    (_dequantize, _fake_dequantize),
    (_prepack, _fake_prepack),
    (_unpack, _fake_unpack),
    (_gemm, _fake_gemm),
    (_gemm_fp4, _fake_gemm_fp4),
    (_quantize_gemm, _fake_quantize_gemm),
):
    _op = torch.library.custom_op(f"fp4gemm::{_implementation.__name__[1:]}", _implementation, mutates_args=())
    _op.register_fake(_fake)
torch.library.custom_op("fp4gemm::gemm_out", _gemm_out, mutates_args=("out",))  # returns nothing: needs no fake
