"""A calibrated model on the GPU: scales that are right for what it sees, and layers that multiply by them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fp4gemm
from fp4gemm.nn import FP4Linear


def make(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device)


def batches(device: torch.device) -> list[torch.Tensor]:
    """Correlated, with channels of different sizes."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(256) + torch.randn(256, 256, generator=generator) / 16
    size = torch.exp(torch.randn(256, generator=generator))
    return [(torch.randn(512, 256, generator=generator) @ mix * size).to(device) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_method_keeps_more_of_the_outputs(dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    model, xs = make(device).to(dtype), [x.to(dtype) for x in batches(device)]
    names, x = ["0", "2"], xs[0]
    with torch.no_grad():
        want = model(x).float()
    errors = []
    for metric, feedback in (("amax", False), ("sse", False), ("hessian", False), ("hessian", True)):
        folder = tmp_path / f"{metric}{feedback}"
        options = {"metric": metric, "feedback": feedback, "folder": folder, "progress": False}
        found = fp4gemm.calibrate(model, xs, **options)
        again = fp4gemm.calibrate(model, xs, **{**options, "folder": folder.with_suffix(".again")})
        for name in names:
            for a, b in zip(found[name].to_tensors().values(), again[name].to_tensors().values(), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        converted = fp4gemm.convert(copy.deepcopy(model), fp4gemm.nn.w4a16(), weights=found)
        with torch.no_grad():
            errors.append(float((converted(x).float() - want).norm() / want.norm()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.7 * errors[0], errors


def test_layers_move_and_are_saved(device: torch.device) -> None:
    """Prepacked where GEMMs read that, plain in a state; on the CPU the same products."""
    layer = nn.Linear(256, 96)
    w = fp4gemm.search_scales(layer.weight.detach())
    here = FP4Linear(w, layer.bias, recipe=fp4gemm.nn.per_token())
    there = copy.deepcopy(here).to(device)
    assert there.weight.device.type == device.type
    x = torch.randn(33, 256)
    got, want = there(x.to(device)).cpu(), here(x)
    assert float((got - want).norm()) < 1e-3 * float(want.norm())
    held = here.state_dict()
    for name, part in there.state_dict().items():
        assert torch.equal(part.cpu().reshape(-1).view(torch.uint8), held[name].reshape(-1).view(torch.uint8)), name
    there.load_state_dict(FP4Linear(fp4gemm.quantize(layer.weight.detach()), layer.bias).state_dict())
    assert not torch.equal(there(x.to(device)).cpu(), got)
    back = there.to("cpu").weight
    assert back.prepacked is None
    assert torch.equal(back.data, fp4gemm.quantize(layer.weight.detach()).data)


def test_graph(cuda: torch.device) -> None:
    """A calibrated model is captured as it is."""
    model = make(cuda).bfloat16().eval()
    model = fp4gemm.convert(model, weights=fp4gemm.calibrate(model, metric="sse", progress=False))
    x = torch.randn(16, 256, device=cuda, dtype=torch.bfloat16)
    with torch.no_grad():
        want = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(x)
        got.zero_()
        graph.replay()
    assert torch.equal(got, want)
