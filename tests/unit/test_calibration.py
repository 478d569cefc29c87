"""Calibration of whole models: what layers see, memory, interruptions, and the model that comes out."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp4gemm
from fp4gemm import calibration, search
from fp4gemm.nn import FP4Linear


class Model(nn.Module):
    """Layers of several widths, one that is called twice, one that is never called, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 64)
        self.dropout = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.unused = nn.Linear(32, 16)
        self.head = fp4gemm.nn.Linear(64, 20, recipe=fp4gemm.nn.w4a16())

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.dropout(torch.relu(self.first(input=x * scale)))
        for block in (*self.blocks, self.blocks[0]):
            x = x + torch.tanh(block(x))
        return self.head(x)


NAMES = ["first", "blocks.0", "blocks.1", "blocks.2", "unused", "head"]


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def batches(count: int = 3) -> list[Any]:
    """Each way that a batch can be given."""
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(9, 48, generator=generator) for _ in range(count)]
    kinds = (lambda x: x, lambda x: (x, 0.5), lambda x: {"x": x, "scale": 2.0})
    return [kind(x) for kind, x in zip(itertools.cycle(kinds), xs, strict=False)]


def same(a: fp4gemm.FP4Tensor, b: fp4gemm.FP4Tensor) -> bool:
    pairs = ((getattr(a, n).reshape(-1), getattr(b, n).reshape(-1)) for n in ("data", "block_scale", "outer_scale"))
    return a.shape == b.shape and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def seen_by(model: Model) -> dict[str, torch.Tensor]:
    """Inputs of every layer, by other means: all of them kept."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for name in NAMES:
        layer, forward = model.get_submodule(name), model.get_submodule(name).forward
        layer.forward = lambda input, _n=name, _f=forward: (seen[_n].append(input), _f(input))[1]
    with torch.no_grad():
        for batch in batches():
            model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)
    return {name: torch.cat(xs) for name, xs in seen.items() if xs}


def calibrate(model: nn.Module, *args: Any, **options: Any) -> dict[str, fp4gemm.FP4Tensor]:
    with pytest.warns(UserWarning, match="unused: no batch reaches this layer"):
        return fp4gemm.calibrate(model, *(args or (batches(),)), progress=False, **options)


@pytest.mark.parametrize("feedback", [False, True])
def test_weights_are_those_of_a_search_by_hand(feedback: bool) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    model.blocks[1].eval()
    found = calibrate(model, feedback=feedback)
    assert list(found) == NAMES
    for name, x in seen_by(model).items():
        w = model.get_submodule(name).weight.detach()
        accumulator = search.HessianAccumulator(w.shape[1], full=feedback)
        for batch in x.split(18 if name == "blocks.0" else 9):
            accumulator.add(batch)
        h = (accumulator.full_hessian if feedback else accumulator.hessian)(damping=0.01)
        want = fp4gemm.search_scales(w, "hessian", hessian=h, feedback=feedback)
        d, e = (t.dequantize().double() - w.double() for t in (found[name], want))
        # Sums of the same terms in another order may choose otherwise here and there, but no worse.
        full = search.HessianAccumulator(w.shape[1], full=True)
        full.add(x)
        errors = [float(((t @ full.full_hessian().double()) * t).sum()) for t in (d, e)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02), name
    assert same(found["unused"], fp4gemm.search_scales(model.unused.weight.detach()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: name != "blocks.1" for name in modes}  # eval mode was for the passes alone
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_results_do_not_depend_on_the_passes() -> None:
    model, passes = make(), []

    class Counted(list[Any]):
        def __iter__(self) -> Any:
            passes.append(1)
            return super().__iter__()

    whole = calibrate(model, Counted(batches()))
    assert len(passes) == 1
    one_by_one = calibrate(model, Counted(batches()), memory=1)
    assert len(passes) == 1 + 6
    two = 4 * 16 * (48 + 64)
    in_groups = calibrate(model, Counted(batches()), memory=two)
    assert len(passes) == 1 + 6 + 4  # first and blocks.0; blocks.1; blocks.2 and unused; head
    assert all(same(whole[n], one_by_one[n]) and same(whole[n], in_groups[n]) for n in NAMES)


def test_memory_is_bounded() -> None:
    """Sums that are alive at a time, as their accumulators are made."""
    model, alive, most = make(), [], []
    method = search.Method("hessian", feedback=True)
    layers = calibration.linears(model)
    limit = 2 * 4 * 64 * 64
    for group in calibration._groups(layers, method, limit):
        alive.append(sum(method.accumulator(layer.in_features).sum.nbytes for layer in group.values()))
        most.append(list(group))
    assert max(alive) <= limit
    assert [name for group in most for name in group] == NAMES
    assert len(most) < len(NAMES)


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"feedback": True, "memory": 1}, {"metric": "sse"}])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    options = {"progress": False, "filter": lambda name, _: name != "unused", **options}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    want = fp4gemm.calibrate(model, batches(), folder=whole, **options)
    finished, save = [], calibration._Store.save

    def limited(self: Any, name: str, t: fp4gemm.FP4Tensor) -> None:
        if len(finished) % 3 == 2:
            finished.append("stopped before " + name)
            raise Stop
        finished.append(name)
        save(self, name, t)

    monkeypatch.setattr(calibration._Store, "save", limited)
    for _ in range(2):
        with pytest.raises(Stop):
            fp4gemm.calibrate(model, batches(), folder=parts, **options)
        assert not (parts / "quantized.safetensors").exists()
    got = fp4gemm.calibrate(model, batches(), folder=parts, **options)
    assert [name for name in finished if "stopped" not in name] == [name for name in NAMES if name != "unused"]
    assert list(got) == list(want)
    assert all(same(got[name], want[name]) for name in want)
    files = {str(p.relative_to(whole)): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert files == {str(p.relative_to(parts)): p.read_bytes() for p in parts.rglob("*") if p.is_file()}
    assert len(files) == 2 + 5
    assert all(same(t, want[name]) for name, t in fp4gemm.load_quantized(whole / "quantized.safetensors").items())
    # Once more: nothing is left to do, so batches are not read.
    again = fp4gemm.calibrate(model, iter(()), folder=parts, **options)
    assert all(same(again[name], want[name]) for name in want)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    model = make()
    fp4gemm.calibrate(model, metric="sse", folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"folder: .* another method"):
        fp4gemm.calibrate(model, metric="amax", folder=tmp_path, progress=False)
    with torch.no_grad():
        model.blocks[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"folder: .* another model \(blocks.1\)"):
        fp4gemm.calibrate(model, metric="sse", folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"folder: .* another model"):
        fp4gemm.calibrate(make(), metric="sse", folder=tmp_path, progress=False, filter=lambda name, _: name == "head")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest"):
        fp4gemm.calibrate(make(), metric="sse", folder=tmp_path, progress=False)
    fp4gemm.calibrate(make(), metric="sse", folder=tmp_path / "new", progress=False)
    damaged = tmp_path / "new" / "layers" / "head.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"head.safetensors: not a whole safetensors file"):
        fp4gemm.calibrate(make(), metric="sse", folder=tmp_path / "new", progress=False)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"batches": []}, "batches: expected at least one, got none"),
        ({"batches": iter(batches()), "memory": 1}, "batches: expected what can be read 6 times"),
        ({"filter": lambda *_: False}, "model: expected at least one"),
        ({"metric": "mse"}, "metric: expected one of"),
        ({"metric": "sse", "feedback": True}, "feedback: expected"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fp4gemm.calibrate(make(), **{"batches": batches(), "progress": False, **arguments})
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        fp4gemm.calibrate("model")


def test_hessians_are_saved_for_files(tmp_path: Path) -> None:
    model = make()
    paths = fp4gemm.save_hessians(model, batches(), tmp_path, progress=False)
    assert [path.name for path in paths] == [f"{name}.safetensors" for name in NAMES]
    found = dict(fp4gemm.collect_hessians(model, batches(), progress=False))
    stamps = {path: path.stat().st_mtime_ns for path in paths}
    paths[1].unlink()
    assert fp4gemm.save_hessians(model, batches(), tmp_path, progress=False) == paths
    assert sum(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()) == len(NAMES) - 1
    for path, accumulator in zip(paths, found.values(), strict=True):
        held = search.HessianAccumulator.load(path)
        assert torch.equal(held.sum, accumulator.sum)
        assert held.full
        assert held.tokens == accumulator.tokens
    assert found["blocks.0"].tokens == 2 * found["blocks.1"].tokens == 54


# --- the model that comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [fp4gemm.nn.per_token(), fp4gemm.nn.per_tensor(), fp4gemm.nn.w4a16()])
def test_convert_with_weights(recipe: fp4gemm.nn.Recipe) -> None:
    model = make().eval()
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = fp4gemm.calibrate(model, metric="sse", progress=False, filter=lambda name, _: name != "blocks.2")
    replaced = copy.deepcopy(model).bfloat16()
    for name, w in found.items():
        layer = replaced.get_submodule(name)
        layer.__class__ = nn.Linear
        layer.weight.data = w.dequantize(torch.bfloat16)
    converted = fp4gemm.convert(copy.deepcopy(model), recipe, weights=found).bfloat16()
    kinds = {name: type(converted.get_submodule(name)) for name in NAMES}
    assert kinds == {name: nn.Linear if name == "blocks.2" else FP4Linear for name in NAMES}
    assert converted.first.weight.nbytes * 3 < model.first.weight.nbytes
    with torch.no_grad():
        got, want = converted(x).float(), replaced(x).float()
        with fp4gemm.autocast(None):
            converted.first.recipe = None
            assert converted.first(x).shape == (2, 9, 64)
    error = float((got - want).norm() / want.norm())
    assert error < (0.02 if recipe.activations is None else 0.2)
    layer = FP4Linear(found["first"], model.first.bias, recipe=fp4gemm.nn.per_token())
    assert torch.equal(layer(x), fp4gemm.quantize_gemm(x, found["first"], model.first.bias))


def test_states_have_the_names_of_files(tmp_path: Path) -> None:
    model = make().eval()
    found = fp4gemm.calibrate(model, metric="sse", progress=False)
    converted = fp4gemm.convert(make().eval(), weights=found)
    fp4gemm.save_quantized(tmp_path / "w.safetensors", found)
    state = converted.state_dict()
    assert {name for name in state if "weight" in name} == set(fp4gemm.tensor_file.read(tmp_path / "w.safetensors"))
    other = fp4gemm.convert(make().eval(), weights=fp4gemm.calibrate(make(), metric="amax", progress=False))
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert not torch.equal(other(x), converted(x))
        other.load_state_dict(state)
        assert torch.equal(other(x), converted(x))
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    del state["first.weight_scale"]
    with pytest.raises(RuntimeError, match=r"first\.weight_scale"):
        other.load_state_dict(state)
    state["first.weight_scale"] = torch.zeros(64, 4, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"first.weight: weight_scale: expected shape \(64, 3\)"):
        other.load_state_dict(state)
    moved = copy.deepcopy(converted).to(torch.float16)
    assert same(moved.first.weight, converted.first.weight)
    assert moved.first.bias.dtype == torch.float16
    assert moved.to("meta").first.weight.device.type == "meta"


def test_layers_are_compiled_and_follow_autocast() -> None:
    layer = fp4gemm.convert(nn.Linear(48, 20), weights={"": fp4gemm.quantize(torch.randn(20, 48))})
    x = torch.randn(5, 48)
    with torch.no_grad():
        want = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_a_layer_of_a_parameter_keeps_no_graph() -> None:
    linear, x = nn.Linear(48, 20), torch.randn(5, 48)
    layer = FP4Linear(fp4gemm.quantize(linear.weight), linear.bias)
    want = layer(x)
    assert not want.requires_grad
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    parameter = weakref.ref(linear.weight)
    del linear
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.randn(3, 24), ValueError, r"x: expected \[..., K\] with K = 48, got shape \[3, 24\]"),
        (torch.empty(0, 7), ValueError, r"x: expected .* got shape \[0, 7\]"),
        (torch.tensor(1.0), ValueError, r"x: expected .* got shape \[\]"),
        ([1.0], TypeError, r"x: expected a torch\.Tensor, got list"),
    ],
)
def test_what_a_layer_does_not_take(x: torch.Tensor, error: type[Exception], message: str) -> None:
    layer = FP4Linear(fp4gemm.quantize(torch.randn(20, 48)))
    with pytest.raises(error, match=message):
        layer(x)


def test_what_a_layer_is_not_made_of() -> None:
    w = fp4gemm.quantize(torch.randn(20, 48))
    with pytest.raises(TypeError, match="weight: expected an FP4Tensor, got Tensor"):
        FP4Linear(torch.randn(20, 48))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias: expected shape \[20\] \(N of weight\), got \[48\]"):
        FP4Linear(w, torch.randn(48))
    model, x = nn.Linear(48, 20), torch.randn(2, 48)
    want = model(x)
    with pytest.raises(TypeError, match="weights: : expected an FP4Tensor, got Tensor"):
        fp4gemm.convert(model, weights={"": torch.randn(20, 48)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="weights: expected a mapping from names to FP4Tensors, got list"):
        fp4gemm.convert(model, weights=[w])  # type: ignore[arg-type]
    assert torch.equal(model(x), want)  # as it was


def test_weights_that_do_not_fit() -> None:
    model = make()
    w = fp4gemm.quantize(torch.randn(64, 32))
    with pytest.raises(ValueError, match="weights: expected names of Linears that are converted, got 'dropout'"):
        fp4gemm.convert(model, weights={"dropout": w})
    with pytest.raises(ValueError, match=r"weights: first: expected \(64, 48\), got \(64, 32\)"):
        fp4gemm.convert(model, weights={"first": w})
    assert type(model.first) is nn.Linear


def test_the_manifest_says_of_what(tmp_path: Path) -> None:
    fp4gemm.calibrate(make(), metric="4/6", folder=tmp_path, progress=False)
    held = json.loads((tmp_path / "manifest.json").read_text())
    assert search.Method(**held["method"]) == search.Method("4/6")
    assert list(held["layers"]) == NAMES
