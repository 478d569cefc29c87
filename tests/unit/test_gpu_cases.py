"""The checks of tests/gpu, on the CPU: generators draw what they say, and comparisons catch what they should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fp4gemm
from fp4gemm import reference
from fp4gemm.tensor import FP4Tensor


def load_cases() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "gpu" / "gpu_cases.py"
    spec = importlib.util.spec_from_file_location("gpu_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("gpu_cases", module)
    spec.loader.exec_module(module)
    return module


cases = load_cases()


def test_random_problems_cover_what_they_should() -> None:
    drawn = [cases.QuantizeCase.draw(seed) for seed in range(200)]
    for name, count in {"dtype": 3, "sf_layout": 3, "scaling": 3, "convention": 5, "given": 3, "values": 3}.items():
        assert len({getattr(case, name) for case in drawn}) == count, name
    assert any(case.rows == 1 for case in drawn)
    assert any(case.k == 16 for case in drawn)
    assert sum(case.k % 2 for case in drawn) >= 5
    assert sum(case.k > 32768 for case in drawn) >= 10
    assert sum(bool(case.k % 8) for case in drawn) >= 20
    assert cases.QuantizeCase.draw(7) == cases.QuantizeCase.draw(7)


@pytest.mark.parametrize("seed", [0, 3, 11, 26, 58])
def test_a_random_problem_runs(seed: int) -> None:
    case = cases.QuantizeCase.draw(seed)
    assert torch.equal(case.x().nan_to_num(), case.x().nan_to_num())
    got = fp4gemm.quantize(case.x(), outer_scale=case.outer_scale(), **case.arguments())
    want = reference.quantize(case.x(), outer_scale=case.outer_scale(), **case.arguments())
    assert got.shape == (case.rows, case.k)
    cases.assert_same(got, want, str(case))


def test_special_values_are_there() -> None:
    x = next(
        c for c in map(cases.QuantizeCase.draw, range(200)) if c.values == "special" and c.rows > 30 and c.k > 30
    ).x()
    assert x.isnan().any()
    assert ((x == 0) & x.signbit()).any()
    assert ((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any()
    assert (x == torch.finfo(x.dtype).max).any()


def test_one_wrong_byte_is_caught() -> None:
    want = cases.any_bytes(130, 48, "128x4", "per_row", seed=1)
    for name in ("data", "block_scale", "outer_scale"):
        leaves = {leaf: getattr(want, leaf).clone() for leaf in ("data", "block_scale", "outer_scale")}
        leaves[name].view(torch.uint8).flatten()[-1] ^= 1  # for block_scale: a padding byte
        with pytest.raises(AssertionError, match=f"{name}: 1 of"):
            cases.assert_same(FP4Tensor(**leaves, shape=want.shape, sf_layout=want.sf_layout), want, "case")
    with pytest.raises(AssertionError, match="differ"):
        cases.assert_same_bits(torch.tensor([-0.0]), torch.tensor([0.0]), "sign of zero")


def test_tie_matrix_walks_all_block_amaxes() -> None:
    for amax in cases.TIE_AMAXES:
        x = cases.tie_matrix(amax)
        assert (x.abs().amax(dim=1) == amax).all()
        block_amaxes = set(x.reshape(len(x), -1, 16).abs().amax(dim=-1).flatten().view(torch.int16).tolist())
        assert block_amaxes == set(range(int(torch.tensor(amax).bfloat16().view(torch.int16)) + 1))


def test_identity_is_the_identity() -> None:
    for layout, scaling in (("linear", "per_row"), ("128x4", "per_tensor"), ("8x4", "per_row")):
        assert torch.equal(reference.dequantize(cases.identity(37, layout, scaling)), torch.eye(37))


def test_uninitialized_memory_is_garbage() -> None:
    with cases.filled_with_nan():
        assert torch.empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.uint8) == 255).all()
        assert torch.empty(5, dtype=torch.float8_e4m3fn).float().isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bound_holds_for_a_right_gemm_and_not_for_a_wrong_one(out_dtype: torch.dtype) -> None:
    a, b = (reference.quantize(torch.randn(n, 320, generator=torch.Generator().manual_seed(n))) for n in (20, 30))
    bias = torch.randn(30)
    D = fp4gemm.gemm(a, b, bias, out_dtype=out_dtype)
    cases.assert_within_bound(D, a, b, bias, out_dtype, "right")
    exact, bound = cases.gemm_exact_and_bound(a, b, bias, out_dtype)
    for wrong in (exact + 3 * bound, torch.full_like(exact, float("nan")), exact.roll(1, 0)):
        with pytest.raises(AssertionError, match="outside the bound"):
            cases.assert_within_bound(wrong.to(out_dtype), a, b, bias, out_dtype, "wrong")
    assert (bound / (exact.abs() + 1)).max() < 0.02


def test_exact_operands_sum_exactly_in_any_order() -> None:
    a, b = (cases.exact_operand(4, 2000, "128x4", "per_tensor", seed) for seed in (1, 2))
    one, two = (reference.dequantize(t, outer=False) for t in (a, b))
    products = one * two
    for order in (torch.arange(2000), torch.randperm(2000, generator=torch.Generator().manual_seed(3))):
        running = products[:, order].cumsum(dim=1)[:, -1]
        assert torch.equal(running.double(), products.double().sum(dim=1))


def test_every_forced_kernel_exists() -> None:
    """A configuration that no kernel has would only be found out on a GPU."""
    plain = cases.FORCED_VARIANTS[0]
    forced = [config for config, variant in cases.kernels(cases.FORCED_VARIANTS) if variant == plain]
    assert forced == [*cases.chosen_configs(), *cases.EXTRA_CONFIGS]
