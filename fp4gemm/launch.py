"""Launching: argument bytes, grid, stream. A launch is one packed by-value struct and one driver call."""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from fp4gemm.load import DriverError, Kernel, bind_context, check, load
from fp4gemm.spec import GemmSpec, KernelSpec, PackedCollectiveSpec
from fp4gemm.tensor_map import SIZE, address_word, find_requests

# The structs of templates/include/fp4gemm/{quantize,dequantize,pack,gemm,grouped}.hpp: keep both alike.
QUANTIZE_ARGUMENTS = struct.Struct("<5Q4q4i4QIi")
NO_OPTIONS = (0, 0, 0, 0, 0, 0)  # its last fields, where a kernel reads none of them
NORM_ARGUMENTS = struct.Struct(QUANTIZE_ARGUMENTS.format + "3Qqf4x")
AMAX_ARGUMENTS = struct.Struct("<2Q2q2i")
DEQUANTIZE_ARGUMENTS = struct.Struct("<4QI2i4x")
PACK_ARGUMENTS = struct.Struct("<3Q2q2i")
GEMM_ARGUMENTS = struct.Struct("<14Q13q8iQ")  # GroupedArguments, of which other kernels read all but the offsets


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


_programmatic: ContextVar[bool] = ContextVar("programmatic", default=False)


@contextmanager
def programmatic(enabled: bool = True) -> Iterator[None]:
    """Let GEMMs on prepacked weights ask for their weight before the kernel in front of them has ended.

    A chain of layers then has no gaps. Only for weights that no kernel of the chain writes. Holds for calls, and
    captures, of this context. Without it they begin before that, too (dependent launch), as quantizers of few CTAs
    do, but read and write nothing before it has ended; only the GEMM of ``quantize_gemm``, behind its own quantizer,
    always asks for its weight first. CUTLASS's collective and grouped products never do.
    """
    token = _programmatic.set(enabled)
    try:
        yield
    finally:
        _programmatic.reset(token)


def is_programmatic() -> bool:
    """Whether this is inside of :func:`programmatic`."""
    return _programmatic.get()


class Dispatch:
    """One entry point, its CTA and its argument at a fixed address: what is left is a grid and a stream.

    ``waits``: the kernel itself waits for the one in front, so it may be launched before that has ended.
    """

    def __init__(
        self, kernel: Kernel, entry_point: str, threads: int, shared_bytes: int, argument: int, *, waits: bool = False
    ) -> None:
        self._handle = kernel.entry_points[entry_point]
        self._threads, self._shared, self._waits = threads, shared_bytes, waits
        self._pointers = (ctypes.c_void_p * 1)(argument)
        self._address = ctypes.addressof(self._pointers)
        self._configs: dict[tuple[int, int, int], Any] = {}

    def __call__(self, grid: tuple[int, int, int], stream: int, dependent: bool | None = None) -> None:
        """Launch; ``dependent``: before the one in front has ended, None: as ``programmatic`` says. Not thread-safe."""
        status = self._launch(grid, stream, dependent)
        if status:  # CUDA_SUCCESS is 0
            if status == _driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:
                bind_context(torch.cuda.current_device())
                status = self._launch(grid, stream, dependent)
            if status:
                raise DriverError(f"kernel launch, grid {grid}, {self._threads} threads: {status.name}")

    def _launch(self, grid: tuple[int, int, int], stream: int, dependent: bool | None) -> Any:
        if not (self._waits and (_programmatic.get() if dependent is None else dependent)):
            return _driver().cuLaunchKernel(
                self._handle, *grid, self._threads, 1, 1, self._shared, stream, self._address, 0
            )[0]
        config = self._configs.get(grid)
        if config is None:
            config = self._configs[grid] = _dependent_config(grid, self._threads, self._shared)
        config.hStream = stream
        return _driver().cuLaunchKernelEx(config, self._handle, self._address, 0)[0]


def _dependent_config(grid: tuple[int, int, int], threads: int, shared_bytes: int) -> Any:
    driver = _driver()
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value.programmaticStreamSerializationAllowed = 1
    attribute.value = value
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = [attribute], 1
    return config


