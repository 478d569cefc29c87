"""Runs the tile kernels on the CPU with the arguments that a launch would have."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import emulator as emulation
from torch import Tensor

from fp4gemm import tile_calls
from fp4gemm.render import render
from fp4gemm.spec import TileAmaxSpec, TileQuantizeSpec
from fp4gemm.tile_calls import TILE_AMAX_ARGUMENTS, TILE_QUANTIZE_ARGUMENTS, Output

_DRIVER = """
static ARGUMENTS const* arguments;
extern "C" int arguments_bytes() { return sizeof(ARGUMENTS); }
extern "C" char const* run(ARGUMENTS const* args, int ctas, unsigned seed) {
  arguments = args;
  return run_grid([] { KERNEL<Config>(*arguments, current->cta->shared).run(); }, ctas, 1, Config::kThreads,
                  Config::kSharedBytes, seed);
}
"""


def quantize(
    folder: Path, spec: TileQuantizeSpec, x: Tensor, rows: Output | None, columns: Output | None, *,
    hadamard: int | None = None, seed: Tensor | int | None = None, noop: Tensor | None = None, schedule: int = 1,
) -> None:  # fmt: skip
    """Into ``rows`` and ``columns``."""
    values = tile_calls.quantize_values(x, rows, columns, hadamard, seed, noop)
    _run(folder, spec, "TileQuantizer", "TileQuantizeArguments", TILE_QUANTIZE_ARGUMENTS)(
        values, tile_calls.tiles(x), schedule
    )


def amax(
    folder: Path, spec: TileAmaxSpec, x: Tensor, results: tuple[Tensor | None, ...], hadamard: int | None,
    sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Into ``results``: of rows, of columns, of the tensor, of the transformed one."""
    values = tile_calls.amax_values(x, results, hadamard, sums)
    _run(folder, spec, "TileAmax", "TileAmaxArguments", TILE_AMAX_ARGUMENTS)(values, tile_calls.tiles(x), 1)


class Launcher:
    """In the place of ``fp4gemm.launch.Launcher``, for tile kernels."""

    def __init__(self, folder: Path, spec: TileQuantizeSpec | TileAmaxSpec, packing: struct.Struct) -> None:
        name = "Quantize" if isinstance(spec, TileQuantizeSpec) else "Amax"
        kernel = "TileQuantizer" if isinstance(spec, TileQuantizeSpec) else "TileAmax"
        self._run = _run(folder, spec, kernel, f"Tile{name}Arguments", packing)

    def __call__(self, grid: tuple[int, int, int], stream: int, *values: int) -> None:
        self._run(values, grid[0], stream)


@cache
def _run(
    folder: Path, spec: TileQuantizeSpec | TileAmaxSpec, kernel: str, arguments: str, packing: struct.Struct
) -> Callable[[tuple[int, ...], int, int], None]:
    head, _, _ = render(spec).partition('extern "C"')
    driver = _DRIVER.replace("ARGUMENTS", arguments).replace("KERNEL", kernel)
    library = emulation.compile_cpp(folder, spec.name, head + driver)
    library.run.restype = ctypes.c_char_p
    assert library.arguments_bytes() == packing.size

    def run(values: tuple[int, ...], ctas: int, schedule: int) -> None:
        storage = ctypes.create_string_buffer(packing.pack(*values), packing.size)
        problem = library.run(ctypes.byref(storage), ctas, schedule)
        assert problem is None, problem.decode()

    return run
