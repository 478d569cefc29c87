"""Operands of products: what they are on each device. tests/emulated has the kernels' bytes, tests/gpu the products."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fp4gemm
from fp4gemm import ops, reference, select
from fp4gemm.engine import Activations
from fp4gemm.formats import LEFT, PREPACKED, RIGHT, VALUES, packed_shape
from fp4gemm.operands import quantize_operands
from fp4gemm.reference.arguments import check_quantize
from fp4gemm.tensor import FP4Tensor


@pytest.mark.parametrize("sides", [(LEFT, LEFT), (LEFT, RIGHT), (RIGHT, RIGHT)])
@pytest.mark.parametrize("rows, columns", [(True, True), (True, False), (False, True), (False, False)])
def test_on_a_cpu_they_are_nvfp4(rows, columns, sides):
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = quantize_operands(x, rows, columns, scaling="per_row", hadamard=7, sides=sides)
    for asked, one, want in zip((rows, columns), got, fp4gemm.quantize_both(x, hadamard=7), strict=True):
        assert (one is not None) == asked
        if isinstance(one, FP4Tensor):
            assert (one.shape, one.sf_layout, one.prepacked) == (want.shape, want.sf_layout, None)
            assert torch.equal(one.data, want.data)
            assert torch.equal(one.outer_scale, want.outer_scale)


def test_on_hopper_they_are_what_its_gemms_read(monkeypatch):
    """To a tracer, which runs no kernel."""
    monkeypatch.setattr(select, "arch_of", lambda index: "sm_90a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        x = torch.empty(40, 70, device="cuda", dtype=torch.bfloat16)
        left, right = quantize_operands(x, True, True, scaling="per_row", sides=(LEFT, RIGHT))
        assert isinstance(left, Activations)
        assert (left.values.shape, left.values.dtype, left.outer_scale.shape) == ((40, 80), torch.bfloat16, (40,))
        assert isinstance(right, FP4Tensor)
        assert (right.shape, right.data.shape, right.prepacked) == ((70, 40), packed_shape(70, 40), PREPACKED)
        _, alone = quantize_operands(x, False, True, scaling="per_tensor")
        assert isinstance(alone, Activations)
        assert (alone.values.shape, alone.outer_scale.shape) == ((70, 48), ())
        assert ops.product(alone, right, None, torch.float32).shape == (70, 70)


def test_a_tracer_without_a_gpu_needs_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode():
        x = torch.empty(40, 70, device="cuda", dtype=torch.bfloat16)
        for t in quantize_operands(x, True, True, scaling="per_row", sides=(LEFT, RIGHT)):
            assert isinstance(t, FP4Tensor)
            assert (t.device.type, t.prepacked) == ("cuda", None)


def test_values_and_the_prepacked_form_of_the_reference():
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(2))
    args, t = check_quantize(x, sf_layout="linear"), fp4gemm.quantize(x, sf_layout="linear")
    values, no_scales, outer = reference.quantize_operand(args._replace(sf_layout=VALUES))
    assert (values.shape, values.dtype, no_scales.numel()) == ((40, 80), torch.bfloat16, 0)
    assert torch.equal(values[:, :70].float() * outer[:, None], fp4gemm.dequantize(t))
    assert not values[:, 70:].any()
    packed, no_scales, outer = reference.quantize_operand(args._replace(sf_layout=PREPACKED))
    assert torch.equal(packed, t.prepack().data)
    assert (no_scales.numel(), outer.tolist()) == (0, t.outer_scale.tolist())
