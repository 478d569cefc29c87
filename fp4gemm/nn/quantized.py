"""FP4Linear: a layer that has its weight in NVFP4 and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4gemm import checkpoint, select
from fp4gemm.nn.context import check_recipe, resolve
from fp4gemm.nn.functional import multiply, under_autocast
from fp4gemm.nn.recipes import Recipe
from fp4gemm.tensor import FP4Tensor


class FP4Linear(nn.Module):
    """y [..., N] = x [..., K] . weight [N, K]^T + bias [N], for serving: no gradients, and no weight but the NVFP4 one.

    ``state_dict`` has that weight as ``weight``, ``weight_scale`` and ``weight_scale_2``: the names of files that
    ``fp4gemm quantize-model`` writes. ``to(dtype)`` leaves it alone.

    Args:
        weight: prepacked where its device is a Hopper GPU.
        bias: [N].
        recipe: says what becomes of x; None: that of the innermost :class:`fp4gemm.autocast`, else ``per_token()``.

    Raises TypeError where ``weight`` is no FP4Tensor, ValueError where ``bias``, or later ``x``, has another shape.
    """

    recipe: Recipe | None = None
    bias: Tensor | None

    def __init__(self, weight: FP4Tensor, bias: Tensor | None = None, *, recipe: Recipe | None = None) -> None:
        super().__init__()
        if not isinstance(weight, FP4Tensor):
            raise TypeError(f"weight: expected an FP4Tensor, got {type(weight).__name__}")
        if bias is not None and tuple(bias.shape) != (weight.rows,):
            raise ValueError(f"bias: expected shape [{weight.rows}] (N of weight), got {list(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._hold(weight, recipe)

    @classmethod
    def take_over(cls, linear: nn.Linear, weight: FP4Tensor, recipe: Recipe | None) -> None:
        """Makes ``linear`` one of these, in place: hooks and other names of the module stay."""
        del linear.weight
        held: nn.Module = linear
        held.__class__ = cls
        assert isinstance(held, cls)
        held._hold(weight, recipe)

    def _hold(self, weight: FP4Tensor, recipe: Recipe | None) -> None:
        check_recipe(recipe)
        self.recipe = recipe
        self.out_features, self.in_features = weight.shape
        self.weight = _placed(weight.detach())

    def forward(self, input: Tensor) -> Tensor:
        recipe = resolve(self.recipe)
        self._check(input)
        x = under_autocast(input)
        if recipe is None:
            return F.linear(x, self.weight.dequantize(x.dtype), self.bias)
        y = multiply(x.reshape(-1, self.in_features), self.weight, self.bias, recipe)
        return y.view(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., K] with K = {self.in_features}, got shape {list(x.shape)}")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self.weight}, recipe={self.recipe}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device)).device
        if device != self.weight.device:
            self.weight = _placed(self.weight.to(device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: part for name, part in checkpoint.to_parts(self.weight).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, missing, unexpected, errors = args
        names = (checkpoint.WEIGHT, checkpoint.SCALE, checkpoint.OUTER)
        unexpected[:] = [name for name in unexpected if name not in {prefix + each for each in names}]
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        missing += absent
        if absent:
            return
        try:
            parts = {name: state_dict[prefix + name].to(self.weight.device) for name in names}
            weight = checkpoint.from_parts(parts, self.in_features, self.weight.sf_layout)
            if weight.shape != self.weight.shape:
                raise ValueError(f"expected shape {self.weight.shape}, got {weight.shape}")
            self.weight = _placed(weight)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}{checkpoint.WEIGHT}: {error}")


def _placed(weight: FP4Tensor) -> FP4Tensor:
    """In the form that GEMMs of its device read."""
    device = weight.device
    if device.type == "cuda" and weight.data.numel() and select.arch_of(device.index) == "sm_90a":
        return weight.prepack()
    return weight.unpack()
