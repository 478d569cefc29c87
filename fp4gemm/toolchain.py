"""Where NVRTC and the headers are, and what to do when they are not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fp4gemm import env

INSTALL = "pip install 'fp4gemm[cuda13]'"


class ToolchainError(RuntimeError):
    """NVRTC or a header folder is missing; the message says what to install or set."""


@dataclass(frozen=True)
class Headers:
    cutlass: Path
    cutlass_version: str
    cuda: tuple[Path, ...]


def cutlass_include() -> Path:
    """CUTLASS's include folder: ``FP4GEMM_CUTLASS_PATH`` or the nvidia-cutlass wheel. Raises ToolchainError."""
    chosen = env.settings().cutlass_path
    candidates = [chosen / "include", chosen] if chosen else [p / "source/include" for p in _package("cutlass_library")]
    for folder in candidates:
        if (folder / "cutlass/version.h").is_file():
            return folder
    where = f"FP4GEMM_CUTLASS_PATH={chosen} has no include/cutlass/version.h" if chosen else "CUTLASS is not installed"
    raise ToolchainError(f"{where}: {INSTALL}, or set FP4GEMM_CUTLASS_PATH to a CUTLASS checkout")


@cache
def cutlass_version(include: Path) -> str:
    text = (include / "cutlass/version.h").read_text()
    parts = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) if part else "?" for part in parts)


def header_versions() -> str:
    """What identifies the headers under a CUTLASS kernel: versions of CUTLASS, CUDA and CCCL.

    For a CUTLASS that the user brings, which may be edited, also the size and time of every header. Raises
    ToolchainError.
    """
    cutlass = cutlass_include()
    edited = _tree_stamp(cutlass) if env.settings().cutlass_path else ""
    return " ".join((cutlass_version(cutlass), *_cuda_versions(cuda_includes()), edited))


@cache
def _cuda_versions(includes: tuple[Path, ...]) -> tuple[str, ...]:
    files = (("cuda.h", "CUDA_VERSION"), ("cuda/std/__cccl/version.h", "CCCL_VERSION"))
    found = [(folder / file, macro) for file, macro in files for folder in includes if (folder / file).is_file()]
    matches = [re.search(rf"#\s*define {macro} (\d+)", path.read_text()) for path, macro in found]
    return tuple(match.group(1) for match in matches if match)


@cache
def _tree_stamp(include: Path) -> str:
    stats = ((path, path.stat()) for path in sorted(include.rglob("*.[hi]*")) if path.is_file())
    text = "\n".join(f"{path.relative_to(include)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cuda_includes() -> tuple[Path, ...]:
    """CUDA and CCCL headers: ``FP4GEMM_CUDA_HOME``, the wheels, or an installed toolkit. Raises ToolchainError."""
    chosen = env.settings().cuda_home
    for root in [chosen] if chosen else _cuda_roots():
        include = root / "include"
        cccl = next((c for c in (include / "cccl", include) if (c / "cuda/std/type_traits").is_file()), None)
        if (include / "cuda_fp16.h").is_file() and cccl is not None:
            return tuple(dict.fromkeys((cccl, include)))
    where = f"FP4GEMM_CUDA_HOME={chosen}" if chosen else "the installed wheels and CUDA_HOME"
    raise ToolchainError(f"no CUDA headers with CCCL in {where}: {INSTALL}, or set FP4GEMM_CUDA_HOME to a toolkit")


def find_headers() -> Headers:
    """All header folders. Raises ToolchainError naming the first that is missing."""
    cutlass = cutlass_include()
    return Headers(cutlass, cutlass_version(cutlass), cuda_includes())


@cache
def nvrtc_version() -> str:
    """Version of NVRTC, from its wheel or from the library. Raises ToolchainError where there is none."""
    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise ToolchainError(f"NVRTC was not found ({error}): {INSTALL}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ToolchainError(f"NVRTC does not answer ({status.name}): {INSTALL}")
    return f"{major}.{minor}"


def _package(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def _cuda_roots() -> list[Path]:
    wheels = [p / "cu13" for p in _package("nvidia")]
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [*wheels, *toolkits, Path("/usr/local/cuda")]
