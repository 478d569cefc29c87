"""Blackwell's GEMM kernels on a Hopper GPU: turning the emulation on, launching them, and what the emulator noticed."""

from __future__ import annotations

import atexit
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import overlay
import torch

from fp4gemm import blockscaled, calls, launch, load, select, tile_calls
from fp4gemm import compile as compiler
from fp4gemm.cache import Entry
from fp4gemm.engine import Output
from fp4gemm.select import DTYPE_NAMES
from fp4gemm.spec import GemmSpec, GroupedGemmSpec
from fp4gemm.tensor import FP4Batch, FP4Tensor

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
FAULTS = {int(code): name for name, code in re.findall(r"^  (k\w+) = (\d+),", overlay.EMULATOR.read_text(), re.M)}
# What is left of an instruction that CUTLASS has for another arch: its wrappers print these and stop.
NOT_EMULATED = re.compile(rb"[^\0]*(?:Attempting to use|Trying to use|not implemented)[^\0]*")


def missing() -> str | None:
    """What this machine lacks; None when it has everything."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"needs compute capability 9.0: {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    return None


@cache
def _overlay(more: overlay.Edits) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fp4gemm-overlay-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return overlay.make(folder, more=more)


@contextmanager
def emulate(arch: str, more: overlay.Edits = ()) -> Iterator[None]:
    """Kernels of ``arch`` are compiled for sm_90a with the emulator inside, and with ``more`` edits of CUTLASS."""
    before = os.environ.get("FP4GEMM_EMULATE")
    compiler.use_overlay(_overlay(more))
    os.environ["FP4GEMM_EMULATE"] = arch
    try:
        yield
    finally:
        os.environ.pop("FP4GEMM_EMULATE")
        if before is not None:
            os.environ["FP4GEMM_EMULATE"] = before
        compiler.use_overlay(None)


SMS = 148  # of a B200: what the choice of a kernel is made for


@contextmanager
def blackwell(arch: str) -> Iterator[list[GemmSpec]]:
    """To the public functions the GPU is one of ``arch`` with ``SMS`` SMs. Gives the GEMMs that they launch.

    At the end these are over, and the emulator had nothing to say about them.
    """
    launched: list[GemmSpec] = []
    plan_of, gpu_of = blockscaled.gemm_plan, select.gpu_of

    def noted(spec: GemmSpec, problem: launch.GemmProblem, device: int) -> launch.GemmPlan:
        launched.append(spec)
        return plan_of(spec, problem, device)

    with emulate(arch):
        _forget_the_arch()
        blockscaled.gemm_plan = noted  # type: ignore[assignment]
        select.gpu_of = lambda device: (arch, SMS)  # type: ignore[assignment]
        try:
            yield launched
            torch.cuda.synchronize()
        finally:
            blockscaled.gemm_plan, select.gpu_of = plan_of, gpu_of
            _forget_the_arch()
    for spec in dict.fromkeys(launched):
        check_faults(load.load(spec), spec.name)


def _forget_the_arch() -> None:
    """Empties every cache whose key is a device and whose content depends on its arch."""
    for module in (select, blockscaled, calls, tile_calls):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def not_emulated(entry: Entry) -> list[str]:
    """Messages of CUTLASS's wrappers in a cubin: each is an instruction that nothing emulates."""
    return sorted({match.decode() for match in NOT_EMULATED.findall(entry.cubin)})


# --- the emulator's own state in a loaded kernel ----------------------------------------------------------------------


def _global(kernel: load.Kernel, name: str) -> tuple[int, int]:
    from cuda.bindings import driver

    found = driver.cuLibraryGetGlobal(kernel.library, f"fp4gemm_emulation_{name}".encode())
    address, size = load.check(found, f"find {name} of the emulator in {kernel.spec.name}")
    return int(address), int(size)


