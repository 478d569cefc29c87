"""The GEMM: bit for bit where one answer is right, within a derived bound of float64 elsewhere (see gpu_cases)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import reference
from fp4gemm.formats import SF_LAYOUTS

LAYOUTS = tuple(SF_LAYOUTS)
SCALINGS = ("per_row", "per_tensor")
# Large enough for several CTAs, waves and k-tiles, and not a multiple of any tile.
LARGE = ((1, 4096, 4096), (16, 1000, 2048), (257, 513, 1040), (1030, 2056, 4112), (2048, 2048, 2048), (300, 8200, 272))
LARGE_K = ((17, 40, 65584), (1, 8, 40000), (130, 136, 33000), (5, 3, 100001))


def quantized(rows: int, k: int, seed: int, device: torch.device, **options: object) -> fp4gemm.FP4Tensor:
    """A random operand, quantized by the reference."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    return reference.quantize(x, **options).to(device)


def check_exact(
    a: fp4gemm.FP4Tensor,
    b: fp4gemm.FP4Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    device: torch.device,
    what: str,
) -> None:
    """Operands on the CPU whose float32 sums are exact in every order: D has one right answer."""
    want = reference.gemm(a, b, bias, out_dtype)
    on_device = a.to(device), b.to(device), None if bias is None else bias.to(device)
    cases.poison(device, want.numel() * want.element_size())
    got = fp4gemm.gemm(*on_device, out_dtype=out_dtype)
    # A sum of zero may be +0 or -0, depending on the order: compare values there, bits after adding +0.
    cases.assert_same_bits(got + 0.0, want.to(device) + 0.0, what)


# --- B = identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(1, 16), (3, 17), (64, 64), (130, 136), (300, 257), (513, 1024), (5, 1)])
def test_identity_gives_the_dequantized_operand(
    shape: tuple[int, int], scaling: str, out_dtype: torch.dtype, device: torch.device
) -> None:
    rows, k = shape
    t = quantized(rows, k, rows + k, device, scaling=scaling)
    want = reference.dequantize(t, out_dtype)
    for layout, eye_scaling in zip(LAYOUTS, ("per_row", "per_tensor", "per_row"), strict=True):
        eye = cases.identity(k, layout, eye_scaling).to(device)
        what = f"{shape} {scaling} {layout}"
        cases.assert_same_bits(fp4gemm.gemm(t, eye, out_dtype=out_dtype) + 0.0, want + 0.0, f"{what}: A . I")
        cases.assert_same_bits(fp4gemm.gemm(eye, t, out_dtype=out_dtype) + 0.0, want.t() + 0.0, f"{what}: I . B'")


def test_identity_with_every_code_and_scale(device: torch.device) -> None:
    for out_dtype in cases.DTYPES:
        t = cases.any_bytes(200, 528, "128x4", "per_row", seed=1).to(device)
        got = fp4gemm.gemm(t, cases.identity(528).to(device), out_dtype=out_dtype)
        cases.assert_same_bits(got + 0.0, reference.dequantize(t, out_dtype) + 0.0, str(out_dtype))


