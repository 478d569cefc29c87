"""What the tests of the reference share."""

import torch

from fp4gemm import formats
from fp4gemm.formats import unpack_e2m1
from fp4gemm.tensor import FP4Tensor

CONVENTIONS = list(formats.CONVENTIONS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(rows: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scale_bytes(t: FP4Tensor) -> torch.Tensor:
    return t.linear_block_scale().view(torch.uint8)


def codes(t: FP4Tensor) -> torch.Tensor:
    return unpack_e2m1(t.data)


def assert_same(got: FP4Tensor, expected: FP4Tensor) -> None:
    assert (got.shape, got.sf_layout) == (expected.shape, expected.sf_layout)
    assert torch.equal(got.data, expected.data)
    assert torch.equal(got.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))
    assert torch.equal(got.outer_scale.view(torch.int32), expected.outer_scale.view(torch.int32))


def hard(rows: int, k: int, seed: int, dtype: torch.dtype = torch.float32, special: bool = False) -> torch.Tensor:
    """Blocks of many magnitudes, zero and all-but-zero ones, and as asked NaN and Inf."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g) * torch.exp2(
        torch.randint(-12, 5, (rows, k // 16), generator=g).repeat_interleave(16, dim=1).float()
    )
    x[torch.rand(rows, k, generator=g) < 0.05] = -0.0
    x[0, :16] = 0
    if rows > 2:
        x[2] = 0
    if special:
        x[rows // 2, 3] = float("nan")
        x[-1, k // 2] = -float("inf")
        x[:, -1] = float("nan")
    return x.to(dtype)
