"""Files of measurements: named after a GPU, and written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def gpu_slug(gpu: str) -> str:
    """A GPU's name as file names carry it: 'NVIDIA H200' -> 'h200'."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return words.removeprefix("nvidia-") or "unknown"


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` through a temporary sibling, then rename: a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes 0600; a measurement is a public file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