def read_words(kernel: load.Kernel, name: str) -> list[int]:
    """A variable of the emulator, after all launches."""
    from cuda.bindings import driver

    torch.cuda.synchronize()
    address, size = _global(kernel, name)
    host = torch.zeros(size // 4, dtype=torch.int32)
    load.check(driver.cuMemcpyDtoH(host.data_ptr(), address, size), f"read {name}")
    return [value & 0xFFFFFFFF for value in host.tolist()]


def write_words(kernel: load.Kernel, name: str, values: list[int]) -> None:
    from cuda.bindings import driver

    torch.cuda.synchronize()
    address, size = _global(kernel, name)
    host = torch.tensor(values, dtype=torch.int64).to(torch.int32)
    assert host.numel() * 4 == size, name
    load.check(driver.cuMemcpyHtoD(address, host.data_ptr(), size), f"write {name}")


def check_faults(kernel: load.Kernel, what: str) -> None:
    """Fails with the first thing that the emulator was given and does not take, and forgets it."""
    count, code, *details, cta, thread = read_words(kernel, "faults")
    if count:
        write_words(kernel, "faults", [0] * 6)
        hexadecimal = " ".join(f"{value:#x}" for value in details)
        name = FAULTS.get(code, code)
        raise AssertionError(f"{what}: {count} faults, first {name} {hexadecimal} in CTA {cta}, thread {thread}")


# --- launching --------------------------------------------------------------------------------------------------------


@contextmanager
def launched_as(spec: GemmSpec, sms: int | None = None, clusters: int | None = None) -> Iterator[None]:
    """Launches inside are emulated, are over at the end, and the emulator had nothing to say about them."""
    with emulate(spec.arch):
        kernel = load.load(spec)

    def plan_of(_: GemmSpec, problem: launch.GemmProblem, device: int) -> launch.GemmPlan:
        with _gpu_of(sms, device):
            plan = launch.GemmPlan(kernel, problem, device)
        if clusters is not None:
            across, full_x = clusters * spec.cluster[0], plan.grid[0]
            write_words(kernel, "launch_control", [full_x, 0, 0, 0])
            plan.grid = (min(across, full_x), *plan.grid[1:])
        ctas[spec] = math.prod(plan.grid)
        return plan

    before = blockscaled.gemm_plan
    blockscaled.gemm_plan = plan_of  # type: ignore[assignment]
    try:
        yield
        torch.cuda.synchronize()
    finally:
        blockscaled.gemm_plan = before
        if clusters is not None:
            granted[spec] = read_words(kernel, "launch_control")[2]
            write_words(kernel, "launch_control", [0, 0, 0, 0])
    check_faults(kernel, spec.name)


# Of the last launch of a kernel: clusters that launch control handed out, and CTAs that were launched.
granted: dict[GemmSpec, int] = {}
ctas: dict[GemmSpec, int] = {}


def run(
    spec: GemmSpec, a: FP4Tensor | FP4Batch, b: FP4Tensor | FP4Batch, bias: torch.Tensor | None = None,
    c: torch.Tensor | None = None, beta: float = 0.0, *, sms: int | None = None, clusters: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """D of a kernel, launched as the package does; all around D, between members of a batch too, is checked to be left
    alone.

    ``sms``: make the plan for a GPU of so many, whose persistent CTAs then have several tiles each. ``clusters``:
    launch so many along x, and leave the others to cluster launch control.
    """
    rows, columns = (b.rows, a.rows) if spec.column_major else (a.rows, b.rows)
    leading = -(-columns // 16) * 16 + 16
    shape = (*a.shape[:-2], rows + 2, leading)
    guarded = torch.full(shape, float("nan"), dtype=DTYPES[spec.out_dtype], device=a.data.device)
    d = guarded[..., 1 : rows + 1, :columns]
    d = d.mT if spec.column_major else d
    with launched_as(spec, sms, clusters):
        blockscaled.launch_spec(spec, a, b, bias, Output(d, c, beta))
    outside = guarded.clone()
    outside[..., 1 : rows + 1, :columns] = float("nan")
    assert bool(outside.isnan().all()), f"{spec.name} {a.shape} {b.shape}: wrote outside D"
    return d


def run_fp4(
    spec: GemmSpec, a: FP4Tensor | FP4Batch, b: FP4Tensor | FP4Batch, bias: torch.Tensor | None,
    outer_scale: torch.Tensor, *, sms: int | None = None, clusters: int | None = None,
) -> FP4Tensor | FP4Batch:  # fmt: skip
    """The same for a D in NVFP4."""
    assert spec.sf_layout is not None
    with launched_as(spec, sms, clusters):
        data, scales = blockscaled.launch_fp4_spec(spec, a, b, bias, outer_scale)
    if isinstance(a, FP4Batch):
        return FP4Batch(data, scales, outer_scale, (len(a), a.rows, b.rows), spec.sf_layout)
    return FP4Tensor(data, scales, outer_scale, (a.rows, b.rows), spec.sf_layout)


def run_grouped(
    spec: GroupedGemmSpec, a: FP4Tensor, b: FP4Batch, offsets: torch.Tensor, bias: torch.Tensor | None = None,
    c: torch.Tensor | None = None, beta: float = 0.0, *, sms: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """D of a grouped kernel, NaN where it wrote nothing; beside D's columns is checked to be left alone."""
    leading = -(-b.rows // 16) * 16 + 16
    guarded = torch.full((a.rows + 2, leading), float("nan"), dtype=DTYPES[spec.out_dtype], device=a.data.device)
    d = guarded[1 : a.rows + 1, : b.rows]
    with launched_as(spec, sms):
        blockscaled.launch_grouped_spec(spec, a, b, offsets, bias, Output(d, c, beta))
    outside = guarded.clone()
    outside[1 : a.rows + 1, : b.rows] = float("nan")
    assert bool(outside.isnan().all()), f"{spec.name} {a.shape} {b.shape}: wrote outside D"
    return d


@contextmanager
def _gpu_of(sms: int | None, device: int) -> Iterator[None]:
    launch.bind_context(device)
    maker = launch._params_maker(device)
    before = maker._sms
    maker._sms = before if sms is None else sms
    try:
        yield
    finally:
        maker._sms = before


def describe(got: torch.Tensor, want: torch.Tensor, wrong: torch.Tensor) -> str:
    """Where in D the wrong elements are: how many in each 32 x 32 block, and the first of them with their ratios."""
    rows, columns = wrong.shape
    padded = torch.zeros(-(-rows // 32) * 32, -(-columns // 32) * 32, dtype=torch.int64)
    padded[:rows, :columns] = wrong.cpu()
    blocks = padded.reshape(padded.shape[0] // 32, 32, -1, 32).sum((1, 3))[:16, :16]
    grid = "\n".join(" ".join(f"{count:4d}" for count in line) for line in blocks.tolist())
    lines = [f"{int(wrong.sum())} of {wrong.numel()} wrong; by blocks of 32 x 32, the first 16 each way:", grid]
    for row, column in wrong.nonzero()[:8].tolist():
        x, y = got[row, column].item(), want[row, column].item()
        lines.append(f"[{row}, {column}]: {x}, expected {y}, ratio {x / y if y else float('nan'):.6g}")
    return "\n".join(lines)
