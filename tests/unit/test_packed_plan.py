"""Plans of GEMMs on prepacked weights without a GPU: the bytes of the argument, with a driver that is made up."""

import ctypes
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fp4gemm import launch, packed_plan
from fp4gemm.division import SM_SHARED_BYTES, divide, wgmma_shared_bytes
from fp4gemm.load import DriverError
from fp4gemm.packed_plan import PACKED_GEMM_BYTES, PackedPlan, PackedProblem
from fp4gemm.spec import PackedMmaSpec, PackedWgmmaSpec
from fp4gemm.tensor_map import Request

MMA = PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, 1, 8, 4, 2, 2, 0, 0)
WGMMA = PackedWgmmaSpec("sm_90a", "fp16", "bf16", None, False, 128, 2, 2, 1, 2, 1, 8)
PROBLEM = PackedProblem(5, 1000, 4100, 4104, 1008, False, True, False)
ADDRESS_WORD = 3  # of the made-up descriptors
SMS, SMEM, THREADS = 132, 150000, 256
# As struct PackedGemmArguments of packed_gemm.hpp has them, in its order.
FIELDS = (
    *(
        "x",
        "w",
        "d",
        "c",
        "outer_a",
        "outer_b",
        "bias",
        "offsets",
        "x_stride",
        "d_stride_m",
        "d_stride_n",
        "m",
        "n",
        "k",
    ),
    *("panels", "k_blocks", "row_tiles", "token_tiles", "raster", "depth", "depth_inverse", "first_turn"),
    *("piece_blocks", "weights_first", "launch_early", "panels_each", "panels_extra"),
    *("experts", "outer_a_stride", "outer_b_stride", "beta"),
)
ADDRESSES = dict(zip(FIELDS[:8], range(0x1000, 0x9000, 0x1000), strict=True))


def fields(argument: bytes) -> dict[str, float]:
    return dict(zip(FIELDS, struct.unpack_from("<8Q3q19if", argument, 128), strict=True))


@pytest.fixture
def requests(monkeypatch):
    """Descriptors hold the address in word 3; the requests for them."""
    seen = []

    def encode(self: Request, address: int) -> bytes:
        seen.append(self)
        words = list(range(1000, 1016))
        words[ADDRESS_WORD] = address
        return struct.pack("<16Q", *words)

    monkeypatch.setattr(Request, "encode", encode)
    return seen


