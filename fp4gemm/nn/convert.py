"""Turns the Linears of a model into fp4gemm's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from fp4gemm.nn.context import check_recipe
from fp4gemm.nn.layer import Linear
from fp4gemm.nn.quantized import FP4Linear
from fp4gemm.nn.recipes import Recipe
from fp4gemm.tensor import FP4Tensor

_Model = TypeVar("_Model", bound=nn.Module)


def convert(
    model: _Model,
    recipe: Recipe | None = None,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    weights: Mapping[str, FP4Tensor] | None = None,
) -> _Model:
    """Makes every ``torch.nn.Linear`` of ``model`` an :class:`fp4gemm.nn.Linear`, in place; returns ``model``.

    Modules and parameters stay the objects they are, so tied weights, hooks, optimizers and ``state_dict`` keys do too.
    Of a converted layer the recipe is replaced. Subclasses of ``torch.nn.Linear`` are left alone, and with them
    ``torch.nn.MultiheadAttention``, which does not call its projections.

    Args:
        recipe: None: that of the innermost :class:`fp4gemm.autocast` whenever the model runs, else ``per_token()``.
        filter: called with name ("" for ``model`` itself) and module; where it returns False the layer is left alone.
        weights: of layers by name, as :func:`fp4gemm.calibrate` and :func:`fp4gemm.load_quantized` give them. Only
            these layers are converted, and each becomes an :class:`fp4gemm.nn.FP4Linear`, without its parameter.

    Raises TypeError where ``model`` is not a Module, ``recipe`` not a Recipe or None, or ``weights`` no mapping to
    FP4Tensors; ValueError where it has a name that is no layer's, or a weight of another shape. Nothing is converted
    then.
    """
    check_recipe(recipe)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    taken = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Linear) and (filter is None or filter(name, module))
    }
    if weights is not None:
        _check_weights(weights, taken)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path reads the weights itself; this attribute is how it knows that it must not.
            module.activation_relu_or_gelu = 0
    for name, layer in taken.items():
        if weights is None:
            layer.__class__ = Linear
            layer.recipe = recipe
        elif name in weights:
            FP4Linear.take_over(layer, weights[name].to(layer.weight.device), recipe)
    return model


def _check_weights(weights: Mapping[str, FP4Tensor], layers: Mapping[str, nn.Linear]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a mapping from names to FP4Tensors, got {type(weights).__name__}")
    for name, weight in weights.items():
        if name not in layers:
            raise ValueError(f"weights: expected names of Linears that are converted, got {name!r}")
        if not isinstance(weight, FP4Tensor):
            raise TypeError(f"weights: {name}: expected an FP4Tensor, got {type(weight).__name__}")
        if weight.shape != tuple(layers[name].weight.shape):
            raise ValueError(f"weights: {name}: expected {tuple(layers[name].weight.shape)}, got {weight.shape}")
