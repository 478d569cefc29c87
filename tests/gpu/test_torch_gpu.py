"""The operations inside torch: streams, CUDA graphs, torch.compile, opcheck."""

from __future__ import annotations

import importlib.util
import os
import shutil

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import reference

M, N, K = 48, 160, 320


@pytest.fixture
def weights(device: torch.device) -> fp4gemm.FP4Tensor:
    return reference.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(1))).to(device)


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)


@pytest.fixture
def bias(device: torch.device) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(3)).bfloat16().to(device)


def test_other_stream(weights: fp4gemm.FP4Tensor, x: torch.Tensor, bias: torch.Tensor, cuda: torch.device) -> None:
    want = fp4gemm.quantize_gemm(x, weights, bias)
    buffer, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        buffer.copy_(x)
        fused = fp4gemm.quantize_gemm(buffer, weights, bias)
        split = fp4gemm.gemm(fp4gemm.quantize(buffer), weights, bias)
    stream.synchronize()
    cases.assert_same_bits(fused, want, "quantize_gemm")
    cases.assert_same_bits(split, want, "gemm")


def test_streams_side_by_side(weights: fp4gemm.FP4Tensor, cuda: torch.device) -> None:
    """Plans and scratch that two streams share would mix their results."""
    inputs = [torch.randn(M, K, device=cuda).bfloat16() for _ in range(4)]
    want = [fp4gemm.quantize_gemm(t, weights) for t in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[] for _ in inputs]
    for _ in range(20):
        for stream, t, results in zip(streams, inputs, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(fp4gemm.quantize_gemm(t, weights))
    torch.cuda.synchronize()
    for expected, results in zip(want, got, strict=True):
        for result in results:
            cases.assert_same_bits(result, expected, "stream")


@pytest.mark.parametrize("call", ["gemm", "quantize_gemm"])
def test_cuda_graph(
    call: str, weights: fp4gemm.FP4Tensor, x: torch.Tensor, bias: torch.Tensor, cuda: torch.device
) -> None:
    def run() -> torch.Tensor:
        if call == "gemm":
            return fp4gemm.gemm(fp4gemm.quantize(x), weights, bias)
        return fp4gemm.quantize_gemm(x, weights, bias)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for scale in (1.0, 50.0, 0.02):
        x.copy_(torch.randn(M, K, device=cuda) * scale)
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        cases.assert_same_bits(replayed, run(), f"{call}, scale {scale}")


def inductor_lacks(device: torch.device) -> str | None:
    """What torch's inductor needs and does not find here."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "inductor needs triton"
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return None if any(map(shutil.which, filter(None, compilers))) else "inductor needs a C compiler"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(
    backend: str, weights: fp4gemm.FP4Tensor, x: torch.Tensor, bias: torch.Tensor, device: torch.device
) -> None:
    def layer(x: torch.Tensor, w: fp4gemm.FP4Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fp4gemm.quantize_gemm(x * 2, w, bias) + 1

    def steps(x: torch.Tensor, w: fp4gemm.FP4Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = fp4gemm.quantize(x, scaling="per_tensor")
        return fp4gemm.gemm(q, w, bias, out_dtype=torch.float32), fp4gemm.dequantize(q)

    if backend == "inductor" and (lacks := inductor_lacks(device)):
        pytest.skip(lacks)
    torch._dynamo.reset()
    for function in (layer, steps):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        got, want = compiled(x, weights, bias), function(x, weights, bias)
        for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
            cases.assert_same_bits(one, other, f"{function.__name__} {backend}")


def test_compile_dynamic_m(weights: fp4gemm.FP4Tensor, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fp4gemm.quantize_gemm, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 48, 130):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).bfloat16().to(device)
        cases.assert_same_bits(compiled(x, weights), fp4gemm.quantize_gemm(x, weights), f"M = {rows}")


def test_inference_mode_and_no_grad(weights: fp4gemm.FP4Tensor, x: torch.Tensor) -> None:
    want = fp4gemm.quantize_gemm(x, weights)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cases.assert_same_bits(fp4gemm.quantize_gemm(x, weights), want, mode.__name__)


def opcheck(op: str, *arguments: object) -> None:
    # Not test_schema: it multiplies every tensor to compare it, which float8 has no kernel for.
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fp4gemm, op).default, arguments, test_utils=utilities)


def test_opcheck(weights: fp4gemm.FP4Tensor, x: torch.Tensor, bias: torch.Tensor) -> None:
    """Fake registration, autograd keys and functionalization of the custom ops, as torch checks them."""
    plain = (weights.data, weights.block_scale, weights.outer_scale)
    w, activations = (*plain, f":{weights.sf_layout}"), (x, None, None, "")
    packed = weights.prepack()
    p = (packed.data, packed.block_scale, packed.outer_scale, f"sm90:{packed.sf_layout}")
    out = torch.zeros(M, N, dtype=torch.float32, device=x.device)
    scale = torch.full((M,), 1 / 512, device=x.device)
    opcheck("quantize", x, False, "128x4", "te_per_token", 1, None)
    opcheck("quantize", x.float(), True, "linear", "te", 1, None)
    opcheck("quantize", x, False, "8x4", "te_per_token", 1, scale)
    opcheck("dequantize", *plain, weights.sf_layout, K, torch.float32)
    opcheck("prepack", weights.data, weights.block_scale, weights.sf_layout, K)
    opcheck("unpack", packed.data, packed.sf_layout, N, K)
    opcheck("gemm", *w, *w, N, K, None, None, 0.0, None, torch.bfloat16, False)
    opcheck("gemm", *activations, *p, N, K, bias, out.bfloat16(), 0.5, "relu", torch.bfloat16, True)
    opcheck("gemm_out", out, *activations, *p, N, K, bias, None, 0.0, None)
    opcheck("quantize_gemm", x, *w, N, bias, torch.bfloat16, None)
    opcheck("quantize_gemm", x, *p, N, None, torch.float32, scale)


def test_operands_are_not_changed(weights: fp4gemm.FP4Tensor, x: torch.Tensor, bias: torch.Tensor) -> None:
    """What opcheck's schema test would say, had it float8."""
    a = reference.quantize(x)
    tensors = (x, bias, a.data, a.block_scale, a.outer_scale, weights.data, weights.block_scale, weights.outer_scale)
    before = [t.clone() for t in tensors]
    packed = weights.prepack()
    tensors = (*tensors, packed.data)
    before.append(packed.data.clone())
    for w in (weights, packed):
        fp4gemm.gemm(a, w, bias)
        fp4gemm.gemm(x, w, bias, c=x.new_zeros(M, N))
        fp4gemm.quantize_gemm(x, w, bias)
    fp4gemm.dequantize(a)
    for index, (t, copy) in enumerate(zip(tensors, before, strict=True)):
        cases.assert_same_bits(t, copy, f"operand {index}")


def test_leading_dimensions(weights: fp4gemm.FP4Tensor, x: torch.Tensor, bias: torch.Tensor) -> None:
    want = fp4gemm.quantize_gemm(x, weights, bias)
    got = fp4gemm.quantize_gemm(x.reshape(4, 3, 4, K), weights, bias)
    cases.assert_same_bits(got, want.reshape(4, 3, 4, N), "leading dimensions")


# Last of all: a kernel that loads from a misaligned address takes the CUDA context with it, and every later test.
@pytest.mark.parametrize("shifted", ["data", "block_scale", "outer_scale", "bias"])
def test_misaligned_operands(shifted: str, device: torch.device) -> None:
    """Tensors that start one element into a buffer, as views of a packed file do."""
    a, b = cases.exact_operand(33, 128, "128x4", "per_row", 1), cases.exact_operand(N, 128, "8x4", "per_row", 2)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(4)).bfloat16()
    want, want_values = reference.gemm(a, b, bias, torch.float32), reference.dequantize(a)

    def place(name: str, t: torch.Tensor) -> torch.Tensor:
        if name != shifted:
            return t.to(device)
        buffer = torch.zeros(t.numel() + 1, dtype=t.dtype, device=device)
        buffer[1:].copy_(t.flatten())
        return buffer[1:].view(t.shape)

    def place_all(t: fp4gemm.FP4Tensor) -> fp4gemm.FP4Tensor:
        leaves = (place(name, getattr(t, name)) for name in ("data", "block_scale", "outer_scale"))
        return fp4gemm.FP4Tensor(*leaves, t.shape, t.sf_layout)

    a, b = place_all(a), place_all(b)
    got = fp4gemm.gemm(a, b, place("bias", bias), out_dtype=torch.float32)
    cases.assert_same_bits(got + 0.0, want + 0.0, f"gemm, {shifted}")
    cases.assert_same_bits(fp4gemm.dequantize(a), want_values, f"dequantize, {shifted}")