@pytest.fixture
def kernel(monkeypatch):
    """What `load` gives; its meta data may be changed."""
    meta = {"threads": THREADS, "smem_bytes": SMEM, "params_bytes": PACKED_GEMM_BYTES}
    made = SimpleNamespace(meta=meta, entry_points={"gemm": "handle"})
    monkeypatch.setattr(packed_plan, "load", lambda spec: made)
    properties = SimpleNamespace(multi_processor_count=SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return made


@pytest.fixture
def launches(monkeypatch, kernel, requests):
    """What reaches the driver: (handle, grid, threads, shared memory, stream, bytes of the argument)."""
    seen = []

    def record(self, grid, stream, dependent):
        assert (self._waits, dependent) == (True, True)  # every launch
        argument = ctypes.string_at(self._pointers[0], PACKED_GEMM_BYTES)
        seen.append((self._handle, grid, self._threads, self._shared, stream, argument))
        return 0

    monkeypatch.setattr(launch.Dispatch, "_launch", record)
    return seen


def test_the_struct_has_no_padding_but_at_its_end():
    """8 pointers, 3 int64, 19 int32 and a float behind the descriptor; alignas(64) of that rounds up."""
    assert packed_plan.PACKED_GEMM_ARGUMENTS.size == 128 + 8 * 11 + 4 * 20
    assert PACKED_GEMM_BYTES == 320
    assert packed_plan._BETA == 128 + 8 * 11 + 4 * 19


@pytest.mark.parametrize("spec", [MMA, WGMMA], ids=lambda spec: type(spec).__name__)
def test_the_argument(spec, launches):
    plan = PackedPlan(spec, PROBLEM, 0)
    plan(7, False, False, *ADDRESSES.values(), 0.625)
    division = divide(spec, 5, 1000, 4100, SMS)
    handle, grid, threads, smem, stream, argument = launches[0]
    assert (handle, grid, threads, stream) == ("handle", (division.ctas, 1, 1), THREADS, 7)
    assert smem == (division.shared_bytes if spec is MMA else SMEM)
    numbers = dict(zip(FIELDS[16:27], division.numbers, strict=True))
    sizes = {"m": 5, "n": 1000, "k": 4100, "panels": 16, "k_blocks": 65, "experts": 0}
    strides = {"x_stride": 4104, "d_stride_m": 1008, "d_stride_n": 1, "outer_a_stride": 1, "outer_b_stride": 0}
    assert fields(argument) == {**ADDRESSES, **sizes, **strides, **numbers, "beta": 0.625}
    assert not any(argument[packed_plan.PACKED_GEMM_ARGUMENTS.size :])


def test_the_argument_of_a_grouped_kernel(launches):
    """Its shared memory has room for the cut, four words, and the table of experts, two words each and for the end."""
    spec = replace(WGMMA, grouped=True)
    PackedPlan(spec, PROBLEM._replace(experts=7), 0)(7, False, False, *ADDRESSES.values(), 0.5)
    _, grid, _, smem, _, argument = launches[0]
    division = divide(spec, 5, 1000, 4100, SMS, 7)
    assert (grid, smem) == ((division.ctas, 1, 1), wgmma_shared_bytes(spec) + 16 + 8 * 8)
    got = fields(argument)
    assert (got["experts"], got["offsets"], got["token_tiles"]) == (7, ADDRESSES["offsets"], 0)


def test_a_column_major_output_and_other_outer_scales(launches):
    problem = PROBLEM._replace(column_major=True, ldd=6, outer_a_per_row=False, outer_b_per_row=True)
    PackedPlan(MMA, problem, 0)(7, False, False, *ADDRESSES.values(), 1.0)
    got = fields(launches[0][-1])
    assert (got["d_stride_m"], got["d_stride_n"], got["outer_a_stride"], got["outer_b_stride"]) == (1, 6, 0, 1)


@pytest.mark.parametrize("spec", [MMA, WGMMA], ids=lambda spec: type(spec).__name__)
def test_later_launches_write_addresses_and_nothing_else(spec, launches):
    plan = PackedPlan(spec, PROBLEM, 0)
    plan(7, False, False, *ADDRESSES.values(), 0.5)
    others = {name: address * 16 + 0x100 for name, address in ADDRESSES.items()} | {"c": 0, "bias": 0}
    plan(8, False, False, *others.values(), 0.25)
    plan(7, False, False, *ADDRESSES.values(), 0.5)
    first, second, third = (entry[-1] for entry in launches)
    assert fields(second) == {**fields(first), **others}  # without C, beta is not read and not written
    assert first == third
    words = struct.unpack("<16Q", second[:128])
    if spec is WGMMA:
        assert words == (*range(1000, 1003), others["x"], *range(1004, 1016))
    else:
        assert words == (0,) * 16


def test_the_descriptor_of_tokens(launches, requests):
    PackedPlan(WGMMA, PROBLEM, 0)
    PackedPlan(replace(WGMMA, a_dtype="bf16", multicast=1), PROBLEM, 0)
    fp16, bf16 = (requests[i] for i in (0, -1))
    # Boxes of 128 bytes of K; of two CTAs that share 128 tokens each brings half.
    assert (fp16.data_type, fp16.box, bf16.data_type, bf16.box) == (6, (64, 64), 9, (64, 128))
    for request in (fp16, bf16):
        assert (request.rank, request.dims, request.strides) == (2, (4100, 5), (2 * 4104,))
        assert (request.swizzle, request.interleave, request.oob_fill, request.element_strides) == (3, 0, 0, (1, 1))


def test_the_descriptors_of_the_mma_kernel_are_never_made(launches, requests):
    PackedPlan(MMA, PROBLEM, 0)
    assert requests == []


def test_a_kernel_with_another_struct_is_refused(kernel):
    kernel.meta["params_bytes"] += 64
    with pytest.raises(DriverError, match=f"{MMA.name}: argument of 384 bytes, packed 320"):
        PackedPlan(MMA, PROBLEM, 0)


def test_a_kernel_that_cannot_serve_the_problem_is_refused(kernel):
    with pytest.raises(ValueError, match=f"{MMA.name} cannot serve .*m=9"):
        PackedPlan(MMA, PROBLEM._replace(m=9), 0)


@pytest.mark.parametrize("spec", [MMA, WGMMA], ids=lambda spec: type(spec).__name__)
def test_each_launch_says_whether_the_weight_may_be_read_first(spec, launches):
    plan = PackedPlan(spec, PROBLEM, 0)
    for weights_first in (True, False, True):
        plan(3, weights_first, False, *ADDRESSES.values(), 1.0)
    assert [fields(entry[-1])["weights_first"] for entry in launches] == [1, 0, 1]


@pytest.mark.parametrize("spec", [MMA, WGMMA], ids=lambda spec: type(spec).__name__)
def test_behind_a_quantizer_a_cta_has_an_sm_to_itself(spec, launches, monkeypatch):
    monkeypatch.setattr(launch.Dispatch, "_launch", lambda self, *arguments: launches.append(self._shared))
    plan = PackedPlan(spec, PROBLEM, 0)
    for behind in (False, True):
        plan(3, True, behind, *ADDRESSES.values(), 1.0)
    alone, behind = launches
    assert alone <= behind
    assert 2 * (behind + 1024) > SM_SHARED_BYTES
