"""Whole models: what passes through their Linears, and NVFP4 weights that err least on it.

Hessians are those of the model as it is given, not of one whose first layers are quantized already: layers do not
depend on each other, so that they may be handled in groups of any size, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from fp4gemm import tensor_file
from fp4gemm.checkpoint import save_quantized
from fp4gemm.files import write_whole
from fp4gemm.nn import Linear
from fp4gemm.search.hessian import HessianAccumulator
from fp4gemm.search.method import Method
from fp4gemm.tensor import FP4Tensor

if TYPE_CHECKING:
    from rich.progress import Progress

Filter = Callable[[str, nn.Linear], bool]
MEMORY = 4 << 30
_MANIFEST, _RESULT = "manifest.json", "quantized.safetensors"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] = (),
    metric: str = "hessian",
    *,
    feedback: bool = False,
    damping: float = 0.01,
    block: int = 16,
    scaling: str = "per_row",
    outer: str = "amax",
    filter: Filter | None = None,
    folder: str | Path | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> dict[str, FP4Tensor]:
    """The weights of the Linears of ``model`` in NVFP4, by name; the model stays as it is.

    ``fp4gemm.convert(model, recipe, weights=calibrate(model, batches))`` puts them into it.

    Args:
        batches: what the model is called with: a tensor, a tuple (of arguments) or a mapping (of keywords). It must
            start again for each pass: a list, a DataLoader. Not read for a metric that needs no Hessian.
        metric: ``hessian``, ``sse``, ``4/6`` or ``amax``: see :class:`fp4gemm.search.Method`, as for ``feedback``,
            ``damping``, ``block``, ``scaling`` and ``outer``.
        filter: called with name ("" for ``model`` itself) and module; where it returns False the layer is left out.
        folder: keeps a file for each finished layer, so that an interrupted call goes on from there when it is
            repeated, with the same bytes in the end if batches are the same; and ``quantized.safetensors`` at the end
            (:func:`fp4gemm.load_quantized`).
        memory: bytes of Hessians at a time: 4 K^2 a layer with ``feedback``, 64 K (128 K for blocks of 32) without. A
            pass over all batches handles as many layers as fit, at least one. Results do not depend on it.
        progress: show a bar.

    Layers that no batch reaches get ``sse``, with a warning.

    Raises:
        TypeError: ``model`` is not a Module, or inputs have another dtype than bf16, fp16 or fp32.
        ValueError: an option is unknown, there is no layer or no batch, batches cannot be read again, or ``folder``
            holds the calibration of another model or method; the message says which.
    """
    method = Method(metric, feedback, damping, block, scaling, outer)
    layers = linears(model, filter)
    store = None if folder is None else _Store(Path(folder), method, layers)
    done = {} if store is None else store.finished(layers)
    missing = {name: layer for name, layer in layers.items() if name not in done}
    with _bar(progress) as bar:
        task = bar.add_task("layers", total=len(layers), completed=len(done))
        for name, found in _inputs(model, batches, missing, method, memory, bar):
            done[name] = _quantized(name, missing[name].weight, method, found)
            if store is not None:
                store.save(name, done[name])
            bar.advance(task)
    result = {name: done[name] for name in layers}
    if store is not None:
        save_quantized(store.folder / _RESULT, result)
    return result


def collect_hessians(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    feedback: bool = True,
    block: int = 16,
    filter: Filter | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Iterator[tuple[str, HessianAccumulator]]:
    """Of the inputs of each Linear, by name: of all columns with ``feedback``, else of blocks of them.

    The other arguments, and what is raised, are those of :func:`calibrate`.
    """
    layers, method = linears(model, filter), Method("hessian", feedback, block=block)
    with _bar(progress) as bar:
        for name, found in _inputs(model, batches, layers, method, memory, bar):
            assert found is not None
            yield name, found


def save_hessians(
    model: nn.Module,
    batches: Iterable[Any],
    folder: str | Path,
    *,
    feedback: bool = True,
    block: int = 16,
    filter: Filter | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> list[Path]:
    """Hessians of the inputs of each Linear, one file a layer in ``folder``, for ``fp4gemm quantize-model``.

    Layers whose file exists are left out. Arguments, and what is raised, are those of :func:`collect_hessians`.
    """
    paths = {name: hessian_path(Path(folder), name) for name in linears(model, filter)}
    missing = {name for name, path in paths.items() if not path.exists()}
    if missing:
        options: dict[str, Any] = {"feedback": feedback, "block": block, "memory": memory, "progress": progress}
        for name, found in collect_hessians(model, batches, filter=lambda name, _: name in missing, **options):
            found.save(paths[name])
    return list(paths.values())


def hessian_path(folder: Path, layer: str) -> Path:
    """Where the Hessian of a layer is kept."""
    return folder / f"{_file_stem(layer)}.safetensors"


def linears(model: nn.Module, filter: Filter | None = None) -> dict[str, nn.Linear]:
    """The ``torch.nn.Linear`` and ``fp4gemm.nn.Linear`` of a model by name, those that ``filter`` takes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Linear) and (filter is None or filter(name, module))
    }
    if not found:
        raise ValueError("model: expected at least one torch.nn.Linear that the filter takes, got none")
    return found


