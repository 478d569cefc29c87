"""C++ source -> cubin with NVRTC, on any machine: no GPU, no nvcc, no host compiler."""

from __future__ import annotations

import hashlib
import logging
import re
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fp4gemm import env, toolchain
from fp4gemm.render import template_dir
from fp4gemm.toolchain import ToolchainError

__all__ = ["CompileError", "Compiled", "ToolchainError", "compile_source", "options", "use_overlay"]

_log = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """NVRTC refused a source. ``log`` is its output, ``path`` the saved source."""

    def __init__(self, name: str, log: str, path: Path) -> None:
        super().__init__(f"NVRTC could not compile {name}; source saved as {path}\n{log}")
        self.log, self.path = log, path


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    log: str
    seconds: float
    registers: int
    spill_bytes: int
    meta: tuple[int, ...]  # the ints of the kernel's own fp4gemm_meta, see templates/include/fp4gemm/gemm.hpp


@dataclass(frozen=True)
class _Overlay:
    folder: Path
    digest: str


_overlay: _Overlay | None = None


def use_overlay(folder: Path | None) -> None:
    """For tests of FP4GEMM_EMULATE: headers that stand before CUTLASS's and do in software what sm_90a lacks.

    They belong to a kernel's identity by their content, read here, not by their place. None: no overlay.
    """
    global _overlay
    _overlay = None if folder is None else _Overlay(folder, _digest(folder))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _emulated(arch: str) -> _Overlay | None:
    """The overlay where kernels of this arch are emulated. Raises ToolchainError where there is none."""
    if arch != env.settings().emulate:
        return None
    if _overlay is None:
        raise ToolchainError(f"FP4GEMM_EMULATE={arch} is for fp4gemm's tests, which bring an emulator: unset it")
    return _overlay


def options(arch: str, *, cutlass: bool = False) -> list[str]:
    """NVRTC options that are part of a kernel's identity. No contraction: docs/numerics.md counts every rounding.

    A GEMM of sm_120a is assembled with -O2. With -O3, the default, ptxas 13.0 moves one address sixteen times in front
    of the loop over tiles, has no uniform registers for it and spills; its inner loop is as long either way.
    """
    language = ["-std=c++17", "--device-as-default-execution-space", "--device-int128", "--fmad=false", "-DNDEBUG"]
    overlay = _emulated(arch)
    target = [f"--gpu-architecture={arch}"]
    if overlay:
        target = ["--gpu-architecture=sm_90a", f"-DFP4GEMM_EMULATE={overlay.digest[:20]}"]
    level = ["--ptxas-options=-O2"] if cutlass and arch == "sm_120a" and not overlay else []
    return [*target, *language, "--ptxas-options=-v", *level]


def include_options(arch: str, *, cutlass: bool) -> list[str]:
    """Own headers first, then the stand-ins that use ``#include_next``, then CUTLASS and CUDA where they are needed."""
    own = template_dir() / "include"
    folders = [own]
    if cutlass:
        headers, overlay = toolchain.find_headers(), _emulated(arch)
        folders += [own / "nvrtc", *([overlay.folder] if overlay else []), headers.cutlass, *headers.cuda]
    return [f"-I{folder}" for folder in folders]


def compile_source(source: str, name: str, arch: str, *, cutlass: bool) -> Compiled:
    """Compile one translation unit. Raises CompileError with NVRTC's log, ToolchainError where something is missing."""
    toolchain.nvrtc_version()
    arguments = options(arch, cutlass=cutlass) + include_options(arch, cutlass=cutlass)
    start = time.perf_counter()
    cubin, log = _nvrtc(source, name, arguments)
    seconds = time.perf_counter() - start
    _log.info("compiled %s in %.1f s", name, seconds)
    if cubin is None:
        with tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".cu", delete=False) as file:
            file.write(source)
        raise CompileError(name, log, Path(file.name))
    return Compiled(cubin, log, seconds, *_resources(log), meta=read_ints(cubin, "fp4gemm_meta"))


def _nvrtc(source: str, name: str, arguments: list[str]) -> tuple[bytes | None, str]:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ToolchainError(f"NVRTC cannot be used ({error}): {toolchain.INSTALL}") from error

    def check(status: nvrtc.nvrtcResult) -> None:
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ToolchainError(f"NVRTC: {status.name}")

    status, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    check(status)
    try:
        (compiled,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments])
        status, size = nvrtc.nvrtcGetProgramLogSize(program)
        check(status)
        log = b" " * size
        check(*nvrtc.nvrtcGetProgramLog(program, log))
        text = log.rstrip(b"\0").decode(errors="replace")
        if compiled != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return None, f"{compiled.name}\n{text}"
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        check(status)
        cubin = b" " * size
        check(*nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _resources(log: str) -> tuple[int, int]:
    """Most registers and most spilled bytes of any entry point, from ptxas's report."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)]
    return max(registers, default=0), max(spills, default=0)


_ELF_HEADER, _SECTION, _SYMBOL = (
    struct.Struct("<16sHHIQQQIHHHHHH"),
    struct.Struct("<IIQQQQIIQQ"),
    struct.Struct("<IBBHQQ"),
)
_SYMTAB = 2


def read_ints(cubin: bytes, symbol: str) -> tuple[int, ...]:
    """The initial value of a global int array in a cubin (ELF64).

    So what only the compiler knows, such as the size of Params, is read without a GPU. Raises ValueError where the
    cubin is cut short or lacks the symbol.
    """
    try:
        header = _ELF_HEADER.unpack_from(cubin)
        offset, count = header[6], header[12]
        sections = [_SECTION.unpack_from(cubin, offset + i * _SECTION.size) for i in range(count)]
        for table in (s for s in sections if s[1] == _SYMTAB):
            names = sections[table[6]][4]
            for at in range(table[4], table[4] + table[5], _SYMBOL.size):
                name, _, _, section, value, size = _SYMBOL.unpack_from(cubin, at)
                start = names + name
                if cubin[start : cubin.index(b"\0", start)] == symbol.encode():
                    return struct.unpack_from(f"<{size // 4}i", cubin, sections[section][4] + value)
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"cubin of {len(cubin)} bytes is not a whole ELF file: {error}") from error
    raise ValueError(f"cubin holds no symbol {symbol}")
