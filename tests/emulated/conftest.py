"""The kernels of GEMMs on prepacked weights, their own C++ source, on a CPU: no GPU and no CUDA, only g++."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves test folders off the path

import emulator as emulation


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> emulation.Emulator:
    if reason := emulation.missing():
        pytest.skip(reason)
    return emulation.make(tmp_path_factory.mktemp("emulated"))
