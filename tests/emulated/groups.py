"""Runs the kernels of groups on the CPU with the arguments that a launch would have."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path
from typing import Any

import emulator as emulation

from fp4gemm.render import render
from fp4gemm.spec import GroupSpec, GroupSumsSpec, QuantizeSpec, TileAmaxSpec, TileQuantizeSpec

_DRIVER = """
static ARGUMENTS const* arguments;
extern "C" int arguments_bytes() { return sizeof(ARGUMENTS); }
extern "C" char const* run(ARGUMENTS const* args, int ctas, unsigned seed) {
  arguments = args;
  return run_grid([] { CALL.run(); }, ctas, 1, THREADS, SHARED, seed);
}
"""
_IN_SHARED = {"CALL": "Kernel(*arguments, current->cta->shared)", "SHARED": "Kernel::kSharedBytes"}
_WORDS: dict[type, dict[str, str]] = {
    QuantizeSpec: {
        "ARGUMENTS": "Arguments", "CALL": "Kernel(*arguments)", "THREADS": "Config::kCta", "SHARED": "0",
    },
    TileQuantizeSpec: {"ARGUMENTS": "GroupTileArguments", "THREADS": "Config::kThreads", **_IN_SHARED},
    TileAmaxSpec: {"ARGUMENTS": "GroupAmaxArguments", "THREADS": "Config::kThreads", **_IN_SHARED},
    GroupSumsSpec: {
        "ARGUMENTS": "GroupSumsArguments", "CALL": "Kernel(*arguments)", "THREADS": "256", "SHARED": "0",
    },
}  # fmt: skip


class Launcher:
    """In the place of ``fp4gemm.launch.Launcher``; the stream is the seed of the order of warps."""

    def __init__(self, folder: Path, spec: GroupSpec | GroupSumsSpec, arguments: struct.Struct) -> None:
        self._library = _compile(folder, spec)
        assert self._library.arguments_bytes() == arguments.size
        self._struct = arguments

    def __call__(self, grid: tuple[int, int, int], stream: int, *values: int) -> None:
        storage = ctypes.create_string_buffer(self._struct.pack(*values), self._struct.size)
        problem: bytes | None = self._library.run(storage, grid[0], stream)
        assert problem is None, problem.decode()


@cache
def _compile(folder: Path, spec: GroupSpec | GroupSumsSpec) -> Any:
    head, _, _ = render(spec).partition('extern "C"')
    driver = _DRIVER
    for name, word in _WORDS[type(spec.kernel if isinstance(spec, GroupSpec) else spec)].items():
        driver = driver.replace(name, word)
    library = emulation.compile_cpp(folder, spec.name, head + driver)
    library.run.restype = ctypes.c_char_p
    return library
