"""TMA descriptors: what CuTe asked for on the device (templates/include/fp4gemm/tensor_map.hpp) is encoded here."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from fp4gemm.load import DriverError, check

SIZE = 128
ALIGNMENT = 64
_MAGIC = 0xF4F4F4F4
_REQUEST = struct.Struct("<II4BIQ5Q4Q5H5H")


@dataclass(frozen=True)
class Request:
    """Arguments of one cuTensorMapEncodeTiled call."""

    rank: int
    data_type: int
    interleave: int
    swizzle: int
    l2_promotion: int
    oob_fill: int
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]

    def encode(self, address: int) -> bytes:
        """The descriptor for a tensor at ``address``. Raises DriverError where the driver refuses it."""
        from cuda.bindings import driver as d

        tensor_map = check(
            d.cuTensorMapEncodeTiled(
                d.CUtensorMapDataType(self.data_type),
                self.rank,
                address,
                [d.cuuint64_t(n) for n in self.dims],
                [d.cuuint64_t(n) for n in self.strides],
                [d.cuuint32_t(n) for n in self.box],
                [d.cuuint32_t(n) for n in self.element_strides],
                d.CUtensorMapInterleave(self.interleave),
                d.CUtensorMapSwizzle(self.swizzle),
                d.CUtensorMapL2promotion(self.l2_promotion),
                d.CUtensorMapFloatOOBfill(self.oob_fill),
            ),
            f"encode a TMA descriptor for {self}",
        )
        return ctypes.string_at(int(tensor_map.getPtr()), SIZE)


def address_word(request: Request, address: int = 0x0000_5A5A_0000_0000) -> tuple[bytes, int]:
    """The descriptor at ``address``, and which of its 8-byte words is the address.

    Found, not assumed: two encodings of different addresses must differ in that word alone.
    """
    other = 0x0000_2C3C_4C5C_6C00
    one, two = (struct.unpack("<16Q", request.encode(a)) for a in (address, other))
    fields = [i for i in range(SIZE // 8) if one[i] != two[i]]
    if len(fields) != 1 or (one[fields[0]], two[fields[0]]) != (address, other):
        raise DriverError("this driver's TMA descriptors do not hold the address as one 64-bit word; please report it")
    return struct.pack("<16Q", *one), fields[0]


def find_requests(params: bytes) -> dict[int, Request]:
    """Offset -> request for every descriptor slot in the bytes of a Params struct."""
    return {
        offset: _parse(params, offset)
        for offset in range(0, len(params) - SIZE + 1, ALIGNMENT)
        if struct.unpack_from("<I", params, offset)[0] == _MAGIC
    }


def _parse(params: bytes, offset: int) -> Request:
    fields = _REQUEST.unpack_from(params, offset)
    _, rank, data_type, interleave, swizzle, promotion, fill, address = fields[:8]
    dims, strides, box, element_strides = fields[8:13], fields[13:17], fields[17:22], fields[22:27]
    return Request(
        rank, data_type, interleave, swizzle, promotion, fill, address,
        dims[:rank], strides[: rank - 1], box[:rank], element_strides[:rank],
    )  # fmt: skip