def _quantized(name: str, w: Tensor, method: Method, found: HessianAccumulator | None) -> FP4Tensor:
    if method.needs_hessian and (found is None or found.tokens == 0):
        warnings.warn(f"{name}: no batch reaches this layer; its scales are those of squared error", stacklevel=3)
        method, found = Method("sse", block=method.block, scaling=method.scaling, outer=method.outer), None
    return method.quantize(w.detach(), found)


# --- what layers see --------------------------------------------------------------------------------------------------


def _inputs(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Linear],
    method: Method,
    memory: int,
    bar: Progress,
) -> Iterator[tuple[str, HessianAccumulator | None]]:
    """Each layer with the Hessian of its inputs, None for a method that needs none."""
    if not method.needs_hessian:
        yield from ((name, None) for name in layers)
        return
    groups = list(_groups(layers, method, memory))
    if len(groups) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches: expected what can be read {len(groups)} times, such as a list, got an iterator; a larger memory "
            f"than {memory} bytes takes fewer passes"
        )
    for index, group in enumerate(groups):
        found = {name: method.accumulator(layer.in_features, layer.weight.device) for name, layer in group.items()}
        _watch(model, batches, group, found, bar, f"batches, pass {index + 1} of {len(groups)}")
        for name in group:
            yield name, found.pop(name)


def _groups(layers: Mapping[str, nn.Linear], method: Method, memory: int) -> Iterator[dict[str, nn.Linear]]:
    """Layers in order, as many at a time as ``memory`` holds, at least one."""
    group: dict[str, nn.Linear] = {}
    held = 0
    for name, layer in layers.items():
        size = method.hessian_bytes(layer.in_features)
        if group and held + size > memory:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += size
    if group:
        yield group


@torch.no_grad()
def _watch(
    model: nn.Module, batches: Iterable[Any], group: Mapping[str, nn.Linear], found: Mapping[str, HessianAccumulator],
    bar: Progress, what: str,
) -> None:  # fmt: skip
    """Runs the model, in eval mode, over all batches."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found[name].add(args[0] if args else kwargs["input"])

    hooks = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in group.items()]
    modes = {module: module.training for module in model.modules()}
    count = len(batches) if isinstance(batches, Sized) else None
    task = bar.add_task(what, total=count)
    seen = 0
    try:
        model.eval()
        for batch in batches:
            _call(model, batch)
            seen += 1
            bar.advance(task)
    finally:
        bar.remove_task(task)
        for each in hooks:
            each.remove()
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError("batches: expected at least one, got none")


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, disable=not shown) as bar:
        yield bar


# --- what is kept -----------------------------------------------------------------------------------------------------


class _Store:
    """A folder: a manifest that says of what, and a file for each finished layer."""

    def __init__(self, folder: Path, method: Method, layers: Mapping[str, nn.Linear]) -> None:
        self.folder = folder
        wanted = {"method": method.as_dict(), "layers": {name: _digest(each.weight) for name, each in layers.items()}}
        path = folder / _MANIFEST
        if not path.exists():
            write_whole(path, json.dumps(wanted, indent=1) + "\n")
            return
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"folder: {path} is not a manifest: {error}") from error
        if held != wanted:
            raise ValueError(
                f"folder: expected an empty one, or the same model and method, got {folder}, which holds a calibration "
                f"of another {_difference(held, wanted)}"
            )

    def _path(self, name: str) -> Path:
        return self.folder / "layers" / f"{_file_stem(name)}.safetensors"

    def finished(self, layers: Mapping[str, nn.Linear]) -> dict[str, FP4Tensor]:
        """What is there of these layers, on their devices."""
        paths = {name: self._path(name) for name in layers}
        return {
            name: FP4Tensor.from_tensors(tensor_file.read(path)).to(layers[name].weight.device)
            for name, path in paths.items()
            if path.exists()
        }

    def save(self, name: str, t: FP4Tensor) -> None:
        tensor_file.write(self._path(name), t.to_tensors())


def _file_stem(layer: str) -> str:
    return quote(layer, safe="") or "model"


def _digest(w: Tensor) -> str:
    """Of shape, dtype and values."""
    found = hashlib.sha256(f"{w.dtype} {tuple(w.shape)}".encode())
    tensor_file.feed(w, found.update)
    return found.hexdigest()


def _difference(held: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(held, dict) or held.get("method") != wanted["method"]:
        return "method"
    layers = held.get("layers", {})
    names = [name for name in {**wanted["layers"], **layers} if wanted["layers"].get(name) != layers.get(name)]
    return f"model ({names[0] or 'its weight'})"
