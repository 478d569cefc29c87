"""The CUDA side of a search: allocate, select, launch; nothing waits for the GPU, and arguments are checked."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.formats import BLOCK, padded_k, scale_columns, scale_layout
from fp4gemm.launch import Launcher
from fp4gemm.reference.search import SearchArguments
from fp4gemm.spec import SearchSpec
from fp4gemm.tensor import FP4Tensor

# The struct of templates/include/fp4gemm/search.hpp: keep both alike.
SEARCH_ARGUMENTS = struct.Struct("<8Q3q6i")

ROWS, UNITS = 32, 4  # that a CTA has at a time
_CTAS = 4096  # enough for several rounds on any GPU; fewer rows to each would load a factor too often


@lru_cache(maxsize=256)
def _launcher(device: int, spec: SearchSpec) -> Launcher:
    return Launcher(spec, SEARCH_ARGUMENTS)


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def _vectorized(x: Tensor) -> bool:
    rows_aligned = x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0
    return x.shape[1] % BLOCK == 0 and x.data_ptr() % 16 == 0 and rows_aligned


def grid(rows: int, columns: int, blocks: int) -> tuple[tuple[int, int, int], int]:
    """CTAs for padded rows and padded columns of scales, ``blocks`` a unit; and how many times 32 rows each takes."""
    across, down = -(-columns // (UNITS * blocks)), -(-rows // ROWS)
    steps = max(-(-down // 65535), min(16, across * down // _CTAS), 1)
    return (across, -(-down // steps), 1), steps


def search(
    args: SearchArguments, *, packed: Tensor | None = None, counters: Tensor | None = None, errors: bool = False
) -> tuple[FP4Tensor, Tensor | None]:
    """The result for x [M, K], M and K positive, and the errors of its scales if asked for.

    ``packed``: of the factor; ``counters``: int64 [3], which an audit adds to.
    """
    x = args.source if args.source.stride(1) == 1 else args.source.contiguous()
    m, k = x.shape
    columns, layout = scale_columns(k), scale_layout(args.sf_layout)
    device = x.device.index
    spec = SearchSpec(
        select.arch_of(device), select.INPUT_NAMES[x.dtype], "given" if args.given else "amax", args.metric,
        args.sf_layout, args.block, _vectorized(x), args.four_six, counters is not None,
    )  # fmt: skip
    data = x.new_empty((m, padded_k(k) // 2), dtype=torch.uint8)
    block_scale = x.new_empty(layout.shape(m, k), dtype=torch.float8_e4m3fn)
    outer = torch.empty_like(args.scale)
    found = x.new_empty((m, args.units), dtype=torch.float32) if errors else None
    padded_rows = -(-m // layout.row_tile) * layout.row_tile
    padded_columns = -(-columns // layout.col_tile) * layout.col_tile
    ctas, steps = grid(padded_rows, padded_columns, args.block // BLOCK)
    _launcher(device, spec)(
        ctas, _stream(device), x.data_ptr(), data.data_ptr(), block_scale.data_ptr(), outer.data_ptr(),
        args.scale.data_ptr(), 0 if packed is None else packed.data_ptr(), 0 if found is None else found.data_ptr(),
        0 if counters is None else counters.data_ptr(), x.stride(0), m, padded_rows, k, columns, args.scale.dim(),
        steps, args.first, args.last,
    )  # fmt: skip
    return FP4Tensor(data, block_scale, outer, (m, k), args.sf_layout), found
