"""Which kernel was fastest for which product x [m, k] . w [n, k]^T: the table measured on an H200 that comes with the
package (sm90_table.json), and before it what ``fp4gemm tune`` measured here (in the cache folder)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fp4gemm.env import settings
from fp4gemm.files import gpu_slug, write_whole

PACKAGED = Path(__file__).with_name("sm90_table.json")
_SCHEMA = 1
_CONFIG_LENGTHS = {"mma": 7, "wgmma": 7, "collective": 3, "stream_k": 3}


@dataclass(frozen=True)
class Choice:
    """For up to ``m`` tokens: the kind of kernel ("mma", "wgmma", "collective", "stream_k") and its configuration
    (``select.packed_of``)."""

    m: int
    n: int
    k: int
    kernel: str
    config: tuple[int, ...]


Kernel = tuple[str, tuple[int, ...]]


def kernel_of(row: dict[str, Any]) -> Kernel:
    """The kernel that a row of a file names. Raises KeyError, TypeError or ValueError where it does not."""
    kernel, config = str(row["kernel"]), tuple(map(int, row["config"]))
    if _CONFIG_LENGTHS.get(kernel) != len(config):
        raise ValueError(f"kernel {kernel!r} with the configuration {config}")
    return kernel, config


def _choice(row: dict[str, Any]) -> Choice:
    m, n, k = (int(row[size]) for size in ("m", "n", "k"))
    return Choice(m, n, k, *kernel_of(row))


def read(path: Path) -> tuple[Choice, ...]:
    """The rows of a table. Raises ValueError, which names the file, where it is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']}, expected {_SCHEMA}")
        return tuple(_choice(row) for row in document["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of kernels ({error}); remove it, or run `fp4gemm tune` again") from error


def write(path: Path, rows: Iterable[Choice], **about: str) -> None:
    """Write a table whole or not at all; ``about`` says where it was measured."""
    ordered = sorted(rows, key=lambda row: (row.n, row.k, row.m))
    lines = [json.dumps(asdict(row)) for row in ordered]
    head = json.dumps({"schema": _SCHEMA, **about})[:-1]
    write_whole(path, head + ', "rows": [\n ' + ",\n ".join(lines) + "\n]}\n")


def tuned_path(gpu: str) -> Path:
    """Where ``fp4gemm tune`` keeps what it measured on a GPU of this name."""
    return settings().cache_dir / f"tuned-{gpu_slug(gpu)}.json"


@cache
def rows_for(gpu: str) -> tuple[Choice, ...]:
    """Own measurements first: they win where both have a product."""
    path = tuned_path(gpu)
    return (read(path) if path.exists() else ()) + read(PACKAGED)


def measured(rows: Iterable[Choice], m: int, n: int, k: int) -> Choice | None:
    """The row of this shape with the least tokens that cover the call's, else the one with the most, of those with at
    most twice or half as many; None where there is none."""
    near = [row for row in rows if (row.n, row.k) == (n, k) and m <= 2 * row.m and row.m <= 2 * m]
    return min(near, key=lambda row: (row.m < m, abs(row.m - m)), default=None)
