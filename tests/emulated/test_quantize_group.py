"""Kernels of groups, their own source on a CPU, against a loop over the reference: every byte of every member, its
padding too, and no byte around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import emulator as emulation
import gpu_cases
import group_cases as cases
import groups
import pytest
import torch

import fp4gemm
from fp4gemm import select
from fp4gemm.formats import GRADIENTS
from fp4gemm.group import calls, ops

PROBLEMS = 6  # of each kind
CPU = torch.device("cpu")


@pytest.fixture
def launches(emulator: emulation.Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``grouped.calls`` as on a GPU of two SMs, with CPU tensors."""
    monkeypatch.setattr(calls, "Launcher", partial(groups.Launcher, emulator.folder))
    monkeypatch.setattr(select, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(select, "gpu_of", lambda device: ("a GPU", 2))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1, raising=False)
    monkeypatch.setattr(select, "prefetch_ctas", lambda spec, k, device: 2)
    caches = calls._rows_kernel, calls._uniform_kernel, calls._tile_kernel, calls._amax_kernel, calls._sums_kernel
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def run(case: cases.GroupCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, then the kernels in its place."""
    x, arguments = case.make(CPU)
    want = fp4gemm.quantize_grouped(x, **arguments, check_dims=True)
    with monkeypatch.context() as patch, cases.guarded():
        patch.setattr(ops.reference, "quantize_grouped", calls.quantize)
        got = fp4gemm.quantize_grouped(x, **arguments)
    cases.assert_results(got, want, case.columns, f"{case}", guarded=True)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("seed", range(PROBLEMS))
@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_groups(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(cases.GroupCase.draw(seed, kind, largest=200), monkeypatch)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("case", cases.UNIFORM, ids=str)
def test_members_that_are_one_matrix(case: cases.GroupCase, monkeypatch: pytest.MonkeyPatch) -> None:
    run(case, monkeypatch)
    assert calls._uniform_kernel.cache_info().currsize == 1


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("options", [{}, {"seed": 3}], ids=str)
@pytest.mark.parametrize("rows", [(5, 0, 3, 1), (3, 3, 3)], ids=str)
def test_long_rows(rows: tuple[int, ...], options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to a CTA, or one where there is noise."""
    sizes, none = tuple((m, 9728) for m in rows), (0,) * len(rows)
    run(cases.GroupCase(1, "rows", torch.bfloat16, sizes, none, 0, False, "normal", dict(options)), monkeypatch)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("sizes", [[10, -1, 20], [10, 100, 3], [60, 5, 1]], ids=str)
def test_what_does_not_fit_is_left_out(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with monkeypatch.context() as patch, cases.guarded():
        patch.setattr(ops.reference, "quantize_grouped", calls.quantize)
        both = fp4gemm.quantize_grouped(x, first_dims=torch.tensor(sizes), both=True, dbias=True)[:2]
    starts = [0, 10, 10] if sizes[0] == 10 else [0, 60, 65]
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        for transposed, t in enumerate(both):
            if size < 0 or start + size > 64:
                with pytest.raises(ValueError, match=rf"^member {i}: "):
                    t.member(i)
            else:
                want = fp4gemm.quantize(x[start : start + size], transposed=bool(transposed))
                gpu_cases.assert_same(t.member(i), want, f"{sizes}, member {i}")


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("options", [{}, {"both": True, "dbias": True}], ids=str)
@pytest.mark.parametrize("kind", ["rows", "both"])
def test_many_members(kind: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    run(cases.GroupCase.draw(0, kind, 200, 80, torch.bfloat16, options), monkeypatch)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("given", ["outer_scale", "amax"])
def test_given_scales(given: str, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all, one of each member, one of each line; of empty members, too."""
    case = cases.GroupCase.draw(4, "rows", 5, dtype=torch.bfloat16, options={"both": both})
    x, arguments = case.make(CPU)
    lines = [t.outer_scale.shape for t in fp4gemm.quantize_grouped(x, **{**arguments, "both": True})]
    for shapes in ([()] * 2, [(5,)] * 2, lines):
        generator = torch.Generator().manual_seed(1)
        scales = tuple(torch.rand(shape, generator=generator) * 0.01 + 1e-4 for shape in shapes)
        run(replace(case, options={"both": both, given: scales}), monkeypatch)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_activations(gradient: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both results and the sums, where rows are whole 16 bytes; rows alone, where they are not."""
    for seed, kind, options in ((1, "both", {"both": True, "dbias": True}), (2, "rows", {"scaling": "per_tensor"})):
        case = cases.GroupCase.draw(seed, kind, 4, 150, dtype, {**options, "gradient": gradient})
        run(replace(case, values="special"), monkeypatch)
