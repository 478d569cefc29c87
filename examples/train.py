#!/usr/bin/env python3
"""Trains a small transformer on text that ships with Python, in bf16 and with NVFP4 recipes, and compares the losses.

    python examples/train.py                                  every recipe, 3 seeds, on the GPU (a few minutes)
    python examples/train.py --recipe bf16 --recipe per_token --seeds 1
    python examples/train.py --render                         no training: docs/training.md and its plot from the JSON

The text is `pydoc_data.topics`, the language reference that `help()` shows, read byte by byte. `--text stdlib` is the
standard library's own sources, some ten times as much, and `--text torch` those of torch, another ten times: 1000 steps
see no byte of it twice. Every recipe sees the same initial weights and the same batches for a seed. The model is
converted by `fp4gemm.convert`: attention and MLP projections are NVFP4, the embedding and the head are not, and
everything else runs under torch.autocast in bf16 as it does without fp4gemm. A recipe whose name ends in `_inner`
leaves the first and the last block in bf16 too, as published NVFP4 pretraining leaves blocks at both ends.
`--finish 0.2` ends every recipe a second time, from the state that its run had by then, with the last fifth of the
steps in plain bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import math
import multiprocessing
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout trains with itself, whatever is installed

import fp4gemm  # noqa: E402
from fp4gemm import provenance, report  # noqa: E402
from fp4gemm.nn import Recipe, per_tensor, per_token, w4a16  # noqa: E402

RECIPES: dict[str, Recipe | None] = {
    "bf16": None,
    "per_token": per_token(),
    "per_token_rht_sr_2d": per_token(rht=True, sr=True, weight_2d=True),
    "per_token_rht_sr_2d_inner": per_token(rht=True, sr=True, weight_2d=True),
    "per_tensor": per_tensor(),
    "w4a16": w4a16(),
}
INNER = "_inner"  # ends the names of recipes that the first and the last block do not take
BASELINE = "bf16"
TORCH = Path(torch.__file__).parent
BEGIN, END = "<!-- training:begin -->", "<!-- training:end -->"
_TAIL = 0.1  # of the steps: what the last training loss is the mean of
_POINTS = 100  # of a curve


@dataclass(frozen=True)
class Size:
    """Of the model and of the run. The default has 25 million parameters."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    context: int = 256
    batch: int = 64
    steps: int = 400
    rate: float = 1e-3


# --- data -------------------------------------------------------------------------------------------------------------


def text(name: str) -> bytes:
    """`topics`: half a megabyte of English; `stdlib`: the standard library's, 5 MB; `torch`: its sources, 46 MB.

    Files are in an order that has nothing to do with their names, so that the end is a sample of all.
    """
    if name == "topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics)).encode()
    folder, files = (TORCH, "**/*.py") if name == "torch" else (Path(sysconfig.get_paths()["stdlib"]), "*.py")
    names = {path.relative_to(folder).as_posix(): path for path in folder.glob(files)}
    return b"\n".join(names[each].read_bytes() for each in sorted(names, key=lambda each: (crc32(each.encode()), each)))


@dataclass(frozen=True)
class Data:
    """Bytes on the device: the last tenth is for validation."""

    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, raw: bytes, device: torch.device) -> Data:
        values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)
        cut = len(values) * 9 // 10
        return cls(values[:cut], values[cut:])


@functools.cache
def load(name: str, device: str) -> Data:
    """The text of that name."""
    return Data.of(text(name), torch.device(device))


def batches(values: Tensor, size: Size, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [batch, context] without end: windows in random order, all of them before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(size.context + 1)
    count = (len(values) - 1) // size.context
    if count < size.batch:
        raise ValueError(f"text: expected at least {size.batch} windows of {size.context} bytes, got {count}")
    while True:
        for chosen in torch.randperm(count, generator=generator).split(size.batch):
            if len(chosen) < size.batch:
                break
            windows = values[(size.context * chosen[:, None] + offsets).to(values.device)].long()
            yield windows[:, :-1], windows[:, 1:]


# --- model ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        self.apply(self._initialize)
        for block in self.blocks:  # residual branches start small
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * size.layers))

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(size: Size, name: str, seed: int, device: torch.device) -> Transformer:
    """The same initial weights for every recipe of RECIPES; it is called under ``fp4gemm.autocast(recipe)``."""
    torch.manual_seed(seed)
    model = Transformer(size).to(device)
    if RECIPES[name] is None:
        return model
    kept = ("head", "blocks.0.", f"blocks.{size.layers - 1}.") if name.endswith(INNER) else ("head",)
    return fp4gemm.convert(model, None, lambda layer, _: not layer.startswith(kept))