class Launcher:
    """A kernel whose one argument is a by-value struct, packed in place for each launch.

    ``waits``, ``dependent``: see :class:`Dispatch`. ``shared_bytes``: instead of what the kernel needs.
    """

    def __init__(
        self, spec: KernelSpec, arguments: struct.Struct, *, waits: bool = False, dependent: bool | None = None,
        shared_bytes: int | None = None,
    ) -> None:  # fmt: skip
        kernel = load(spec)
        if kernel.meta["params_bytes"] != arguments.size:
            raise DriverError(f"{spec.name}: argument of {kernel.meta['params_bytes']} bytes, packed {arguments.size}")
        self._pack = arguments.pack_into
        self._buffer = ctypes.create_string_buffer(arguments.size)
        address = ctypes.addressof(self._buffer)
        threads, shared = kernel.meta["threads"], kernel.meta["smem_bytes"] if shared_bytes is None else shared_bytes
        self._dispatch = Dispatch(kernel, spec.entry_points[0], threads, shared, address, waits=waits)
        self._dependent = dependent
        self._lock = threading.Lock()

    def __call__(self, grid: tuple[int, int, int], stream: int, *values: float) -> None:
        with self._lock:  # the driver copies the buffer before it returns
            self._pack(self._buffer, 0, *values)
            self._dispatch(grid, stream, self._dependent)


class Batch(NamedTuple):
    """How many problems of one shape a launch has, and how far it is from one to the next, in elements.

    Operands and D lie apart; of the others 0 means that all share one. Block scales of operands are contiguous.
    """

    members: int = 1
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    sfd: int = 0
    outer_a: int = 0
    outer_b: int = 0
    outer_d: int = 0
    bias: int = 0


NO_BATCH = Batch()


class GemmProblem(NamedTuple):
    """What a plan depends on: shape, leading dimensions in elements, which outer scales are vectors, and the batch."""

    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldc: int
    ldd: int
    outer_a_per_row: bool
    outer_b_per_row: bool
    outer_d_per_row: bool = False
    batch: Batch = NO_BATCH


class Operands(NamedTuple):
    """What a launch writes into Params: addresses, 0 for what the kernel has not, and the bits of beta (float64).

    ``workspace``: of a kernel that has one, and ``launch_number`` what tells what this launch leaves there from what
    others have left. ``offsets``: of a grouped product, the first row of each expert and the end of the last one's.
    """

    a: int
    b: int
    sfa: int
    sfb: int
    c: int
    d: int
    sfd: int
    outer_a: int
    outer_b: int
    outer_d: int
    bias: int
    beta: int
    workspace: int = 0
    launch_number: int = 0
    offsets: int = 0


OPERANDS = Operands._fields

_launch_numbers = itertools.count(int.from_bytes(os.urandom(7), "little") + 1)


def new_launch_number() -> int:
    """Fresh memory holds it by accident, a word once in 2**56 times. No earlier launch has left it: who waits for a
    flag clears it.
    """
    return next(_launch_numbers)


def beta_bits(beta: float) -> int:
    """``Operands.beta``: kernels have beta as a float64 in Params, a word like an address."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", beta))
    return int(bits)


def _stand_in(operand: int) -> int:
    """An address no allocation has, to find where an operand's pointer stands in Params; 128-byte aligned for TMA."""
    return 0x0000_5A5A_0000_0000 + (operand + 1) * 0x0100_0080


class GemmPlan:
    """CUTLASS's Params for one kernel and problem. Later launches only write pointers into it."""

    def __init__(self, kernel: Kernel, problem: GemmProblem, device: int) -> None:
        launch_bytes = _make_params(kernel, problem, device)
        params, grid = _split(kernel, launch_bytes)
        self.grid = grid
        self.patches = _raw_pointers(params) + _encode_descriptors(params)
        self._buffer = ctypes.create_string_buffer(bytes(params), len(params))
        self._words = memoryview(self._buffer).cast("B").cast("Q")
        address = ctypes.addressof(self._buffer)
        threads, shared_bytes = kernel.meta["threads"], kernel.meta["smem_bytes"]
        self._dispatch = Dispatch(kernel, "gemm", threads, shared_bytes, address, waits=True)
        self._lock = threading.Lock()

    def __call__(self, stream: int, dependent: bool | None, operands: Operands) -> None:
        """Launch with these operands; ``dependent``: see :class:`Dispatch`."""
        with self._lock:
            words = self._words
            for word, operand in self.patches:
                words[word] = operands[operand]
            self._dispatch(self.grid, stream, dependent)


@lru_cache(maxsize=4096)
def gemm_plan(spec: GemmSpec | PackedCollectiveSpec, problem: GemmProblem, device: int) -> GemmPlan:
    """The plan of a (kernel, problem, device); the first call runs ``make_params`` there."""
    return GemmPlan(load(spec), problem, device)


