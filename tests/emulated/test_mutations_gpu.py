"""That the comparisons of test_blackwell_gpu.py can fail: five faults in a kernel, each of which they must notice."""

from __future__ import annotations

import os
import subprocess
import sys

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


def outcome(kernel: Mutation) -> str:
    """right, wrong or hangs. Building is no part of what is timed."""
    kernel.build()
    command = [sys.executable, mutations.__file__, kernel.name]
    environ = {**os.environ, "FP4GEMM_DISABLE_JIT": "1"}
    try:
        done = subprocess.run(command, timeout=SECONDS, env=environ, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    print(done.stdout)
    assert done.returncode in (0, mutations.WRONG), f"{kernel.name} neither passed nor failed:\n{done.stderr}"
    return "wrong" if done.returncode else "right"


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


@pytest.mark.parametrize("kernel", [pytest.param(kernel, marks=on_gpu, id=kernel.name) for kernel in INTACT])
def test_an_intact_kernel_is_right(kernel: Mutation) -> None:
    assert outcome(kernel) == "right"


@pytest.mark.parametrize("mutation", [pytest.param(kernel, marks=on_gpu, id=kernel.name) for kernel in MUTATIONS])
def test_a_fault_is_noticed(mutation: Mutation) -> None:
    assert outcome(mutation) in ("wrong", "hangs")
