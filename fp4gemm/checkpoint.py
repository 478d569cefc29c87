"""Quantized weights in safetensors files, under the names that Model Optimizer's NVFP4 checkpoints have.

For a layer ``name``, ``value = code * weight_scale * weight_scale_2``:

    name.weight          uint8          [N, ceil16(K) / 2]   two codes a byte, the first in the low nibble
    name.weight_scale    float8_e4m3fn  [N, ceil(K / 16)]    row-major
    name.weight_scale_2  float32        [] (per tensor), or [N] (per row), which Model Optimizer has not
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fp4gemm import tensor_file
from fp4gemm.formats import padded_k, scale_columns, scale_layout
from fp4gemm.tensor import FP4Tensor
from fp4gemm.tensor_file import Entry

WEIGHT, SCALE, OUTER = "weight", "weight_scale", "weight_scale_2"
_COLUMNS = "nvfp4_columns"  # in the metadata, of layers whose K is no multiple of 16: JSON, K by name


def joined(layer: str, part: str) -> str:
    """``layer.part``; of a model that is itself a layer, ``part``."""
    return f"{layer}.{part}" if layer else part


def to_parts(t: FP4Tensor) -> dict[str, Tensor]:
    """The three tensors of a weight, under their names."""
    t = t.unpack()
    return {WEIGHT: t.data, SCALE: t.linear_block_scale(), OUTER: t.outer_scale}


def from_parts(parts: Mapping[str, Tensor], k: int | None = None, sf_layout: str = "128x4") -> FP4Tensor:
    """Inverse of :func:`to_parts`; ``k``: columns, default those of all codes. Raises what FP4Tensor raises."""
    data, scale, outer = parts[WEIGHT], parts[SCALE], parts[OUTER]
    if data.dim() != 2:
        raise ValueError(f"{WEIGHT}: expected shape [N, ceil16(K) / 2], got {list(data.shape)}")
    shape = data.shape[0], 2 * data.shape[1] if k is None else k
    if tuple(scale.shape) != (expected := (shape[0], scale_columns(shape[1]))):
        raise ValueError(f"{SCALE}: expected shape {expected}, got {tuple(scale.shape)}")
    outer = outer.reshape(()) if outer.numel() == 1 and shape[0] != 1 else outer
    return FP4Tensor(data, scale_layout(sf_layout).from_linear(scale), outer, shape, sf_layout)


def entries_of(layer: str, n: int, k: int, per_tensor: bool) -> list[Entry]:
    """What ``to_parts`` of an [N, K] weight will be."""
    return [
        Entry.of(joined(layer, WEIGHT), torch.uint8, (n, padded_k(k) // 2)),
        Entry.of(joined(layer, SCALE), torch.float8_e4m3fn, (n, scale_columns(k))),
        Entry.of(joined(layer, OUTER), torch.float32, () if per_tensor else (n,)),
    ]


def metadata_of(columns: Mapping[str, int]) -> dict[str, str]:
    """What a file says about itself, given K of its layers."""
    ragged = {layer: k for layer, k in columns.items() if k % 16}
    named = {_COLUMNS: json.dumps(ragged)} if ragged else {}
    return {"format": "pt", "quant_algo": "NVFP4", "group_size": "16", **named}


def save_quantized(path: str | Path, weights: Mapping[str, FP4Tensor]) -> None:
    """Weights by layer, as a safetensors file that is written whole or not at all; :func:`load_quantized` reads it."""
    tensors = {joined(layer, part): t for layer, w in weights.items() for part, t in to_parts(w).items()}
    tensor_file.write(Path(path), tensors, metadata_of({layer: w.k for layer, w in weights.items()}))


def load_quantized(
    path: str | Path, device: torch.device | str = "cpu", *, sf_layout: str = "128x4"
) -> dict[str, FP4Tensor]:
    """The NVFP4 weights of a safetensors file by layer (the name without ``.weight``); other tensors stay unread.

    Reads what ``fp4gemm quantize-model``, :func:`fp4gemm.calibrate` and Model Optimizer write.

    Raises ValueError that names the file, and the tensor, where it is damaged or parts of a weight do not fit.
    """
    with tensor_file.Reader(Path(path)) as file:
        columns = _columns_of(file)
        found = {}
        for layer in layers_of(file.entries):
            parts = {part: file.read(joined(layer, part)).to(device) for part in (WEIGHT, SCALE, OUTER)}
            try:
                found[layer] = from_parts(parts, columns.get(layer), sf_layout)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {joined(layer, WEIGHT)}: {error}") from error
        return found


def _columns_of(file: tensor_file.Reader) -> dict[str, int]:
    text = file.metadata.get(_COLUMNS, "{}")
    try:
        columns = json.loads(text)
    except (TypeError, ValueError):
        columns = None
    if not isinstance(columns, dict) or not all(isinstance(k, int) and k >= 0 for k in columns.values()):
        raise ValueError(f"{file.path}: {_COLUMNS}: expected JSON with a number of columns by layer, got {text!r}")
    return columns


def layers_of(names: Collection[str]) -> list[str]:
    """Layers of which there are all three parts."""
    layers = [name.removesuffix(OUTER).removesuffix(".") for name in names if f".{name}".endswith(f".{OUTER}")]
    return [layer for layer in layers if all(joined(layer, part) in names for part in (WEIGHT, SCALE))]