class _ParamsMaker:
    """Runs ``make_params`` on one device.

    It has a stream and a buffer of its own, and runs in relaxed capture mode, so a plan can be made while another
    stream is being captured, and making one waits for nothing else.
    """

    _BUFFER_BYTES = 16 << 10

    def __init__(self, device: int) -> None:
        driver = _driver()
        self._stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "create a stream")
        self._buffer = check(driver.cuMemAlloc(self._BUFFER_BYTES + 64), "allocate Params")
        self.one = int(self._buffer) + self._BUFFER_BYTES
        check(driver.cuMemsetD32Async(self.one, 0x3F800000, 1, self._stream), "write 1.0")  # done before make_params is
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._lock = threading.Lock()

    def __call__(self, kernel: Kernel, problem: GemmProblem) -> bytes:
        """The bytes of the kernel's Launch struct, with stand-in addresses."""
        driver, size = _driver(), kernel.meta["launch_bytes"]
        if size > self._BUFFER_BYTES:
            raise DriverError(f"{kernel.spec.name}: Params of {size} bytes, expected at most {self._BUFFER_BYTES}")
        p, (members, *batch) = problem, problem.batch
        *addresses, offsets = (_stand_in(i) for i in range(len(OPERANDS)))
        arguments, host = ctypes.create_string_buffer(GEMM_ARGUMENTS.size), ctypes.create_string_buffer(size)
        strides, flags = (p.lda, p.ldb, p.ldc, p.ldd), (p.outer_a_per_row, p.outer_b_per_row, p.outer_d_per_row)
        GEMM_ARGUMENTS.pack_into(
            arguments, 0, *addresses, *strides, *batch, p.m, p.n, p.k, members, self._sms, *flags, offsets
        )  # fmt: skip
        pointer = ctypes.c_uint64(int(self._buffer))
        pointers = (ctypes.c_void_p * 2)(ctypes.addressof(arguments), ctypes.addressof(pointer))
        with self._lock:
            entry, stream = kernel.entry_points["make_params"], self._stream
            # Padding is not written: what the last kernel left there could pass for a descriptor request.
            check(driver.cuMemsetD8Async(self._buffer, 0, size, stream), "clear Params")
            launched = driver.cuLaunchKernel(entry, 1, 1, 1, 1, 1, 1, 0, stream, ctypes.addressof(pointers), 0)
            check(launched, f"launch make_params of {kernel.spec.name}")
            check(driver.cuMemcpyDtoHAsync(ctypes.addressof(host), self._buffer, size, stream), "copy Params")
            check(driver.cuStreamSynchronize(stream), f"run make_params of {kernel.spec.name}")
        return host.raw


_params_maker = lru_cache(maxsize=None)(_ParamsMaker)


def _make_params(kernel: Kernel, problem: GemmProblem, device: int) -> bytes:
    driver = _driver()
    bind_context(device)
    (status, mode) = driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    check((status,), "relax the capture mode")
    try:
        return _params_maker(device)(kernel, problem)
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def address_of_one(device: int) -> int:
    """Where an fp32 1.0 stands on a device for which a plan was made: the outer scale of what has none."""
    return _params_maker(device).one


def _split(kernel: Kernel, launch_bytes: bytes) -> tuple[bytearray, tuple[int, int, int]]:
    grid = struct.unpack_from("<3i", launch_bytes, kernel.meta["grid_offset"])
    return bytearray(launch_bytes[: kernel.meta["params_bytes"]]), grid


def _encode_descriptors(params: bytearray) -> list[tuple[int, int]]:
    """Replace recorded requests by descriptors, in place; returns (8-byte word, operand) for each address field."""
    patches = []
    for offset, request in find_requests(bytes(params)).items():
        operand = next(i for i in range(len(OPERANDS)) if _stand_in(i) == request.address)
        params[offset : offset + SIZE], word = address_word(request, request.address)
        patches.append((offset // 8 + word, operand))
    return patches


def _raw_pointers(params: bytearray) -> list[tuple[int, int]]:
    """(8-byte word, operand) for each stand-in address in Params outside the descriptor slots."""
    operands = {_stand_in(i): i for i in range(len(OPERANDS))}
    slots = {offset // 8 + i for offset in find_requests(bytes(params)) for i in range(SIZE // 8)}
    words = struct.unpack_from(f"<{len(params) // 8}Q", params)
    return [(i, operands[word]) for i, word in enumerate(words) if word in operands and i not in slots]
