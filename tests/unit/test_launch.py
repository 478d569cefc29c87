"""Plans without a GPU: where operands' addresses stand in Params, found with stand-ins and a driver that is made up."""

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from fp4gemm import launch
from fp4gemm.launch import OPERANDS
from fp4gemm.load import DriverError
from fp4gemm.tensor_map import ALIGNMENT, SIZE, Request

A, B, D, OUTER_A, OUTER_B, BIAS = (OPERANDS.index(name) for name in ("a", "b", "d", "outer_a", "outer_b", "bias"))
STAND_INS = [launch._stand_in(i) for i in range(len(OPERANDS))]
ADDRESS_WORD = 3  # of the made-up descriptors


def request_bytes(operand: int) -> bytes:
    """What make_params leaves for a 2-D tensor at an operand's stand-in address."""
    head = struct.pack("<II4BIQ", 0xF4F4F4F4, 2, 9, 0, 3, 2, 0, STAND_INS[operand])
    return (head + struct.pack("<5Q4Q5H5H", *(64, 32, 1, 1, 1), *(128, 0, 0, 0), *[1] * 10)).ljust(SIZE, b"\0")


def params() -> bytearray:
    """Params of 6 slots: descriptors of a and d, raw pointers around them, and numbers that are no pointers."""
    data = bytearray(6 * ALIGNMENT)
    data[64:192] = request_bytes(A)
    data[256:384] = request_bytes(D)
    struct.pack_into("<3Q", data, 8, STAND_INS[OUTER_B], 7, STAND_INS[BIAS])
    struct.pack_into("<2Q", data, 200, STAND_INS[OUTER_A], STAND_INS[OUTER_B])
    struct.pack_into("<Q", data, 228, STAND_INS[B])  # not on 8 bytes: no pointer
    return data


@pytest.fixture
def driver(monkeypatch):
    """A driver whose descriptors hold the address in word 3; ``encoded`` lists the requests it saw."""
    encoded = []

    def encode(self: Request, address: int) -> bytes:
        encoded.append(self)
        words = list(range(1000, 1016))
        words[ADDRESS_WORD] = address
        return struct.pack("<16Q", *words)

    monkeypatch.setattr(Request, "encode", encode)
    return encoded


def test_stand_ins_are_distinct_aligned_and_no_allocation():
    assert len(set(STAND_INS)) == len(OPERANDS) == 15
    assert all(address % 128 == 0 for address in STAND_INS)
    assert all(2**32 < address < 2**47 for address in STAND_INS)  # as a user's address, so the driver encodes it
    # No stand-in is another one with a small offset: an address inside Params that moved is not mistaken for it.
    assert all(abs(one - two) > 2**20 for one in STAND_INS for two in STAND_INS if one != two)
    # Neither half is shared: a pointer that is cut to 32 bits cannot pass for another.
    assert len({address & 0xFFFF_FFFF for address in STAND_INS}) == len(OPERANDS)


def test_arguments_are_as_large_as_their_struct():
    """GroupedArguments of grouped.hpp: 15 words, strides and 8 ints."""
    assert launch.GEMM_ARGUMENTS.size == 8 * (len(OPERANDS) + 4 + len(launch.NO_BATCH) - 1) + 4 * 8


def test_beta_is_a_double_in_a_word():
    assert struct.unpack("<d", struct.pack("<Q", launch.beta_bits(-0.3))) == (-0.3,)


def test_raw_pointers_are_found_outside_of_descriptors():
    assert launch._raw_pointers(params()) == [(1, OUTER_B), (3, BIAS), (25, OUTER_A), (26, OUTER_B)]


def test_raw_pointers_in_params_of_ragged_size():
    assert launch._raw_pointers(params()[:24] + struct.pack("<Q", STAND_INS[D])[:4]) == [(1, OUTER_B)]


def test_descriptors_are_encoded_in_place_and_their_address_is_found(driver):
    data = params()
    before = bytes(data)
    assert launch._encode_descriptors(data) == [(8 + ADDRESS_WORD, A), (32 + ADDRESS_WORD, D)]
    for offset, operand in ((64, A), (256, D)):
        words = struct.unpack_from("<16Q", data, offset)
        assert words[ADDRESS_WORD] == STAND_INS[operand]
        assert words[0] == 1000
        data[offset : offset + SIZE] = before[offset : offset + SIZE]
    assert data == before  # nothing else changed
    assert {request.address for request in driver} == {STAND_INS[A], STAND_INS[D]}


