"""What figures were measured on: the sources, the GPU and its driver, and versions of what they depend on."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Environment:
    """What the figures were measured on."""

    commit: str
    dirty: bool
    gpu: str
    driver: str
    versions: dict[str, str]


def _output(command: Sequence[str], folder: Path | None = None) -> str | None:
    """What a command prints, stripped; None when it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def project_root() -> Path:
    """The folder that holds the package: the checkout, when the package runs from one."""
    return Path(__file__).resolve().parents[1]


def git_state(root: Path | None = None) -> tuple[str, bool] | None:
    """(commit, dirty) of the checkout at `root`; None outside one, without git, or before the first commit."""
    root = root or project_root()
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return None
    commit = _output(["git", "rev-parse", "HEAD"], root)
    status = _output(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return (commit, bool(status)) if commit and status is not None else None


def source_state(commit: str | None = None, root: Path | None = None) -> tuple[str, bool]:
    """(commit, dirty) of what is measured: the given commit, else git's, else $GIT_COMMIT, else "unknown".

    Sources copied to a GPU machine have no history: there a commit that the caller names counts as clean,
    anything else counts as dirty.
    """
    state = git_state(root)
    if commit:
        return commit, state[1] if state and state[0].startswith(commit) else False
    if state:
        return state
    return os.environ.get("GIT_COMMIT") or UNKNOWN, True


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown"."""
    text = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return text.splitlines()[0].strip() if text else UNKNOWN


def _try_version(get: Callable[[], str]) -> str:
    try:
        return get()
    except Exception as error:  # a missing toolchain must not lose a finished run
        return f"absent ({type(error).__name__})"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import torch

    import fp4gemm
    from fp4gemm import toolchain

    found = {
        "fp4gemm": fp4gemm.__version__,
        "torch": torch.__version__,
        "nvrtc": _try_version(lambda: str(toolchain.nvrtc_version())),
        "cutlass": _try_version(lambda: str(toolchain.find_headers().cutlass_version)),
    }
    for peer in ("humming-kernels", "nvidia-modelopt", "torchao"):  # measured where they are installed
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[peer] = metadata.version(peer)
    return found


def environment(commit: str | None = None) -> Environment:
    """The machine and the sources, as a Report needs them; names the current CUDA device, "cpu" where there is none."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    named, dirty = source_state(commit)
    return Environment(commit=named, dirty=dirty, gpu=gpu, driver=driver_version(), versions=versions())
