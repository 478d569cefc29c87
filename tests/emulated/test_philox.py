"""Philox and the stochastic code of a magnitude against the definition in docs/numerics.md, written out in Python."""

from __future__ import annotations

import ctypes
import random

import emulator as emulation
import numpy as np
import pytest

_DRIVER = """
#include "fp4gemm/philox.hpp"
namespace fp4gemm {
extern "C" void philox(uint64_t seed, uint64_t block, uint32_t* w) {
  PhiloxBlock const noise = philox_block(seed, block);
  for (int i = 0; i < 4; ++i) w[i] = noise.w[i];
}
extern "C" void codes(float const* v, uint8_t const* bytes, uint8_t* one, uint8_t* eight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) one[i] = stochastic_code(v[i], bytes[i]);
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    uint32_t noise[2];
    std::memcpy(noise, bytes + i, 8);
    auto const value = [&](int j) { return (bytes[i + j] % 2 ? -v[i + j] : v[i + j]) * kPlaceUnit; };
    uint32_t const word = stochastic_eight(value, noise[0], noise[1]);
    for (int j = 0; j < 8; ++j) eight[i + j] = (word >> (4 * j) & 15) ^ bytes[i + j] % 2 << 3;
  }
}
}  // namespace fp4gemm
"""


@pytest.fixture(scope="module")
def library(emulator: emulation.Emulator) -> ctypes.CDLL:
    return emulation.compile_cpp(emulator.folder, "philox", _DRIVER)


def philox(seed: int, block: int) -> list[int]:
    """Philox4x32-7 as its authors give it."""
    key, c = [seed & 0xFFFFFFFF, seed >> 32], [block & 0xFFFFFFFF, block >> 32, 0, 0]
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ key[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox(library: ctypes.CDLL) -> None:
    rng = random.Random(0)
    cases = [(0, 0), (2**63 - 1, 2**63 - 1), *((rng.getrandbits(63), rng.getrandbits(50)) for _ in range(200))]
    for seed, block in cases:
        words = (ctypes.c_uint32 * 4)()
        library.philox(ctypes.c_uint64(seed), ctypes.c_uint64(block), words)
        assert list(words) == philox(seed, block)
    assert philox(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]  # the known answer


def expected_codes(v: np.ndarray, byte: np.ndarray) -> np.ndarray:
    exact = v.astype(np.float64)  # sums of a float32 and a byte are, from 2^-40 on; what is less changes nothing
    place = np.where(exact < 2, 2 * exact, np.where(exact < 4, exact + 2, exact / 2 + 4))
    return np.minimum(np.floor(place + byte / 256), 7).astype(np.uint8)


def test_codes(library: ctypes.CDLL) -> None:
    """Random magnitudes, and those within a few ulps of where a byte carries them over a grid point."""
    rng = np.random.default_rng(1)
    grid = np.array([0.5, 1, 1.5, 2, 3, 4, 6, 7], dtype=np.float64)
    steps = np.array([0.5, 0.5, 0.5, 0.5, 1, 1, 2, 2], dtype=np.float64)
    near = (grid[:, None] - steps[:, None] * np.arange(256) / 256).astype(np.float32).ravel()
    around = (near.view(np.int32)[:, None] + np.arange(-20, 21)).ravel()
    shifts = near[:, None] - 2.0 ** -np.arange(18, 34, dtype=np.float32)  # half an ulp below a grid point, for any t
    v = np.concatenate([around[around >= 0].astype(np.int32).view(np.float32), shifts.ravel()])
    v = v[(v >= 0) & (v < 7)].astype(np.float32)
    exact = [np.tile(v, 4), np.tile(v, 4)]
    bytes_ = [(-(np.tile(v, 4) * np.where(np.tile(v, 4) < 2, 512, np.where(np.tile(v, 4) < 4, 256, 128)))).astype(int)]
    bytes_[0] = (bytes_[0] + np.repeat(np.arange(-2, 2), len(v))) % 256
    bytes_.append(rng.integers(0, 256, len(exact[1])))
    exact.append((rng.random(1 << 18) * 7).astype(np.float32))
    exact.append(np.exp2(rng.random(1 << 16) * 30 - 28).astype(np.float32))
    bytes_ += [rng.integers(0, 256, len(part)) for part in exact[2:]]
    values, noise = np.concatenate(exact), np.concatenate(bytes_).astype(np.uint8)
    values[values >= 7] = 6.9
    n = len(values) // 8 * 8
    values, noise = np.ascontiguousarray(values[:n]), np.ascontiguousarray(noise[:n])
    one, eight = np.empty(n, np.uint8), np.empty(n, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, noise, one, eight)]
    library.codes(*pointers, ctypes.c_int64(n))
    want = expected_codes(values, noise)
    np.testing.assert_array_equal(one, want)
    np.testing.assert_array_equal(eight, want)
    assert (expected_codes(values, noise) != ((values * 2).astype(int) + (noise > 255))).any()


def test_what_saturates(library: ctypes.CDLL) -> None:
    values = np.array([7, 8, 100, np.inf, np.nan, 6, 5.999, 0], dtype=np.float32)
    noise, one, eight = np.zeros(8, np.uint8), np.empty(8, np.uint8), np.empty(8, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, noise, one, eight)]
    library.codes(*pointers, ctypes.c_int64(8))
    assert one.tolist() == [7, 7, 7, 7, 7, 7, 6, 0]
