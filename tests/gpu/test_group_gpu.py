"""Groups against a loop over the reference: every byte of every member, nothing around them, and sizes that change on
the device."""

from __future__ import annotations

from typing import Any

import gpu_cases
import group_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import FP4Tensor
from fp4gemm.formats import GRADIENTS
from fp4gemm.group import calls
from fp4gemm.reference.group import member_seed

PROBLEMS, CHUNK = 200, 50
CPU = torch.device("cpu")


def check(case: cases.GroupCase, device: torch.device) -> None:
    x, arguments = case.make(CPU)
    want = fp4gemm.quantize_grouped(x, **arguments, check_dims=True)
    x, arguments = case.make(device)
    with cases.guarded():
        got = fp4gemm.quantize_grouped(x, **arguments)
    cases.assert_results(got, want, case.columns, f"{case}", guarded=device.type == "cuda")


@pytest.mark.parametrize("first", range(0, PROBLEMS, CHUNK))
@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_groups(kind: str, first: int, device: torch.device) -> None:
    for seed in range(first, first + CHUNK):
        check(cases.GroupCase.draw(seed, kind), device)


@pytest.mark.parametrize("case", cases.UNIFORM, ids=str)
def test_members_that_are_one_matrix(case: cases.GroupCase, device: torch.device) -> None:
    check(case, device)


@pytest.mark.parametrize("members", [128, 1024, 1500])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_many_members(kind: str, members: int, device: torch.device) -> None:
    check(cases.GroupCase.draw(0, kind, members, largest=160, options={"both": True, "dbias": True}), device)


@pytest.mark.parametrize("width", [4096, 5120, 8192, 14336, 40000])
@pytest.mark.parametrize("options", [{"scaling": "per_row"}, {"scaling": "per_tensor"}, {"seed": 3}], ids=str)
def test_long_rows(options: dict[str, Any], width: int, device: torch.device) -> None:
    """In registers, one, two or four to a CTA, and read twice."""
    for dtype in (torch.bfloat16, torch.float32):
        sizes = ((5, width), (0, width), (130, width), (1, width))
        check(cases.GroupCase(1, "rows", dtype, sizes, (0,) * 4, 0, False, "normal", options), device)


@pytest.mark.parametrize("kind", ["rows", "both"])
@pytest.mark.parametrize("given", ["outer_scale", "amax"])
@pytest.mark.parametrize("shape", ["one", "members", "lines"])
def test_given_scales(shape: str, given: str, kind: str, device: torch.device) -> None:
    for both in (True, False):
        case = cases.GroupCase.draw(3, kind, 5, dtype=torch.bfloat16, options={"seed": 7})
        x, arguments = case.make(CPU)
        group = fp4gemm.quantize_grouped(x, **arguments, both=True)
        sizes = {"one": [()] * 2, "members": [(5,)] * 2, "lines": [t.outer_scale.shape for t in group]}[shape]
        generator = torch.Generator().manual_seed(1)
        scales = [torch.rand(size, generator=generator) * 0.01 + 1e-4 for size in sizes]
        scales = [t * 2688 for t in scales] if given == "amax" else scales
        want = fp4gemm.quantize_grouped(x, **arguments, both=both, **{given: tuple(scales)})
        x, arguments = case.make(device)
        with cases.guarded():
            moved = {given: tuple(t.to(device) for t in scales)}
            got = fp4gemm.quantize_grouped(x, **arguments, both=both, **moved)
        cases.assert_results(got, want, case.columns, f"{case}", guarded=device.type == "cuda")


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_activations(gradient: str, dtype: torch.dtype, device: torch.device) -> None:
    for kind in cases.KINDS:
        for options in ({"both": True, "dbias": True}, {"scaling": "per_tensor"}):
            check(cases.GroupCase.draw(11, kind, None, 300, dtype, {**options, "gradient": gradient}), device)


def same(got: FP4Tensor, want: FP4Tensor, what: str) -> None:
    gpu_cases.assert_same(got, want, what)


def test_members_are_those_of_the_dense_quantizer(device: torch.device) -> None:
    """A group's bytes are quantize's own, under the seed of the member: no reference in between."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 272, generator=generator).to(device, torch.bfloat16)
    sizes = [0, 300, 1, 128, 129, 342]
    dims = torch.tensor(sizes, device=device)
    rows, columns = fp4gemm.quantize_grouped(x, first_dims=dims, both=True, hadamard=0xACE1, seed=99)
    for i, member in enumerate(x.split(sizes)):
        seed = member_seed(99, i)
        same(rows.member(i), fp4gemm.quantize(member, seed=seed), f"member {i}")
        turned = fp4gemm.quantize(member, transposed=True, hadamard=0xACE1, seed=seed)
        same(columns.member(i), turned, f"transpose of member {i}")


# --- what reviews of such kernels elsewhere have found ---


def test_the_end_of_a_member_inside_of_a_tile(device: torch.device) -> None:
    """A member that ends within a tile of 128 x 128 must neither read nor write the next one's values."""
    sizes = [100, 30, 129, 1]
    x = torch.ones(sum(sizes), 160)
    x[100:130] = 1e30  # it would show in the amax of the first, and in the codes of the third
    x = x.to(device, torch.bfloat16)
    dims = torch.tensor(sizes, device=device)
    rows, columns, dbias = fp4gemm.quantize_grouped(x, first_dims=dims, both=True, dbias=True, scaling="per_tensor")
    for i, member in enumerate(x.split(sizes)):
        same(rows.member(i), fp4gemm.quantize(member, scaling="per_tensor"), f"member {i}")
        want = fp4gemm.quantize(member, scaling="per_tensor", transposed=True)
        same(columns.member(i), want, f"transpose of member {i}")
    assert dbias[[0, 2, 3]].eq(torch.tensor([[100.0], [129.0], [1.0]], device=device)).all()


