"""Batches: quantize_batch to the byte, bmm bit for bit what gemm makes of the members."""

import gpu_cases as cases
import pytest
import torch

import fp4gemm
from fp4gemm import FP4Batch, reference
from fp4gemm.formats import SF_LAYOUTS

L, N, K = 3, 72, 320


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize(
    "shape", [(128, 320), (33, 320), (7, 40), (256, 16)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("sf_layout", SF_LAYOUTS)
@pytest.mark.parametrize("scaling", ["per_row", "per_tensor"])
def test_quantize_batch(device: torch.device, scaling: str, sf_layout: str, shape: tuple[int, int]) -> None:
    x = values(L, *shape) * torch.tensor([1, 50, 0.01]).view(L, 1, 1).bfloat16()
    outer = torch.linspace(0.001, 0.1, L * shape[0]).view(L, shape[0])
    for given in (None, outer[:, 0] if scaling == "per_tensor" else outer):
        members = [
            reference.quantize(
                member, scaling=scaling, sf_layout=sf_layout, outer_scale=None if given is None else given[i]
            )
            for i, member in enumerate(x)
        ]
        with cases.filled_with_nan():
            got = fp4gemm.quantize_batch(
                x.to(device), scaling=scaling, sf_layout=sf_layout,
                outer_scale=None if given is None else given.to(device),
            )  # fmt: skip
        for i, want in enumerate(members):
            cases.assert_same(got[i].to("cpu"), want, f"{shape}, member {i}")


@pytest.mark.parametrize("rows", [1, 16, 129])
@pytest.mark.parametrize("packed", [True, False])
def test_bmm(device: torch.device, packed: bool, rows: int) -> None:
    """Sums are exact, so each member has one answer."""
    pairs = [
        [cases.exact_operand(size, K, "128x4", "per_row", 2 * i + j) for j, size in enumerate((rows, N))]
        for i in range(L)
    ]
    a, b = (FP4Batch.stack(each).to(device) for each in zip(*pairs, strict=True))
    b = b.prepack() if packed else b
    bias, c = values(L, N, seed=1), values(L, rows, N, seed=2)
    for one_bias in (bias, bias[0]):
        want = torch.stack(
            [
                reference.gemm(*pair, one_bias if one_bias.dim() == 1 else one_bias[i], c=c[i], beta=0.5)
                for i, pair in enumerate(pairs)
            ]
        )
        for column_major in (False, True):
            with cases.filled_with_nan():
                got = fp4gemm.bmm(a, b, one_bias.to(device), c=c.to(device), beta=0.5, column_major=column_major)
            cases.assert_same_bits(got.cpu() + 0.0, want + 0.0, f"{rows} rows, column_major {column_major}")


def test_bmm_into_a_part(device: torch.device) -> None:
    """Between the members nothing changes."""
    a, b = (fp4gemm.quantize_batch(values(L, size, K).to(device)) for size in (40, N))
    whole = torch.full((L, 42, N + 8), 7.0, device=device)
    out = whole[:, 1:-1, :N]
    fp4gemm.bmm(a, b, out=out)
    cases.assert_same_bits(
        out, torch.stack([fp4gemm.gemm(a[i], b[i], out_dtype=out.dtype) for i in range(L)]), "members"
    )
    out.fill_(7)
    assert bool((whole == 7).all())


@pytest.mark.parametrize("sf_layout", ["128x4", "linear"])
def test_bmm_fp4(device: torch.device, sf_layout: str) -> None:
    a, b = (FP4Batch.stack(cases.exact_operand(n, K, "8x4", "per_row", n + i) for i in range(L)) for n in (40, N))
    outer = torch.linspace(0.01, 1, L * 40).view(L, 40)
    for given in (outer, outer[:, 0]):
        with cases.filled_with_nan():
            got = fp4gemm.bmm_fp4(a.to(device), b.to(device), outer_scale=given.to(device), sf_layout=sf_layout)
        for i, member in enumerate(got.to("cpu")):
            want = fp4gemm.gemm_fp4(a[i], b[i], outer_scale=given[i], sf_layout=sf_layout)
            cases.assert_same_bits(member.block_scale, want.block_scale, f"block scales of member {i}")
            cases.assert_same_bits(member.dequantize() + 0.0, want.dequantize() + 0.0, f"values of member {i}")


def test_bmm_in_a_graph(cuda: torch.device) -> None:
    x, w = values(L, 128, K).to(cuda), fp4gemm.quantize_batch(values(L, N, K).to(cuda)).prepack()
    fp4gemm.bmm(fp4gemm.quantize_batch(x), w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d = fp4gemm.bmm(fp4gemm.quantize_batch(x), w)
    x.copy_(x.flip(1))
    graph.replay()
    torch.cuda.synchronize()
    cases.assert_same_bits(d, fp4gemm.bmm(fp4gemm.quantize_batch(x), w), "replayed")
