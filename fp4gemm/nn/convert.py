"""Turns the Linears of a model into fp4gemm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from fp4gemm.nn.context import check_recipe
from fp4gemm.nn.layer import Linear
from fp4gemm.nn.recipes import Recipe

_Model = TypeVar("_Model", bound=nn.Module)


def convert(
    model: _Model, recipe: Recipe | None = None, filter: Callable[[str, nn.Linear], bool] | None = None
) -> _Model:
    """Makes every ``torch.nn.Linear`` of ``model`` an :class:`fp4gemm.nn.Linear`, in place; returns ``model``.

    Modules and parameters stay the objects they are, so tied weights, hooks, optimizers and ``state_dict`` keys do too.
    Of a converted layer the recipe is replaced. Subclasses of ``torch.nn.Linear`` are left alone, and with them
    ``torch.nn.MultiheadAttention``, which does not call its projections.

    Args:
        recipe: None: that of the innermost :class:`fp4gemm.autocast` whenever the model runs, else ``per_token()``.
        filter: called with name ("" for ``model`` itself) and module; where it returns False the layer is left alone.

    Raises TypeError where ``model`` is not a Module, or ``recipe`` not a Recipe or None.
    """
    check_recipe(recipe)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path reads the weights itself; this attribute is how it knows that it must not.
            module.activation_relu_or_gelu = 0
        if type(module) in (nn.Linear, Linear) and (filter is None or filter(name, module)):
            module.__class__ = Linear
            module.recipe = recipe
    return model
