"""``fp4gemm quantize-model``: a safetensors file with its weights in NVFP4, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from fp4gemm.calibration import hessian_path
from fp4gemm.checkpoint import entries_of, metadata_of, to_parts
from fp4gemm.files import whole
from fp4gemm.reference.arguments import FLOATS
from fp4gemm.search.hessian import HessianAccumulator
from fp4gemm.search.method import Method
from fp4gemm.tensor_file import Entry, Reader, feed, write_header

INCLUDE = ("*",)
EXCLUDE = ("*embed*", "*wte*", "*wpe*", "*lm_head*")
"""Embeddings are matrices too, and output heads are what least bears four bits."""


@dataclass(frozen=True)
class Summary:
    """Layers that are quantized, tensors that are copied, and bytes of all tensors before and after."""

    quantized: tuple[str, ...]
    copied: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize_file(
    source: Path,
    out: Path,
    method: Method,
    *,
    include: Sequence[str] = INCLUDE,
    exclude: Sequence[str] = EXCLUDE,
    hessians: Path | None = None,
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] = lambda layer: None,
) -> Summary:
    """Writes ``out``: each matrix ``layer.weight`` (bf16, fp16, fp32) whose layer a glob of ``include`` matches and
    none of ``exclude``, in NVFP4, and every other tensor as it is.

    ``out`` is written whole or not at all; in memory is one tensor at a time. ``hessians``: the folder that
    :func:`fp4gemm.save_hessians` wrote, where the method needs it. ``tell`` is called with each layer first.

    Raises ValueError that names the file or the layer: a damaged file, nothing to quantize, a Hessian that is missing
    or does not fit.
    """
    if method.needs_hessian != (hessians is not None):
        needed = "a folder" if method.needs_hessian else "none"
        raise ValueError(f"hessians: expected {needed} with metric={method.metric!r}, got {hessians}")
    with Reader(source) as file:
        layers = {name: _layer(entry, include, exclude) for name, entry in file.entries.items()}
        chosen = {name: layer for name, layer in layers.items() if layer is not None}
        if not chosen:
            raise ValueError(f"{source}: no matrix *.weight whose name {list(include)} matches and {list(exclude)} not")
        paths = {} if hessians is None else {name: hessian_path(hessians, layer) for name, layer in chosen.items()}
        for name, path in paths.items():  # all of them before any work
            if not path.exists():
                raise ValueError(f"{name}: expected its Hessian in {path}, which is not there; or exclude the layer")
        entries = [part for entry in file.entries.values() for part in _entries(entry, layers[entry.name], method)]
        columns = {layer: file.entries[name].shape[1] for name, layer in chosen.items()}
        with whole(out) as stream:
            metadata = {**file.metadata, **metadata_of(columns), "method": json.dumps(method.as_dict())}
            write_header(stream, entries, metadata)
            for name in file.entries:
                if name not in chosen:
                    file.copy(name, stream)
                    continue
                tell(chosen[name])
                w = file.read(name).to(device)
                found = _hessian(paths.get(name), w, method)
                try:
                    parts = to_parts(method.quantize(w, found))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                for part in parts.values():
                    feed(part, stream.write)
        copied = tuple(name for name in file.entries if name not in chosen)
        before = sum(entry.nbytes for entry in file.entries.values())
    return Summary(tuple(chosen.values()), copied, before, sum(entry.nbytes for entry in entries))


def _layer(entry: Entry, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """The layer whose weight this is, if it is to be quantized."""
    if len(entry.shape) != 2 or entry.dtype not in FLOATS or not f".{entry.name}".endswith(".weight"):
        return None
    layer = entry.name.removesuffix("weight").removesuffix(".")
    taken = any(fnmatchcase(layer, glob) for glob in include) and not any(fnmatchcase(layer, glob) for glob in exclude)
    return layer if taken else None


def _entries(entry: Entry, layer: str | None, method: Method) -> list[Entry]:
    if layer is None:
        return [entry]
    n, k = entry.shape
    return entries_of(layer, n, k, method.scaling == "per_tensor")


def _hessian(path: Path | None, w: torch.Tensor, method: Method) -> HessianAccumulator | None:
    """What is in the file. Raises ValueError where it is not for this weight and method."""
    if path is None:
        return None
    found = HessianAccumulator.load(path, w.device)
    if found.k != w.shape[1]:
        raise ValueError(f"{path}: expected a Hessian of {w.shape[1]} columns, got one of {found.k}")
    if method.feedback and not found.full:
        raise ValueError(f"{path}: expected a Hessian of all columns, for feedback, got one of blocks")
    if found.full:
        found.block = method.block
    elif found.block != method.block:
        raise ValueError(f"{path}: expected blocks of {method.block}, got {found.block}")
    return found
