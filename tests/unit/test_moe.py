"""The mixture of experts of the examples, small and on the CPU: the bits of a loop of dense layers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fp4gemm.nn import per_token, w4a16

ROOT = Path(__file__).resolve().parents[2]


def load_example():
    spec = importlib.util.spec_from_file_location("example_moe", ROOT / "examples" / "moe.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_moe"] = module
    spec.loader.exec_module(module)
    return module


example = load_example()
TINY = example.Size(width=32, hidden=48, experts=6, top=2)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, TINY.width, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def moe():
    torch.manual_seed(0)
    return example.MoE(TINY, per_token())


@pytest.mark.parametrize("count", [1, 2, 50])
def test_serving_has_the_bits_of_a_loop(moe, count):
    moe.eval()
    with torch.no_grad():
        got, want = moe(tokens(count)), example.dense(moe)(tokens(count))
        assert got.shape == (count, TINY.width)
        assert torch.equal(got, want)
        moe.fused = False  # SiLU in torch, rounded to bf16, is not that of the producer
        assert example.difference(moe(tokens(count)), want)[1] < 0.1


@pytest.mark.parametrize("recipe", [per_token(), w4a16()], ids=["per_token", "w4a16"])
def test_a_step_has_the_bits_of_a_loop(recipe):
    torch.manual_seed(0)
    moe = example.MoE(TINY, recipe)
    found = []
    for block in (moe, example.dense_layers(moe)):
        example.step(block, moe, tokens(40))()
        found.append([p.grad for p in moe.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.any()


def test_it_computes_a_mixture_of_experts():
    """Against the definition, in float64."""
    torch.manual_seed(0)
    moe = example.MoE(TINY, w4a16(), dtype=torch.float32)
    x = tokens(30).float()
    want = torch.zeros(30, TINY.width, dtype=torch.float64)
    weights, chosen = moe.router(x).softmax(-1).topk(TINY.top)
    for t in range(30):
        for share, e in zip(weights[t] / weights[t].sum(), chosen[t], strict=True):
            gate, up = (moe.up.weight[e].double() @ x[t].double()).chunk(2)
            want[t] += share * (moe.down.weight[e].double() @ (torch.nn.functional.silu(gate) * up))
    got = example.in_torch(moe)(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert 0.01 < example.difference(moe(x), want)[1] < 0.3  # NVFP4 weights


def test_routing():
    logits = torch.randn(100, 7, generator=torch.Generator().manual_seed(2))
    routing = example.Routing.of(logits, 3)
    chosen = logits.topk(3).indices
    assert routing.offsets.diff().tolist() == torch.bincount(chosen.flatten(), minlength=7).tolist()
    for e in range(7):
        rows = slice(routing.offsets[e], routing.offsets[e + 1])
        assert routing.source[rows].tolist() == (chosen == e).any(1).nonzero().flatten().tolist()
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(100))
    rows = routing.source[:, None].float()
    torch.testing.assert_close(routing.combine(rows)[:, 0], torch.arange(100.0))


def test_it_runs(capsys):
    assert example.main(["--device", "cpu", "--tokens", "3", "--width", "32", "--hidden", "48", "--train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 experts, 2 for each token, 32 -> 48 -> 32, cpu"
    assert "100.00% of values as in the loop" in lines[1]
    assert "gradients differ by 0.0e+00" in lines[2]
