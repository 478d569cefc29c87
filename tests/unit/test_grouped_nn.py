"""GroupedLinear on the CPU: a loop of linear, what is kept, what torch does with modules, and the GPU's way to dw."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fp4gemm
from fp4gemm.nn import GroupedLinear, Linear, autocast, micro_batches, per_tensor, per_token, w4a16, weights
from fp4gemm.nn import weight_gradient as wg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import gpu_cases as cases
import nn_cases

CPU = torch.device("cpu")
COUNTS, N, K = nn_cases.COUNTS, 33, 70
OFFSETS = nn_cases.offsets_of(COUNTS, CPU)
FIXED = [name for name, r in nn_cases.GROUPED_RECIPES.items() if not r.stochastic]


def problem(recipe=None, dtype=torch.bfloat16, spare=0, n=N, k=K):
    return nn_cases.grouped_problem(COUNTS, n, k, CPU, dtype, spare, recipe)


# ---------------------------------------------------------------- products and gradients


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", FIXED)
def test_each_expert_is_a_linear_of_its_own(name, dtype):
    layer, x, offsets, dy = problem(nn_cases.RECIPES[name], dtype)
    y = layer(x, offsets)
    y.backward(dy)
    want = nn_cases.loop(layer, x, dy, COUNTS)
    for what, got, right in zip(("y", "dx", "dw"), (y, x.grad, layer.weight.grad), want, strict=False):
        cases.assert_same_bits(got.detach(), right, f"{what}, {name}")
    torch.testing.assert_close(layer.bias.grad, want[3], rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("name", nn_cases.GROUPED_RECIPES)
def test_gradients(name):
    nn_cases.check_grouped(name, COUNTS, N, K, torch.bfloat16, CPU, spare=9)
    nn_cases.check_grouped(name, (0, 33), 16, 24, torch.float32, CPU)


@pytest.mark.parametrize("name", [name for name in FIXED if nn_cases.RECIPES[name].hadamard is None])
def test_exact_problems_have_the_gradients_of_torch(name):
    nn_cases.check_grouped_exact(name, CPU)


def test_no_tokens():
    layer = GroupedLinear(3, K, N)
    x = torch.zeros(0, K, requires_grad=True)
    y = layer(x, torch.zeros(4, dtype=torch.int64))
    assert y.shape == (0, N)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in layer.parameters())
    with torch.no_grad():
        assert layer(x, torch.zeros(4, dtype=torch.int64)).shape == (0, N)


@pytest.mark.parametrize("name", nn_cases.GROUPED_RECIPES)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)], ids=str)
def test_only_what_is_needed_is_the_same(name, needs):
    layer, x, offsets, dy = problem(nn_cases.RECIPES[name])
    torch.manual_seed(1)
    y = layer(x, offsets)
    y.backward(dy)
    wants = x.grad, layer.weight.grad, layer.bias.grad
    some = x.detach().requires_grad_(bool(needs[0])), *layer.parameters()
    for t, need in zip(some, needs, strict=True):
        t.grad = None
        t.requires_grad_(bool(need))
    torch.manual_seed(1)
    again = layer(some[0], offsets)
    again.backward(dy)
    assert torch.equal(again, y)
    for t, want in zip(some, wants, strict=True):
        assert t.grad is None if not t.requires_grad else torch.equal(t.grad, want)


def test_what_waits_for_backward_is_quantized():
    layer, x, offsets, _ = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        layer(x, offsets)
    quantized = [torch.uint8, torch.float8_e4m3fn, torch.float32, torch.int64]
    assert saved == [torch.int64, *quantized, torch.uint8, torch.float32]  # offsets, x^T, w^T prepacked


def test_a_gradient_of_any_strides():
    layer, x, offsets, _ = problem()
    layer(x, offsets).sum().backward()  # an expanded scalar
    expanded, x.grad = x.grad, None
    layer(x, offsets).backward(torch.ones(len(x), N, dtype=x.dtype))
    assert torch.equal(x.grad, expanded)
    wide = torch.cat((x.detach(), x.detach()), 1)[:, :K].requires_grad_()
    layer(wide, offsets).sum().backward()
    assert torch.equal(wide.grad, expanded)


def test_noise_repeats_with_the_seed_of_torch():
    layer, x, offsets, dy = problem(per_token(sr=True))
    found = []
    for seed in (3, 3, 4):
        x.grad = layer.weight.grad = None
        torch.manual_seed(seed)
        layer(x, offsets).backward(dy)
        found.append((x.grad, layer.weight.grad))
    for first, second, other in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


# ---------------------------------------------------------------- the GPU's way to dw, which every device can go


@pytest.mark.parametrize("hadamard", [None, 0xACE1])
@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 5), (16, 32, 0), (1,) * 20], ids=str)
def test_gathered_blocks(counts, hadamard):
    _, x, offsets, dy = nn_cases.grouped_problem(counts, N, K, CPU, spare=21)
    options = {"offsets": offsets, "sf_layout": "linear", "transposed": True, "hadamard": hadamard}
    dyt, xt = (fp4gemm.quantize_grouped(t.detach(), **options) for t in (dy, x))
    for t in (dyt, xt):  # nobody writes outer scales of members without tokens
        t.outer_scale.view(len(counts), -1)[torch.tensor(counts) == 0] = float("nan")
    got = wg._multiply(dyt, xt, (len(counts), N, K), len(x), torch.float32)
    half = wg._multiply(dyt, xt, (len(counts), N, K), len(x), torch.bfloat16)
    cases.assert_same_bits(half, got.bfloat16(), "another dtype")
    for e, (a, b) in enumerate(zip(dyt.members(), xt.members(), strict=True)):
        if counts[e] == 0:
            assert not got[e].any()
            continue
        want, bound = cases.gemm_exact_and_bound(a, b, None, torch.bfloat16)
        assert bool(((got[e].double() - want).abs() <= bound + 2.0**-22 * want.abs()).all()), e


def test_a_member_that_was_left_out_has_no_blocks():
    """Its sizes are -1 in the index."""
    slots = wg._Slots.of(torch.tensor([-1, 17, 0]), 40)
    assert slots.ends.tolist() == [1, 3, 4]
    assert slots.real.tolist() == [False, True, True, False, False]
    assert slots.expert.tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("n, k", [(N, K), (32, 64)])
def test_plain_products(n, k):
    layer, x, offsets, dy = problem(spare=5, n=n, k=k)
    got = wg._multiply_plain(dy, x.detach(), offsets)
    assert got.shape == layer.weight.shape
    for e, rows in enumerate(nn_cases.rows_of(COUNTS)):
        want = dy[rows].double().t() @ x[rows].double()
        bound = 2.0**-8 * want.abs() + 2.0**-14 * (dy[rows].double().abs().t() @ x[rows].double().abs())
        assert bool(((got[e].double() - want).abs() <= bound).all())


# ---------------------------------------------------------------- main_grad


@pytest.mark.parametrize("recipe", [per_token(), w4a16()], ids=["per_token", "w4a16"])
def test_main_grad_accumulates(recipe):
    layer, x, offsets, dy = problem(recipe)
    layer(x, offsets).backward(dy)
    want, layer.weight.grad = layer.weight.grad, None
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    for count in (1, 2, 3):
        layer(x, offsets).backward(dy)
        assert layer.weight.grad is None
        torch.testing.assert_close(layer.weight.main_grad, count * want, rtol=1e-6, atol=1e-5)


def test_main_grad_as_megatron_has_it():
    layer, x, offsets, dy = problem()
    w = layer.weight
    w.main_grad, w.grad_added_to_main_grad, w.zero_out_wgrad = torch.zeros_like(w), False, True
    layer(x, offsets).backward(dy)
    assert w.grad_added_to_main_grad
    assert w.main_grad.any()
    assert w.grad.shape == w.shape
    assert not w.grad.any()


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["per_token", "weight_2d"])
@pytest.mark.parametrize("n, k", [(N, K), (128, 64), (64, 40)])
def test_stacks_are_those_of_experts_alone(name, n, k):
    recipe = nn_cases.RECIPES[name]
    w = torch.randn(3, n, k)
    for got, transposed in zip(weights.quantize_weight(w, recipe, True), (False, True), strict=True):
        options = {"scaling": recipe.weights, "block": recipe.weight_block, "transposed": transposed}
        want = fp4gemm.stack_weights([fp4gemm.quantize(each, **options) for each in w])
        assert got.shape == want.shape
        assert torch.equal(got.data, want.data)
        assert torch.equal(got.outer_scale, want.outer_scale)
    rows, none = weights.quantize_weight(w, recipe, False)
    assert none is None
    assert torch.equal(rows.data, weights.quantize_weight(w, recipe, True)[0].data)


@pytest.fixture
def quantized(monkeypatch):
    """Counts what is quantized as a weight."""
    calls = []
    make = weights.quantize_weight
    monkeypatch.setattr(weights, "quantize_weight", lambda w, *rest: calls.append(w) or make(w, *rest))
    monkeypatch.setattr("fp4gemm.nn.functional.quantize_weight", weights.quantize_weight)
    return calls


def test_weights_are_kept(quantized):
    layer, x, offsets, _ = problem()
    want = layer(x, offsets).detach()
    layer(x, offsets).sum().backward()
    assert len(quantized) == 2
    with micro_batches():
        layer(x, offsets).sum().backward()
        layer(x, offsets)
    assert len(quantized) == 3
    layer.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x, offsets), want)
    assert len(quantized) == 4
    with torch.no_grad():
        layer.weight.data.mul_(0)  # unseen
        assert torch.equal(layer(x, offsets), want)
        layer.requantize()
        assert torch.equal(layer(x, offsets)[:17], layer.bias[:1].to(x.dtype).expand(17, N))
        layer.train()
        layer(x, offsets), layer(x, offsets)
    assert len(quantized) == 7


def test_copies_and_files():
    layer, x, offsets, _ = problem(w4a16())
    want = layer(x, offsets)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(copy.deepcopy(layer)(x, offsets), want)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x, offsets), want)
    fresh = GroupedLinear(len(COUNTS), K, N, recipe=w4a16())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, offsets), want)
    assert repr(layer) == (
        f"GroupedLinear(num_experts=6, in_features=70, out_features=33, bias=True, recipe={w4a16()})"
    )
    assert GroupedLinear(2, 4, 4, bias=False, dtype=torch.bfloat16, device="meta").weight.is_meta


def test_initial_values_are_those_of_linear():
    torch.manual_seed(0)
    layer, one = GroupedLinear(8, 256, 64), Linear(256, 64)
    for got, want in ((layer.weight, one.weight), (layer.bias, one.bias)):
        assert float(got.detach().abs().max()) <= 1 / 16
        assert float(got.detach().std()) == pytest.approx(float(want.detach().std()), rel=0.2)


# ---------------------------------------------------------------- recipes, autocast, compile


def test_autocast():
    layer, x, offsets, dy = problem(n=32, k=64)
    with autocast(w4a16()):
        w4 = layer(x, offsets)
    assert not torch.equal(w4, layer(x, offsets))
    layer.recipe = w4a16()
    assert torch.equal(layer(x, offsets), w4)
    layer.recipe = None
    with autocast(None):
        y = layer(x, offsets)
        y.backward(dy)
    for e, rows in enumerate(nn_cases.rows_of(COUNTS)):
        w, b = layer.weight[e].to(x.dtype), layer.bias[e].to(x.dtype)
        torch.testing.assert_close(y[rows], F.linear(x[rows], w) + b)
        torch.testing.assert_close(layer.bias.grad[e], dy[rows].float().sum(0), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.detach().float(), offsets), layer(x, offsets))


def test_a_producer_quantizes_what_it_makes():
    layer, _, offsets, _ = problem()
    h = torch.randn(int(offsets[-1]), 2 * K, dtype=torch.bfloat16)
    with torch.no_grad():
        got = layer(h, offsets, producer="silu_mul")
    w = fp4gemm.stack_weights([fp4gemm.quantize(each.detach()) for each in layer.weight])
    want = fp4gemm.quantize_gemm_grouped(h, w, offsets, layer.bias.detach(), producer="silu_mul")
    assert torch.equal(got, want)
    with pytest.raises(NotImplementedError, match="producer: 'silu_mul' has no gradient"):
        layer(h, offsets, producer="silu_mul")
    with torch.no_grad():
        with autocast(w4a16()), pytest.raises(ValueError, match="producer: expected None where the recipe leaves"):
            layer(h, offsets, producer="silu_mul")
        with autocast(None), pytest.raises(ValueError, match="producer: expected None where nothing is quantized"):
            layer(h, offsets, producer="silu_mul")


@pytest.mark.parametrize("name", ["per_token", "rht_sr_2d", "w4a16"])
def test_compiled_without_graph_breaks(name):
    torch._dynamo.reset()
    model = nn_cases.Experts(len(COUNTS), 32, nn_cases.RECIPES[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for counts in (COUNTS, (3, 0, 0, 9, 1, 0)):
        x, offsets = torch.randn(sum(counts), 32), nn_cases.offsets_of(counts, CPU)
        got, want = (nn_cases.run_block(m, x, offsets) for m in (compiled, model))
        nn_cases.assert_same_step(got, want, f"{counts}")
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x, offsets), model(x, offsets))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.zeros(2, K, dtype=torch.float64)}, TypeError, "x.dtype: expected one of .*, got torch.float64"),
        ({"x": torch.zeros(2, K + 1)}, ValueError, r"x: expected \[T, 70\] .*, got shape \[2, 71\]"),
        ({"x": torch.zeros(2, 3, K)}, ValueError, r"x: expected \[T, 70\]"),
        ({"x": torch.zeros(2, K, device="meta")}, ValueError, r"weight: expected device meta \(that of x\), got cpu"),
        ({"offsets": OFFSETS[1:]}, ValueError, r"offsets: expected shape \[7\] .*, got \[6\]"),
        ({"offsets": OFFSETS + 1}, ValueError, "offsets: expected 0 first, got 1"),
        ({"offsets": OFFSETS.int()}, TypeError, "offsets: expected dtype torch.int64, got torch.int32"),
        ({"offsets": OFFSETS.tolist()}, TypeError, "offsets: expected a torch.Tensor, got list"),
        ({"offsets": OFFSETS.to("meta")}, ValueError, "offsets: expected device cpu"),
        ({"producer": "swiglu"}, ValueError, "producer"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    layer = problem()[0]
    arguments = {"x": torch.zeros(int(OFFSETS[-1]), K), "offsets": OFFSETS}
    with torch.no_grad(), pytest.raises(error, match=message):
        layer(**{**arguments, **change})


def test_what_experts_do_not_have():
    with pytest.raises(ValueError, match="recipe: activations='per_tensor' is not supported for experts"):
        GroupedLinear(2, 4, 4, recipe=per_tensor())
    layer, x, offsets, _ = problem()
    with autocast(per_tensor()), pytest.raises(ValueError, match="recipe: activations='per_tensor'"):
        layer(x, offsets)
    with pytest.raises(TypeError, match="recipe: expected a Recipe or None, got bool"):
        GroupedLinear(2, 4, 4, recipe=True)
    with pytest.raises(ValueError, match="num_experts: expected 1 to 1024, got 0"):
        GroupedLinear(0, 4, 4)
    with pytest.raises(ValueError, match="member 1: expected sizes of at least 0"):
        layer(x, offsets.index_fill(0, torch.tensor([2]), 0))
