"""The environment variables of fp4gemm, all of them, parsed in one place. A misspelt one is an error."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

PREFIX = "FP4GEMM_"
VARIABLES = {
    "FP4GEMM_CACHE_DIR": "folder of compiled kernels (default: fp4gemm in the user's cache folder)",
    "FP4GEMM_CUTLASS_PATH": "CUTLASS checkout or its include folder (default: the nvidia-cutlass wheel)",
    "FP4GEMM_CUDA_HOME": "CUDA toolkit whose headers to use (default: the nvidia-cuda-* wheels, then CUDA_HOME)",
    "FP4GEMM_DISABLE_JIT": "1: a kernel that is not in the cache is an error (default 0)",
    "FP4GEMM_EMULATE": "for fp4gemm's own tests: sm_100a or sm_120a, whose kernels then run on compute capability 9.0",
    "FP4GEMM_LOG": "logging level: debug, info, warning, error (default: as the application sets it)",
}
_D = TypeVar("_D", str, None)
_EMULATED = ("sm_100a", "sm_120a")
_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    cache_dir: Path
    cutlass_path: Path | None
    cuda_home: Path | None
    disable_jit: bool
    log: str | None
    emulate: str | None


def settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The current settings. Raises ValueError for an unknown FP4GEMM_* variable or a value that cannot be."""
    environ = os.environ if environ is None else environ
    for name in environ:
        if name.startswith(PREFIX) and name not in VARIABLES:
            raise ValueError(f"environment variable {name} is not known to fp4gemm; known: {', '.join(VARIABLES)}")
    return Settings(
        cache_dir=_path(environ, "FP4GEMM_CACHE_DIR") or _default_cache_dir(environ),
        cutlass_path=_path(environ, "FP4GEMM_CUTLASS_PATH"),
        cuda_home=_path(environ, "FP4GEMM_CUDA_HOME"),
        disable_jit=_choice(environ, "FP4GEMM_DISABLE_JIT", ("0", "1"), "0") == "1",
        log=_choice(environ, "FP4GEMM_LOG", _LEVELS, None),
        emulate=_choice(environ, "FP4GEMM_EMULATE", _EMULATED, None),
    )


@cache
def configure_logging() -> None:
    """Give the ``fp4gemm`` logger the level of FP4GEMM_LOG, and a handler where the application has set none up.

    Without the variable, logging stays as the application has it.
    """
    level = settings().log
    if level is None:
        return
    logger = logging.getLogger("fp4gemm")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name)
    return Path(value).expanduser() if value else None


def _choice(environ: Mapping[str, str], name: str, choices: tuple[str, ...], default: _D) -> str | _D:
    value = environ.get(name)
    if not value:
        return default
    if value not in choices:
        raise ValueError(f"environment variable {name}: got {value!r}, expected one of {', '.join(choices)}")
    return value


def _default_cache_dir(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp4gemm"
