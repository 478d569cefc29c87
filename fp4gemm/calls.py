"""The CUDA side of the operators: allocate, select, launch. Nothing waits for the GPU; ops has checked arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.formats import BLOCK, scale_columns, scale_layout
from fp4gemm.launch import (
    AMAX_ARGUMENTS,
    DEQUANTIZE_ARGUMENTS,
    QUANTIZE_ARGUMENTS,
    GemmProblem,
    Launcher,
    gemm_plan,
)

_UNITS = 2**32  # half blocks that a dequantizer counts


class Packed(NamedTuple):
    """The tensors of an FP4Tensor, as operators pass them."""

    data: Tensor
    block_scale: Tensor
    outer_scale: Tensor
    sf_layout: str


def _stream(device: int) -> int:
    # The handle without the Stream object around it: 0.1 us instead of 3.
    return torch._C._cuda_getCurrentRawStream(device)


class _Quantizer:
    """A quantizer's launcher and how it divides a tensor among CTAs."""

    def __init__(
        self, device: int, dtype: torch.dtype, k: int, scaling: str, convention: str, sf_layout: str, vectorized: bool
    ) -> None:
        arch, name = select.arch_of(device), select.DTYPE_NAMES[dtype]
        spec = select.quantize_spec(arch, name, k, scaling, convention, sf_layout, vectorized)
        self.launch = Launcher(spec, QUANTIZE_ARGUMENTS)
        self.rows = spec.rows
        step = spec.threads * spec.blocks
        # Without a row to reduce, CTAs divide rows too; 3 is the most padding columns a layout adds.
        self.steps = 1 if scaling == "per_row" else min(-(-(scale_columns(k) + 3) // step), 65535)
        self.prefetch = select.prefetch_ctas(spec, k, device)


_quantizer = lru_cache(maxsize=1024)(_Quantizer)


@lru_cache(maxsize=64)
def _amax(device: int, dtype: torch.dtype, vectorized: bool) -> Launcher:
    return Launcher(select.amax_spec(select.arch_of(device), select.DTYPE_NAMES[dtype], vectorized), AMAX_ARGUMENTS)


@lru_cache(maxsize=64)
def _dequantizer(device: int, dtype: torch.dtype, sf_layout: str, outer: bool) -> tuple[Launcher, int]:
    """Launcher and half blocks of a CTA."""
    spec = select.dequantize_spec(select.arch_of(device), select.DTYPE_NAMES[dtype], sf_layout, outer)
    return Launcher(spec, DEQUANTIZE_ARGUMENTS), spec.threads * spec.units


@lru_cache(maxsize=4096)
def _scale_shape(sf_layout: str, m: int, k: int) -> tuple[int, ...]:
    return scale_layout(sf_layout).shape(m, k)


def _vectorized(x: Tensor) -> bool:
    """Whether every row starts on 16 bytes and holds whole blocks, so that a block is whole 16-byte loads."""
    rows_aligned = x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0
    return x.shape[1] % BLOCK == 0 and x.data_ptr() % 16 == 0 and rows_aligned


def quantize(x: Tensor, per_tensor: bool, sf_layout: str, convention: str, outer_scale: Tensor | None) -> Packed:
    """Row-wise NVFP4 of x [M, K], M and K positive; see ``ops.quantize``."""
    if x.stride(1) != 1:
        x = x.contiguous()
    device, (m, k) = x.device.index, x.shape
    layout, columns, stream = scale_layout(sf_layout), scale_columns(k), _stream(device)
    data = x.new_empty((m, columns * BLOCK // 2), dtype=torch.uint8)
    block_scale = x.new_empty(_scale_shape(sf_layout, m, k), dtype=torch.float8_e4m3fn)
    outer = x.new_empty(() if per_tensor else (m,), dtype=torch.float32)
    scaling, scale_in, vectorized, x_stride = "per_row", 0, _vectorized(x), x.stride(0)
    if outer_scale is not None:
        scaling, scale_in = "given", outer_scale.data_ptr()
    elif per_tensor:
        amax = x.new_zeros((), dtype=torch.float32)
        scaling, scale_in = "per_tensor", amax.data_ptr()
        grid = (min(m, 1024), 1, 1)
        _amax(device, x.dtype, vectorized)(grid, stream, x.data_ptr(), scale_in, x_stride, m, k, columns)
    quantizer = _quantizer(device, x.dtype, k, scaling, convention, sf_layout, vectorized)
    padded_rows = -(-m // layout.row_tile) * layout.row_tile
    quantizer.launch(
        (-(-padded_rows // quantizer.rows), quantizer.steps, 1), stream,
        x.data_ptr(), data.data_ptr(), block_scale.data_ptr(), outer.data_ptr(), scale_in,
        x_stride, m, padded_rows, k, columns, int(scaling == "given" and not per_tensor), quantizer.prefetch,
    )  # fmt: skip
    return Packed(data, block_scale, outer, sf_layout)


def _in_words(t: Packed) -> Packed:
    """``t`` with its codes on a 4-byte boundary, as the dequantizer loads them; a copy only of a view that is not."""
    return t if t.data.data_ptr() % 4 == 0 else t._replace(data=t.data.clone())


def _division(rows: int, padded_k: int, outer_per_row: bool, step: int) -> tuple[int, int, int, int]:
    """The last four fields of an operand of DEQUANTIZE_ARGUMENTS: half blocks, columns, outer stride, CTAs."""
    columns = padded_k // BLOCK
    units = rows * columns * 2
    if units >= _UNITS:
        raise ValueError(f"tensor of {rows} x {padded_k} values: expected fewer than 2**35 in one call")
    return units, columns, int(outer_per_row), -(-units // step)


_NO_OPERAND = (0,) * 8


def dequantize(t: Packed, k: int, dtype: torch.dtype) -> Tensor:
    """Values [M, K] of a non-empty tensor; see ``ops.dequantize``."""
    t = _in_words(t)
    device, (m, half_k) = t.data.device.index, t.data.shape
    out = t.data.new_empty((m, 2 * half_k), dtype=dtype)
    launch, step = _dequantizer(device, dtype, t.sf_layout, True)
    division = _division(m, 2 * half_k, t.outer_scale.dim() == 1, step)
    pointers = (t.data.data_ptr(), t.block_scale.data_ptr(), t.outer_scale.data_ptr(), out.data_ptr())
    launch((division[-1], 1, 1), _stream(device), *pointers, *division, *_NO_OPERAND)
    return out if 2 * half_k == k else out[:, :k].contiguous()


class _Gemm:
    """Everything about a GEMM that its operands' addresses do not change. K is padded to whole blocks."""

    def __init__(
        self, device: int, m: int, n: int, k: int, per_row: tuple[bool, bool],
        layouts: tuple[str, str], out_dtype: torch.dtype, bias_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        bias = None if bias_dtype is None else select.DTYPE_NAMES[bias_dtype]
        spec = select.gemm_spec(select.arch_of(device), m, n, select.DTYPE_NAMES[out_dtype], bias)
        # TMA stores rows of whole 16 bytes.
        self.ldd = -(-n * out_dtype.itemsize // 16) * 16 // out_dtype.itemsize
        self.plan = gemm_plan(spec, GemmProblem(m, n, k, k, k, self.ldd, *per_row), device)
        self.device, self.m, self.n, self.k, self.out_dtype = device, m, n, k, out_dtype
        (self.launch_a, step), (self.launch_b, _) = (
            _dequantizer(device, torch.bfloat16, layout, False) for layout in layouts
        )
        self.division_a, self.division_b = (_division(rows, k, False, step) for rows in (m, n))
        self.grid_a, self.grid_b = (self.division_a[-1], 1, 1), (self.division_b[-1], 1, 1)
        self.one_launch = layouts[0] == layouts[1]
        self.grid = (self.division_a[-1] + self.division_b[-1], 1, 1)

    def __call__(self, a: Packed, b: Packed, bias: Tensor | None) -> Tensor:
        values = a.data.new_empty((self.m + self.n, self.k), dtype=torch.bfloat16)
        d = a.data.new_empty((self.m, self.ldd), dtype=self.out_dtype)
        stream, a_values = _stream(self.device), values.data_ptr()
        b_values = a_values + 2 * self.m * self.k
        operand_a = (a.data.data_ptr(), a.block_scale.data_ptr(), 0, a_values, *self.division_a)
        operand_b = (b.data.data_ptr(), b.block_scale.data_ptr(), 0, b_values, *self.division_b)
        if self.one_launch:
            self.launch_a(self.grid, stream, *operand_a, *operand_b)
        else:
            self.launch_a(self.grid_a, stream, *operand_a, *_NO_OPERAND)
            self.launch_b(self.grid_b, stream, *operand_b, *_NO_OPERAND)
        self.plan(
            stream, a_values, b_values, 0, 0, d.data_ptr(),
            a.outer_scale.data_ptr(), b.outer_scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        )  # fmt: skip
        return d if self.ldd == self.n else d[:, : self.n].contiguous()


_gemm = lru_cache(maxsize=4096)(_Gemm)


def gemm(a: Packed, b: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """A . B^T of non-empty operands; see ``ops.gemm``."""
    m, half_k = a.data.shape
    if bias is not None:
        bias = bias.contiguous()
    call = _gemm(
        a.data.device.index, m, b.data.shape[0], 2 * half_k, (a.outer_scale.dim() == 1, b.outer_scale.dim() == 1),
        (a.sf_layout, b.sf_layout), out_dtype, None if bias is None else bias.dtype,
    )  # fmt: skip
    return call(_in_words(a), _in_words(b), bias)
