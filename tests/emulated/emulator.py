"""Compiles a GEMM kernel on prepacked weights for the CPU and runs it with the arguments that a launch would have."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import translate

from fp4gemm import division
from fp4gemm.division import Division
from fp4gemm.packed_plan import PACKED_GEMM_ARGUMENTS, PACKED_GEMM_BYTES, PackedProblem
from fp4gemm.render import render
from fp4gemm.spec import PackedMmaSpec, PackedWgmmaSpec, QuantizeSpec, SearchSpec

Spec = PackedMmaSpec | PackedWgmmaSpec
# Threads jump between stacks, which a fortified longjmp takes for a fault.
_FLAGS = ("-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fpermissive", "-w", "-fPIC")
_DRIVER = """
static PackedGemmArguments const* arguments;
extern "C" int arguments_bytes() { return sizeof(PackedGemmArguments); }
extern "C" char const* run(PackedGemmArguments const* args, int ctas, int cluster, int shared_bytes, unsigned seed) {
  arguments = args;
  return run_grid([] { KERNEL<Config>(*arguments, current->cta->shared).run(); }, ctas, cluster, Config::kThreads,
                  shared_bytes, seed);
}
"""
_QUANTIZE_DRIVER = """
static ARGUMENTS const* arguments;
extern "C" int arguments_bytes() { return sizeof(ARGUMENTS); }
extern "C" char const* run(ARGUMENTS const* args, int ctas, int layers, unsigned seed) {
  arguments = args;
  return run_grid([] { KERNEL<Config>(*arguments).run(); }, ctas, 1, THREADS, 0, seed, layers);
}
"""


def missing() -> str | None:
    """What this machine lacks; None when it has everything."""
    return None if shutil.which("g++") else "needs g++ (12 or newer, on x86-64 Linux)"


@dataclass(frozen=True)
class Emulator:
    """A folder with the translated headers, and what was compiled there."""

    folder: Path

    def compile(self, spec: Spec) -> ctypes.CDLL:
        """Raises RuntimeError with the compiler's words."""
        return _compile(self.folder, spec)

    def run(self, spec: Spec, problem: PackedProblem, tensors: dict[str, torch.Tensor | None], how: How) -> str | None:
        """What went wrong, or None. ``tensors``: x, w, d, c, outer_a, outer_b, bias, offsets."""
        library = self.compile(spec)
        assert library.arguments_bytes() == PACKED_GEMM_BYTES
        storage = ctypes.create_string_buffer(PACKED_GEMM_BYTES + 64)
        at = -ctypes.addressof(storage) % 64
        _pack(storage, at, spec, problem, tensors, how)
        if isinstance(spec, PackedMmaSpec):
            cluster, shared = spec.split, how.division.shared_bytes
        else:
            cluster = spec.split * spec.multicast
            shared = how.division.shared_bytes or division.wgmma_shared_bytes(spec)
        arguments = ctypes.c_void_p(ctypes.addressof(storage) + at)
        problem_text: bytes | None = library.run(arguments, how.division.ctas, cluster, shared, how.seed)
        return None if problem_text is None else problem_text.decode()


@dataclass(frozen=True)
class How:
    """How a problem is divided, the order of warps, and beta."""

    division: Division
    seed: int
    beta: float


def _pack(
    storage: ctypes.Array[ctypes.c_char],
    at: int,
    spec: Spec,
    p: PackedProblem,
    tensors: dict[str, torch.Tensor | None],
    how: How,
) -> None:
    names = ("x", "w", "d", "c", "outer_a", "outer_b", "bias", "offsets")
    addresses = (0 if (t := tensors.get(name)) is None else t.data_ptr() for name in names)
    strides = (1, p.ldd) if p.column_major else (p.ldd, 1)
    PACKED_GEMM_ARGUMENTS.pack_into(
        storage, at, *addresses, p.x_stride, *strides, p.m, p.n, p.k, p.panels, p.k_blocks, *how.division.numbers,
        p.experts, p.outer_a_per_row, p.outer_b_per_row, how.beta,
    )  # fmt: skip
    if isinstance(spec, PackedWgmmaSpec):
        x = tensors["x"]
        assert x is not None
        struct.pack_into("<5Q", storage, at, x.data_ptr(), p.k, p.m, p.x_stride, spec.tokens // spec.multicast)


class QuantizeLauncher:
    """A row-wise quantizer or a search, with the arguments that ``fp4gemm.launch.Launcher`` gets."""

    def __init__(self, emulator: Emulator, spec: QuantizeSpec | SearchSpec, arguments: struct.Struct) -> None:
        self._library = _compile_quantizer(emulator.folder, spec)
        assert self._library.arguments_bytes() == arguments.size
        self._struct = arguments

    def __call__(self, grid: tuple[int, int, int], stream: int, *values: float) -> None:
        storage = ctypes.create_string_buffer(self._struct.pack(*values), self._struct.size)
        wrong: bytes | None = self._library.run(storage, grid[0], grid[1], stream)
        assert wrong is None, wrong


@cache
def _compile_quantizer(folder: Path, spec: QuantizeSpec | SearchSpec) -> ctypes.CDLL:
    head, _, _ = render(spec).partition('extern "C"')
    if isinstance(spec, SearchSpec):
        words = {"ARGUMENTS": "SearchArguments", "KERNEL": "ScaleSearch", "THREADS": "Config::kThreads"}
    else:
        words = {"ARGUMENTS": "Config::Arguments", "KERNEL": "RowQuantizer", "THREADS": "Config::kCta"}
    driver = _QUANTIZE_DRIVER
    for name, word in words.items():
        driver = driver.replace(name, word)
    feature = (
        "" if spec.arch == "sm_90a" else f"#define __CUDA_ARCH_FEAT_{spec.arch[:-1].replace('_', '').upper()}_ALL\n"
    )
    library = compile_cpp(folder, spec.name, feature + head + driver)
    library.run.restype = ctypes.c_char_p
    return library


@cache
def _compile(folder: Path, spec: Spec) -> ctypes.CDLL:
    kernel = "PackedMma" if isinstance(spec, PackedMmaSpec) else "PackedWgmma"
    head, _, _ = render(spec).partition('extern "C"')  # the kernel's own source, up to its entry point
    library = compile_cpp(folder, spec.name, head + _DRIVER.replace("KERNEL", kernel))
    library.run.restype = ctypes.c_char_p
    return library


def compile_cpp(folder: Path, name: str, source: str) -> ctypes.CDLL:
    """``source``, which may include the package's headers, as a library. Raises RuntimeError with g++'s words."""
    file, target = folder / f"{name}.cpp", folder / f"{name}.so"
    file.write_text('#include "cuda.hpp"\n' + source, encoding="utf-8")
    _compile_file(folder, "-shared", file, target)
    return ctypes.CDLL(str(target))


def _compile_file(folder: Path, kind: str, file: Path, target: Path) -> None:
    command = ["g++", *_FLAGS, *kind.split(), f"-I{folder}", str(file), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


def make(folder: Path) -> Emulator:
    translate.translate(folder)
    # Every source includes it first, and so takes it as it is compiled here.
    _compile_file(folder, "-x c++-header", folder / "cuda.hpp", folder / "cuda.hpp.gch")
    return Emulator(folder)
