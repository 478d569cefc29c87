"""Activations of a GEMM's epilogue in torch, as functions of fp32; kernels have them in activation.hpp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x < 0, 0.0, x),
    "gelu": functional.gelu,  # the form with erf
    "silu": functional.silu,
}


def check_activation(name: str | None) -> None:
    """Raises ValueError unless ``name`` is None or that of an activation."""
    if name is not None and name not in _FUNCTIONS:
        raise ValueError(f"activation: expected one of {', '.join(_FUNCTIONS)} or None, got {name!r}")


def activate(name: str | None, x: Tensor) -> Tensor:
    """``x``, float32, or the activation of it."""
    return x if name is None else _FUNCTIONS[name](x)
