"""Which recipe a layer without one of its own takes."""

from __future__ import annotations

import threading
from types import TracebackType

from fp4gemm.nn.recipes import Recipe, per_token

DEFAULT = per_token()


class _Current(threading.local):
    # torch.compile guards an attribute of the instance, so that a compiled function follows it; not one of the class,
    # and it cannot read a ContextVar.
    def __init__(self) -> None:
        self.recipe: Recipe | None = DEFAULT


_current = _Current()


def resolve(recipe: Recipe | None) -> Recipe | None:
    """``recipe``, or the one of the innermost :class:`autocast`; None where that says not to quantize."""
    return _current.recipe if recipe is None else recipe


class autocast:
    """``with fp4gemm.autocast(recipe):`` sets the recipe of layers and ``linear`` calls that have none of their own.

    ``autocast(None)``: these multiply as ``torch.nn.functional.linear`` does. It holds for the calls inside, in this
    thread; their backward, wherever it runs, keeps to the recipe of its forward. ``torch.nn.Linear`` is not touched:
    see :func:`fp4gemm.convert`. Without any autocast the recipe is ``per_token()``. Raises TypeError where ``recipe``
    is neither a Recipe nor None.
    """

    def __init__(self, recipe: Recipe | None) -> None:
        check_recipe(recipe)
        self.recipe = recipe
        self._outer: list[Recipe | None] = []

    def __enter__(self) -> Recipe | None:
        self._outer.append(_current.recipe)
        _current.recipe = self.recipe
        return self.recipe

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _current.recipe = self._outer.pop()


def check_recipe(recipe: object) -> None:
    """Raises TypeError unless ``recipe`` is a Recipe or None."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe or None, got {type(recipe).__name__}")
