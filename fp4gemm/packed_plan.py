"""Launches of the GEMMs on prepacked weights: the argument of a kernel and problem, made once."""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import lru_cache
from typing import NamedTuple

import torch

from fp4gemm.division import ALONE_BYTES, divide
from fp4gemm.formats import PACKED_BLOCK
from fp4gemm.launch import Dispatch
from fp4gemm.load import DriverError, load
from fp4gemm.spec import PackedMmaSpec, PackedWgmmaSpec
from fp4gemm.tensor_map import Request, address_word

Spec = PackedMmaSpec | PackedWgmmaSpec

# PackedGemmArguments of templates/include/fp4gemm/packed_gemm.hpp: keep both alike.
# x_map | x, w, d, c, outer_a, outer_b, bias, offsets | strides of x and d | m, n, k, panels, k_blocks | division, with
# weights_first | experts, strides, beta
PACKED_GEMM_ARGUMENTS = struct.Struct("<128x8Q3q5i11i3if")
PACKED_GEMM_BYTES = -(-PACKED_GEMM_ARGUMENTS.size // 64) * 64
_X, _W, _D, _C, _OUTER_A, _OUTER_B, _BIAS, _OFFSETS = range(16, 24)  # words of 8 bytes
_BETA = PACKED_GEMM_ARGUMENTS.size - 4
_WEIGHTS_FIRST = struct.calcsize("<128x8Q3q5i7i")


class PackedProblem(NamedTuple):
    """What a plan depends on beside the kernel: sizes; strides in elements; which outer scales are vectors.

    x [m, k] has rows ``x_stride`` apart; D [m, n] is row-major, or column-major where ``column_major``, ``ldd`` apart.
    ``experts``: how many weights [n, k] follow each other for the m tokens of a grouped kernel, 0 for others;
    ``outer_b_per_row`` then is of each weight.
    """

    m: int
    n: int
    k: int
    x_stride: int
    ldd: int
    column_major: bool
    outer_a_per_row: bool
    outer_b_per_row: bool
    experts: int = 0

    @property
    def panels(self) -> int:
        return -(-self.n // PACKED_BLOCK)

    @property
    def k_blocks(self) -> int:
        return -(-self.k // PACKED_BLOCK)


class PackedPlan:
    """The argument of one kernel and problem. Later launches only write addresses into it."""

    def __init__(self, spec: Spec, problem: PackedProblem, device: int) -> None:
        kernel = load(spec)
        if kernel.meta["params_bytes"] != PACKED_GEMM_BYTES:
            raise DriverError(
                f"{spec.name}: argument of {kernel.meta['params_bytes']} bytes, packed {PACKED_GEMM_BYTES}"
            )
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        division = divide(spec, problem.m, problem.n, problem.k, sms, problem.experts)
        if division is None:
            raise ValueError(f"{spec.name} cannot serve {problem}")
        p = problem
        strides = (1, p.ldd) if p.column_major else (p.ldd, 1)
        self._buffer = ctypes.create_string_buffer(PACKED_GEMM_BYTES)
        PACKED_GEMM_ARGUMENTS.pack_into(
            self._buffer, 0, *(0,) * 8, p.x_stride, *strides, p.m, p.n, p.k, p.panels, p.k_blocks,
            *division.numbers, p.experts, p.outer_a_per_row, p.outer_b_per_row, 0.0,
        )  # fmt: skip
        self._words = memoryview(self._buffer).cast("B").cast("Q")
        self._map_word: int | None = None
        if isinstance(spec, PackedWgmmaSpec):
            encoded, self._map_word = address_word(_tokens_request(spec, p))
            self._words[:16] = memoryview(encoded).cast("Q")
        self._grid = (division.ctas, 1, 1)
        shared = kernel.meta["smem_bytes"] if division.shared_bytes is None else division.shared_bytes
        address = ctypes.addressof(self._buffer)
        threads = kernel.meta["threads"]
        self._dispatch = self._behind = Dispatch(kernel, "gemm", threads, shared, address, waits=True)
        if division.ctas <= sms and shared < ALONE_BYTES:
            # While a quantizer of a few CTAs still runs, two of these would share an SM and leave another one idle.
            self._behind = Dispatch(kernel, "gemm", threads, ALONE_BYTES, address, waits=True)
        self._lock = threading.Lock()

    def __call__(
        self, stream: int, weights_first: bool, behind: bool, x: int, w: int, d: int, c: int, outer_a: int,
        outer_b: int, bias: int, offsets: int, beta: float,
    ) -> None:  # fmt: skip
        """Launch with these addresses, 0 for what is absent, before the kernel in front has ended.

        Only ``weights_first`` does it read anything before that, then its weight. ``behind`` a quantizer of its tokens.
        """
        with self._lock:
            words = self._words
            words[_X], words[_W], words[_D], words[_C] = x, w, d, c
            words[_OUTER_A], words[_OUTER_B], words[_BIAS], words[_OFFSETS] = outer_a, outer_b, bias, offsets
            if self._map_word is not None:
                words[self._map_word] = x
            if c:
                struct.pack_into("<f", self._buffer, _BETA, beta)
            struct.pack_into("<i", self._buffer, _WEIGHTS_FIRST, weights_first)
            dispatch = self._behind if behind else self._dispatch
            dispatch(self._grid, stream, True)


def _tokens_request(spec: PackedWgmmaSpec, p: PackedProblem) -> Request:
    """Boxes of 64 columns, swizzled for WGMMA; tokens and columns past the end read as zero."""
    box = (64, spec.tokens // spec.multicast)
    data_type = {"bf16": 9, "fp16": 6}[spec.a_dtype]  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _FLOAT16
    swizzle_128b, promotion_128b = 3, 2
    return Request(2, data_type, 0, swizzle_128b, promotion_128b, 0, 0, (p.k, p.m), (2 * p.x_stride,), box, (1, 1))


@lru_cache(maxsize=4096)
def packed_plan(spec: Spec, problem: PackedProblem, device: int) -> PackedPlan:
    return PackedPlan(spec, problem, device)
