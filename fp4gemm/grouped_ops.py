"""Grouped GEMMs among the public operators: the products of a mixture of experts, in one launch; see ``ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4gemm import gemm_calls, reference
from fp4gemm.dispatch import direct, on_its_device, on_kernels, refuse_gradients
from fp4gemm.engine import Output
from fp4gemm.formats import BLOCK, PLAIN, QuantizeOptions
from fp4gemm.grouped import GroupedWeight
from fp4gemm.quantize_dispatch import run
from fp4gemm.reference.arguments import QuantizeArguments, check_float, check_quantize
from fp4gemm.reference.grouped import check_grouped, check_rest, check_weight
from fp4gemm.tensor import FP4Batch, FP4Tensor

_LAYOUT, _CONVENTION = "linear", "te_per_token"  # of activations between the quantizer and the products


def gemm_grouped(
    x: FP4Tensor | Tensor,
    w: GroupedWeight | FP4Batch,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    c: Tensor | None = None,
    beta: float = 1.0,
    out: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """D [T, N]: rows offsets[e] to offsets[e + 1] of ``x`` [T, K] times the weight of expert e, in one launch.

    Each row is a row of ``gemm(x, w_e, bias[e], ...)``. The device reads ``offsets``: nothing waits for them,
    and a captured graph follows what stands there when it is replayed. On CUDA nobody checks them: values are clamped
    to 0..T, and an expert whose rows would end before they begin has none. Rows of no expert are not written.

    Args:
        x: bf16 or fp16 activations, or NVFP4, sorted by expert; on Blackwell NVFP4.
        w: weights of E experts: on Hopper best what :func:`fp4gemm.stack_weights` makes, on Blackwell an
            :class:`fp4gemm.FP4Batch` [E, N, K].
        offsets: int64 [E + 1], not decreasing, from 0 to T; on the device of ``x``.
        bias: [E, N], bf16, fp16 or fp32.
        out_dtype: bf16, fp16 or fp32; default: that of ``out``, of plain activations, else bf16.
        c: [T, N] of ``out_dtype``; beta * c is added. It may be ``out``, to accumulate in place.
        out: where to write D: [T, N], rows contiguous.
        tokens: how many an expert is expected to have; default T / E. It chooses a kernel, and does not change results
            but for the order of fp32 sums.

    Raises:
        TypeError: an operand or a dtype is not one of the above.
        ValueError: shapes or devices do not fit; the message names the argument. On the CPU also for ``offsets`` that
            decrease or leave 0..T.
        NotImplementedError: the operands are on a CUDA device for which there is no kernel.
        RuntimeError: ``out`` is given, and an argument requires a gradient.
    """
    dtype = check_grouped(x, w, offsets, bias, out_dtype, c, out, tokens)
    w = _prepacked(w)
    x = x.unpack() if isinstance(x, FP4Tensor) else x
    flat = (x, None, None, "") if isinstance(x, Tensor) else (x.data, x.block_scale, x.outer_scale, x.sf_layout)
    source, _, outer, _ = flat
    tokens = tokens or mean_tokens(source.shape[0], w.shape[0])
    if direct(source, outer, w.outer_scale, bias, c, out):
        d = source.new_empty((source.shape[0], w.rows), dtype=dtype) if out is None else out
        _multiply(x, w, offsets, bias, c, beta, tokens, d)
        return d
    operands = (*flat, *_flat(w), offsets, bias, c, 0.0 if c is None else beta, tokens)
    if out is None:
        result: Tensor = torch.ops.fp4gemm.gemm_grouped(*operands, dtype)
        return result
    refuse_gradients(source, outer, w.outer_scale, bias, c, out)
    torch.ops.fp4gemm.gemm_grouped_out(out, *operands)
    return out


def quantize_gemm_grouped(
    x: Tensor,
    w: GroupedWeight | FP4Batch,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    outer_scale: Tensor | None = None,
    producer: str | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Quantize ``x`` [T, K] (bf16, fp16 or fp32) per row and multiply each row by the weight of its expert: [T, N].

    Bit for bit ``gemm_grouped(quantize(x), w, offsets, bias)``, in two launches, of which the second begins while the
    first still runs. ``outer_scale`` (float32, [], [1] or [T]) and ``producer`` (``silu_mul`` of [T, 2 K], gate and up,
    ``gelu_tanh`` or ``relu2``) are those of :func:`fp4gemm.quantize`, the other arguments, and what is raised, those of
    :func:`gemm_grouped`; ``out_dtype`` is by default the dtype of ``x``.
    """
    check_weight(w)
    w = _prepacked(w)
    args = check_quantize(x, sf_layout=_LAYOUT, outer_scale=outer_scale, producer=producer)
    check_float("x.dtype", x.dtype)
    if args.shape[1] != w.k:
        twice = ", twice for silu_mul" if producer == "silu_mul" else ""
        raise ValueError(
            f"x: expected shape [T, K] with K = {w.k} (that of w, shape {w.shape}{twice}), got {tuple(x.shape)}"
        )
    if x.device != w.device:
        raise ValueError(f"w: expected device {x.device} (that of x), got {w.device}")
    check_rest(w, offsets, bias, out_dtype, tokens)
    dtype, tokens = out_dtype or x.dtype, tokens or mean_tokens(x.shape[0], w.shape[0])
    if direct(x, w.outer_scale, bias, args.outer_scale):
        return _quantize_multiply(args, w, offsets, bias, tokens, dtype)
    result: Tensor = torch.ops.fp4gemm.quantize_gemm_grouped(
        x, *_flat(w), offsets, bias, args.outer_scale, producer, tokens, dtype
    )
    return result


