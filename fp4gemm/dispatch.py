"""How the public functions reach an implementation: directly, or through the dispatcher where something watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_T = TypeVar("_T")


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing traces, wraps or differentiates this call, so that the dispatcher would only add time."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(x, *others)
    return (
        type(x) in _PLAIN
        and not (torch.is_grad_enabled() and _require_grad(x, *others))
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _refuse_tangents(*tensors: Tensor | None) -> None:
    # The dispatcher of custom ops would drop them in silence, where it raises for a gradient.
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError("forward-mode derivatives: an argument has a tangent, and FP4 has no derivative")


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where a call with ``out`` would drop a gradient: its operator returns nothing that could
    have one."""
    if torch.is_grad_enabled() and _require_grad(*tensors):
        raise RuntimeError("out: expected None where an argument requires a gradient; detach it, or use torch.no_grad")


def _require_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - a generator costs more than the checks
        if t is not None and t.requires_grad:
            return True
    return False


def on_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def on_its_device(x: Tensor, function: Callable[..., _T], *args: object) -> _T:
    """Calls ``function`` with the device of ``x`` current."""
    if x.device.index == torch._C._cuda_getDevice():
        return function(*args)
    with torch.cuda.device(x.device):
        return function(*args)