@pytest.mark.parametrize(
    "words",
    [
        lambda address: [*range(16)],  # not there
        lambda address: [address, address, *range(14)],  # twice
        lambda address: [address >> 4, *range(15)],  # shifted
        lambda address: [address & 0xFFFF_FFFF, address >> 32, *range(14)],  # in two halves
    ],
    ids=["absent", "twice", "shifted", "halves"],
)
def test_a_descriptor_that_holds_the_address_otherwise_is_an_error(monkeypatch, words):
    monkeypatch.setattr(Request, "encode", lambda self, address: struct.pack("<16Q", *words(address)))
    with pytest.raises(DriverError, match="do not hold the address as one 64-bit word"):
        launch._encode_descriptors(params())


def kernel(size: int, **meta: int) -> SimpleNamespace:
    meta = {"threads": 384, "smem_bytes": 1000, "params_bytes": size, "grid_offset": size} | meta
    return SimpleNamespace(meta=meta, entry_points={"gemm": "handle"}, spec=SimpleNamespace(name="fake"))


@pytest.fixture
def launches(monkeypatch):
    """What reaches the driver: (handle, grid, threads, shared memory, stream, bytes of the argument)."""
    seen = []

    def launch_kernel(handle, x, y, z, threads, y_threads, z_threads, smem, stream, pointers, extra):
        assert (y_threads, z_threads, extra) == (1, 1, 0)
        address = ctypes.c_void_p.from_address(pointers).value
        seen.append((handle, (x, y, z), threads, smem, stream, ctypes.string_at(address, 6 * ALIGNMENT)))
        return (0,)

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(cuLaunchKernel=launch_kernel))
    return seen


def test_a_plan_writes_addresses_and_nothing_else(driver, launches, monkeypatch):
    made = bytes(params()) + struct.pack("<3i", 132, 2, 1) + bytes(52)
    monkeypatch.setattr(launch, "_make_params", lambda *arguments: made)
    plan = launch.GemmPlan(kernel(len(params())), launch.GemmProblem(4, 8, 64, 64, 64, 8, 8, True, False), 0)
    for first in (0x1000, 0x9000):
        addresses = launch.Operands(*(first + 256 * i for i in range(len(OPERANDS))))
        plan(5, None, addresses)
        handle, grid, threads, smem, stream, data = launches[-1]
        assert (handle, grid, threads, smem, stream) == ("handle", (132, 2, 1), 384, 1000, 5)
        words = list(struct.unpack("<48Q", data))
        where = {1: OUTER_B, 3: BIAS, 25: OUTER_A, 26: OUTER_B, 11: A, 35: D}
        assert {word: words[word] for word in where} == {word: addresses[operand] for word, operand in where.items()}
        assert words[2] == 7
        assert not set(STAND_INS) & set(words)


AMAX = SimpleNamespace(name="fake", entry_points=("amax",))


@pytest.fixture
def made(monkeypatch):
    """What loading AMAX gives."""
    meta = {"threads": 256, "params_bytes": launch.AMAX_ARGUMENTS.size, "smem_bytes": 0}
    kernel = SimpleNamespace(meta=meta, entry_points={"amax": "handle"})
    monkeypatch.setattr(launch, "load", lambda spec: kernel)
    return kernel


def test_a_launcher_packs_its_values(launches, made):
    size = launch.AMAX_ARGUMENTS.size
    launch.Launcher(AMAX, launch.AMAX_ARGUMENTS)((9, 1, 1), 3, 1, 2, 3, 4, 5, 6)
    handle, grid, threads, smem, stream, data = launches[0]
    assert (handle, grid, threads, smem, stream) == ("handle", (9, 1, 1), 256, 0, 3)
    assert launch.AMAX_ARGUMENTS.unpack(data[:size]) == (1, 2, 3, 4, 5, 6)
    made.meta["params_bytes"] = size + 8
    with pytest.raises(DriverError, match=f"fake: argument of {size + 8} bytes, packed {size}"):
        launch.Launcher(AMAX, launch.AMAX_ARGUMENTS)


