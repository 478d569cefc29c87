"""Layers of experts on the GPU: gradients beside a loop of linear, torch.compile, CUDA graphs that follow offsets."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import gpu_cases as cases
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import nn_cases
from test_torch_gpu import inductor_lacks

from fp4gemm.nn import GroupedLinear, micro_batches, per_token

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(16, 16), (33, 70), (128, 64), (64, 130), (1, 48), (24, 1)]  # N, K
SKEWED = tuple(random.Random(1).choices((0, 0, 1, 3, 40, 300), k=64))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", nn_cases.GROUPED_RECIPES)
def test_gradients(name: str, size: tuple[int, int], device: torch.device) -> None:
    nn_cases.check_grouped(name, nn_cases.COUNTS, *size, torch.bfloat16, device, spare=9)


@pytest.mark.parametrize("counts", [(5,), (0, 0, 0, 2), (256, 0, 512), SKEWED], ids=["1", "4", "3", "64"])
@pytest.mark.parametrize("name", ["per_token", "rht_sr_2d", "w4a16"])
def test_gradients_of_other_groups(name: str, counts: tuple[int, ...], device: torch.device) -> None:
    nn_cases.check_grouped(name, counts, 72, 136, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_of_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    nn_cases.check_grouped("rht_sr_2d", nn_cases.COUNTS, 64, 130, dtype, device)


@pytest.mark.parametrize("name", [n for n, r in nn_cases.GROUPED_RECIPES.items() if r.hadamard is None])
def test_exact(name: str, device: torch.device) -> None:
    nn_cases.check_grouped_exact(name, device)


@pytest.mark.parametrize("name", ["per_token", "rht", "weight_2d", "w4a16"])
def test_beside_a_loop(name: str, device: torch.device) -> None:
    """The same operands, with sums in another order; dw is rounded to bf16 once more."""
    counts = (100, 0, 7, 300)
    layer, x, offsets, dy = nn_cases.grouped_problem(counts, 256, 192, device, recipe=nn_cases.RECIPES[name])
    y = layer(x, offsets)
    y.backward(dy)
    got = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
    for what, a, b in zip(("y", "dx", "dw", "db"), got, nn_cases.loop(layer, x, dy, counts), strict=True):
        assert nn_cases.relative_error(a, b) < (1e-5 if what == "db" else 2e-3), what
        assert torch.equal(a[1], b[1]) or what in ("y", "dx")  # zeros of the expert without tokens


@pytest.mark.parametrize("name", nn_cases.GROUPED_RECIPES)
def test_no_tokens(name: str, device: torch.device) -> None:
    layer = GroupedLinear(3, 64, 32, device=device, recipe=nn_cases.RECIPES[name])
    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    for rows in (0, 20):  # none at all, or none of an expert's
        x = torch.zeros(rows, 64, device=device, requires_grad=True)
        layer.zero_grad()
        y = layer(x, offsets)
        y.backward(torch.ones_like(y))
        assert x.grad.shape == x.shape
        assert not any(t.grad.any() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("name", nn_cases.GROUPED_RECIPES)
def test_serving_is_the_forward_of_training(name: str, device: torch.device) -> None:
    """Kept or not, rows alone or with their transposes: one result."""
    layer, x, offsets, _ = nn_cases.grouped_problem(nn_cases.COUNTS, 64, 130, device, recipe=nn_cases.RECIPES[name])
    want = layer(x, offsets).detach()
    with torch.no_grad():
        cases.assert_same_bits(layer(x, offsets), want, "no_grad")
        layer.eval()
        for _ in range(2):
            cases.assert_same_bits(layer(x, offsets), want, "eval")
    with micro_batches():
        for _ in range(2):
            cases.assert_same_bits(layer(x, offsets).detach(), want, "micro_batches")


@pytest.mark.parametrize("name", ["per_token", "w4a16"])
def test_main_grad(name: str, device: torch.device) -> None:
    layer, x, offsets, dy = nn_cases.grouped_problem(
        nn_cases.COUNTS, 64, 130, device, recipe=nn_cases.RECIPES[name]
    )  # fmt: skip
    layer(x, offsets).backward(dy)
    want, layer.weight.grad = layer.weight.grad, None
    layer.weight.main_grad = torch.ones_like(layer.weight)
    for _ in range(2):
        layer(x, offsets).backward(dy)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad, 1 + 2 * want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["per_token", "rht_sr_2d", "w4a16"])
def test_compiled_experts(name: str, backend: str, device: torch.device) -> None:
    if backend == "inductor" and (lacks := inductor_lacks(device)):
        pytest.skip(lacks)
    torch._dynamo.reset()
    model = nn_cases.Experts(6, recipe=nn_cases.RECIPES[name]).to(device)
    x = torch.randn(sum(nn_cases.COUNTS), 64, device=device)
    offsets = nn_cases.offsets_of(nn_cases.COUNTS, device)
    want = nn_cases.run_block(model, x, offsets)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = nn_cases.run_block(compiled, x, offsets)
    if backend == "aot_eager":
        nn_cases.assert_same_step(got, want, name)
    else:
        assert nn_cases.relative_error(got[0], want[0]) < 0.05
        for key, value in got[1].items():
            assert nn_cases.relative_error(value, want[1][key]) < 0.4, key
    model.eval()
    with torch.no_grad():
        assert nn_cases.relative_error(compiled(x, offsets), model(x, offsets)) < 0.05


@pytest.mark.parametrize("name", ["per_token", "rht_sr_2d", "w4a16"])
def test_a_graph_of_a_training_step_follows_offsets(name: str, cuda: torch.device) -> None:
    """Captured once; replays see other sizes, tokens and weights. With stochastic rounding each has its own noise."""
    recipe = nn_cases.RECIPES[name]
    rows, experts = 300, 6
    model = nn_cases.Experts(experts, recipe=recipe).to(cuda)
    x = torch.randn(rows, 64, device=cuda)
    offsets = nn_cases.offsets_of((50,) * experts, cuda)
    weigh = torch.zeros(rows, 1, device=cuda)  # rows of no expert are undefined: they must not reach the loss

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        y = model(x, offsets).float()
        return torch.where(weigh > 0, y, 0.0).square().sum()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            loss_of(model).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_of(model).backward()
    for step, counts in enumerate(
        [(50,) * 6, (0, 0, 300, 0, 0, 0), (1, 17, 0, 16, 31, 99), (0,) * 6, (0, 7, 0, 0, 0, 1)]
    ):
        generator = torch.Generator(cuda).manual_seed(step)
        x.copy_(torch.randn(rows, 64, device=cuda, generator=generator))
        offsets.copy_(nn_cases.offsets_of(counts, cuda))
        weigh.copy_((torch.arange(rows, device=cuda) < sum(counts))[:, None])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.125)
        graph.replay()
        replayed = nn_cases.grads(model)
        eager = nn_cases.Experts(experts, recipe=recipe).to(cuda)
        eager.load_state_dict(model.state_dict())
        loss_of(eager).backward()
        for n, gradient in nn_cases.grads(eager).items():
            if recipe.stochastic:
                assert bool(gradient.isfinite().all()), n
                close = nn_cases.relative_error(replayed[n], gradient) < 0.5
                assert close or not gradient.any(), (step, n)
            else:
                cases.assert_same_bits(replayed[n], gradient, f"step {step}, {n}")
        for e, count in enumerate(counts):
            if count == 0:
                assert not any(p[e].any() for p in replayed.values()), (step, e)
        graph.replay()
        changed = not torch.equal(model.up.weight.grad, replayed["up.weight"])
        assert changed == (recipe.stochastic and sum(counts) > 0), step


def test_a_graph_of_serving(cuda: torch.device) -> None:
    model = nn_cases.Experts(4, recipe=per_token()).to(cuda).eval()
    x = torch.randn(40, 64, dtype=torch.bfloat16, device=cuda)
    offsets = nn_cases.offsets_of((10, 10, 10, 10), cuda)
    with torch.no_grad():
        model(x, offsets)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(x, offsets)
        for counts in ((10, 10, 10, 10), (0, 40, 0, 0), (3, 0, 30, 7)):
            offsets.copy_(nn_cases.offsets_of(counts, cuda))
            graph.replay()
            cases.assert_same_bits(got, model(x, offsets), f"{counts}")


def test_the_example(device: torch.device) -> None:
    """A routed block: close to the loop of dense layers, and the same bits in a graph that sees other tokens."""
    spec = importlib.util.spec_from_file_location("example_moe", ROOT / "examples" / "moe.py")
    example = sys.modules["example_moe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    size = example.Size(width=256, hidden=320, experts=8, top=2)
    moe = example.MoE(size, per_token()).to(device)
    x = torch.randn(90, size.width, dtype=torch.bfloat16, device=device)
    found = []
    for block in (moe, example.dense_layers(moe)):
        example.step(block, moe, x)()
        found.append([p.grad for p in moe.parameters()])
    for a, b in zip(*found, strict=True):
        assert example.difference(a, b)[1] < 0.05  # a last bit of h that differs may change what it is quantized to
    moe.eval()
    with torch.no_grad():
        assert example.difference(moe(x), example.dense(moe)(x))[1] < 0.02
        if device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            got = moe(x)
        for seed in range(4):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            cases.assert_same_bits(got, moe(x), f"tokens of seed {seed}")
