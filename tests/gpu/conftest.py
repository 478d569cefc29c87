"""Everything here runs kernels: it is skipped, with the reason, where no GPU has any.

`--on-cpu` runs the same tests against the CPU path instead. That shows that the tests themselves are right; it says
nothing about kernels. `--tests-json FILE` writes the counts that `fp4gemm bench --tests-json FILE` records.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for gpu_cases: --import-mode=importlib leaves test folders off the path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-cpu", action="store_true", help="run tests/gpu against the CPU path (checks the tests)")
    parser.addoption("--tests-json", metavar="FILE", help="write passed, failed, skipped and the command as JSON")


def missing() -> str | None:
    """What this machine lacks for the kernels; None when it has everything."""
    if not torch.cuda.is_available():
        build = torch.version.cuda
        return "no CUDA device: " + (f"torch built for CUDA {build} finds none" if build else "torch is a CPU build")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"no device of compute capability 9.0: {torch.cuda.get_device_name()} has {major}.{minor}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = None if config.getoption("--on-cpu", default=False) else missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the operations run."""
    return torch.device("cpu" if request.config.getoption("--on-cpu", default=False) else "cuda")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The same for tests of what only CUDA has: streams, graphs, several devices."""
    if device.type != "cuda":
        pytest.skip("--on-cpu: this test needs CUDA streams or graphs")
    return device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    target = config.getoption("--tests-json", default=None)
    if not target:
        return
    counts = {name: len(terminalreporter.getreports(name)) for name in ("passed", "failed", "error", "skipped")}
    failed = counts["failed"] + counts.pop("error")
    arguments = [a for a in config.invocation_params.args if not str(a).startswith("--tests-json") and str(a) != target]
    command = shlex.join(["pytest", *map(str, arguments)])
    Path(target).write_text(json.dumps({**counts, "failed": failed, "command": command}) + "\n", encoding="utf-8")
