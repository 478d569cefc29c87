"""Kernels where their own machine is missing: on a CPU, where only g++ is needed, and Blackwell's on a Hopper GPU.

The latter are compiled beside the tests, several at once, and each test waits for the kernels that it launches: those
that are built first are tested first. `--all-kernels` runs more of them than default variants and what the public
functions choose; `--emulated-json FILE` writes what the run showed as a measurement document.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# --import-mode=importlib leaves test folders off the path; gpu_cases is in tests/gpu.
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import build_kernels
import emulation
import emulator as on_cpu
import torch
from mutations import INTACT, MUTATIONS
from specs import CHOSEN, GROUPED, ONLY_ON_REQUEST, VARIANTS

from fp4gemm import provenance, report

HERE = Path(__file__).parent
started = pytest.StashKey[float]()
_WRITING = ("--emulated-json", "--emulated-commit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-kernels", action="store_true", help="run all emulated GEMM kernels, not only the default ones"
    )
    parser.addoption("--emulated-json", metavar="FILE", type=Path, help="write what the emulated GPU tests showed")
    parser.addoption("--emulated-commit", metavar="SHA", help="the commit that is named there, where git is missing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[started] = time.perf_counter()


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _needed(item: pytest.Item) -> Sequence[build_kernels.Kernel]:
    """The kernels that a test launches, or may choose from; none where it runs on the CPU or is skipped."""
    if HERE not in item.path.parents or item.get_closest_marker("gpu") is None or emulation.missing() is not None:
        return []
    if item.get_closest_marker("skip") is not None:
        return []
    parameters = _parameters(item)
    if "spec" in parameters:
        return [parameters["spec"]]
    if "ran" in parameters:  # the first runs them all, in processes of their own
        return [*MUTATIONS, *(kernel.spec for kernel in INTACT)]
    arch = parameters.get("arch")
    chosen = [*VARIANTS, *CHOSEN, *(spec for spec in GROUPED if spec not in ONLY_ON_REQUEST)]
    return [spec for spec in chosen if arch in (None, spec.arch)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the order of building."""
    if not config.getoption("--all-kernels", default=False):
        on_request = pytest.mark.skip(reason="not a default variant: runs with --all-kernels")
        for item in items:
            if HERE in item.path.parents and _parameters(item).get("spec") in ONLY_ON_REQUEST:
                item.add_marker(on_request)
    order = {kernel: index for index, kernel in enumerate(build_kernels.KERNELS)}
    items.sort(key=lambda item: max((order[kernel] for kernel in _needed(item)), default=-1))


@pytest.fixture(scope="session")
def building(request: pytest.FixtureRequest) -> Iterator[build_kernels.Building]:
    """Of all kernels that the chosen tests launch."""
    needed = {kernel for item in request.session.items for kernel in _needed(item)}
    building = build_kernels.Building([kernel for kernel in build_kernels.KERNELS if kernel in needed])
    torch.set_num_threads(1)  # compilers have the other cores; an operator on all of them would wait for the slowest
    yield building
    building.stop()


@pytest.fixture(autouse=True)
def _kernels_are_built(request: pytest.FixtureRequest) -> None:
    if needed := _needed(request.node):
        request.getfixturevalue("building").wait(needed)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> on_cpu.Emulator:
    if reason := on_cpu.missing():
        pytest.skip(reason)
    return on_cpu.make(tmp_path_factory.mktemp("emulated"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    target = config.getoption("--emulated-json", default=None)
    if target is None or emulation.missing() is not None:
        return
    passed, failed, errors, skipped = (
        len(terminalreporter.getreports(name)) for name in ("passed", "failed", "error", "skipped")
    )
    words = report.command_line("pytest", list(map(str, config.invocation_params.args)), _WRITING)
    seconds = time.perf_counter() - config.stash[started]
    tests = report.TestCounts(passed, failed + errors, skipped, words, seconds)
    entries = ((kernel, build_kernels.lookup(kernel)) for kernel in build_kernels.KERNELS)
    rows = [report.compile_row(k.name, k.arch, e.meta, "emulated") for k, e in entries if e is not None]
    environment = provenance.environment(config.getoption("--emulated-commit"))
    report.write(report.Report("emulated", words, environment, 0.0, rows, tests).document(), target)
