"""Fields that several kinds of kernel have, and what every check of one says."""

from __future__ import annotations

from collections.abc import Iterable

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
DTYPES = ("bf16", "fp16", "fp32")
INPUT_DTYPES = (*DTYPES, "e4m3")  # that a quantizer reads


def short(arch: str) -> str:
    """The arch as names of kernels have it."""
    return arch.replace("_", "").rstrip("a")


def unknown(field: str, value: str, known: Iterable[str]) -> str | None:
    return None if value in known else f"{field}: got {value!r}, expected one of {', '.join(known)}"


def thread_problem(threads: int) -> str | None:
    return None if threads in range(32, 1025, 32) else f"threads: got {threads}, expected whole warps, 32 to 1024"