def test_sums_of_columns_of_varying_widths(device: torch.device) -> None:
    """Column c of member i is at the widths before it, plus c; it sums the rows of that member."""
    widths, height = [32, 0, 160, 16], 300
    parts = [torch.arange(w, dtype=torch.float32).expand(height, w) % 7 + i for i, w in enumerate(widths)]
    x = torch.cat([part.reshape(-1) for part in parts]).to(device, torch.bfloat16)
    dims = torch.tensor(widths, device=device)
    _, dbias = fp4gemm.quantize_grouped(x, last_dims=dims, rows=height, dbias=True)
    want = torch.cat([part.sum(0) for part in parts])
    assert torch.equal(dbias[: len(want)].cpu(), want)


def test_rows_that_do_not_divide_are_an_error(device: torch.device) -> None:
    x = torch.randn(10, 32, device=device)
    with pytest.raises(ValueError, match=r"^x: 10 rows are not 4 members of as many rows each$"):
        fp4gemm.quantize_grouped(x, members=4)


# --- sizes on the device ---


def test_sizes_that_do_not_fit_are_left_out(device: torch.device) -> None:
    """They cannot be an error without waiting for the device: nothing is written for them, and their results say so."""
    x = torch.randn(64, 32).to(device, torch.bfloat16)
    for sizes, fits in (([10, -1, 20], [0, 2]), ([10, 100, 3], [0, 2]), ([60, 5, 1], [0])):
        dims = torch.tensor(sizes, device=device)
        with pytest.raises(ValueError, match=r"^member 1: "):
            fp4gemm.quantize_grouped(x, first_dims=dims, check_dims=True)
        if device.type != "cuda":
            continue
        with cases.guarded():
            both = fp4gemm.quantize_grouped(x, first_dims=dims, both=True)
        starts = [0, 10, 10] if sizes[0] == 10 else [0, 60, 65]
        for i in range(3):
            for transposed, t in enumerate(both):
                if i not in fits:
                    with pytest.raises(ValueError, match=rf"^member {i}: "):
                        t.member(i)
                    continue
                member = x[starts[i] : starts[i] + sizes[i]]
                same(t.member(i), fp4gemm.quantize(member, transposed=bool(transposed)), f"{sizes}, member {i}")


@pytest.mark.parametrize(
    "options", [{}, {"both": True, "hadamard": 0xACE1, "seed": 5}, {"scaling": "per_tensor"}], ids=str
)
@pytest.mark.parametrize("varies", ["rows", "both"])
def test_graph_with_sizes_that_change(varies: str, options: dict[str, Any], cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    elements = 1000 * 256
    flat = torch.randn(elements, generator=generator).to(cuda, torch.bfloat16)
    x = flat.view(1000, 256) if varies == "rows" else flat
    first, last = (torch.zeros(4, dtype=torch.int64, device=cuda) for _ in range(2))
    dims = (
        {"first_dims": first} if varies == "rows" else {"first_dims": first, "last_dims": last, "bounds": (1000, 1024)}
    )
    last.fill_(256)
    fp4gemm.quantize_grouped(x, **dims, dbias=True, **options)  # builds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fp4gemm.quantize_grouped(x, **dims, dbias=True, **options)
    for rows, widths in (
        ([250] * 4, [256] * 4), ([1000, 0, 0, 0], [256] * 4), ([1, 7, 0, 600], [256] * 4), ([0] * 4, [256] * 4),
        ([128, 300, 1, 17], [16, 512, 0, 48]),
    ):  # fmt: skip
        if varies == "rows" and widths != [256] * 4:
            continue
        first.copy_(torch.tensor(rows)), last.copy_(torch.tensor(widths))
        flat.copy_(torch.randn(elements, generator=generator))
        graph.replay()
        on_cpu = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in dims.items()}
        want = fp4gemm.quantize_grouped(x.cpu(), **on_cpu, dbias=True, **options)
        cases.assert_results(got, want, sum(widths), f"{rows} x {widths}", guarded=False)


def test_one_launch(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with their own amaxes: one; with anything else that needs an amax: two, and one more for sums."""
    counts: list[str] = []
    launch = calls._Kernel.__call__

    def counted(self: calls._Kernel, *args: int) -> None:
        counts.append(self.spec.name)
        launch(self, *args)

    monkeypatch.setattr(calls._Kernel, "__call__", counted)
    x = torch.randn(256, 64, device=cuda)
    for options, want in (({}, 1), ({"scaling": "per_tensor"}, 2), ({"both": True}, 2), ({"dbias": True}, 3)):
        counts.clear()
        fp4gemm.quantize_grouped(x, members=4, **options)
        assert len(counts) == want, counts


def test_compile_fullgraph(device: torch.device) -> None:
    x, dims = torch.randn(40, 64, device=device), torch.tensor([10, 0, 30], device=device)
    options = {"both": True, "dbias": True, "seed": 3}
    compiled = torch.compile(fp4gemm.quantize_grouped, fullgraph=True, backend="aot_eager")
    want = fp4gemm.quantize_grouped(x, first_dims=dims, **options)
    cases.assert_results(compiled(x, first_dims=dims, **options), want, 192, "compiled", guarded=False)
