"""The prepacked form: its bytes against a scalar reading of packed.hpp, the kernels' arithmetic, and the way back."""

import numpy as np
import pytest
import torch

from fp4gemm.formats import E2M1_VALUES, packed_shape, padded_k, scale_columns
from fp4gemm.reference import packed

SHAPES = [(64, 64), (128, 192), (1, 1), (33, 40), (65, 16), (64, 80), (130, 200), (5, 300)]


def random_operand(n: int, k: int, seed: int = 0, low: int = 1, high: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and linear scale bytes ``low`` <= byte < ``high``."""
    generator = torch.Generator().manual_seed(seed + 1000 * n + k)
    data = torch.randint(0, 256, (n, padded_k(k) // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(low, high, (n, scale_columns(k)), generator=generator, dtype=torch.uint8)
    return data, scales.view(torch.float8_e4m3fn)


def code_at(data: torch.Tensor, row: int, column: int) -> int:
    if row >= data.shape[0] or column >= 2 * data.shape[1]:
        return 0
    return int(data[row, column // 2]) >> 4 * (column % 2) & 15


def registers_of(block: np.ndarray, w: int, lane: int, half: int) -> list[int]:
    """The eight registers that a lane gets from the words of k-steps 2 * half and 2 * half + 1."""
    at = 512 * w + 16 * lane + 8 * half
    a, b = (int(v) for v in block[at : at + 8].view("<u4"))
    return packed.split_codes(a, b)


def code_of(register: int, high: int) -> int:
    half = register >> 16 * high & 0xFFFF
    return half >> 15 << 3 | half >> 6 & 7


@pytest.mark.parametrize("shape", SHAPES)
def test_every_fragment_holds_the_code_that_the_mma_wants_there(shape):
    data, scales = random_operand(*shape)
    blocks = packed.pack(data, scales, shape).numpy()
    for band, column, w, lane, step in np.ndindex(*blocks.shape[:2], 4, 32, 4):
        g, t = lane // 4, lane % 4
        registers = registers_of(blocks[band, column], w, lane, step // 2)[4 * (step % 2) :]
        for i, high in np.ndindex(4, 2):
            row = 64 * band + 16 * w + g + 8 * (i % 2)
            k = 64 * column + 16 * step + 2 * t + 8 * (i // 2) + high
            assert code_of(registers[i], high) == code_at(data, row, k)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_bytes_stand_where_the_kernels_read_them(shape):
    data, scales = random_operand(*shape)
    blocks = packed.pack(data, scales, shape)
    values = scales.float()
    for band, column, w, g, step, half in np.ndindex(*blocks.shape[:2], 4, 8, 4, 2):
        row, group = 64 * band + 16 * w + g + 8 * half, 4 * column + step
        inside = row < shape[0] and group < scales.shape[1]
        expected = np.float16(float(values[row, group]) * 128).view(np.uint16) >> 7 if inside else 0
        assert int(blocks[band, column, 2048 + 64 * w + 8 * g + 2 * step + half]) == expected


def bf16(bits: np.ndarray) -> np.ndarray:
    """The value of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def kernel_values(block: np.ndarray) -> np.ndarray:
    """A [64, 64] block as ``dequantize_fragments<OperandBf16>`` gives it: bf16 bits, scales, one exact product."""
    values = np.zeros((64, 64))
    for w, lane, half in np.ndindex(4, 32, 2):
        g, t = lane // 4, lane % 4
        registers = registers_of(block, w, lane, half)
        scale_bytes = block[2048 + 64 * w + 8 * g + 4 * half :][:4].reshape(2, 2)  # step, row
        for step, i, high in np.ndindex(2, 4, 2):
            code = bf16(np.array([registers[4 * step + i] >> 16 * high & 0xFFFF]))
            scale = bf16(np.array([int(scale_bytes[step, i % 2]) * 16 + 0x7000]))
            column = 16 * (2 * half + step) + 2 * t + 8 * (i // 2) + high
            values[16 * w + g + 8 * (i % 2), column] = (code * scale).item()
    return values


def test_kernel_arithmetic_is_exact_for_every_code_and_scale():
    """All 16 codes under all 127 finite scales: 2032 pairs in two blocks of 4 x 64 groups."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    shape = (128, 16)
    every = torch.cat((scales, scales[:1])).view(128, 1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(128, 1)
    blocks = packed.pack(codes[:, 0::2] | codes[:, 1::2] << 4, every, shape).numpy()
    got = np.concatenate([kernel_values(blocks[band, 0])[:, :16] for band in range(2)])
    exact = every.double().numpy() * np.array(E2M1_VALUES) * 2.0**-7
    assert np.array_equal(got, exact)
    assert np.array_equal(np.signbit(got), np.signbit(exact))
    # "exact" is meant literally: what mul.bf16x2 would round has no more bits than a bf16.
    assert np.array_equal(got, torch.from_numpy(got).bfloat16().double().numpy())


def test_fp16_operands_are_exact_too():
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    data = torch.zeros(127, 8, dtype=torch.uint8)
    blocks = packed.pack(data, scales.view(127, 1), (127, 16)).numpy()
    for row in range(127):
        band, w, half, g = row // 64, row % 64 // 16, row % 16 // 8, row % 8
        byte = blocks[band, 0, 2048 + 64 * w + 8 * g + half]
        scale = np.uint16(int(byte) << 7).view(np.float16)
        assert float(scale) == float(scales[row].float()) * 128
        for code in range(8):
            raw = np.uint16(code << 9).view(np.float16)  # the code's bits 8..6, three higher
            assert raw == np.float16(E2M1_VALUES[code] * 2.0**-14)
            assert float(raw * scale) == E2M1_VALUES[code] * float(scales[row].float()) * 2.0**-7


@pytest.mark.parametrize("shape", [*SHAPES, (0, 64), (64, 0), (0, 0), (3, 0)])
def test_round_trip_is_byte_exact(shape):
    data, scales = random_operand(*shape)
    blocks = packed.pack(data, scales, shape)
    assert blocks.shape == packed_shape(*shape)
    assert blocks.dtype == torch.uint8
    got_data, got_scales = packed.unpack(blocks, shape)
    assert torch.equal(got_data, data)
    assert got_scales.dtype == torch.float8_e4m3fn
    assert torch.equal(got_scales.view(torch.uint8), scales.view(torch.uint8))


def test_chunks_give_what_one_pass_gives(monkeypatch):
    data, scales = random_operand(300, 100)
    whole = packed.pack(data, scales, (300, 100))
    monkeypatch.setattr(packed, "_CHUNK", 2 * 64 * 100)
    assert torch.equal(packed.pack(data, scales, (300, 100)), whole)
    assert torch.equal(packed.unpack(whole, (300, 100))[0], data)


def test_padding_is_zero():
    data, scales = random_operand(3, 20)
    blocks = packed.pack(data, scales, (3, 20))
    whole_data, whole_scales = packed.unpack(blocks, (64, 64))
    assert int((whole_scales.view(torch.uint8) != 0).sum()) == 3 * 2
    assert not whole_data[3:].any()
    assert not whole_data[:, 16:].any()


def through(code_byte: int, scale_byte: int) -> tuple[int, int]:
    data = torch.full((1, 8), code_byte, dtype=torch.uint8)
    scales = torch.tensor([[scale_byte]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    data, scales = packed.unpack(packed.pack(data, scales, (1, 16)), (1, 16))
    assert len(set(data.flatten().tolist())) == 1
    return int(data[0, 0]), int(scales.view(torch.uint8))


@pytest.mark.parametrize(
    "before, after",
    [
        ((0xD3, 0x00), (0x80, 0x00)),  # a zero scale keeps signs only
        ((0xD3, 0x80), (0x08, 0x00)),  # of a negative zero: signs move
        ((0xD3, 0xC1), (0x5B, 0x41)),  # a negative scale moves its sign to the codes
        ((0xD3, 0x7F), (0xD3, 0x7F)),  # NaN stays NaN
        ((0xD3, 0xFF), (0x5B, 0x7F)),
        ((0xD3, 0x7E), (0xD3, 0x7E)),
    ],
)
def test_what_the_form_does_not_keep(before, after):
    assert through(*before) == after


def test_nan_scales_are_the_packed_byte_255():
    data = torch.zeros(1, 8, dtype=torch.uint8)
    scales = torch.tensor([[0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    block = packed.pack(data, scales, (1, 16))[0, 0].numpy()
    assert block[2048] == 255
    assert np.isnan(kernel_values(block)[0, :16]).all()


def test_values_are_those_of_the_pair_for_any_byte():
    """Every scale byte, negative ones included: the kernel's values are code * scale * 2^-7."""
    data, _ = random_operand(64, 64)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(64, 4)
    block = packed.pack(data, scales, (64, 64))[0, 0].numpy()
    codes = torch.stack((data & 15, data >> 4), -1).flatten(1)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[codes.long()]
    exact = values * scales.double().repeat_interleave(16, 1) * 2.0**-7
    assert np.array_equal(kernel_values(block), exact.numpy(), equal_nan=True)
