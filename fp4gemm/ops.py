"""The public operators, as ``torch.library`` custom ops: CPU tensors go to the reference, CUDA tensors to the kernels.

A custom op passes plain tensors; the functions here check arguments and wrap results. Outside of tracing they call the
implementation directly, because the dispatcher of Python custom ops costs more than the whole launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fp4gemm import calls, reference
from fp4gemm.calls import Packed
from fp4gemm.formats import BLOCK, padded_k, scale_layout
from fp4gemm.reference.arguments import (
    check_finite_values,
    check_float,
    check_gemm,
    check_quantize,
    check_quantize_gemm,
)
from fp4gemm.tensor import FP4Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
# On Hopper a quantized activation never leaves quantize_gemm, so its scales take the layout that has no padding.
_ACTIVATION_LAYOUT = "linear"
_ACTIVATION_CONVENTION = "te_per_token"
_T = TypeVar("_T")


def quantize(
    x: Tensor,
    *,
    scaling: str = "per_row",
    sf_layout: str = "128x4",
    convention: str | None = None,
    block: tuple[int, int] = (1, BLOCK),
    outer_scale: Tensor | None = None,
    check_finite: bool = False,
) -> FP4Tensor:
    """Quantize ``x`` [M, K] (bf16, fp16 or fp32, any strides) to NVFP4; bytes are the same on every device.

    ``scaling``: ``per_row``, ``per_tensor``, or ``per_column``, whose result is the FP4Tensor of the transpose, shape
    (K, M). ``outer_scale`` (float32 decode multiplier, [], [1] or [rows]) replaces the amax: static calibration.
    ``block=(16, 16)`` gives weights one block scale for 16 x 16 values. docs/numerics.md describes ``convention`` and
    the results for NaN and Inf; ``check_finite=True`` raises for them instead and waits for the device.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, a name or a device does not fit; the message says which argument.
        NotImplementedError: ``x`` is on a CUDA device for which there is no kernel.
    """
    args = check_quantize(
        x, scaling=scaling, sf_layout=sf_layout, convention=convention, block=block, outer_scale=outer_scale
    )
    if check_finite:
        check_finite_values(x, args.outer_scale)
    implementation = _quantize if _direct(x, args.outer_scale) else torch.ops.fp4gemm.quantize
    data, block_scale, outer = implementation(
        args.source, args.per_tensor, sf_layout, args.convention, args.block[0], args.outer_scale
    )
    m, k = args.source.shape
    return FP4Tensor(data, block_scale, outer, (m, k), sf_layout)


def dequantize(t: FP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of ``t`` as a dense [M, K] tensor: (code * block scale) * outer scale in fp32, one rounding to ``dtype``.

    Raises TypeError where ``t`` is not an FP4Tensor or ``dtype`` not bf16, fp16 or fp32.
    """
    if not isinstance(t, FP4Tensor):
        raise TypeError(f"t: expected an FP4Tensor, got {type(t).__name__}")
    check_float("dtype", dtype)
    implementation = _dequantize if _direct(t.data, t.outer_scale) else torch.ops.fp4gemm.dequantize
    result: Tensor = implementation(t.data, t.block_scale, t.outer_scale, t.sf_layout, t.k, dtype)
    return result


