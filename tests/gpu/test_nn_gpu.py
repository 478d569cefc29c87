"""Layers on the GPU: gradients, torch.compile, CUDA graphs of training steps, weights that are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import gpu_cases as cases
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).parent))
import nn_cases
from test_torch_gpu import inductor_lacks

import fp4gemm
from fp4gemm.nn import Linear, micro_batches


@pytest.mark.parametrize("shape", nn_cases.SHAPES, ids=str)
@pytest.mark.parametrize("name", nn_cases.RECIPES)
def test_gradients(name: str, shape: tuple[int, int, int], device: torch.device) -> None:
    nn_cases.check_gradients(name, shape, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_of_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    nn_cases.check_gradients("rht_sr_2d", (40, 64, 130), dtype, device)


@pytest.mark.parametrize("name", [name for name, r in nn_cases.RECIPES.items() if r.hadamard is None])
def test_exact(name: str, device: torch.device) -> None:
    nn_cases.check_exact(name, device)


def test_hadamard_cancels(device: torch.device) -> None:
    nn_cases.check_hadamard(device)


@pytest.mark.parametrize("name", nn_cases.RECIPES)
def test_serving_is_the_forward_of_training(name: str, device: torch.device) -> None:
    """Prepacked and kept or not: one result."""
    x, w, bias, _ = nn_cases.problem((40, 64, 130), device)
    layer = Linear(130, 64, device=device, recipe=nn_cases.RECIPES[name])
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(bias)
    want = layer(x).detach()
    with torch.no_grad():
        cases.assert_same_bits(layer(x), want, "no_grad")
        layer.eval()
        for _ in range(2):
            cases.assert_same_bits(layer(x), want, "eval")
    with micro_batches():
        for _ in range(2):
            cases.assert_same_bits(layer(x).detach(), want, "micro_batches")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["per_token", "rht_sr_2d", "per_tensor", "w4a16"])
def test_compiled_block(name: str, backend: str, device: torch.device) -> None:
    """No graph breaks; inductor rounds what is between the layers differently, and draws other seeds."""
    if backend == "inductor" and (lacks := inductor_lacks(device)):
        pytest.skip(lacks)
    torch._dynamo.reset()
    model = nn_cases.Block(recipe=nn_cases.RECIPES[name]).to(device)
    x = torch.randn(48, 64, device=device)
    want = nn_cases.run_block(model, x)
    got = nn_cases.run_block(torch.compile(model, fullgraph=True, backend=backend), x)
    if backend == "aot_eager":
        nn_cases.assert_same_step(got, want, name)
    else:
        assert nn_cases.relative_error(got[0], want[0]) < 0.05
        for key, value in got[1].items():
            assert nn_cases.relative_error(value, want[1][key]) < 0.4, key
    model.eval()
    with torch.no_grad():
        expected, compiled = model(x), torch.compile(model, fullgraph=True, backend=backend)
        assert nn_cases.relative_error(compiled(x), expected) < 0.05
        assert nn_cases.relative_error(compiled(x), expected) < 0.05


def test_compiled_for_any_number_of_tokens(device: torch.device) -> None:
    """One trace, forward and backward, with the bits of the layer that is not compiled. Up to 64 tokens may take
    another: packed by blocks of 64, x^T has a size of 1 then, which torch.compile never leaves open."""
    torch._dynamo.reset()
    layer = Linear(128, 96, recipe=nn_cases.RECIPES["per_token"]).to(device, torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens, traces in ((300, 1), (100, 1), (65, 1), (40, 2), (64, 2)):
        x, dy = (torch.randn(tokens, n, device=device).bfloat16() for n in (128, 96))
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.backward(dy)
            results.append((y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad))
        for got, want in zip(*reversed(results), strict=True):
            cases.assert_same_bits(got, want, f"{tokens} tokens")
        assert counter.frame_count <= traces


def _training_graph(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(x).float().square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(x).float().square().mean()
        loss.backward()
    return graph, loss


@pytest.mark.parametrize("name", ["per_token", "rht_sr_2d", "w4a16"])
def test_cuda_graph_of_a_training_step(name: str, cuda: torch.device) -> None:
    """Replays read new inputs and new weights; with stochastic rounding each has its own noise."""
    recipe = nn_cases.RECIPES[name]
    model = nn_cases.Block(recipe=recipe).to(cuda)
    x = torch.randn(48, 64, device=cuda)
    graph, loss = _training_graph(model, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for step in range(4):
        x.copy_(torch.randn(48, 64, device=cuda, generator=torch.Generator(cuda).manual_seed(step)))
        graph.replay()
        losses.append(float(loss))
        replayed = {n: p.grad.clone() for n, p in model.named_parameters()}
        eager = nn_cases.Block(recipe=recipe).to(cuda)
        eager.load_state_dict(model.state_dict())
        want = nn_cases.run_block(eager, x)
        if not recipe.stochastic:
            for n, gradient in replayed.items():
                cases.assert_same_bits(gradient, want[1][n], f"step {step}, {n}")
        graph.replay()
        again = model.up.weight.grad
        assert torch.equal(again, replayed["up.weight"]) != recipe.stochastic, step
        optimizer.step()
    assert len(set(losses)) == 4


def test_cuda_graph_of_serving(cuda: torch.device) -> None:
    """A graph reads the weight that was kept, and its memory stays, whatever becomes of the weight."""
    model = nn_cases.Block(recipe=nn_cases.RECIPES["per_token"]).to(cuda).eval()
    x = torch.randn(48, 64, device=cuda)
    with torch.no_grad():
        want = model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(x)
        for layer in (model.up, model.down):  # the norm and biases are read where they are
            layer.weight.mul_(2)
        other = [model(x) for _ in range(3)]
        garbage = [torch.full_like(t, 7) for t in other for _ in range(50)]
        graph.replay()
        torch.cuda.synchronize()
    del garbage
    cases.assert_same_bits(got, want, "replay")


def test_a_fused_step_and_eval(device: torch.device) -> None:
    """Fused optimizers do not change the version of a weight: what is kept in eval mode must not outlive training."""
    model = nn_cases.Block(recipe=nn_cases.RECIPES["per_token"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = torch.randn(48, 64, device=device)
    results = []
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            results.append(model(x))
            fresh = nn_cases.Block(recipe=nn_cases.RECIPES["per_token"]).to(device).eval()
            fresh.load_state_dict(model.state_dict())
            cases.assert_same_bits(results[-1], fresh(x), "kept weight")
        model.train()
        model(x).sum().backward()
        optimizer.step()
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_converted_encoder_compiled_and_eager(backend: str, device: torch.device) -> None:
    """A real sentence encoder, its Linears converted in place."""
    if backend == "inductor" and (lacks := inductor_lacks(device)):
        pytest.skip(lacks)
    nn_cases.check_encoder(backend, device)


def test_main_grad(device: torch.device) -> None:
    x, w, _, dy = nn_cases.problem((40, 64, 130), device)
    fp4gemm.nn.linear(x, w).backward(dy)
    want, w.grad = w.grad, None
    w.main_grad = torch.ones_like(w)
    for _ in range(2):
        fp4gemm.nn.linear(x, w).backward(dy)
    assert w.grad is None
    torch.testing.assert_close(w.main_grad, 1 + 2 * want.detach(), rtol=1e-6, atol=1e-5)
