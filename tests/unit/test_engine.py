"""What a launch may read before the kernel in front of it has ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fp4gemm import engine, launch
from fp4gemm.engine import Activations, GroupedWeights, Output, Weight
from fp4gemm.spec import PackedCollectiveSpec, PackedMmaSpec, PackedWgmmaSpec

MMA = PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, 1, 16, 3, 1, 2, 0, 0)
WGMMA = PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 64, 7, 4, 1, 1, 2, 6)
COLLECTIVE = PackedCollectiveSpec("sm_90a", "bf16", "bf16", None, (128, 256, 64), (2, 1), "cooperative")
M, N, K = 4, 64, 128


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What plans are called with, stream first."""
    seen: list[tuple[Any, ...]] = []
    for name in ("packed_plan", "gemm_plan"):
        monkeypatch.setattr(engine, name, lambda *_: lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(engine, "address_of_one", lambda device: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return seen


def operands() -> tuple[Activations, torch.Tensor, torch.Tensor, Output]:
    x, d = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, N, dtype=torch.bfloat16)
    return Activations(x, None), torch.zeros(N * K * 9 // 16, dtype=torch.uint8), torch.ones(()), Output(d, None, 0.0)


@pytest.mark.parametrize("spec", [MMA, WGMMA], ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize(
    "dependent, programmatic, expected",
    [
        (None, False, (False, False)),
        (None, True, (True, False)),
        (False, False, (False, False)),
        (False, True, (False, False)),  # the kernel in front has just written the weight
        (True, False, (True, True)),
        (True, True, (True, True)),
    ],
)
def test_when_a_gemm_may_read_its_weight_first(spec, dependent, programmatic, expected, launched):
    """(the weight may come first, right behind the quantizer of the tokens)"""
    x, data, one, out = operands()
    with launch.programmatic(programmatic):
        engine.launch_spec(spec, x, Weight(data, one, N, K), None, out, dependent)
    ((stream, *what),) = (call[:3] for call in launched)
    assert (stream, tuple(what)) == (7, expected)


@pytest.mark.parametrize("dependent", [None, False, True])
def test_grouped_products_never_do(dependent, launched):
    x, data, one, out = operands()
    weights = GroupedWeights(data[None], one[None], torch.tensor([0, M]), 1, N, K, M)
    with launch.programmatic():
        engine.launch_grouped(WGMMA, x, weights, None, out, dependent)
    assert [call[:3] for call in launched] == [(7, False, bool(dependent))]


@pytest.mark.parametrize("dependent", [None, False, True])
def test_a_collective_is_always_launched_early(dependent, launched):
    x, data, one, out = operands()
    engine.launch_spec(COLLECTIVE, x, Weight(data, one, N, K), None, out, dependent)
    assert [call[:2] for call in launched] == [(7, True)]


def test_a_kernel_that_shares_tiles_has_memory_and_a_number_of_its_own(launched, monkeypatch):
    """Launches on two streams may run at once, and what one left in memory must not count for the next."""
    monkeypatch.setattr(engine.select, "gpu_of", lambda device: ("NVIDIA H200", 132))
    x, data, one, out = operands()
    spec = replace(COLLECTIVE, stream_k=True)
    for s in (spec, spec, COLLECTIVE):
        engine.launch_spec(s, x, Weight(data, one, N, K), None, out)
    first, second, plain = (call[2] for call in launched)
    assert first.workspace
    assert 0 < first.launch_number < second.launch_number < 2**63
    assert (plain.workspace, plain.launch_number) == (0, 0)
    assert spec.workspace_bytes(132) == 132 * (128 * 256 * 4 + 2 * 8)
