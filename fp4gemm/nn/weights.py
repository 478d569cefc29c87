"""Quantized weights, kept from one micro-batch to the next.

An entry belongs to a tensor object, and lives as long as that does. It is valid while the tensor's version and address
are what they were, on the stream that made it. A CUDA graph is another matter, as it replays on memory and not on
entries: while one is captured nothing is stored, and only weights that the caller calls frozen are taken from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4gemm import ops, select
from fp4gemm.dispatch import direct
from fp4gemm.nn.recipes import Recipe
from fp4gemm.tensor import FP4Tensor

Forms = tuple[FP4Tensor | None, FP4Tensor | None]
"""An FP4Tensor of a matrix, and of its transpose, each None where nothing needs it."""

_Key = tuple[int, int, str, bool]


@dataclass
class _Entry:
    key: _Key
    stream: int
    forms: Forms


@dataclass
class _Held:
    """What is known of one weight; ``captured``: forms whose memory a CUDA graph reads."""

    entry: _Entry | None = None
    captured: list[FP4Tensor] = field(default_factory=list)


_held = WeakTensorKeyDictionary()


def quantize_forms(
    t: Tensor, rows: bool, columns: bool, scaling: str, *, block: tuple[int, int] = (1, 16),
    hadamard: int | None = None, seed: Tensor | None = None,
) -> Forms:  # fmt: skip
    """The forms of ``t`` that are asked for, from one pass over it."""
    if rows and columns:
        return ops.quantize_both(t, scaling=scaling, block=block, hadamard=hadamard, seed=seed)
    if rows:
        return ops.quantize(t, scaling=scaling, block=block, seed=seed), None
    if columns:
        return None, ops.quantize(t, scaling=scaling, block=block, transposed=True, hadamard=hadamard, seed=seed)
    return None, None


def quantize_weight(w: Tensor, recipe: Recipe, columns: bool) -> Forms:
    """w [N, K] row-wise, and its transpose where ``columns``; prepacked where that is how GEMMs read them."""
    rows, transposed = quantize_forms(w, True, columns, recipe.weights, block=recipe.weight_block)
    if direct(w) and w.is_cuda and w.numel() and select.arch_of(w.device.index) == "sm_90a":
        rows = None if rows is None else rows.prepack()
        transposed = None if transposed is None else transposed.prepack()
    return rows, transposed


def cached_weight(w: Tensor, recipe: Recipe, columns: bool, frozen: bool) -> Forms:
    """The same, made once for each version of ``w``.

    ``frozen``: nothing is going to change ``w``, so that a graph which is being captured may keep to what is here.
    """
    if w.is_inference():  # such a tensor has no version
        return quantize_weight(w, recipe, columns)
    capturing = w.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing and not frozen:
        return quantize_weight(w, recipe, columns)
    key = (w._version, w.data_ptr(), recipe.weights, recipe.weight_2d)
    stream = torch._C._cuda_getCurrentRawStream(w.device.index) if w.is_cuda else 0
    held = _held.get(w)
    entry = None if held is None else held.entry
    # Capturing waited for every stream before it began on its own.
    if held is not None and entry is not None and entry.key == key and (capturing or entry.stream == stream):
        rows, transposed = entry.forms
        if transposed is not None or not columns:
            if capturing and rows is not None:
                held.captured.append(rows)
            return entry.forms
    forms = quantize_weight(w, recipe, columns)
    if not capturing:
        if held is None:
            held = _held[w] = _Held()
        held.entry = _Entry(key, stream, forms)
    return forms


def forget(w: Tensor) -> None:
    """Drops the quantized forms of ``w``."""
    held = _held.get(w)
    if held is not None:
        held.entry = None