# --- every M, ragged N and K ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", range(301))
def test_every_m_with_ragged_n_and_k(M: int, device: torch.device) -> None:
    rng = random.Random(M)
    N = rng.choice((1, 8 * rng.randint(1, 50), rng.randint(1, 400), 128 * rng.randint(1, 3)))
    K = rng.choice((16 * rng.randint(1, 60), rng.randint(1, 900), 64 * rng.randint(1, 16), 8 * rng.randint(1, 90)))
    out_dtype, with_bias = rng.choice(cases.DTYPES), rng.random() < 0.4
    bias = torch.randn(N, generator=torch.Generator().manual_seed(M)) if with_bias else None
    if bias is not None:
        bias = bias.to(rng.choice(cases.DTYPES))
    layouts, scalings = rng.choices(LAYOUTS, k=2), rng.choices(SCALINGS, k=2)
    what = f"{M}x{N}x{K} {layouts} {scalings} out {out_dtype} bias {None if bias is None else bias.dtype}\n"
    what += cases.repro("test_gemm_gpu.py::test_every_m_with_ragged_n_and_k", M)

    a, b = (
        cases.exact_operand(rows, K, sf_layout, scaling, seed)
        for rows, sf_layout, scaling, seed in zip((M, N), layouts, scalings, (2 * M, 2 * M + 1), strict=True)
    )
    check_exact(a, b, bias, out_dtype, device, what)

    a = quantized(M, K, 2 * M, device, scaling=scalings[0], sf_layout=layouts[0])
    b = quantized(N, K, 2 * M + 1, device, scaling=scalings[1], sf_layout=layouts[1])
    bias = None if bias is None else bias.to(device)
    cases.poison(device, M * N * out_dtype.itemsize)
    cases.assert_within_bound(fp4gemm.gemm(a, b, bias, out_dtype=out_dtype), a, b, bias, out_dtype, what)


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [*LARGE, *LARGE_K])
def test_large(shape: tuple[int, int, int], out_dtype: torch.dtype, device: torch.device) -> None:
    M, N, K = shape
    a, b = cases.exact_operand(M, K, "128x4", "per_row", 1), cases.exact_operand(N, K, "8x4", "per_row", 2)
    bias = torch.randn(N).to(out_dtype)
    check_exact(a, b, bias, out_dtype, device, f"{shape}")
    a, b = quantized(M, K, 3, device), quantized(N, K, 4, device)
    cases.assert_within_bound(fp4gemm.gemm(a, b, out_dtype=out_dtype), a, b, None, out_dtype, f"{shape}")


@pytest.mark.parametrize("bias_dtype", cases.DTYPES)
@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("scalings", [(s, t) for s in SCALINGS for t in SCALINGS])
def test_bias_and_outer_scales(
    scalings: tuple[str, str], out_dtype: torch.dtype, bias_dtype: torch.dtype, device: torch.device
) -> None:
    """outer_a * (outer_b * acc) + bias, each rounded on its own: a contracted multiply-add shows in float32."""
    M, N, K = 70, 203, 320
    a, b = (cases.exact_operand(n, K, "128x4", s, n) for n, s in zip((M, N), scalings, strict=True))
    bias = (torch.randn(N, generator=torch.Generator().manual_seed(8)) * 30).to(bias_dtype)
    check_exact(a, b, bias, out_dtype, device, f"{scalings} {out_dtype} bias {bias_dtype}")
    check_exact(a, b, None, out_dtype, device, f"{scalings} {out_dtype}")


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(activation: str, out_dtype: torch.dtype, column_major: bool, device: torch.device) -> None:
    """Bit for bit where it is arithmetic; erf and exp are those of another library."""
    M, N, K = 70, 203, 320
    a, b = (cases.exact_operand(n, K, "128x4", "per_row", n) for n in (M, N))
    bias, c = torch.linspace(-2, 2, N), torch.linspace(-3, 3, M * N).reshape(M, N).to(out_dtype)
    operands = a.to(device), b.to(device), bias.to(device)
    got = fp4gemm.gemm(
        *operands, activation=activation, c=c.to(device), beta=0.5, out_dtype=out_dtype, column_major=column_major
    )
    want = reference.gemm(a, b, bias, out_dtype, c=c, beta=0.5, activation=activation).to(device)
    assert got.t().is_contiguous() == column_major
    if activation == "relu":
        cases.assert_same_bits(got + 0.0, want + 0.0, f"relu {out_dtype}")
    else:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sf_layout", ["128x4", "linear"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 32), (70, 203, 320), (129, 264, 96), (200, 33, 288)])
