"""That the comparisons of test_blackwell_gpu.py can fail: five faults in a kernel, each of which they must notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import build_kernels
import emulation
import mutations
import pytest
from mutations import INTACT, MUTATIONS, Mutation

from fp4gemm import toolchain
from fp4gemm.toolchain import ToolchainError

SECONDS = 60  # a kernel that was built takes far less, Python and all
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(emulation.missing() is not None, reason=emulation.missing() or ""),
]


def run(kernel: Mutation) -> str:
    """right, wrong or hangs."""
    command = [sys.executable, mutations.__file__, kernel.name]
    environ = {**os.environ, "FP4GEMM_DISABLE_JIT": "1"}
    try:
        done = subprocess.run(command, timeout=SECONDS, env=environ, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    print(done.stdout)
    assert done.returncode in (0, mutations.WRONG), f"{kernel.name} neither passed nor failed:\n{done.stderr}"
    return "wrong" if done.returncode else "right"


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, building: build_kernels.Building) -> Iterator[dict[str, Future[str]]]:
    """Of all kernels that tests here run: at once, as each process takes seconds to begin."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    kernels = [found.params["ran"] for found in parameters if found is not None and "ran" in found.params]
    building.wait(kernel.spec if kernel in INTACT else kernel for kernel in kernels)
    with ThreadPoolExecutor(len(kernels)) as pool:
        yield {kernel.name: pool.submit(run, kernel) for kernel in kernels}


@pytest.mark.parametrize("kernel", MUTATIONS, ids=lambda kernel: kernel.name)
def test_a_fault_is_an_edit_of_this_cutlass(kernel: Mutation) -> None:
    try:
        include = toolchain.cutlass_include()
    except ToolchainError as error:
        pytest.skip(str(error))
    for name, edits in kernel.edits:
        before = after = (include / name).read_text()
        for edit in edits:
            after = edit(after)
        assert after != before


@pytest.mark.parametrize("ran", [pytest.param(kernel, marks=on_gpu, id=kernel.name) for kernel in INTACT])
def test_an_intact_kernel_is_right(ran: Mutation, outcomes: dict[str, Future[str]]) -> None:
    assert outcomes[ran.name].result() == "right"


@pytest.mark.parametrize("ran", [pytest.param(kernel, marks=on_gpu, id=kernel.name) for kernel in MUTATIONS])
def test_a_fault_is_noticed(ran: Mutation, outcomes: dict[str, Future[str]]) -> None:
    assert outcomes[ran.name].result() in ("wrong", "hangs")
