"""What the suites share: their configuration, jobs, and the byte counts of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fp4gemm.bench import timing
from fp4gemm.report import Row
from fp4gemm.tensor import FP4Tensor

ARCH = "sm_90a"


@dataclass(frozen=True)
class Config:
    """`repeats` samples per candidate; `quick` keeps one or two shapes of each suite, to see that everything runs.

    `shapes` (N, K) and `sizes` (M) replace those of the GEMM sweep.
    """

    repeats: int = timing.DEFAULT_REPEATS
    quick: bool = False
    shapes: tuple[tuple[int, int], ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Job:
    """One label in the progress bar and the rows it measures."""

    label: str
    run: Callable[[], list[Row]]


Suite = Callable[[Config], Iterator[Job]]


def nbytes(*values: torch.Tensor | FP4Tensor) -> int:
    """Bytes of tensors, and of everything an FP4Tensor stores."""
    total = 0
    for value in values:
        parts = (value.data, value.block_scale, value.outer_scale) if isinstance(value, FP4Tensor) else (value,)
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def random_inputs(copies: int, M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """`copies` random [M, K] tensors, each in memory of its own."""
    return list(torch.randn(copies, M, K, device=timing.DEVICE, dtype=dtype))
