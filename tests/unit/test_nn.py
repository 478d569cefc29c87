"""Layers on the CPU: recipes, conversion, what is kept, and what torch does with modules."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp4gemm
from fp4gemm.nn import (
    FP4Linear,
    Linear,
    Recipe,
    autocast,
    convert,
    functional,
    linear,
    micro_batches,
    per_tensor,
    per_token,
    w4a16,
    weights,
)
from fp4gemm.reference import quantize as reference_quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import nn_cases

CPU = torch.device("cpu")
ALL = per_token(rht=True, sr=True, weight_2d=True)


@pytest.fixture
def quantized(monkeypatch):
    """Counts what is quantized as a weight."""
    calls = []
    make = weights.quantize_weight
    monkeypatch.setattr(weights, "quantize_weight", lambda w, *rest: calls.append(w) or make(w, *rest))
    monkeypatch.setattr("fp4gemm.nn.functional.quantize_weight", weights.quantize_weight)
    return calls


# ---------------------------------------------------------------- recipes


def test_recipes_are_plain_data():
    assert repr(ALL) == (
        "Recipe(activations='per_row', weights='per_tensor', weight_2d=True, hadamard=44257, stochastic=True, "
        "format='nvfp4')"
    )
    for recipe in nn_cases.RECIPES.values():
        assert pickle.loads(pickle.dumps(recipe)) == recipe == eval(repr(recipe)) == Recipe(**recipe.as_dict())
        assert hash(recipe) == hash(copy.deepcopy(recipe))
    assert len(set(nn_cases.RECIPES.values())) == len(nn_cases.RECIPES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL.stochastic = False
    assert per_token() == Recipe()
    assert per_tensor().weights == "per_tensor"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"format": "mxfp4"}, "format: expected one of nvfp4, got 'mxfp4'"),
        ({"activations": "per_column"}, "activations: expected one of per_row, per_tensor, got 'per_column'"),
        ({"weights": None}, "weights: expected one of per_row, per_tensor, got None"),
        ({"weight_2d": True}, "weight_2d: needs weights='per_tensor'.*, got 'per_row'"),
        ({"hadamard": 1 << 16}, "hadamard: expected a mask"),
        ({"activations": None, "hadamard": 0}, "hadamard: expected none where activations=None"),
        ({"activations": None, "stochastic": True}, "stochastic: expected none where activations=None"),
    ],
)
def test_a_recipe_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


# ---------------------------------------------------------------- linear


@pytest.mark.parametrize("name", nn_cases.RECIPES)
def test_gradients(name):
    for shape in nn_cases.SHAPES[1:3]:
        nn_cases.check_gradients(name, shape, torch.bfloat16, CPU)
    nn_cases.check_gradients(name, (17, 33, 70), torch.float32, CPU)


@pytest.mark.parametrize("name", [name for name, r in nn_cases.RECIPES.items() if r.hadamard is None])
def test_exact_problems_have_the_gradients_of_torch(name):
    nn_cases.check_exact(name, CPU)


def test_hadamard_cancels():
    nn_cases.check_hadamard(CPU)


@pytest.mark.parametrize("name", nn_cases.RECIPES)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
def test_only_what_is_needed_is_made_and_is_the_same(name, needs, monkeypatch):
    recipe = nn_cases.RECIPES[name]
    x, w, bias, dy = nn_cases.problem((17, 33, 70), CPU)
    torch.manual_seed(1)
    y = linear(x, w, bias, recipe)
    y.backward(dy)
    some = [t.detach().requires_grad_(bool(need)) for t, need in zip((x, w, bias), needs, strict=True)]
    made = []
    for at in (weights, "quantize_operands"), (functional, "quantize_operands"):
        real = getattr(*at)
        monkeypatch.setattr(*at, lambda t, r, c, *a, real=real, **o: made.append((r, c)) or real(t, r, c, *a, **o))
    torch.manual_seed(1)
    again = linear(*some, recipe)
    again.backward(dy)
    assert torch.equal(again, y)
    for got, want in zip(some, (x, w, bias), strict=True):
        assert got.grad is None if not got.requires_grad else torch.equal(got.grad, want.grad)
    needs_x, needs_w, _ = map(bool, needs)
    expected = [(True, needs_x)]  # w
    if recipe.activations is not None:
        expected += [(True, True)] if needs_w else []  # x; else quantized on its way into the product
        expected += [(needs_x, needs_w)]  # dy
    assert made == expected


def test_no_gradient_is_kept_without_need():
    x, w, bias, _ = nn_cases.problem((17, 33, 70), CPU)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, w, bias)
    # Quantized x and w, both transposed: codes, block scales, outer scales.
    assert [t.dtype for t in saved] == [torch.uint8, torch.float8_e4m3fn, torch.float32] * 2
    assert [t.shape[0] for t in saved[::3]] == [70, 70]


def test_leading_dimensions_and_empty_batches():
    _, w, bias, _ = nn_cases.problem((1, 33, 70), CPU)
    x = torch.randn(2, 3, 5, 70, requires_grad=True)
    y = linear(x, w, bias)
    assert torch.equal(y, linear(x.reshape(-1, 70), w, bias).view(2, 3, 5, 33))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(linear(x[0, 0, 0], w, bias), y[0, 0, 0])
    empty = torch.zeros(0, 70, requires_grad=True)
    w.grad = None
    y = linear(empty, w, bias)
    assert y.shape == (0, 33)
    y.sum().backward()
    assert not w.grad.any()


def test_a_gradient_of_any_strides():
    x, w, _, _ = nn_cases.problem((32, 48, 64), CPU)
    linear(x, w).sum().backward()  # an expanded scalar
    expanded = x.grad.clone()
    x.grad = None
    linear(x, w).backward(torch.ones(32, 48, dtype=x.dtype))
    assert torch.equal(x.grad, expanded)
    x.grad = None
    linear(x, w).t().backward(torch.ones(48, 32, dtype=x.dtype))
    assert torch.equal(x.grad, expanded)


def test_noise_repeats_with_the_seed_of_torch_and_is_unbiased():
    x, w, _, dy = nn_cases.problem((16, 32, 32), CPU, torch.float32)
    recipe = per_token(sr=True)

    def dx():
        x.grad = None
        linear(x, w, None, recipe).backward(dy)
        return x.grad

    torch.manual_seed(3)
    first, second = dx(), dx()
    torch.manual_seed(3)
    assert torch.equal(dx(), first)
    assert not torch.equal(first, second)
    w4 = reference_quantize(w.detach(), transposed=True).dequantize()
    want = dy @ w4.t()
    mean = torch.stack([dx() for _ in range(300)]).mean(0)
    nearest = x.detach().clone().requires_grad_()
    linear(nearest, w).backward(dy)
    assert nn_cases.relative_error(mean, want) < 0.02 < nn_cases.relative_error(nearest.grad, want)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 70, dtype=torch.float64)}, TypeError, "x.dtype: expected one of .*, got torch.float64"),
        (
            {"x": torch.zeros(2, 69)},
            ValueError,
            r"x: expected \[..., K\] with K = 70 \(.*\), got shape \[2, 69\]",
        ),
        ({"x": torch.zeros(())}, ValueError, r"x: expected \[..., K\]"),
        ({"w": torch.zeros(70)}, ValueError, r"w: expected shape \[N, K\], got \[70\]"),
        ({"w": torch.zeros(33, 70, device="meta")}, ValueError, r"w: expected device cpu \(that of x\), got meta"),
        ({"w": torch.zeros(33, 70, dtype=torch.int8)}, TypeError, "w.dtype: expected one of"),
        ({"bias": torch.zeros(32)}, ValueError, r"bias: expected shape \[33\] \(N of w\), got \[32\]"),
        ({"bias": 1.0}, TypeError, "bias: expected a torch.Tensor, got float"),
        ({"recipe": "per_token"}, TypeError, "recipe: expected a Recipe or None, got str"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 70), "w": torch.zeros(33, 70), "bias": torch.zeros(33)}
    with pytest.raises(error, match=message):
        linear(**{**arguments, **change})


# ---------------------------------------------------------------- main_grad


@pytest.mark.parametrize("recipe", [per_token(), w4a16()], ids=["per_token", "w4a16"])
def test_main_grad_accumulates(recipe):
    x, w, bias, dy = nn_cases.problem((17, 33, 70), CPU)
    linear(x, w, bias, recipe).backward(dy)
    want, w.grad, bias.grad = w.grad, None, None
    w.main_grad = torch.zeros_like(w)
    for count in (1, 2, 3):
        linear(x, w, bias, recipe).backward(dy)
        assert w.grad is None
        torch.testing.assert_close(w.main_grad, count * want, rtol=1e-6, atol=1e-6)
    assert bias.grad is not None


@pytest.mark.parametrize("recipe", [per_token(), w4a16()], ids=["per_token", "w4a16"])
def test_main_grad_of_another_shape_is_an_error_and_of_other_strides_is_not(recipe):
    x, w, _, dy = nn_cases.problem((17, 33, 70), CPU)
    for shape in ((3, 70), (70, 33), (1, 70), (33,)):
        w.main_grad = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"main_grad: expected shape \[33, 70\] on cpu"):
            linear(x, w, None, recipe).backward(dy)
    w.main_grad = torch.zeros(33, 140)[:, ::2]
    linear(x, w, None, recipe).backward(dy)
    strided, w.main_grad = w.main_grad, torch.zeros(33, 70)
    linear(x, w, None, recipe).backward(dy)
    assert torch.equal(strided, w.main_grad)


@pytest.mark.parametrize("zero_out", [False, True])
def test_main_grad_as_megatron_has_it(zero_out):
    x, w, _, dy = nn_cases.problem((17, 33, 70), CPU)
    w.main_grad, w.grad_added_to_main_grad, w.zero_out_wgrad = torch.zeros_like(w), False, zero_out
    seen = []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad_added_to_main_grad))
    linear(x, w).backward(dy)
    assert seen == [True]
    assert w.main_grad.any()
    assert w.grad.shape == w.shape
    assert not zero_out or not w.grad.any()


# ---------------------------------------------------------------- Linear, convert and autocast


def test_a_drop_in():
    torch.manual_seed(0)
    plain = nn.Linear(70, 33)
    torch.manual_seed(0)
    ours = Linear(70, 33, recipe=w4a16())
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert repr(ours) == f"Linear(in_features=70, out_features=33, bias=True, recipe={w4a16()})"
    assert Linear(4, 4, bias=False, dtype=torch.bfloat16, device="meta").weight.is_meta
    with pytest.raises(TypeError, match="recipe: expected a Recipe or None, got bool"):
        Linear(4, 4, recipe=True)


def test_convert_keeps_objects():
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
    model[3].weight = model[0].weight  # tied
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    before = dict(model.named_parameters()), list(model.modules())
    assert convert(model, ALL) is model
    assert [type(m) for m in model] == [nn.Embedding, Linear, nn.GELU, Linear]
    assert all(a is b for a, b in zip(before[1], model.modules(), strict=True))
    assert all(p is before[0][name] for name, p in model.named_parameters())
    assert model[3].weight is model[0].weight
    model(torch.arange(16)).sum().backward()
    assert seen == [1]
    assert model[0].weight.grad is not None
    convert(model, per_token())
    assert model[1].recipe == per_token()


def test_convert_what_the_filter_takes():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "own": Own(4, 4)})
    names = []
    convert(model, filter=lambda name, module: names.append((name, module)) or name == "a")
    assert [type(m) for m in model.values()] == [Linear, nn.Linear, Own]
    assert names == [("a", model["a"]), ("b", model["b"])]
    root = nn.Linear(4, 4)
    assert convert(root) is root
    assert type(root) is Linear
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got Tensor"):
        convert(torch.zeros(1))
    with pytest.raises(TypeError, match="recipe: expected a Recipe"):
        convert(model, "per_token")


def test_the_fast_path_of_torch_does_not_pass_by():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = layer(x)
        got = convert(copy.deepcopy(layer), per_token())(x)
    assert 0.005 < nn_cases.relative_error(got, want) < 0.3


def test_autocast_is_for_layers_without_a_recipe():
    x = torch.randn(16, 64)
    layer, fixed = Linear(64, 32), Linear(64, 32, recipe=w4a16())
    default, own = layer(x), fixed(x)
    assert torch.equal(default, linear(x, layer.weight, layer.bias, per_token()))
    with autocast(None):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with autocast(per_tensor()) as inner:
            assert inner == per_tensor()
            assert torch.equal(layer(x), linear(x, layer.weight, layer.bias, per_tensor()))
        assert torch.equal(linear(x, layer.weight), F.linear(x, layer.weight))
        assert torch.equal(fixed(x), own)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(layer(x)))
        thread.start()
        thread.join()
        assert torch.equal(elsewhere[0], default)
    assert torch.equal(layer(x), default)
    with pytest.raises(TypeError, match="recipe: expected a Recipe or None, got str"):
        autocast("per_token")


def test_autocast_is_left_after_an_error():
    with pytest.raises(KeyError), autocast(None):
        raise KeyError
    x = torch.randn(16, 64)
    layer = Linear(64, 32)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_backward_keeps_to_the_recipe_of_its_forward():
    x, w, _, dy = nn_cases.problem((17, 33, 70), CPU)
    linear(x, w, None, w4a16()).backward(dy)
    want, x.grad = x.grad, None
    with autocast(w4a16()):
        y = linear(x, w)
    y.backward(dy)
    assert torch.equal(x.grad, want)


# ---------------------------------------------------------------- what is kept


def test_micro_batches_quantize_a_weight_once(quantized):
    model = nn_cases.Block()
    x = torch.randn(3, 16, 64)
    want = []
    for t in x:
        model(t).sum().backward()
    want, count = nn_cases.grads(model), len(quantized)
    assert count == 6
    model.zero_grad()
    with micro_batches():
        for t in x:
            model(t).sum().backward()
        with micro_batches():
            model(x[0])
    assert len(quantized) == count + 2
    for name, gradient in nn_cases.grads(model).items():
        assert torch.equal(gradient, want[name]), name
    model(x[0])
    assert len(quantized) == count + 4


def test_micro_batches_see_a_step(quantized):
    layer = Linear(64, 32)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    x = torch.randn(16, 64)
    with micro_batches():
        layer(x).sum().backward()
        optimizer.step()
        assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
        with torch.no_grad():
            layer(x)  # rows are there
        with autocast(w4a16()):
            layer(x)  # the same weight
        with autocast(per_tensor()):
            layer(x)
    assert len(quantized) == 4  # one more for linear, which keeps nothing


def test_micro_batches_of_a_frozen_input(quantized):
    """Where the transpose is not needed at first, it is made when it is."""
    layer = Linear(64, 32)
    x = torch.randn(16, 64)
    with micro_batches():
        layer(x)
        layer(x.requires_grad_()).sum().backward()
        layer(x)
    assert len(quantized) == 2
    assert x.grad is not None


def test_serving_keeps_weights(quantized):
    layer = Linear(64, 32).eval()
    x = torch.randn(16, 64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), layer(x))
    assert len(quantized) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
        doubled = layer(x)
        assert len(quantized) == 2
        layer.weight.data.mul_(0)  # unseen
        assert torch.equal(layer(x), doubled)
        layer.requantize()
        assert not torch.equal(layer(x), doubled)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.add_(1)
        assert not torch.equal(copied(x), layer(x))


def test_training_drops_what_serving_kept(quantized):
    layer = Linear(64, 32).eval()
    x = torch.randn(16, 64)

    def serve():
        with torch.no_grad():
            return layer(x)

    serve()
    layer(x)  # with gradients
    layer.weight.data.mul_(2)
    doubled = serve()
    assert torch.equal(doubled, linear(x, layer.weight, layer.bias))
    layer.weight.data.mul_(2)
    layer.train().eval()
    assert not torch.equal(serve(), doubled)
    layer.train()
    count = len(quantized)
    serve(), serve()
    assert len(quantized) == count + 2  # training mode keeps nothing


def test_what_is_kept_goes_with_the_weight():
    layer = Linear(64, 32).eval()
    with torch.no_grad():
        layer(torch.randn(16, 64))
    count = len(weights._serving)
    del layer
    assert len(weights._serving) == count - 1


# ---------------------------------------------------------------- torch


def test_compiled_autocast_and_dtype():
    torch._dynamo.reset()
    layer = Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def inside(x):
        with autocast(w4a16()):
            return layer(x)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for recipe in (per_token(), None, w4a16()):
        with autocast(recipe):
            assert torch.equal(compiled(x), layer(x)), recipe
    assert torch.equal(compiled(x), layer(x))
    with autocast(w4a16()):
        want = layer(x)
    assert torch.equal(inside(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
        assert torch.equal(compiled(x), layer(x))


def test_a_converted_encoder_compiled_and_eager():
    nn_cases.check_encoder("aot_eager", torch.device("cpu"))


@pytest.mark.parametrize("recipe", [per_token(), ALL, w4a16()], ids=["per_token", "all", "w4a16"])
def test_compiled_without_graph_breaks(recipe):
    torch._dynamo.reset()
    model = nn_cases.Block(recipe=recipe)
    x = torch.randn(24, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (24, 7):
        nn_cases.assert_same_step(
            nn_cases.run_block(compiled, x[:rows]), nn_cases.run_block(model, x[:rows]), f"{rows} rows"
        )
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        for p in model.parameters():
            p.mul_(2)
        assert torch.equal(compiled(x), model(x))


def test_compiled_main_grad():
    torch._dynamo.reset()
    layer = Linear(64, 32)
    x = torch.randn(16, 64)
    layer(x).sum().backward()
    want = layer.weight.grad
    for megatron in (False, True):
        layer.weight.grad = None
        layer.weight.main_grad = torch.zeros(32, 64)
        if megatron:
            layer.weight.grad_added_to_main_grad = False
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
        if megatron:  # as of any other layer: its hooks add it
            assert torch.equal(layer.weight.grad, want)
            assert not layer.weight.grad_added_to_main_grad
        else:
            assert layer.weight.grad is None
            assert torch.equal(layer.weight.main_grad, want)


def test_torch_autocast():
    layer = Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.bfloat16(), layer.weight, layer.bias))
    y.float().sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (torch.float32,) * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    model = nn_cases.Block(recipe=per_token(rht=True, weight_2d=True))
    x = torch.randn(24, 64)
    want = nn_cases.run_block(model, x)
    wrapped = nn_cases.Block.__new__(nn_cases.Block)
    wrapped.__dict__ = model.__dict__
    again = nn_cases.run_block(_Checkpointed(model, reentrant), x)
    nn_cases.assert_same_step(
        (again[0], {n.removeprefix("model."): g for n, g in again[1].items()}), want, "checkpoint"
    )


class _Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def test_copies_and_files():
    model = convert(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), ALL).eval()
    x = torch.randn(16, 64)
    with torch.no_grad():
        want = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for twin in (copy.deepcopy(model), loaded, pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), want)
            assert twin[0].recipe == ALL
        plain = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
        plain.load_state_dict(model.state_dict())
        assert torch.equal(convert(plain, ALL).eval()(x), want)
        model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()})
        assert not torch.equal(model(x), want)


@pytest.mark.parametrize("name", nn_cases.RECIPES)
def test_meta_tensors_give_shapes(name):
    layer = Linear(70, 33, device="meta", recipe=nn_cases.RECIPES[name])
    x = torch.empty(5, 70, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape, layer.weight.grad.shape) == ((5, 33), (5, 70), (33, 70))
    with torch.no_grad():
        assert layer.eval()(x).shape == (5, 33)


def test_a_product_under_autocast_is_not_rounded_twice():
    a, b = (fp4gemm.quantize(torch.randn(16, 64)) for _ in range(2))
    want = fp4gemm.gemm(a, b, out_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fp4gemm.gemm(a, b, out_dtype=torch.float32), want)


def test_gradients_of_gradients_are_refused():
    x, w, _, _ = nn_cases.problem((17, 33, 70), CPU)
    (dx,) = torch.autograd.grad(linear(x, w).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        dx.sum().backward()


def test_opcheck():
    x, w, bias, _ = nn_cases.problem((17, 33, 70), CPU)
    arguments = x.detach(), w.detach(), bias.detach()
    for recipe in nn_cases.RECIPES.values():
        torch.library.opcheck(
            torch.ops.fp4gemm.linear.default,
            (*arguments, recipe.activations, recipe.weights, recipe.weight_2d, True, True),
        )


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_examples_of_the_docs_run(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    (example,) = (block for block in blocks if "fp4gemm.convert" in block)
    names = {"torch": torch, "fp4gemm": fp4gemm}
    exec(example, names)
    assert type(names["model"][0]) is Linear
    assert names["model"][0].recipe == ALL


def test_the_example_of_calibration_runs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    (example,) = (block.partition("```")[0] for block in text.split("```python\n")[1:])
    names = {}
    exec(example, names)
    assert type(names["model"][0]) is FP4Linear
    assert names["y"].shape == (8, 32)


def test_the_package_exports_what_docs_name():
    assert (fp4gemm.autocast, fp4gemm.convert) == (autocast, convert)
    assert callable(fp4gemm.nn.linear)
