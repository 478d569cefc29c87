"""``dequantize``, the prepacked form and the products as torch's operators, and what runs them.

An operator passes plain tensors and names: ``flat`` takes an operand apart, ``_operand`` puts it together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm import calls, gemm_calls, reference
from fp4gemm.calls import Packed
from fp4gemm.dispatch import on_its_device, on_kernels
from fp4gemm.engine import Activations, Output
from fp4gemm.formats import BLOCK, PLAIN, QuantizeOptions, packed_shape, padded_k, scale_layout
from fp4gemm.quantize_dispatch import run
from fp4gemm.reference import packed as packed_form
from fp4gemm.reference.arguments import QuantizeArguments, check_quantize
from fp4gemm.tensor import FP4Tensor

# On Hopper a quantized activation never leaves quantize_gemm, so its scales take the layout that has no padding.
ACTIVATION_LAYOUT = "linear"
_ACTIVATION_CONVENTION = "te_per_token"


def dequantize(
    data: Tensor, block_scale: Tensor, outer_scale: Tensor, sf_layout: str, k: int, dtype: torch.dtype
) -> Tensor:
    if on_kernels(data):
        packed = Packed(data, block_scale, outer_scale, sf_layout)
        return on_its_device(data, calls.dequantize, packed, k, dtype)
    return reference.dequantize(FP4Tensor(data, block_scale, outer_scale, (data.shape[0], k), sf_layout), dtype)


def _has_packers(data: Tensor) -> bool:
    """Whether kernels convert to and from the prepacked form: on Hopper, whose form it is; torch does elsewhere."""
    return on_kernels(data) and gemm_calls.on_hopper(data.device.index)


def prepack(data: Tensor, block_scale: Tensor, sf_layout: str, k: int) -> Tensor:
    if _has_packers(data):
        return on_its_device(data, calls.prepack, data, block_scale, sf_layout, k)
    shape = data.shape[0], k
    return packed_form.pack(data, scale_layout(sf_layout).to_linear(block_scale, *shape), shape)


def unpack(data: Tensor, sf_layout: str, rows: int, k: int) -> tuple[Tensor, Tensor]:
    if _has_packers(data):
        return on_its_device(data, calls.unpack, data, sf_layout, rows, k)
    codes, scales = packed_form.unpack(data, (rows, k))
    return codes, scale_layout(sf_layout).from_linear(scales)


_Flat = tuple[Tensor, Tensor | None, Tensor | None, str]


def flat(t: FP4Tensor | Activations | Tensor) -> _Flat:
    """An operand as a custom op passes it; the text is empty for one that is not NVFP4, else form:layout."""
    if isinstance(t, Tensor):
        return t, None, None, ""
    if isinstance(t, Activations):
        return t.values, None, t.outer_scale, ""
    return t.data, t.block_scale, t.outer_scale, f"{t.prepacked or ''}:{t.sf_layout}"


def _operand(parts: _Flat, rows: int, k: int) -> FP4Tensor | Activations | Tensor:
    """Inverse of ``flat``."""
    data, block_scale, outer_scale, kind = parts
    if outer_scale is None:
        return data
    if block_scale is None:
        return Activations(data, outer_scale)
    form, _, sf_layout = kind.partition(":")
    return FP4Tensor(data, block_scale, outer_scale, (rows, k), sf_layout, form or None)


def _weight(parts: _Flat, rows: int, k: int) -> FP4Tensor:
    w = _operand(parts, rows, k)
    assert isinstance(w, FP4Tensor)  # checked before the operator was called
    return w


def empty_output(like: Tensor, shape: tuple[int, int], dtype: torch.dtype, column_major: bool) -> Tensor:
    m, n = shape
    return like.new_empty((n, m), dtype=dtype).t() if column_major else like.new_empty(shape, dtype=dtype)


def multiply(
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


def quantize_multiply(args: QuantizeArguments, w: FP4Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    x, per_tensor, outer_scale = args.source, args.per_tensor, args.outer_scale
    d = x.new_empty((x.shape[0], w.rows), dtype=out_dtype)
    if on_kernels(x) and w.rows > 0:
        extras = (args.options, args.channel_order)
        on_its_device(
            x, gemm_calls.quantize_gemm, x, w, bias, per_tensor, _ACTIVATION_CONVENTION, outer_scale, d, *extras
        )
        return d
    multiply(FP4Tensor(*run(args), (x.shape[0], w.k), ACTIVATION_LAYOUT), w, bias, None, 0.0, None, d)
    return d


def gemm(
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
    out_dtype: torch.dtype, column_major: bool,
) -> Tensor:  # fmt: skip
    d = empty_output(a, (a.shape[0], n), out_dtype, column_major)
    right = (b, b_block_scale, b_outer_scale, b_kind)
    gemm_out(d, a, a_block_scale, a_outer_scale, a_kind, *right, n, k, bias, c, beta, activation)
    return d


def gemm_out(
    out: Tensor,
    a: Tensor, a_block_scale: Tensor | None, a_outer_scale: Tensor | None, a_kind: str,
    b: Tensor, b_block_scale: Tensor | None, b_outer_scale: Tensor | None, b_kind: str,
    n: int, k: int, bias: Tensor | None, c: Tensor | None, beta: float, activation: str | None,
) -> None:  # fmt: skip
    left = _operand((a, a_block_scale, a_outer_scale, a_kind), a.shape[0], k)
    multiply(left, _weight((b, b_block_scale, b_outer_scale, b_kind), n, k), bias, c, beta, activation, out)


def gemm_fp4(
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


def quantize_gemm(
    x: Tensor, w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor | None, w_kind: str, n: int,
    bias: Tensor | None, out_dtype: torch.dtype, outer_scale: Tensor | None,
    residual: int = 0, channel_order: Tensor | None = None, producer: str | None = None,
) -> Tensor:  # fmt: skip
    options = QuantizeOptions(residual=residual, producer=producer)
    weight = _weight((w, w_block_scale, w_outer_scale, w_kind), n, options.columns(x.shape[1]) + residual)
    args = QuantizeArguments(
        x, outer_scale is not None and outer_scale.dim() == 0, ACTIVATION_LAYOUT, _ACTIVATION_CONVENTION, (1, BLOCK),
        outer_scale, options=PLAIN if options == PLAIN else options, channel_order=channel_order,
    )  # fmt: skip
    return quantize_multiply(args, weight, bias, out_dtype)


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
    return empty_output(a, (a.shape[0], n), out_dtype, column_major)


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
    (dequantize, _fake_dequantize),
    (prepack, _fake_prepack),
    (unpack, _fake_unpack),
    (gemm, _fake_gemm),
    (gemm_fp4, _fake_gemm_fp4),
    (quantize_gemm, _fake_quantize_gemm),
):
    _op = torch.library.custom_op(f"fp4gemm::{_implementation.__name__}", _implementation, mutates_args=())
    _op.register_fake(_fake)
torch.library.custom_op("fp4gemm::gemm_out", gemm_out, mutates_args=("out",))  # returns nothing: needs no fake
