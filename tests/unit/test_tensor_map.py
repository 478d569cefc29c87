"""TMA requests: what the device left in Params is read back field by field, at every place it may stand."""

import struct

import pytest

from fp4gemm import tensor_map
from fp4gemm.load import DriverError
from fp4gemm.tensor_map import Request, find_requests


def request_bytes(
    rank, address, *, dims, strides, box, element_strides, data_type=9, interleave=0, swizzle=3, promotion=2, fill=1
):
    """TensorMapRequest of templates/include/fp4gemm/tensor_map.hpp, field by field, as a device leaves it."""
    data = struct.pack("<I", 0xF4F4F4F4) + struct.pack("<I", rank)
    data += bytes([data_type, interleave, swizzle, promotion]) + struct.pack("<I", fill)
    data += struct.pack("<Q", address)
    for values, count, word in ((dims, 5, "<Q"), (strides, 4, "<Q"), (box, 5, "<H"), (element_strides, 5, "<H")):
        unused = 0xDEAD  # past the rank anything may stand
        data += b"".join(struct.pack(word, value) for value in (*values, *[unused] * (count - len(values))))
    return data.ljust(128, b"\xee")


MATRIX = request_bytes(
    2, 0x7F00_1234_5680, dims=(4096, 300), strides=(8192,), box=(64, 128), element_strides=(1, 2), data_type=9
)
LARGEST = request_bytes(
    5, 2**48 - 128, dims=(1, 2, 3, 4, 2**32), strides=(16, 32, 48, 2**40 - 16), box=(1, 2, 3, 4, 256),
    element_strides=(1, 2, 3, 4, 8), data_type=14, interleave=1, swizzle=2, promotion=3, fill=0,
)  # fmt: skip


def test_a_request_is_as_large_as_the_descriptor_it_stands_for():
    assert len(MATRIX) == len(LARGEST) == tensor_map.SIZE == 128
    assert tensor_map._REQUEST.size <= tensor_map.SIZE


@pytest.mark.parametrize(
    "data, expected",
    [
        (MATRIX, Request(2, 9, 0, 3, 2, 1, 0x7F00_1234_5680, (4096, 300), (8192,), (64, 128), (1, 2))),
        (
            LARGEST,
            Request(
                5, 14, 1, 2, 3, 0, 2**48 - 128,
                (1, 2, 3, 4, 2**32), (16, 32, 48, 2**40 - 16), (1, 2, 3, 4, 256), (1, 2, 3, 4, 8),
            ),
        ),
    ],
    ids=["matrix", "largest"],
)  # fmt: skip
def test_fields(data, expected):
    assert find_requests(data) == {0: expected}


def test_offsets():
    params = bytearray(b"\xf4" * 3 + b"\x00" * 61)  # part of the magic number is no request
    params += MATRIX + bytes(64) + LARGEST + bytes(40)
    found = find_requests(bytes(params))
    assert {offset: request.rank for offset, request in found.items()} == {64: 2, 256: 5}


def test_descriptors_stand_on_64_bytes_only():
    for shift in (1, 4, 32, 60):
        assert find_requests(bytes(shift) + MATRIX + bytes(128)) == {}


@pytest.mark.parametrize("length", [0, 1, 63, 64, 127])
def test_what_is_shorter_than_a_descriptor_holds_none(length):
    assert find_requests(MATRIX[:length]) == {}


def test_encode_hands_every_field_to_the_driver(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    tensor = driver.CUtensorMap()
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        return driver.CUresult.CUDA_SUCCESS, tensor

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    descriptor = find_requests(MATRIX)[0].encode(0xABC00)
    assert len(descriptor) == tensor_map.SIZE
    as_ints = [[int(n) for n in field] if isinstance(field, list) else int(field) for field in calls[0]]
    assert as_ints == [9, 2, 0xABC00, [4096, 300], [8192], [64, 128], [1, 2], 0, 3, 2, 1]


def test_a_refused_descriptor_names_the_request(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    refusal = (driver.CUresult.CUDA_ERROR_INVALID_VALUE, None)
    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", lambda *arguments: refusal)
    with pytest.raises(DriverError) as error:
        find_requests(MATRIX)[0].encode(64)
    assert "CUDA_ERROR_INVALID_VALUE" in str(error.value)
    assert "dims=(4096, 300)" in str(error.value)