def test_fp4_results(shape: tuple[int, int, int], per_row: bool, sf_layout: str, device: torch.device) -> None:
    """The bytes of the reference's quantizer, but for the sign of a sum that is zero."""
    M, N, K = shape
    a, b = (cases.exact_operand(n, K, "128x4", "per_row", n) for n in (M, N))
    outer = torch.rand(M) + 0.5 if per_row else torch.tensor(0.7)
    bias = torch.linspace(-2, 2, N)
    got = fp4gemm.gemm_fp4(
        a.to(device),
        b.to(device),
        bias.to(device),
        outer_scale=outer.to(device),
        activation="relu",
        sf_layout=sf_layout,
    )
    values = reference.gemm(a, b, bias, torch.float32, activation="relu")
    want = reference.quantize(values, outer_scale=outer, sf_layout=sf_layout, convention="te_per_token").to(device)
    cases.assert_same_bits(got.block_scale, want.block_scale, f"{shape} block scales")
    cases.assert_same_bits(got.outer_scale, want.outer_scale, f"{shape} outer scales")
    cases.assert_same_bits(got.dequantize() + 0.0, want.dequantize() + 0.0, f"{shape} values")


@pytest.mark.parametrize("shape", [(0, 32, 64), (8, 0, 64), (8, 24, 0), (0, 0, 0), (0, 24, 0)])
def test_empty(shape: tuple[int, int, int], device: torch.device) -> None:
    M, N, K = shape
    a, b = reference.quantize(torch.zeros(M, K)), reference.quantize(torch.zeros(N, K))
    bias = torch.arange(N).float()
    for out_dtype in cases.DTYPES:
        check_exact(a, b, None, out_dtype, device, f"{shape}")
        check_exact(a, b, bias, out_dtype, device, f"{shape} with bias")


def test_bias_with_a_stride(device: torch.device) -> None:
    M, N, K = 33, 48, 128
    a, b = cases.exact_operand(M, K, "128x4", "per_row", 1), cases.exact_operand(N, K, "128x4", "per_row", 2)
    bias = torch.randn(2 * N)
    want = reference.gemm(a, b, bias[::2], torch.float32)
    got = fp4gemm.gemm(a.to(device), b.to(device), bias.to(device)[::2], out_dtype=torch.float32)
    cases.assert_same_bits(got + 0.0, want + 0.0, "bias with a stride")


def test_uninitialized_memory_never_shows(device: torch.device) -> None:
    """Output and every scratch buffer, padded rows and columns included, start as NaN."""
    for M, N, K in ((1, 8, 16), (5, 3, 17), (130, 257, 72), (64, 128, 1000)):
        a, b = cases.exact_operand(M, K, "128x4", "per_row", 1), cases.exact_operand(N, K, "8x4", "per_tensor", 2)
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(3)).bfloat16()
        on_device = a.to(device), b.to(device), x.to(device)
        for out_dtype in cases.DTYPES:
            with cases.filled_with_nan():
                got = fp4gemm.gemm(on_device[0], on_device[1], out_dtype=out_dtype)
                fused = fp4gemm.quantize_gemm(on_device[2], on_device[1], out_dtype=out_dtype)
            want = reference.gemm(a, b, None, out_dtype)
            cases.assert_same_bits(got + 0.0, want.to(device) + 0.0, f"{M}x{N}x{K} {out_dtype}")
            split = fp4gemm.gemm(reference.quantize(x).to(device), on_device[1], out_dtype=out_dtype)
            cases.assert_same_bits(fused, split, f"quantize_gemm {M}x{N}x{K} {out_dtype}")


