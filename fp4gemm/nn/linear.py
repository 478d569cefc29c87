"""Linear: torch.nn.Linear whose products are NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4gemm.nn.context import check_recipe
from fp4gemm.nn.functional import run
from fp4gemm.nn.recipes import Recipe
from fp4gemm.nn.weights import forget


class Linear(nn.Linear):
    """``torch.nn.Linear`` that multiplies as ``recipe`` says, forward and backward: :func:`fp4gemm.nn.linear`.

    The same parameters, initialization and ``state_dict``: the weight stays what it was, and is quantized when it is
    used. In eager mode the quantized weight is kept until ``weight`` changes, which its version says: an optimizer's
    step does. Writes that go around autograd's counter (``weight.data.copy_``, or through a buffer that the weight is a
    view of) need :meth:`requantize`. Compiled training steps quantize each time; compiled inference keeps as well.

    Args:
        recipe: None: that of the innermost :class:`fp4gemm.autocast`, else ``per_token()``.
        cache_weight: whether quantized weights are kept; None: unless the weight has ``main_grad``, because
            frameworks that use it write weights around the counter.

    The other arguments are those of ``torch.nn.Linear``; ``TypeError`` where ``recipe`` is not a Recipe or None.
    A CUDA graph of a module in eval mode reads the weight as it was quantized when the graph was captured.
    """

    # On the class, so that an nn.Linear which `convert` turns into this one has them.
    recipe: Recipe | None = None
    cache_weight: bool | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
        cache_weight: bool | None = None,
    ) -> None:
        check_recipe(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe
        self.cache_weight = cache_weight

    def forward(self, input: Tensor) -> Tensor:
        cache = self.cache_weight
        if cache is None:
            cache = not hasattr(self.weight, "main_grad")
        # Only a parameter outlives the call.
        return run(input, self.weight, self.bias, self.recipe, cache and self.weight.is_leaf, not self.training)

    def requantize(self) -> None:
        """Drops the quantized weight; the next call makes it again."""
        forget(self.weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"

    def __setattr__(self, name: str, value: object) -> None:
        # FSDP2 gathers into one parameter object again and again, keeps its version, and sets it each time.
        if name == "weight" and isinstance(value, Tensor):
            forget(value)
        super().__setattr__(name, value)
