"""Quantized weights, and how long they are kept: for some micro-batches, or for serving.

An entry belongs to a tensor object and is valid while the tensor's version and address, the recipe and the stream are
what they were. A version alone does not tell that a weight has changed: torch's fused optimizers leave it as it is, and
so does the replay of a CUDA graph. So entries live only where the caller says that nothing changes weights: inside
``micro_batches``, and in modules in eval mode outside of training.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4gemm import select
from fp4gemm.dispatch import direct
from fp4gemm.formats import BLOCK, PACKED_BLOCK, RIGHT, packed_shape, padded_k
from fp4gemm.group.ops import quantize_grouped
from fp4gemm.group.tensor import GroupedFP4Tensor
from fp4gemm.grouped import GroupedWeight, stack_weights
from fp4gemm.nn.recipes import Recipe
from fp4gemm.operands import quantize_operands
from fp4gemm.tensor import FP4Tensor

Weight = FP4Tensor | GroupedWeight
WeightForms = tuple[Weight | None, Weight | None]
"""A quantized weight [N, K], or those of experts, [E, N, K], and the transpose; None where nothing needs it."""


@dataclass
class _Held:
    """What is kept of one weight; ``captured``: what CUDA graphs read, which lives as long as the weight."""

    key: tuple[object, ...] = ()
    forms: WeightForms = (None, None)
    captured: list[Weight] = field(default_factory=list)


_serving = WeakTensorKeyDictionary()


class _Current(threading.local):
    def __init__(self) -> None:
        self.kept: WeakTensorKeyDictionary | None = None


_current = _Current()


class micro_batches:
    """``with fp4gemm.nn.micro_batches():`` around the forward and backward passes between two steps of the optimizer.

    Inside, in this thread, the weight of a ``Linear`` or ``GroupedLinear`` is quantized once, not once for each forward
    pass. A change that autograd's version counter sees is noticed; one by a fused optimizer is not, so steps belong
    outside. Compiled layers take no notice of it.
    """

    def __init__(self) -> None:
        self._outer: list[WeakTensorKeyDictionary | None] = []

    def __enter__(self) -> None:
        self._outer.append(_current.kept)
        if _current.kept is None:
            _current.kept = WeakTensorKeyDictionary()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _current.kept = self._outer.pop()


def quantize_weight(w: Tensor, recipe: Recipe, columns: bool) -> WeightForms:
    """w [N, K], or [E, N, K] of experts, row-wise, and transposed where ``columns``; in the form that GEMMs read."""
    if w.dim() == 3:
        return _quantize_experts(w, recipe, columns)
    rows, transposed = _forms(w, recipe, columns)
    if direct(w) and w.is_cuda and w.numel() and select.arch_of(w.device.index) == "sm_90a":
        rows = rows.prepack()  # that of both ways is, already
    return rows, transposed


def _forms(w: Tensor, recipe: Recipe, columns: bool) -> tuple[FP4Tensor, FP4Tensor | None]:
    how: dict[str, Any] = {"scaling": recipe.weights, "block": recipe.weight_block, "sides": (RIGHT, RIGHT)}
    rows, transposed = quantize_operands(w, True, columns, **how)
    assert isinstance(rows, FP4Tensor)
    assert transposed is None or isinstance(transposed, FP4Tensor)
    return rows, transposed


def _quantize_experts(w: Tensor, recipe: Recipe, columns: bool) -> WeightForms:
    experts, n, k = w.shape
    if recipe.weight_2d:  # blocks that groups do not have
        forms = [_forms(each, recipe, columns) for each in w.unbind()]
        rows, transposed = ([t for t in side if t is not None] for side in zip(*forms, strict=True))
        return stack_weights(rows), stack_weights(transposed) if columns else None
    w = w.contiguous()
    if not columns:
        group = quantize_grouped(w, scaling=recipe.weights, sf_layout="linear")
        return _prepacked(group, (experts, n, k)), None
    group, group_t = quantize_grouped(w, scaling=recipe.weights, sf_layout="linear", both=True)
    return _prepacked(group, (experts, n, k)), _prepacked(group_t, (experts, k, n))


def _prepacked(t: GroupedFP4Tensor, shape: tuple[int, int, int]) -> GroupedWeight:
    """Members of one shape; in one launch where none of them ends within a block of rows."""
    experts, n, k = shape
    whole = n % PACKED_BLOCK == 0
    parts, rows = (1, experts * n) if whole else (experts, n)
    data = t.data.view(parts, rows, padded_k(k) // 2)
    scales = t.block_scale.view(parts, rows, padded_k(k) // BLOCK)
    none = t.outer_scale.new_empty(())  # the packed form has codes and block scales
    packed = [FP4Tensor(data[i], scales[i], none, (rows, k), "linear").prepack().data for i in range(parts)]
    outer = t.outer_scale.view(experts, n) if t.scaling == "per_row" else t.outer_scale
    return GroupedWeight((packed[0] if whole else torch.cat(packed)).view(experts, *packed_shape(n, k)), outer, shape)


def kept_weight(w: Tensor, recipe: Recipe, columns: bool, serving: bool) -> WeightForms:
    """The same, from what is kept of ``w`` where that is allowed; ``serving``: no gradient, in eval mode."""
    if w.is_inference() or not w.is_leaf:  # without a version, or made anew by each call
        return quantize_weight(w, recipe, columns)
    if _current.kept is not None:
        return _look_up(_current.kept, w, recipe, columns)
    if not serving:
        if w.requires_grad:
            forget(w)  # it is being trained
        return quantize_weight(w, recipe, columns)
    if w.is_cuda and torch.cuda.is_current_stream_capturing():
        return _captured(w, recipe)
    return _look_up(_serving, w, recipe, columns)


def _look_up(kept: WeakTensorKeyDictionary, w: Tensor, recipe: Recipe, columns: bool) -> WeightForms:
    held: _Held | None = kept.get(w)  # type: ignore[no-untyped-call]
    if held is None:
        held = kept[w] = _Held()
    key = (*_key(w, recipe), *_place(w))
    if held.key != key or (columns and held.forms[1] is None):
        held.forms = quantize_weight(w, recipe, columns)
        held.key = key
    return held.forms


def _key(w: Tensor, recipe: Recipe) -> tuple[object, ...]:
    return w._version, w.data_ptr(), recipe.weights, recipe.weight_2d


def _place(w: Tensor) -> tuple[object, ...]:
    """Where the memory of the forms may be read: their stream, and inside a graph or outside."""
    if not w.is_cuda:
        return ()
    return torch._C._cuda_getCurrentRawStream(w.device.index), torch.cuda.is_current_stream_capturing()


def _captured(w: Tensor, recipe: Recipe) -> WeightForms:
    """For a graph: what is kept, from whatever stream, as capturing began by waiting for all of them."""
    held: _Held | None = _serving.get(w)  # type: ignore[no-untyped-call]
    if held is None or held.key[: -len(_place(w))] != _key(w, recipe):
        return quantize_weight(w, recipe, False)
    rows = held.forms[0]
    assert rows is not None
    held.captured.append(rows)
    return rows, None


def forget(w: Tensor) -> None:
    """Drops what is kept of ``w`` for serving."""
    held: _Held | None = _serving.get(w)  # type: ignore[no-untyped-call]
    if held is not None:
        held.key, held.forms = (), (None, None)