@pytest.mark.parametrize(
    "statuses, bound, error",
    [
        (["CUDA_SUCCESS"], 0, None),
        (["CUDA_ERROR_INVALID_CONTEXT", "CUDA_SUCCESS"], 1, None),
        (["CUDA_ERROR_INVALID_CONTEXT"] * 2, 1, "CUDA_ERROR_INVALID_CONTEXT"),
        (["CUDA_ERROR_INVALID_VALUE"], 0, "CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_a_thread_without_a_context_gets_one(monkeypatch, statuses, bound, error):
    driver = pytest.importorskip("cuda.bindings.driver")
    answers, calls, devices = iter(statuses), [], []

    def launch_kernel(*arguments):
        calls.append(arguments)
        return (getattr(driver.CUresult, next(answers)),)

    fake = SimpleNamespace(cuLaunchKernel=launch_kernel, CUresult=driver.CUresult)
    argument = ctypes.create_string_buffer(8)
    dispatch = launch.Dispatch(kernel(8), "gemm", 64, 1024, ctypes.addressof(argument))
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    monkeypatch.setattr(launch.torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(launch, "bind_context", devices.append)
    with pytest.raises(DriverError, match=rf"grid \(9, 1, 1\), 64 threads: {error}") if error else nullcontext():
        dispatch((9, 1, 1), 5)
    assert calls == [("handle", 9, 1, 1, 64, 1, 1, 1024, 5, dispatch._address, 0)] * len(statuses)
    assert devices == [3] * bound
    assert ctypes.c_void_p.from_address(dispatch._address).value == ctypes.addressof(argument)


class DependentDriver:
    """Records plain launches as "plain" and the configurations of dependent ones."""

    def __init__(self):
        driver = pytest.importorskip("cuda.bindings.driver")
        for name in (
            "CUlaunchAttribute",
            "CUlaunchAttributeValue",
            "CUlaunchAttributeID",
            "CUlaunchConfig",
            "CUresult",
        ):
            setattr(self, name, getattr(driver, name))
        self.seen = []
        self.status = driver.CUresult.CUDA_SUCCESS

    def cuLaunchKernel(self, *arguments):
        self.seen.append("plain")
        return (self.status,)

    def cuLaunchKernelEx(self, config, handle, pointers, extra):
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        threads = (config.blockDimX, config.blockDimY, config.blockDimZ)
        (attribute,) = config.attrs
        allowed = attribute.value.programmaticStreamSerializationAllowed
        self.seen.append((grid, threads, config.sharedMemBytes, int(config.hStream), attribute.id, allowed))
        return (self.status,)


@pytest.fixture
def dependent_driver(monkeypatch):
    fake = DependentDriver()
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    return fake


def test_dependent_launches_carry_the_attribute(dependent_driver):
    dispatch = launch.Dispatch(kernel(8), "gemm", 96, 2048, 0x1000, waits=True)
    serialization = dependent_driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    for grid, stream in (((7, 1, 1), 11), ((7, 1, 1), 12), ((3, 2, 1), 12)):
        dispatch(grid, stream, True)
        assert dependent_driver.seen[-1] == (grid, (96, 1, 1), 2048, stream, serialization, 1)
    assert len(dispatch._configs) == 2  # one of a grid
    dispatch((7, 1, 1), 11)
    assert dependent_driver.seen[-1] == "plain"
    dependent_driver.status = dependent_driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DriverError, match="INVALID_VALUE"):
        dispatch((7, 1, 1), 11, True)


def test_programmatic_reaches_kernels_that_wait_and_no_others(dependent_driver):
    waiting, other = (launch.Dispatch(kernel(8), "gemm", 96, 0, 0x1000, waits=waits) for waits in (True, False))

    def plain() -> list[bool]:
        dependent_driver.seen.clear()
        for dispatch in (waiting, other):
            dispatch((1, 1, 1), 0)
        return [seen == "plain" for seen in dependent_driver.seen]

    assert plain() == [True, True]
    with launch.programmatic():
        assert plain() == [False, True]
        with launch.programmatic(False):
            assert plain() == [True, True]
        assert plain() == [False, True]
        with ThreadPoolExecutor(1) as pool:  # of this context only
            assert pool.submit(plain).result() == [True, True]
    with pytest.raises(KeyError), launch.programmatic():
        raise KeyError
    assert plain() == [True, True]
    other((1, 1, 1), 0, True)  # it would read what is not there yet
    assert dependent_driver.seen[-1] == "plain"


@pytest.mark.parametrize("asked, got", [(None, 0), (4096, 4096)])
def test_a_launcher_asks_for_shared_memory(asked, got, made, monkeypatch):
    seen = []
    monkeypatch.setattr(launch.Dispatch, "_launch", lambda self, *_: seen.append(self._shared) or 0)
    launch.Launcher(AMAX, launch.AMAX_ARGUMENTS, shared_bytes=asked)((9, 1, 1), 3, 1, 2, 3, 4, 5, 6)
    assert seen == [got]


@pytest.mark.parametrize("dependent", [None, True])
def test_a_launcher_says_whether_it_depends(dependent, made, monkeypatch):
    seen = []
    monkeypatch.setattr(launch.Dispatch, "_launch", lambda self, grid, stream, how: seen.append(how) or 0)
    launch.Launcher(AMAX, launch.AMAX_ARGUMENTS, waits=True, dependent=dependent)((9, 1, 1), 3, 1, 2, 3, 4, 5, 6)
    assert seen == [dependent]
