"""The prepacked form on the device against the reference, byte for byte, both ways."""

from __future__ import annotations

import gpu_cases as cases
import pytest
import torch

from fp4gemm import FP4Tensor, reference
from fp4gemm.formats import SF_LAYOUTS

LAYOUTS = tuple(SF_LAYOUTS)
SHAPES = ((0, 64), (3, 0), (1, 1), (1, 16), (64, 64), (63, 65), (65, 63), (5, 300), (130, 72), (200, 1040), (257, 4112))


def assert_same(got: FP4Tensor, want: FP4Tensor, what: str) -> None:
    assert got.prepacked == want.prepacked, what
    cases.assert_same(got, want, what)


def check(t: FP4Tensor, device: torch.device, what: str) -> None:
    """Prepacks and unpacks on `device`, each time into memory that held 0x7F."""
    want = t.prepack()
    back = want.unpack()
    on_device = t.to(device)
    cases.poison(device, want.data.numel())
    got = on_device.prepack()
    assert_same(got, want, f"{what}: pack")
    cases.poison_for(back, device)
    assert_same(got.unpack(), back, f"{what}: unpack")


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_equal_the_reference(shape: tuple[int, int], sf_layout: str, device: torch.device) -> None:
    check(cases.any_bytes(*shape, sf_layout, "per_row", seed=sum(shape)), device, f"{shape}")


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 64), (130, 272)])
def test_zero_nan_and_negative_scales(shape: tuple[int, int], sf_layout: str, device: torch.device) -> None:
    """All 256 scale bytes: those of 0 keep signs of codes only, the sign of a negative one moves to its codes."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = torch.arange(shape[0] * (shape[1] // 16)).remainder(256).to(torch.uint8).view(shape[0], -1)
    check(cases.packed(codes, scales, torch.ones(shape[0]), sf_layout), device, f"{shape}")


@pytest.mark.parametrize("sf_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 64), (70, 130)])
def test_round_trip_gives_every_byte_back(shape: tuple[int, int], sf_layout: str, device: torch.device) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    t = reference.quantize(x, sf_layout=sf_layout)
    assert_same(t.to(device).prepack().unpack(), t, f"{shape}")


def test_scales_past_the_tensor_do_not_matter(device: torch.device) -> None:
    """A swizzled layout has padding; what a caller's file holds there stays out of the blocks."""
    t = cases.any_bytes(37, 80, "128x4", "per_row", seed=3)
    padding = SF_LAYOUTS["128x4"].from_linear(torch.ones(37, 5, dtype=torch.uint8)) == 0
    dirty = torch.where(padding, 0x55, t.block_scale.view(torch.uint8)).to(torch.uint8).view(torch.float8_e4m3fn)
    filled = FP4Tensor(t.data, dirty, t.outer_scale, t.shape, t.sf_layout)
    assert_same(filled.to(device).prepack(), t.prepack(), "dirty padding")


def test_views_that_start_anywhere(device: torch.device) -> None:
    """Data and packed bytes of a slice need not be aligned."""
    t = cases.any_bytes(70, 96, "linear", "per_row", seed=4)
    want = t.prepack()
    for offset in (1, 4, 8):
        data, packed = (
            torch.cat((torch.zeros(offset, dtype=torch.uint8), source.flatten())).to(device)[offset:].view(source.shape)
            for source in (t.data, want.data)
        )
        moved, outer = t.to(device), t.outer_scale.to(device)
        got = FP4Tensor(data, moved.block_scale, outer, t.shape, "linear").prepack()
        assert_same(got, want, f"offset {offset}: pack")
        form = FP4Tensor(packed, moved.block_scale.new_empty(0), outer, t.shape, "linear", "sm90")
        assert_same(form.unpack(), want.unpack(), f"offset {offset}: unpack")


def test_dequantize_of_a_prepacked_tensor(device: torch.device) -> None:
    t = cases.any_bytes(130, 200, "8x4", "per_row", seed=5)
    for dtype in cases.DTYPES:
        got = t.to(device).prepack().dequantize(dtype)
        cases.assert_same_bits(got, reference.dequantize(t.prepack(), dtype), str(dtype))


def test_large(device: torch.device) -> None:
    """More CTAs than the device holds at once, against the reference on the same device."""
    shape = (2100, 8208) if device.type == "cuda" else (300, 1040)
    t = cases.any_bytes(*shape, "128x4", "per_row", seed=6).to(device)
    want = reference.packed.pack(t.data, t.linear_block_scale(), t.shape)
    got = t.prepack()
    cases.assert_same_bits(got.data, want, "pack")
    data, scales = reference.packed.unpack(want, t.shape)
    cases.assert_same_bits(got.unpack().data, data, "unpack: data")
    cases.assert_same_bits(got.unpack().linear_block_scale(), scales, "unpack: scales")


def test_compiled(device: torch.device) -> None:
    t = cases.any_bytes(130, 72, "8x4", "per_row", seed=7).to(device)

    def there_and_back(t: FP4Tensor) -> tuple[FP4Tensor, FP4Tensor]:
        p = t.prepack()
        return p, p.unpack()

    packed, back = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(t)
    assert_same(packed, t.prepack(), "pack")
    assert_same(back, t.prepack().unpack(), "unpack")