def mean_tokens(total: int, experts: int) -> int:
    """Of an expert, rounded up, and at least 1."""
    return max(1, -(-total // experts))


def _prepacked(w: GroupedWeight | FP4Batch) -> GroupedWeight | FP4Batch:
    """A prepacked batch as what it is beside its name."""
    return GroupedWeight(w.data, w.outer_scale, w.shape) if isinstance(w, FP4Batch) and w.prepacked else w


def _multiply(
    x: FP4Tensor | Tensor, w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None, c: Tensor | None,
    beta: float, tokens: int, d: Tensor,
) -> None:  # fmt: skip
    """D into ``d``."""
    if d.is_cuda and d.numel() > 0 and w.k > 0:
        on_its_device(d, gemm_calls.gemm_grouped, x, w, offsets, bias, tokens, Output(d, c, beta))
    elif d.numel() > 0:
        reference.gemm_grouped(x, w, offsets, bias, d.dtype, c=c, beta=beta, out=d)


def _quantize_multiply(
    args: QuantizeArguments, w: GroupedWeight | FP4Batch, offsets: Tensor, bias: Tensor | None, tokens: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x = args.source
    d = x.new_empty((x.shape[0], w.rows), dtype=dtype)
    if on_kernels(x) and d.numel() > 0:
        on_its_device(
            x, gemm_calls.quantize_gemm_grouped, x, w, offsets, bias, args.outer_scale, tokens, d, args.options
        )
    else:
        _multiply(FP4Tensor(*run(args), args.shape, _LAYOUT), w, offsets, bias, None, 0.0, tokens, d)
    return d


def _operand(
    data: Tensor, block_scale: Tensor | None, outer_scale: Tensor | None, sf_layout: str, k: int
) -> FP4Tensor | Tensor:
    if block_scale is None or outer_scale is None:
        return data
    return FP4Tensor(data, block_scale, outer_scale, (data.shape[0], k), sf_layout)


def _flat(w: GroupedWeight | FP4Batch) -> tuple[Tensor, Tensor | None, Tensor, str, int, int]:
    """A weight as a custom op passes it: without block scales where it is prepacked."""
    scales, layout = (w.block_scale, w.sf_layout) if isinstance(w, FP4Batch) else (None, "")
    return w.data, scales, w.outer_scale, layout, w.rows, w.k


def _weight(
    data: Tensor, block_scale: Tensor | None, outer_scale: Tensor, sf_layout: str, n: int, k: int
) -> GroupedWeight | FP4Batch:
    shape = data.shape[0], n, k
    if block_scale is None:
        return GroupedWeight(data, outer_scale, shape)
    return FP4Batch(data, block_scale, outer_scale, shape, sf_layout)


def _gemm_grouped(
    x: Tensor, x_block_scale: Tensor | None, x_outer_scale: Tensor | None, x_layout: str,
    w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor, w_layout: str, n: int, k: int, offsets: Tensor,
    bias: Tensor | None, c: Tensor | None, beta: float, tokens: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    d = x.new_empty((x.shape[0], n), dtype=out_dtype)
    activations = x, x_block_scale, x_outer_scale, x_layout
    weights = w, w_block_scale, w_outer_scale, w_layout
    _gemm_grouped_out(d, *activations, *weights, n, k, offsets, bias, c, beta, tokens)
    return d


def _gemm_grouped_out(
    out: Tensor, x: Tensor, x_block_scale: Tensor | None, x_outer_scale: Tensor | None, x_layout: str,
    w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor, w_layout: str, n: int, k: int, offsets: Tensor,
    bias: Tensor | None, c: Tensor | None, beta: float, tokens: int,
) -> None:  # fmt: skip
    activations = _operand(x, x_block_scale, x_outer_scale, x_layout, k)
    weights = _weight(w, w_block_scale, w_outer_scale, w_layout, n, k)
    _multiply(activations, weights, offsets, bias, c, beta, tokens, out)


def _quantize_gemm_grouped(
    x: Tensor, w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor, w_layout: str, n: int, k: int,
    offsets: Tensor, bias: Tensor | None, outer_scale: Tensor | None, producer: str | None, tokens: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    options = PLAIN if producer is None else QuantizeOptions(producer=producer)
    per_tensor = outer_scale is not None and outer_scale.dim() == 0
    args = QuantizeArguments(x, per_tensor, _LAYOUT, _CONVENTION, (1, BLOCK), outer_scale, options=options)
    weights = _weight(w, w_block_scale, w_outer_scale, w_layout, n, k)
    return _quantize_multiply(args, weights, offsets, bias, tokens, out_dtype)


def _fake_gemm_grouped(
    x: Tensor, x_block_scale: Tensor | None, x_outer_scale: Tensor | None, x_layout: str,
    w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor, w_layout: str, n: int, k: int, offsets: Tensor,
    bias: Tensor | None, c: Tensor | None, beta: float, tokens: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


def _fake_quantize_gemm_grouped(
    x: Tensor, w: Tensor, w_block_scale: Tensor | None, w_outer_scale: Tensor, w_layout: str, n: int, k: int,
    offsets: Tensor, bias: Tensor | None, outer_scale: Tensor | None, producer: str | None, tokens: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


for _implementation, _fake in (
    (_gemm_grouped, _fake_gemm_grouped),
    (_quantize_gemm_grouped, _fake_quantize_gemm_grouped),
):
    _op = torch.library.custom_op(f"fp4gemm::{_implementation.__name__[1:]}", _implementation, mutates_args=())
    _op.register_fake(_fake)
torch.library.custom_op("fp4gemm::gemm_grouped_out", _gemm_grouped_out, mutates_args=("out",))
