"""Kernels where their own machine is missing: on a CPU, where only g++ is needed, and Blackwell's on a Hopper GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# --import-mode=importlib leaves test folders off the path; gpu_cases is in tests/gpu.
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import emulator as emulation


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> emulation.Emulator:
    if reason := emulation.missing():
        pytest.skip(reason)
    return emulation.make(tmp_path_factory.mktemp("emulated"))
