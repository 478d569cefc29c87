"""How long a product by a kernel takes, in turn with others: what a launch, a tile and a block of K take of the kernel,
measured on an H200 (sm90_rates.json, which tools/tune.py writes), times what the busiest CTA has of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from fp4gemm.division import Sequence
from fp4gemm.files import write_whole
from fp4gemm.table import kernel_of

PACKAGED = Path(__file__).with_name("sm90_rates.json")
_SCHEMA = 1


@dataclass(frozen=True)
class Rate:
    """Microseconds of a launch, of each tile and of each block of K of its ``kernel`` and ``config``
    (``select.packed_of``), and of each cluster more to a tile that they share."""

    kernel: str
    config: tuple[int, ...]
    launch: float
    tile: float
    block: float
    sharing: float = 0.0

    def microseconds(self, longest: Sequence) -> float:
        tiles, blocks, sharing = longest
        return self.launch + self.tile * tiles + self.block * blocks + self.sharing * sharing


def read(path: Path) -> tuple[Rate, ...]:
    """Raises ValueError, which names the file, where it has no rates."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']}, expected {_SCHEMA}")
        terms = ("launch", "tile", "block", "sharing")
        return tuple(Rate(*kernel_of(row), *(float(row[term]) for term in terms)) for row in document["rates"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no rates of kernels ({error})") from error


def write(path: Path, rates: Iterable[Rate], **about: str) -> None:
    """Write a file of rates whole or not at all; ``about`` says where they were measured."""
    lines = [json.dumps(asdict(rate)) for rate in rates]
    head = json.dumps({"schema": _SCHEMA, **about})[:-1]
    write_whole(path, head + ', "rates": [\n ' + ",\n ".join(lines) + "\n]}\n")


@cache
def packaged() -> tuple[Rate, ...]:
    return read(PACKAGED)
