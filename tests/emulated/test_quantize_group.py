"""Kernels of groups, their own source on a CPU, against a loop over the reference: every byte of every member, its
padding too, and no byte around them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import emulator as emulation
import group_cases as cases
import groups
import pytest
import torch

import fp4gemm
from fp4gemm import select
from fp4gemm.grouped import calls, ops

PROBLEMS = 12  # of each kind
CPU = torch.device("cpu")


@pytest.fixture
def launches(emulator: emulation.Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``grouped.calls`` as on a GPU of two SMs, with CPU tensors."""
    monkeypatch.setattr(calls, "Launcher", partial(groups.Launcher, emulator.folder))
    monkeypatch.setattr(select, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(select, "gpu_of", lambda device: ("a GPU", 2))
    monkeypatch.setattr(select, "prefetch_ctas", lambda spec, k, device: 2)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1, raising=False)
    caches = calls._rows_kernel, calls._tile_kernel, calls._amax_kernel, calls._sums_kernel
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def run(case: cases.GroupCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, then the kernels in its place."""
    x, arguments = case.make(CPU)
    want = fp4gemm.quantize_grouped(x, **arguments, check_dims=True)
    with monkeypatch.context() as patch, cases.guarded():
        patch.setattr(ops.reference, "quantize_grouped", calls.quantize)
        got = fp4gemm.quantize_grouped(x, **arguments)
    cases.assert_results(got, want, case.columns, f"{case}", guarded=True)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("seed", range(PROBLEMS))
@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_groups(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(cases.GroupCase.draw(seed, kind, largest=200), monkeypatch)
