"""Files that are written whole or not at all, and the names of measurements."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def gpu_slug(gpu: str) -> str:
    """A GPU's name as file names carry it: 'NVIDIA H200' -> 'h200'."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return words.removeprefix("nvidia-") or "unknown"


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a temporary sibling, which is renamed to ``path`` at the end: a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.chmod(temporary, 0o644)  # mkstemp makes 0600; these are public files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes ``path`` in one go."""
    with whole(path) as stream:
        stream.write(text.encode("utf-8"))
