"""The CUDA side of quantizing, packing and dequantizing: allocate, select, launch. Nothing waits for the GPU; ops has
checked arguments. gemm_calls has the products."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.division import room_for
from fp4gemm.formats import (
    BLOCK,
    NORMS,
    PACKED_BLOCK,
    PLAIN,
    QuantizeOptions,
    packed_shape,
    padded_k,
    scale_columns,
    scale_layout,
)
from fp4gemm.launch import (
    AMAX_ARGUMENTS,
    DEQUANTIZE_ARGUMENTS,
    NO_OPTIONS,
    NORM_ARGUMENTS,
    PACK_ARGUMENTS,
    QUANTIZE_ARGUMENTS,
    Launcher,
)
from fp4gemm.spec import check

_UNITS = 2**32  # half blocks that a dequantizer counts
_MOST_CTAS_Y = 65535  # of a grid


class Packed(NamedTuple):
    """The tensors of an FP4Tensor, as operators pass them."""

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    sf_layout: str


def _stream(device: int) -> int:
    # The handle without the Stream object around it: 0.1 us instead of 3.
    return torch._C._cuda_getCurrentRawStream(device)


class Norm(NamedTuple):
    """What an RMSNorm in front of a quantizer of x [M, K] takes and leaves, all of the dtype of x: weight [K], residual
    and their sum [M, K], contiguous, or None for both."""

    weight: Tensor
    residual: Tensor | None
    sum: Tensor | None
    eps: float

    @property
    def producer(self) -> str:
        return "rmsnorm" if self.residual is None else "add_rmsnorm"


class _Quantizer:
    """A quantizer's launcher and how it divides a tensor among CTAs."""

    def __init__(
        self, device: int, dtype: torch.dtype, k: int, scaling: str, convention: str, sf_layout: str, vectorized: bool,
        few: bool, options: QuantizeOptions = PLAIN, gathered: bool = False, noop: bool = False,
    ) -> None:  # fmt: skip
        arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
        spec = select.quantize_spec(
            arch, name, k, scaling, convention, sf_layout, vectorized, options, gathered=gathered, noop=noop, few=few
        )
        norm = options.producer in NORMS
        self.launch = Launcher(spec, NORM_ARGUMENTS if norm else QUANTIZE_ARGUMENTS)
        self.rows = spec.rows
        step = spec.threads * spec.blocks
        # Without a row to reduce, CTAs divide rows too; a layout pads columns to whole fours.
        self.steps = 1 if scaling == "per_row" else min(-(-(-(-scale_columns(k) // 4) * 4) // step), _MOST_CTAS_Y)
        self.prefetch = select.prefetch_ctas(spec, k, device) if self.steps == 1 else 0


_quantizer = lru_cache(maxsize=1024)(_Quantizer)


@lru_cache(maxsize=64)
def _amax(device: int, dtype: torch.dtype, vectorized: bool, producer: str | None) -> Launcher:
    spec = select.amax_spec(select.arch_of(device), select.INPUT_NAMES[dtype], vectorized, producer)
    return Launcher(spec, AMAX_ARGUMENTS)


@lru_cache(maxsize=64)
def _dequantizer(device: int, dtype: torch.dtype, sf_layout: str, outer: bool) -> tuple[Launcher, int]:
    """Launcher and half blocks of a CTA."""
    spec = select.dequantize_spec(select.arch_of(device), select.DTYPE_NAMES[dtype], sf_layout, outer)
    return Launcher(spec, DEQUANTIZE_ARGUMENTS), spec.threads * spec.units


@lru_cache(maxsize=4096)
def _scale_shape(sf_layout: str, m: int, k: int) -> tuple[int, ...]:
    return scale_layout(sf_layout).shape(m, k)


def vectorized_rows(x: Tensor, k: int) -> bool:
    """Whether every row starts on 16 bytes and holds whole blocks, so that a block is whole 16-byte loads."""
    rows_aligned = x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0
    return k % BLOCK == 0 and x.data_ptr() % 16 == 0 and rows_aligned


def _tensor_amax(x: Tensor, k: int, producer: str | None, vectorized: bool, stream: int) -> Tensor:
    """max(|x|), or of the k columns that are made of it, float32 []."""
    amax, m = x.new_zeros((), dtype=torch.float32), x.shape[0]
    launch = _amax(x.device.index, x.dtype, vectorized, producer)
    launch((min(m, 1024), 1, 1), stream, x.data_ptr(), amax.data_ptr(), x.stride(0), m, k, scale_columns(k))
    return amax


NOOP_MASKS = {torch.bool: 0xFF, torch.uint8: 0xFF, torch.int32: 0xFFFFFFFF, torch.float32: 0x7FFFFFFF}


def _extras(
    seed: Tensor | int | None, noop: Tensor | None, order: Tensor | None, out_columns: int
) -> tuple[int, int, int, int, int, int]:
    """The last fields of QuantizeArguments, of which only those that a kernel has an option for are read."""
    seed_in, value = (seed.data_ptr(), 0) if isinstance(seed, Tensor) else (0, seed or 0)
    flag, mask = (0, 0) if noop is None else (noop.data_ptr(), NOOP_MASKS[noop.dtype])
    return seed_in, value, flag, 0 if order is None else order.data_ptr(), mask, out_columns


def _order(channel_order: Tensor | None) -> Tensor | None:
    """int32 on 16 bytes, as kernels load it."""
    return None if channel_order is None else aligned(channel_order.to(torch.int32).contiguous(), 16)


def _scaling(
    x: Tensor, per_tensor: bool, outer_scale: Tensor | None, amax: Tensor | None, options: QuantizeOptions,
    vectorized: bool, stream: int,
) -> tuple[str, Tensor | None]:  # fmt: skip
    """What the kernel does for outer scales, and what it reads for that."""
    if outer_scale is not None:
        return "given", outer_scale
    if per_tensor:
        if amax is None:
            amax = _tensor_amax(x, options.columns(x.shape[1]), options.producer, vectorized, stream)
        return "per_tensor", amax
    return ("per_row", None) if amax is None else ("amaxes", amax)


def quantize(
    x: Tensor,
    per_tensor: bool,
    sf_layout: str,
    convention: str,
    outer_scale: Tensor | None,
    amax: Tensor | None = None,
    options: QuantizeOptions = PLAIN,
    seed: Tensor | int | None = None,
    channel_order: Tensor | None = None,
    noop: Tensor | None = None,
    out: Packed | None = None,
    norm: Norm | None = None,
) -> Packed:
    """Row-wise NVFP4 of x [M, K], M and K positive; see ``ops.quantize``, which has checked all of it.

    ``options`` without a transform, and with the producer that ``norm`` is, if it is one; ``noop`` needs ``out``, whose
    tensors are contiguous: written, and returned.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    device, m, k = x.device.index, x.shape[0], options.columns(x.shape[1])
    columns, stream = scale_columns(k), _stream(device)
    out_columns = columns + options.residual // BLOCK
    if out is None:
        data = x.new_empty((m, out_columns * BLOCK // 2), dtype=torch.uint8)
        block_scale = x.new_empty(_scale_shape(sf_layout, m, out_columns * BLOCK), dtype=torch.float8_e4m3fn)
        out = Packed(data, block_scale, x.new_empty(() if per_tensor else (m,), dtype=torch.float32), sf_layout)
    vectorized = vectorized_rows(x, k)
    tail: tuple[int | float, ...] = ()
    if norm is not None:
        operands = [t if t.stride(-1) == 1 else t.contiguous() for t in norm[:2] if t is not None]
        vectorized = vectorized and all(vectorized_rows(t.view(-1, k) if t.dim() == 1 else t, k) for t in operands)
        tail = _norm_tail(operands, norm)
    scaling, scale_in = _scaling(x, per_tensor, outer_scale, amax, options, vectorized, stream)
    order = _order(channel_order)
    few = m <= select.FEW_ROWS
    if options is PLAIN and noop is None:
        quantizer = _quantizer(device, x.dtype, k, scaling, convention, sf_layout, vectorized, few)
        extras = NO_OPTIONS
    else:
        quantizer = _quantizer(
            device,
            x.dtype,
            k,
            scaling,
            convention,
            sf_layout,
            vectorized,
            few,
            options,
            order is not None,
            noop is not None,
        )
        extras = _extras(seed, noop, order, out_columns)
    row_tile = scale_layout(sf_layout).row_tile
    padded_rows = -(-m // row_tile) * row_tile
    quantizer.launch(
        (-(-padded_rows // quantizer.rows), quantizer.steps, 1), stream,
        x.data_ptr(), out.data.data_ptr(), out.block_scale.data_ptr(), out.outer_scale.data_ptr(),
        0 if scale_in is None else scale_in.data_ptr(),
        x.stride(0), 0, m, padded_rows, k, columns, int(scaling == "given" and not per_tensor), quantizer.prefetch,
        *extras, *tail,
    )  # fmt: skip
    return out


def _norm_tail(operands: list[Tensor], norm: Norm) -> tuple[int | float, ...]:
    """The fields that NormArguments adds: ``operands`` are weight and residual, columns contiguous."""
    if norm.sum is None:
        return operands[0].data_ptr(), 0, 0, 0, norm.eps
    weight, residual = operands
    return weight.data_ptr(), residual.data_ptr(), norm.sum.data_ptr(), residual.stride(0), norm.eps


@lru_cache(maxsize=1024)
def can_quantize(
    device: int, dtype: torch.dtype, k: int, scaling: str, convention: str, sf_layout: str, options: QuantizeOptions
) -> bool:
    """Whether there is a kernel for such rows of k values: not where a norm's row does not fit on chip."""
    arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
    return check(select.quantize_spec(arch, name, k, scaling, convention, sf_layout, True, options)) is None


class _ValuesQuantizer:
    """The launcher of a quantizer that writes values, and all arguments but addresses and strides."""

    def __init__(
        self, device: int, dtype: torch.dtype, m: int, k: int, scaling: str, convention: str,
        vectorized: bool, scale_in_stride: int, options: QuantizeOptions, gathered: bool,
    ) -> None:  # fmt: skip
        arch, name = select.arch_of(device), select.INPUT_NAMES[dtype]
        spec, share = select.values_spec(arch, name, m, k, scaling, convention, vectorized, options, gathered=gathered)
        if share > _MOST_CTAS_Y:  # of which each has a step of a row
            most = _MOST_CTAS_Y * spec.threads * spec.blocks * BLOCK
            raise ValueError(f"x: got rows of {k} values, expected at most {most}")
        self.grid = (-(-m // spec.rows), share, 1)
        early = select.early(m, self.grid[0] * share, select.gpu_of(device)[1])
        self.launch = (
            Launcher(spec, QUANTIZE_ARGUMENTS, waits=True)
            if early is None
            else Launcher(spec, QUANTIZE_ARGUMENTS, waits=True, dependent=True, shared_bytes=room_for(early))
        )
        self.stride = -(-(k + options.residual) // 8) * 8  # whole 16 bytes, as TMA wants rows
        prefetch = select.prefetch_ctas(spec, k, device) if share == 1 else 0
        self.sizes = (m, m, k, scale_columns(k), scale_in_stride, prefetch)


_values_quantizer = lru_cache(maxsize=4096)(_ValuesQuantizer)


def quantize_values(
    x: Tensor,
    per_tensor: bool,
    convention: str,
    outer_scale: Tensor | None,
    options: QuantizeOptions = PLAIN,
    channel_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``quantize`` makes of x [M, K], M and K positive, as values: (code * block scale, outer scales).

    The values are exact bf16 [M, ceil8(K + KE)], zeros past K; ``outer_scale`` None, [] or [M] as in ``quantize``, and
    the second tensor has its outer scales ([] or [M]); ``options``: none that needs a seed or a transform. For a GEMM
    that follows: the kernel takes part in programmatic dependent launch.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    device, m, k = x.device.index, x.shape[0], options.columns(x.shape[1])
    stream, vectorized, order = _stream(device), vectorized_rows(x, k), _order(channel_order)
    scaling, scale_in = _scaling(x, per_tensor, outer_scale, None, options, vectorized, stream)
    quantizer = _values_quantizer(
        device, x.dtype, m, k, scaling, convention, vectorized, int(scaling == "given" and not per_tensor),
        options, order is not None,
    )  # fmt: skip
    values = x.new_empty((m, quantizer.stride), dtype=torch.bfloat16)
    outer = x.new_empty(() if per_tensor else (m,), dtype=torch.float32)
    quantizer.launch(
        quantizer.grid, stream, x.data_ptr(), values.data_ptr(), 0, outer.data_ptr(),
        0 if scale_in is None else scale_in.data_ptr(), x.stride(0), quantizer.stride, *quantizer.sizes,
        *_extras(None, None, order, scale_columns(k) + options.residual // BLOCK),
    )  # fmt: skip
    return values, outer


@lru_cache(maxsize=16)
def _packer(device: int, sf_layout: str, direction: str) -> tuple[Launcher, int]:
    """Launcher and blocks of a CTA."""
    spec = select.pack_spec(select.arch_of(device), sf_layout, direction)
    return Launcher(spec, PACK_ARGUMENTS), spec.threads // 128


def aligned(t: Tensor, size: int) -> Tensor:
    """``t``, or a copy where it is a view that does not begin on ``size`` bytes."""
    return t if t.data_ptr() % size == 0 else t.clone()


def _launch_packer(
    direction: str, data: Tensor, block_scale: Tensor, packed: Tensor, sf_layout: str, k: int, padded_rows: int
) -> None:
    device, blocks = data.device.index, packed.shape[1]
    units = -(-padded_rows // PACKED_BLOCK) * blocks
    if units >= 2**31:
        raise ValueError(f"tensor of {data.shape[0]} x {k} values: expected fewer than 2**31 blocks of 64 x 64")
    launch, at_once = _packer(device, sf_layout, direction)
    launch(
        (-(-units // at_once), 1, 1), _stream(device), data.data_ptr(), block_scale.data_ptr(), packed.data_ptr(),
        data.shape[0], padded_rows, scale_columns(k), blocks,
    )  # fmt: skip


def prepack(data: Tensor, block_scale: Tensor, sf_layout: str, k: int) -> Tensor:
    """The prepacked form, uint8 [ceil(N/64), ceil(K/64), 2304], of a non-empty weight; see ``ops.prepack``."""
    n = data.shape[0]
    packed = data.new_empty(packed_shape(n, k))
    _launch_packer("pack", aligned(data, 8), block_scale, packed, sf_layout, k, n)
    return packed


def unpack(packed: Tensor, sf_layout: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes and block scales of a non-empty prepacked weight; see ``ops.unpack``."""
    layout = scale_layout(sf_layout)
    data = packed.new_empty((n, padded_k(k) // 2))
    block_scale = packed.new_empty(_scale_shape(sf_layout, n, k), dtype=torch.float8_e4m3fn)
    padded_rows = -(-n // layout.row_tile) * layout.row_tile
    _launch_packer("unpack", data, block_scale, aligned(packed, 16), sf_layout, k, padded_rows)
    return data, block_scale


def _in_words(t: Packed) -> Packed:
    """``t`` with its codes on a 4-byte boundary, as the dequantizer loads them; a copy only of a view that is not."""
    return t if t.data.data_ptr() % 4 == 0 else t._replace(data=t.data.clone())


def _launch_dequantizer(t: Packed, rows: int, padded_k: int, out: Tensor, outer: bool) -> None:
    device = t.data.device.index
    launch, step = _dequantizer(device, out.dtype, t.sf_layout, outer)
    columns = padded_k // BLOCK
    units = rows * columns * 2
    if units >= _UNITS:
        raise ValueError(f"tensor of {rows} x {padded_k} values: expected fewer than 2**35 in one call")
    launch(
        (-(-units // step), 1, 1), _stream(device), t.data.data_ptr(), t.block_scale.data_ptr(),
        t.outer_scale.data_ptr() if outer else 0, out.data_ptr(), units, columns, int(t.outer_scale.dim() == 1),
    )  # fmt: skip


def dequantize(t: Packed, k: int, dtype: torch.dtype) -> Tensor:
    """Values [M, K] of a non-empty tensor; see ``ops.dequantize``."""
    t = _in_words(t)
    m, half_k = t.data.shape
    out = t.data.new_empty((m, 2 * half_k), dtype=dtype)
    _launch_dequantizer(t, m, 2 * half_k, out, outer=True)
    return out if 2 * half_k == k else out[:, :k].contiguous()


def as_values(t: Packed, m: int, k: int) -> Tensor:
    """code * block scale in bf16 [M, ceil16(K)], zeros past K."""
    t = _in_words(t)
    out = t.data.new_empty((m, padded_k(k)), dtype=torch.bfloat16)
    _launch_dequantizer(t, m, out.shape[1], out, outer=False)
    return out
