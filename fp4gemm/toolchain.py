"""Where NVRTC and the headers are, and what to do when they are not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fp4gemm import env

_INSTALL = "pip install 'fp4gemm[cuda13]'"


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
    raise ToolchainError(f"{where}: {_INSTALL}, or set FP4GEMM_CUTLASS_PATH to a CUTLASS checkout")


@cache
def cutlass_version(include: Path) -> str:
    text = (include / "cutlass/version.h").read_text()
    parts = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) if part else "?" for part in parts)


def cuda_includes() -> tuple[Path, ...]:
    """CUDA and CCCL headers: ``FP4GEMM_CUDA_HOME``, the wheels, or an installed toolkit. Raises ToolchainError."""
    chosen = env.settings().cuda_home
    for root in [chosen] if chosen else _cuda_roots():
        include = root / "include"
        cccl = next((c for c in (include / "cccl", include) if (c / "cuda/std/type_traits").is_file()), None)
        if (include / "cuda_fp16.h").is_file() and cccl is not None:
            return tuple(dict.fromkeys((cccl, include)))
    where = f"FP4GEMM_CUDA_HOME={chosen}" if chosen else "the installed wheels and CUDA_HOME"
    raise ToolchainError(f"no CUDA headers with CCCL in {where}: {_INSTALL}, or set FP4GEMM_CUDA_HOME to a toolkit")


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
        raise ToolchainError(f"NVRTC was not found ({error}): {_INSTALL}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ToolchainError(f"NVRTC does not answer ({status.name}): {_INSTALL}")
    return f"{major}.{minor}"


def _package(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def _cuda_roots() -> list[Path]:
    wheels = [p / "cu13" for p in _package("nvidia")]
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [*wheels, *toolkits, Path("/usr/local/cuda")]
