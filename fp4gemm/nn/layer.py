"""Linear: torch.nn.Linear whose products are NVFP4."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fp4gemm.nn.context import check_recipe
from fp4gemm.nn.functional import run
from fp4gemm.nn.recipes import Recipe
from fp4gemm.nn.weights import forget


class KeepsWeight(nn.Module):
    """A module whose quantized ``weight`` is kept in eval mode: when that ends."""

    weight: Tensor

    def train(self, mode: bool = True) -> Self:
        forget(self.weight)
        return super().train(mode)

    def requantize(self) -> None:
        """Drops the quantized weight; the next call makes it again."""
        forget(self.weight)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        # FSDP2 gathers into one parameter object again and again, keeps its version, and sets it each time.
        if name == "weight" and isinstance(value, Tensor):
            forget(value)
        super().__setattr__(name, value)


class Linear(KeepsWeight, nn.Linear):
    """``torch.nn.Linear`` that multiplies as ``recipe`` says, forward and backward: :func:`fp4gemm.nn.linear`.

    The same parameters, initialization and ``state_dict``: the weight stays what it was, and is quantized when it is
    used. In eval mode, without gradients, the quantized weight is kept until ``train()``, ``eval()``, another
    ``weight`` or version of it, or a forward pass with gradients; a write that goes around autograd's version counter
    (``weight.data.copy_``) needs :meth:`requantize`. For training see :class:`fp4gemm.nn.micro_batches`.

    Args:
        recipe: None: that of the innermost :class:`fp4gemm.autocast`, else ``per_token()``.

    The other arguments are those of ``torch.nn.Linear``. TypeError where ``recipe`` is not a Recipe or None.
    A CUDA graph captured in eval mode reads the weight that was kept then, if one was: call the model once before.
    """

    recipe: Recipe | None = None  # on the class, so that an nn.Linear which `convert` turns into this one has it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        check_recipe(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe

    def forward(self, input: Tensor) -> Tensor:
        return run(input, self.weight, self.bias, self.recipe, keep=True, serving=not self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"