# --- quantize_gemm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 64, 64), (1, 256, 512), (7, 33, 50), (16, 1024, 2048), (129, 130, 272), (300, 512, 8208)]
)
@pytest.mark.parametrize("given", ["no", "scalar", "rows"])
def test_quantize_gemm_is_gemm_of_quantize(
    given: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    M, N, K = shape
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(device, dtype)
    w = quantized(N, K, N, device)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    outer = {"no": None, "scalar": torch.tensor(1 / 512), "rows": torch.linspace(1e-3, 1e-2, M)}[given]
    outer = None if outer is None else outer.to(device)
    for b in (None, bias):
        got = fp4gemm.quantize_gemm(x, w, b, outer_scale=outer)
        want = fp4gemm.gemm(fp4gemm.quantize(x, outer_scale=outer), w, b, out_dtype=dtype)
        cases.assert_same_bits(got, want, f"{shape} {dtype} bias {b is not None}")
    for out_dtype in cases.DTYPES:
        got = fp4gemm.quantize_gemm(x, w, out_dtype=out_dtype, outer_scale=outer)
        want = fp4gemm.gemm(fp4gemm.quantize(x, outer_scale=outer), w, out_dtype=out_dtype)
        cases.assert_same_bits(got, want, f"{shape} {dtype} to {out_dtype}")


def test_quantize_gemm_with_strided_input(device: torch.device) -> None:
    base, w = (
        torch.randn(256, 96, generator=torch.Generator().manual_seed(5)).bfloat16().to(device),
        quantized(80, 256, 6, device),
    )
    got = fp4gemm.quantize_gemm(base.t(), w)
    cases.assert_same_bits(got, fp4gemm.quantize_gemm(base.t().contiguous(), w), "transposed view")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_quantize_gemm_with_nan_and_inf(dtype: torch.dtype, device: torch.device) -> None:
    """As the quantizer has them: the same as quantize, then gemm; other rows do not notice."""
    x = torch.randn(40, 160, generator=torch.Generator().manual_seed(7)).to(dtype)
    x[3, 5], x[9, 100], x[17] = float("nan"), float("inf"), float("-inf")
    w = quantized(64, 160, 8, device)
    want = fp4gemm.gemm(reference.quantize(x).to(device), w, out_dtype=torch.float32)
    got = fp4gemm.quantize_gemm(x.to(device), w, out_dtype=torch.float32)
    cases.assert_same_bits(got, want, "NaN and Inf")
    clean = torch.ones(40, dtype=torch.bool)
    clean[[9, 17]] = False
    assert bool(got.cpu()[clean].isfinite().all())


# --- errors -----------------------------------------------------------------------------------------------------------


def test_bad_operands_raise(device: torch.device, request: pytest.FixtureRequest) -> None:
    a, b = quantized(8, 64, 1, device), quantized(16, 64, 2, device)
    with pytest.raises(ValueError, match="K = 80"):
        fp4gemm.gemm(a, quantized(16, 80, 3, device))
    with pytest.raises(ValueError, match="bias"):
        fp4gemm.gemm(a, b, torch.zeros(17, device=device))
    with pytest.raises(TypeError, match="out_dtype"):
        fp4gemm.gemm(a, b, out_dtype=torch.float64)
    with pytest.raises(TypeError, match="a"):
        fp4gemm.gemm(torch.zeros(8, 64, device=device), b)
    with pytest.raises((TypeError, ValueError), match="x"):
        fp4gemm.quantize_gemm(torch.zeros(64, device=device), b)
    request.getfixturevalue("cuda")
    with pytest.raises(ValueError, match="device"):
        fp4gemm.gemm(a, b.to("cpu"))
    with pytest.raises(ValueError, match="device"):
        fp4gemm.gemm(a, b, torch.zeros(16))


def test_two_devices(cuda: torch.device) -> None:
    """The current device stays 0 while operands are on 1, and one library and one cache serve both."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    a, b = cases.exact_operand(140, 144, "128x4", "per_row", 1), cases.exact_operand(264, 144, "8x4", "per_row", 2)
    for index in (1, 0, 1):
        check_exact(a, b, None, torch.bfloat16, torch.device("cuda", index), f"device {index}")
        assert torch.cuda.current_device() == 0


def test_a_thread_that_never_used_cuda(cuda: torch.device) -> None:
    """It has no current context; the launch binds one."""
    a, b = cases.exact_operand(40, 64, "128x4", "per_row", 1), cases.exact_operand(24, 64, "128x4", "per_row", 2)
    a_device, b_device = a.to(cuda), b.to(cuda)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(fp4gemm.gemm, a_device, b_device).result()
    cases.assert_same_bits(got.cpu() + 0.0, reference.gemm(a, b) + 0.0, "another thread")