# --- training ---------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def rate(step: int, size: Size) -> float:
    """Factor of the learning rate: a linear warm-up of a twentieth of the steps, then half a cosine down to a tenth."""
    warm = max(1, size.steps // 20)
    done = max(0.0, (step - warm) / max(1, size.steps - warm))
    return min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def validate(model: nn.Module, data: Data, size: Size, count: int = 10) -> float:
    model.eval()
    source = batches(data.validation, size, seed=0)
    losses = [float(loss_of(model, *next(source))) for _ in range(count)]
    model.train()
    return statistics.fmean(losses)


def train(
    name: str, seed: int, data: Data, size: Size, compiled: bool = False, finish: float = 0.0
) -> Iterator[dict[str, Any]]:
    """A run as a row of a measurement document, and with ``finish`` a second one; losses are in nats a byte.

    ``finish``: the second run goes its own way where so much of all steps is left, and is in bf16 from there on.
    """
    device, recipe = data.train.device, RECIPES[name]
    model = build(size, name, seed, device)
    step_model: nn.Module = torch.compile(model, fullgraph=True) if compiled else model  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, size))
    parts = (model, optimizer, schedule)
    losses = torch.empty(size.steps, device=device)  # read once, at the end: a step does not wait for the GPU

    def steps(first: int, last: int, recipe: Recipe | None) -> float:
        started = time.perf_counter()
        source = itertools.islice(batches(data.train, size, seed), first, last)
        for step, batch in enumerate(source, first):
            optimizer.zero_grad()
            with fp4gemm.autocast(recipe):
                loss = loss_of(step_model, *batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
        losses[-1:].tolist()  # waits
        return time.perf_counter() - started

    def row(finish: float, seconds: float) -> dict[str, Any]:
        values, every = losses.tolist(), max(1, size.steps // _POINTS)
        with fp4gemm.autocast(None if finish else recipe):
            validation = validate(model, data, size)
        return {
            "bench": "training",
            "recipe": f"{name}, then bf16" if finish else name,
            "finish": finish,
            "options": {} if recipe is None else recipe.as_dict(),
            "seed": seed,
            "steps": size.steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            "compiled": compiled,
            "train_loss": statistics.fmean(values[-max(1, int(_TAIL * size.steps)) :]),
            "val_loss": validation,
            "seconds": seconds,
            "curve": [statistics.fmean(values[at : at + every]) for at in range(0, size.steps, every)],
            "curve_steps": every,
        }

    fork = round((1 - finish) * size.steps)
    seconds = steps(0, fork, recipe)
    states = [copy.deepcopy(part.state_dict()) for part in parts] if finish else []
    yield row(0.0, seconds + steps(fork, size.steps, recipe))
    if finish:
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        yield row(finish, seconds + steps(fork, size.steps, None))


# --- results ----------------------------------------------------------------------------------------------------------


def by_recipe(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row)
    return found


def gap(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], loss: str) -> tuple[float, float] | None:
    """Mean over seeds of loss / baseline - 1 at the same seed, and the standard deviation; None without a baseline."""
    base = {row["seed"]: row[loss] for row in baseline}
    gaps = [row[loss] / base[row["seed"]] - 1 for row in rows if row["seed"] in base]
    if not gaps:
        return None
    return statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: losses of every recipe and their gap to bf16."""
    found = by_recipe(rows)
    lines = [
        "| recipe | seeds | training loss | gap to bf16 | validation loss | gap to bf16 | s per run |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, runs in found.items():
        cells = [f"`{name}`", str(len(runs))]
        for loss in ("train_loss", "val_loss"):
            difference = gap(runs, found.get(BASELINE, ()), loss)
            cells.append(f"{statistics.fmean(row[loss] for row in runs):.4f}")
            known = difference is not None and name != BASELINE
            cells.append(f"{difference[0]:+.2%} ± {difference[1]:.2%}" if known and difference else "")
        cells.append(f"{statistics.fmean(row['seconds'] for row in runs):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def region(document: dict[str, Any], file: str) -> str:
    """What docs/training.md says of a run."""
    rows = [row for row in document["rows"] if row["bench"] == "training"]
    first = rows[0]
    return (
        f"{document['gpu']}, torch {document['versions']['torch']}, {document['date'][:10]}, commit "
        f"{document['commit'][:12]}{' (modified)' if document['dirty'] else ''}: `{document['command']}`, "
        f"{first['parameters'] / 1e6:.1f} M parameters, {first['steps']} steps (`{file}`). Losses are nats a byte; the "
        f"training loss is the mean of the last {_TAIL:.0%} of the steps.\n\n{table(rows)}"
    )


def render(folder: Path, page: Path) -> str | None:
    """`page` with its region rendered from the newest document; None where there is no document."""
    found = report.newest(folder, "training")
    if found is None:
        return None
    return report.filled(page.read_text(encoding="utf-8"), BEGIN, END, region(found[1], found[0].name))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss by step, mean over seeds, and its difference to bf16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, gaps) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    found = by_recipe(rows)
    means = {
        name: [statistics.fmean(values) for values in zip(*(run["curve"] for run in runs), strict=True)]
        for name, runs in found.items()
    }
    for name, values in means.items():
        steps = [found[name][0]["curve_steps"] * (at + 0.5) for at in range(len(values))]
        curves.plot(steps, values, label=name, color="black" if name == BASELINE else None, linewidth=1.2)
        if name != BASELINE and BASELINE in means:
            above = [100 * (a / b - 1) for a, b in zip(values, means[BASELINE], strict=True)]
            gaps.plot(steps, above, label=name, linewidth=1.2)
    curves.set(xlabel="step", ylabel="training loss, nats a byte")
    gaps.set(xlabel="step", ylabel="above bf16, %")
    gaps.axhline(0, color="black", linewidth=0.8)
    for axes in (curves, gaps):
        axes.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="repeatable; default: all")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; they share the GPU, which shows in their times"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0 (default 3)")
    parser.add_argument("--text", choices=("topics", "stdlib", "torch"), default="topics")
    parser.add_argument(
        "--finish", type=float, default=0.0, help="run each recipe also with this share of the steps, the last, in bf16"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "measurements", help="of the JSON and the plot")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "training.md", help="where the table goes")
    parser.add_argument("--commit", help="of the sources, where there is no git")
    parser.add_argument("--render", action="store_true", help="only render the newest JSON")
    return parser.parse_args(arguments)


def _rows_of_run(options: argparse.Namespace, size: Size, seed: int, name: str) -> Iterator[dict[str, Any]]:
    data = load(options.text, options.device)
    yield from train(name, seed, data, size, options.compile, 0.0 if RECIPES[name] is None else options.finish)


def _list_of_run(*run: Any) -> list[dict[str, Any]]:
    return list(_rows_of_run(*run))


def _rows(
    options: argparse.Namespace, size: Size, runs: Sequence[tuple[int, str]]
) -> Iterator[Iterable[dict[str, Any]]]:
    """Of each run, in this order, or where they go on in processes of their own as they end."""
    if options.jobs == 1:
        yield from (_rows_of_run(options, size, *run) for run in runs)
        return
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_list_of_run, options, size, *run) for run in runs]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run(options: argparse.Namespace, words: Sequence[str]) -> Path:
    """Trains, and writes the document, again after every run: one that is interrupted keeps those that ended."""
    size = Size(**{name: getattr(options, name) for name in vars(Size())})
    data = load(options.text, options.device)
    print(f"{len(data.train)} bytes to train on, {len(data.validation)} to validate", flush=True)
    command = report.command_line("examples/train.py", words, ("--folder", "--page", "--commit"))
    document = report.Report("training", command, provenance.environment(options.commit), 0.0, [])
    path = report.free_path(options.folder, report.file_name(document.document()))
    runs = list(itertools.product(range(options.seeds), options.recipe or RECIPES))
    for row in itertools.chain.from_iterable(_rows(options, size, runs)):
        document.rows.append({"text": options.text, **row})
        report.write(document.document(), path)
        print(f"{row['recipe']:32} seed {row['seed']}: {row['train_loss']:.4f}, validation {row['val_loss']:.4f}, "
              f"{row['seconds']:.1f} s", flush=True)  # fmt: skip
    print(f"\n{table(document.rows)}\n\n{path}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """0: trained, or rendered; 1: nothing to render."""
    options = parse(arguments)
    if not options.render:
        options.folder.mkdir(parents=True, exist_ok=True)
        run(options, sys.argv[1:] if arguments is None else arguments)
    found = report.newest(options.folder, "training")
    if found is None:
        print(f"examples/train.py: no training rows in {options.folder}", file=sys.stderr)
        return 1
    if options.page.exists():
        page = render(options.folder, options.page)
        assert page is not None
        options.page.write_text(page, encoding="utf-8")
    with contextlib.suppress(ImportError):  # matplotlib is an extra
        plot([row for row in found[1]["rows"] if row["bench"] == "training"], options.folder / "training.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
