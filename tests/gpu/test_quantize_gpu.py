"""Bytes of the quantizer kernels against the reference on the CPU, which is the definition of right."""

from __future__ import annotations

import itertools

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import calls, reference
from fp4gemm.formats import CONVENTIONS, SF_LAYOUTS

LAYOUTS = tuple(SF_LAYOUTS)


def check(
    x: torch.Tensor, device: torch.device, what: str, outer: torch.Tensor | None = None, **options: object
) -> None:
    """Quantizes CPU tensors on `device`, into memory that held 0x7F, and compares every byte with the reference."""
    want = reference.quantize(x, outer_scale=outer, **options)
    on_device = x.to(device), None if outer is None else outer.to(device)
    cases.poison_for(want, device)
    got = fp4gemm.quantize(on_device[0], outer_scale=on_device[1], **options)
    cases.assert_same(got, want, what)


@pytest.mark.parametrize("seed", range(200))
def test_bytes_equal_the_reference(seed: int, device: torch.device) -> None:
    case = cases.QuantizeCase.draw(seed)
    repro = cases.repro("test_quantize_gpu.py::test_bytes_equal_the_reference", seed)
    check(case.x(), device, f"{case}\n{repro}", case.outer_scale(), **case.arguments())


@pytest.mark.parametrize("seed", range(200, 212))
def test_reference_gives_the_same_bytes_on_the_device(seed: int, device: torch.device) -> None:
    case = cases.QuantizeCase.draw(seed)
    x, outer = case.x(), case.outer_scale()
    want = reference.quantize(x, outer_scale=outer, **case.arguments())
    got = reference.quantize(x.to(device), outer_scale=None if outer is None else outer.to(device), **case.arguments())
    cases.assert_same(got, want, str(case))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("amax", cases.TIE_AMAXES)
def test_every_block_amax_under_a_tie_amax(amax: float, scaling: str, convention: str, device: torch.device) -> None:
    check(cases.tie_matrix(amax), device, f"amax {amax}", scaling=scaling, convention=convention)


def test_worked_vector(device: torch.device) -> None:
    row = [-12, -7.5, -3.1, -1, -0.3, -0.05, 0, 0.05, 0.3, 1, 2, 3, 4.5, 6, 9, 10]
    x = torch.tensor([row], dtype=torch.float32, device=device)
    q = fp4gemm.quantize(x, scaling="per_tensor", sf_layout="linear")
    assert bytes(q.data.cpu().flatten().tolist()).hex(" ") == "ef 9b 88 00 10 32 54 66"
    assert q.block_scale.view(torch.uint8).item() == 0x7E
    assert q.outer_scale.item() == torch.tensor(12.0).mul(1 / 2688).item()


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor", "per_column"])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (0, 7)])
def test_empty(shape: tuple[int, int], scaling: str, sf_layout: str, device: torch.device) -> None:
    check(torch.zeros(shape), device, f"{shape}", scaling=scaling, sf_layout=sf_layout)


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_all_zero(dtype: torch.dtype, scaling: str, device: torch.device) -> None:
    x = torch.zeros(37, 160, dtype=dtype)
    x[::2] = -0.0
    for convention in CONVENTIONS:
        check(x, device, f"{dtype} {convention}", scaling=scaling, convention=convention)


@pytest.mark.parametrize("shape", [(32, 64), (130, 1024), (48, 400)])
@pytest.mark.parametrize("given", [False, True])
def test_blocks_of_16_by_16(shape: tuple[int, int], given: bool, device: torch.device) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    outer = torch.tensor(1 / 512) if given else None
    check(x, device, f"{shape}", outer, scaling="per_tensor", block=(16, 16))