def gemm(a: FP4Tensor, b: FP4Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """D [M, N] = a [M, K] . b [N, K]^T, rescaled per row and per column: cast(outer_a * (outer_b * acc) [+ bias]).

    ``bias`` [N] and ``out_dtype`` are bf16, fp16 or fp32. Scale-factor layouts of ``a`` and ``b`` may differ.

    Raises:
        TypeError: an operand is not an FP4Tensor, or a dtype is not one of the above.
        ValueError: K, the shape of ``bias`` or the devices do not match.
        NotImplementedError: the operands are on a CUDA device for which there is no kernel.
    """
    check_gemm(a, b, bias, out_dtype)
    implementation = _gemm if _direct(a.data, a.outer_scale, b.outer_scale, bias) else torch.ops.fp4gemm.gemm
    result: Tensor = implementation(
        a.data, a.block_scale, a.outer_scale, a.sf_layout, b.data, b.block_scale, b.outer_scale, b.sf_layout,
        a.k, bias, out_dtype,
    )  # fmt: skip
    return result


def quantize_gemm(
    x: Tensor,
    w: FP4Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    outer_scale: Tensor | None = None,
) -> Tensor:
    """Quantize ``x`` [..., K] per row and multiply: x . w^T [..., N], in ``out_dtype`` (default: that of ``x``).

    Bit for bit ``gemm(quantize(x), w, bias)``. ``outer_scale`` (float32, [], [1] or [rows]) replaces the row amax.
    Raises what ``quantize`` and ``gemm`` raise.
    """
    check_quantize_gemm(x, w, bias, out_dtype)
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    args = check_quantize(rows, sf_layout=_ACTIVATION_LAYOUT, outer_scale=outer_scale)
    direct = _direct(x, w.outer_scale, bias, args.outer_scale)
    implementation = _quantize_gemm if direct else torch.ops.fp4gemm.quantize_gemm
    result: Tensor = implementation(
        rows, w.data, w.block_scale, w.outer_scale, w.sf_layout, bias, out_dtype or x.dtype, args.outer_scale
    )
    return result if x.dim() == 2 else result.view(*x.shape[:-1], w.rows)


def _direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing traces, wraps or differentiates this call, so that the dispatcher would only add time."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and _require_grad(x, *others))
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _require_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - a generator costs more than the checks
        if t is not None and t.requires_grad:
            return True
    return False


def _on_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def _on_its_device(x: Tensor, function: Callable[..., _T], *args: object) -> _T:
    """Calls ``function`` with the device of ``x`` current."""
    if x.device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(x.device):
        return function(*args)


def _quantize(
    x: Tensor, per_tensor: bool, sf_layout: str, convention: str, block_rows: int, outer_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if _on_kernels(x) and block_rows == 1:
        return _on_its_device(x, calls.quantize, x, per_tensor, sf_layout, convention, outer_scale)[:3]
    t = reference.quantize(
        x,
        scaling="per_tensor" if per_tensor and outer_scale is None else "per_row",
        sf_layout=sf_layout,
        convention=convention,
        block=(block_rows, BLOCK),
        outer_scale=outer_scale,
    )
    return t.data, t.block_scale, t.outer_scale


def _dequantize(
    data: Tensor, block_scale: Tensor, outer_scale: Tensor, sf_layout: str, k: int, dtype: torch.dtype
) -> Tensor:
    if _on_kernels(data):
        packed = Packed(data, block_scale, outer_scale, sf_layout)
        return _on_its_device(data, calls.dequantize, packed, k, dtype)
    return reference.dequantize(FP4Tensor(data, block_scale, outer_scale, (data.shape[0], k), sf_layout), dtype)


def _gemm(
    a_data: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_sf_layout: str,
    b_data: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_sf_layout: str,
    k: int, bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if _on_kernels(a_data) and b_data.numel() > 0:
        a = Packed(a_data, a_block_scale, a_outer_scale, a_sf_layout)
        b = Packed(b_data, b_block_scale, b_outer_scale, b_sf_layout)
        return _on_its_device(a_data, calls.gemm, a, b, bias, out_dtype)
    return reference.gemm(
        FP4Tensor(a_data, a_block_scale, a_outer_scale, (a_data.shape[0], k), a_sf_layout),
        FP4Tensor(b_data, b_block_scale, b_outer_scale, (b_data.shape[0], k), b_sf_layout),
        bias,
        out_dtype,
    )


def _quantize_gemm(
    x: Tensor, w_data: Tensor, w_block_scale: Tensor, w_outer_scale: Tensor, w_sf_layout: str,
    bias: Tensor | None, out_dtype: torch.dtype, outer_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    per_tensor = outer_scale is not None and outer_scale.dim() == 0
    a = _quantize(x, per_tensor, _ACTIVATION_LAYOUT, _ACTIVATION_CONVENTION, 1, outer_scale)
    return _gemm(*a, _ACTIVATION_LAYOUT, w_data, w_block_scale, w_outer_scale, w_sf_layout, x.shape[1], bias, out_dtype)


def _fake_quantize(
    x: Tensor, per_tensor: bool, sf_layout: str, convention: str, block_rows: int, outer_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    return (
        x.new_empty((m, padded_k(k) // 2), dtype=torch.uint8),
        x.new_empty(scale_layout(sf_layout).shape(m, k), dtype=torch.float8_e4m3fn),
        x.new_empty(() if per_tensor else (m,), dtype=torch.float32),
    )


def _fake_dequantize(
    data: Tensor, block_scale: Tensor, outer_scale: Tensor, sf_layout: str, k: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty((data.shape[0], k), dtype=dtype)


def _fake_gemm(
    a_data: Tensor, a_block_scale: Tensor, a_outer_scale: Tensor, a_sf_layout: str,
    b_data: Tensor, b_block_scale: Tensor, b_outer_scale: Tensor, b_sf_layout: str,
    k: int, bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a_data.new_empty((a_data.shape[0], b_data.shape[0]), dtype=out_dtype)


def _fake_quantize_gemm(
    x: Tensor, w_data: Tensor, w_block_scale: Tensor, w_outer_scale: Tensor, w_sf_layout: str,
    bias: Tensor | None, out_dtype: torch.dtype, outer_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], w_data.shape[0]), dtype=out_dtype)


for _implementation, _fake in (
    (_quantize, _fake_quantize),
    (_dequantize, _fake_dequantize),
    (_gemm, _fake_gemm),
    (_quantize_gemm, _fake_quantize_gemm),
):
    _op = torch.library.custom_op(f"fp4gemm::{_implementation.__name__[1:]}", _implementation, mutates_args=())
    _op.register_fake(_fake)