VIEWS = {
    "transposed": lambda x: x.t(),
    "every second column": lambda x: x[:, ::2],
    "every third row": lambda x: x[::3],
    "inner window": lambda x: x[5:77, 7:263],
    "aligned window": lambda x: x[8:72, 64:320],
    "one row for all": lambda x: x[3:4].expand(40, -1),
    "one column for all": lambda x: x[:, 3:4].expand(-1, 48),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor", "per_column"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_strided_input(dtype: torch.dtype, scaling: str, view: str, device: torch.device) -> None:
    base = torch.randn(96, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = reference.quantize(VIEWS[view](base), scaling=scaling)
    cases.poison_for(want, device)
    cases.assert_same(fp4gemm.quantize(VIEWS[view](base.to(device)), scaling=scaling), want, view)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_misaligned_base_pointer(dtype: torch.dtype, offset: int, device: torch.device) -> None:
    rows, k = 19, 272
    flat = torch.randn(offset + rows * k, generator=torch.Generator().manual_seed(3)).to(dtype)
    x = flat.to(device)[offset:].view(rows, k)
    assert x.storage_offset() == offset
    cases.assert_same(fp4gemm.quantize(x), reference.quantize(flat[offset:].view(rows, k)), f"offset {offset}")


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor", "per_column"])
def test_uninitialized_memory_never_shows(scaling: str, sf_layout: str, device: torch.device) -> None:
    for rows, k in ((1, 16), (7, 33), (129, 208), (200, 1040)):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
        want = reference.quantize(x, scaling=scaling, sf_layout=sf_layout)
        x = x.to(device)
        with cases.filled_with_nan():
            got = fp4gemm.quantize(x, scaling=scaling, sf_layout=sf_layout)
        cases.assert_same(got, want, f"{rows}x{k}")


def test_the_input_and_a_given_scale_are_left_alone(device: torch.device) -> None:
    x, outer = torch.randn(33, 144).to(device), torch.rand(33).add(0.01).to(device)
    before, outer_before = x.clone(), outer.clone()
    q = fp4gemm.quantize(x, outer_scale=outer)
    outer.zero_()
    cases.assert_same_bits(x, before, "x")
    cases.assert_same_bits(q.outer_scale, outer_before, "outer_scale")


def test_check_finite_raises(device: torch.device) -> None:
    x = torch.randn(8, 64).to(device)
    fp4gemm.quantize(x, check_finite=True)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x[3, 5] = bad
        with pytest.raises(ValueError, match="x"):
            fp4gemm.quantize(x, check_finite=True)


def test_two_shapes_and_layouts_take_turns(device: torch.device) -> None:
    """A plan that was made for one problem must not leak into another."""
    shapes = ((3, 64), (200, 512), (3, 72), (64, 4096))
    xs = {shape: torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16() for shape in shapes}
    for _, shape, sf_layout in itertools.product(range(2), shapes, LAYOUTS):
        check(xs[shape], device, f"{shape} {sf_layout}", sf_layout=sf_layout)


def test_other_stream(cuda: torch.device) -> None:
    """The kernels run where the caller's stream is: behind a long wait there, on data that is written there."""
    x = torch.randn(128, 1024).bfloat16()
    want = {scaling: reference.quantize(x, scaling=scaling) for scaling in ("per_row", "per_tensor")}
    source, buffer = x.to(cuda), torch.zeros_like(x, device=cuda)
    stream = torch.cuda.Stream()
    for scaling in want:  # loads the kernels, which waits for the device
        fp4gemm.quantize(buffer, scaling=scaling)
    for scaling, expected in want.items():
        buffer.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            buffer.copy_(source)
            got = fp4gemm.quantize(buffer, scaling=scaling)
        stream.synchronize()
        cases.assert_same(got, expected, scaling)


@pytest.mark.parametrize("scaling", ["per_row", "per_tensor", "per_column"])
@pytest.mark.parametrize("shape", [(16, 256), (100, 1000)])
def test_cuda_graph(shape: tuple[int, int], scaling: str, cuda: torch.device) -> None:
    x = torch.randn(shape, device=cuda).bfloat16()
    fp4gemm.quantize(x, scaling=scaling)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = fp4gemm.quantize(x, scaling=scaling)
    for scale in (1.0, 100.0, 0.01):  # falling amax: a buffer that the graph does not reset would show
        x.copy_(torch.randn(shape, device=cuda) * scale)
        graph.replay()
        torch.cuda.synchronize()
        cases.assert_same(q, reference.quantize(x.cpu(), scaling=scaling), f"scale {scale}")


# --- values for a GEMM that follows ---


def check_values(
    x: torch.Tensor, cuda: torch.device, what: str, outer: torch.Tensor | None = None, **options: object
) -> None:
    """`calls.quantize_values`, into memory that held 0x7F, against quantize and dequantize without the outer scale."""
    convention = options.get("convention") or ("te" if options.get("scaling") == "per_tensor" else "te_per_token")
    want = reference.quantize(x, outer_scale=outer, **options)
    per_tensor = want.outer_scale.dim() == 0
    rows, k = x.shape
    values = torch.zeros(rows, -(-k // 8) * 8, dtype=torch.bfloat16)
    values[:, :k] = reference.dequantize(want, torch.bfloat16, outer=False)
    on_device = x.to(cuda), None if outer is None else outer.to(cuda)
    cases.poison(cuda, 2 * values.numel(), 4 * want.outer_scale.numel())
    got, got_outer = calls.quantize_values(on_device[0], per_tensor, str(convention), on_device[1])
    cases.assert_same_bits(got, values, f"{what}: values")
    cases.assert_same_bits(got_outer, want.outer_scale, f"{what}: outer_scale")


@pytest.mark.parametrize("seed", range(300, 420))
def test_values_are_those_of_the_bytes(seed: int, cuda: torch.device) -> None:
    case = cases.QuantizeCase.draw(seed)
    if case.scaling == "per_column":
        pytest.skip("values are of rows")
    options = {"scaling": case.scaling, "convention": case.convention}
    repro = cases.repro("test_quantize_gpu.py::test_values_are_those_of_the_bytes", seed)
    check_values(case.x(), cuda, f"{case}\n{repro}", case.outer_scale(), **options)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("amax", cases.TIE_AMAXES)
def test_values_of_every_block_amax(amax: float, convention: str, cuda: torch.device) -> None:
    check_values(cases.tie_matrix(amax), cuda, f"amax {amax}", convention=convention)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("given", ["no", "scalar", "rows"])
@pytest.mark.parametrize("k", [8, 16, 40, 1000, 4096, 8192, 14336, 16384, 16392, 40000, 70000])
def test_values_however_many_ctas_share_a_row(k: int, given: str, dtype: torch.dtype, cuda: torch.device) -> None:
    for rows in (1, 3, 16, 100, 130):
        if rows * k > 2_000_000 and (rows, k, dtype) != (130, 40000, torch.bfloat16):
            continue
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k)).to(dtype)
        outer = {"no": None, "scalar": torch.tensor(1 / 512), "rows": torch.full((rows,), 1 / 700)}[given]
        check_values(x, cuda, f"{rows}x{k}", outer)


def test_values_of_scales_that_round_to_zero(cuda: torch.device) -> None:
    """Codes under a zero scale are not all zero in `te`; their values are, with the sign of the code."""
    x = torch.full((4, 64), 1e-6)
    x[:, ::3] *= -1
    x[:, 0] = 1000.0
    for convention in CONVENTIONS:
        check_values(x, cuda, convention, scaling="per_tensor", convention=convention)
        check_values(x, cuda, convention, convention=convention)


def test_values_of_strided_rows(cuda: torch.device) -> None:
    base = torch.randn(40, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    for view in VIEWS.values():
        x = view(base)
        got, outer = calls.quantize_values(view(base.to(cuda)), False, "te_per_token", None)
        want = reference.quantize(x)
        cases.assert_same_bits(got[:, : x.shape[1]], reference.dequantize(want, torch.bfloat16, outer=False), "values")
        cases.assert_same_bits(outer, want.outer_scale, "outer_scale")


def test_values_in_a_cuda_graph(cuda: torch.device) -> None:
    x = torch.randn(8, 8192, device=cuda).bfloat16()
    calls.quantize_values(x, False, "te_per_token", None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, outer = calls.quantize_values(x, False, "te_per_token", None)
    for scale in (1.0, 100.0, 0.01):
        x.copy_(torch.randn(8, 8192, device=cuda) * scale)
        graph.replay()
        torch.cuda.synchronize()
        want = reference.quantize(x.cpu())
        cases.assert_same_bits(values, reference.dequantize(want, torch.bfloat16, outer=False), f"scale {scale}")
        cases.assert_same_bits(outer, want.outer_scale, f"scale {scale}")


def test_two_devices(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    x = torch.randn(40, 320).bfloat16()
    for index in (1, 0, 1):
        got = fp4gemm.quantize(x.to(f"cuda:{index}"))
        assert got.device.index == index
        cases.assert_same(got, reference.quantize(x), f"device {index}")
