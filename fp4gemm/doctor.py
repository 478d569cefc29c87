"""What works on this machine and what to do about the rest.

Every check is a function that returns findings and raises nothing. A finding *fails* when it stops something that this
machine could do otherwise; what the machine cannot do anyway (no GPU, so no kernels) is a warning.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp4gemm.toolchain import INSTALL

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "warn", "fail"]

MINIMUM_DRIVER = "NVIDIA driver 580 or newer"
LOW_SPACE = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Device:
    """A GPU as the driver names it."""

    index: int
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """What the CUDA driver answered; `problem` says why there is none."""

    version: int = 0
    devices: tuple[Device, ...] = ()
    problem: str = ""


def examine() -> list[Finding]:
    """Run every check, in the order of the pipeline: machine, torch, toolchain, cache, settings."""
    driver = query_driver()
    checks: list[Callable[[], list[Finding]]] = [
        lambda: check_driver(driver),
        lambda: check_gpus(driver),
        lambda: check_torch(driver),
        lambda: check_nvrtc(has_gpu=bool(driver.devices)),
        lambda: check_headers(has_gpu=bool(driver.devices)),
        check_environment,
        check_cache,
    ]
    return [finding for check in checks for finding in check()]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 when a finding failed, else 0."""
    return int(any(finding.status == "fail" for finding in findings))


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings as a table and one closing sentence."""
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    table = Table("", "check", show_edge=False, pad_edge=False)
    table.add_column("what was found", overflow="fold")
    for finding in findings:
        remedy = f"\n[bold]→ {escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(marks[finding.status], finding.name, escape(finding.detail) + remedy)
    console.print(table)
    count = {status: sum(finding.status == status for finding in findings) for status in marks}
    console.print(f"\n{count['ok']} ok, {count['warn']} warnings, {count['fail']} failures")


def query_driver() -> Driver:
    """Ask the CUDA driver for its version and its GPUs; never raises."""
    try:
        from cuda.bindings import driver as cuda
    except ImportError:
        return Driver(problem="cuda-bindings is not installed", devices=_devices_of_torch())
    try:
        _call(cuda.cuInit(0))
        count = int(_call(cuda.cuDeviceGetCount()))
        return Driver(
            version=int(_call(cuda.cuDriverGetVersion())),
            devices=tuple(_device(cuda, index) for index in range(count)),
        )
    except _CudaError as error:
        return Driver(problem=f"cannot be used: {error}")
    except RuntimeError:  # how cuda.bindings reports that there is no libcuda
        return Driver(problem="none: libcuda was not found")


def check_driver(driver: Driver) -> list[Finding]:
    """The driver exists and is new enough for what NVRTC 13 emits."""
    if driver.problem:
        remedy = INSTALL if "cuda-bindings" in driver.problem else f"for GPU kernels, install {MINIMUM_DRIVER}"
        return [Finding("driver", "fail" if driver.devices else "warn", driver.problem, remedy)]
    found = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
    if driver.version < 13000:
        return [Finding("driver", "fail", f"{found} is older than the kernels' 13.0", f"install {MINIMUM_DRIVER}")]
    return [Finding("driver", "ok", found)]


def check_gpus(driver: Driver) -> list[Finding]:
    """One finding a GPU: does fp4gemm have kernels for it?"""
    if not driver.devices:
        return [Finding("GPU", "warn", "none: everything runs through the reference, on the CPU")]
    return [_check_gpu(device) for device in driver.devices]


def check_torch(driver: Driver) -> list[Finding]:
    """torch is a CUDA build where there is a GPU, and sees it."""
    import torch

    build = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build")
    if not driver.devices or torch.cuda.is_available():
        return [Finding("torch", "ok", build)]
    if torch.version.cuda is None:
        return [Finding("torch", "fail", f"{build}, but this machine has a GPU", "install a CUDA build of torch")]
    remedy = "check CUDA_VISIBLE_DEVICES, and that the driver is at least as new as torch's CUDA"
    return [Finding("torch", "fail", f"{build} does not see the GPU that the driver lists", remedy)]


def check_nvrtc(has_gpu: bool) -> list[Finding]:
    """The run-time compiler is installed and can be loaded."""
    from fp4gemm import toolchain

    try:
        version = toolchain.nvrtc_version()
        return [Finding("NVRTC", "ok", f"{version}, {_call(_load_nvrtc().nvrtcGetNumSupportedArchs())} architectures")]
    except toolchain.ToolchainError as error:
        return [_missing_tool("NVRTC", str(error), has_gpu)]
    except (ImportError, RuntimeError, _CudaError) as error:
        return [_missing_tool("NVRTC", f"cannot be used ({error}): {INSTALL}", has_gpu)]


def check_headers(has_gpu: bool) -> list[Finding]:
    """CUTLASS and CUDA headers are where the compiler will look."""
    from fp4gemm import toolchain

    try:
        headers = toolchain.find_headers()
    except toolchain.ToolchainError as error:
        return [_missing_tool("headers", str(error), has_gpu)]
    except ValueError as error:  # settings that cannot be read; the check of the environment says what is wrong
        return [Finding("headers", "warn", f"not looked for: {error}")]
    return [
        Finding("CUTLASS headers", "ok", f"{headers.cutlass_version} in {headers.cutlass}"),
        Finding("CUDA headers", "ok", ", ".join(map(str, headers.cuda))),
    ]


def check_environment() -> list[Finding]:
    """FP4GEMM_* variables exist and make sense."""
    from fp4gemm import env

    given = sorted(name for name in os.environ if name.startswith("FP4GEMM_"))
    try:
        env.settings()
    except ValueError as error:
        return [Finding("environment", "fail", str(error), "correct the variable or unset it")]
    settings = ", ".join(f"{name}={os.environ[name]}" for name in given)
    return [Finding("environment", "ok", settings or "no FP4GEMM_* variable is set")]


def check_cache() -> list[Finding]:
    """The cache folder can be written to and has room."""
    from fp4gemm import env

    try:
        folder = Path(env.settings().cache_dir)
    except ValueError as error:
        return [Finding("cache", "warn", f"not looked at: {error}")]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    move = "set FP4GEMM_CACHE_DIR to another folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        return [Finding("cache", "fail", f"{folder} cannot be written: {reason}", f"make it writable, or {move}")]
    free = shutil.disk_usage(existing).free
    kernels = sum(1 for _ in folder.rglob("meta.json"))
    detail = f"{folder}: {kernels} kernels, {_size(folder) / 1e6:.1f} MB, {free / 1e9:.1f} GB free"
    if free < LOW_SPACE:
        return [Finding("cache", "warn", detail, f"less than 1 GB is free: make room, or {move}")]
    return [Finding("cache", "ok", detail)]


def _check_gpu(device: Device) -> Finding:
    name = f"GPU {device.index}"
    detail = f"{device.name}, compute capability {device.capability[0]}.{device.capability[1]}"
    from fp4gemm.select import EXECUTED, LAUNCHABLE

    if arch := LAUNCHABLE.get(device.capability):
        if arch in EXECUTED:
            return Finding(name, "ok", f"{detail}: kernels for {arch}")
        unrun = f"kernels for {arch} are compiled and tested under emulation, and have never run on this hardware"
        return Finding(name, "warn", f"{detail}: {unrun}", "compare with CPU tensors before relying on them")
    known = ", ".join(LAUNCHABLE.values())
    return Finding(name, "warn", f"{detail}: no kernels (there are for {known})", "keep tensors on the CPU: reference")


def _missing_tool(name: str, problem: str, has_gpu: bool) -> Finding:
    # The toolchain's own messages end with what to do; here that goes to a line of its own.
    detail, _, remedy = problem.partition(": pip install")
    unused = "" if has_gpu else " (only building kernels needs it)"
    return Finding(name, "fail" if has_gpu else "warn", detail + unused, f"pip install{remedy}" if remedy else INSTALL)


def _load_nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process may be putting an entry into place
            total += path.stat().st_size if path.is_file() else 0
    return total


class _CudaError(Exception):
    """A CUDA library is there and refused a call."""


def _call(result: tuple[Any, ...]) -> Any:
    """Unpack a cuda.bindings answer, which is (status,) or (status, value)."""
    status, *value = result
    if int(status) != 0:
        raise _CudaError(f"it answered {status.name}")
    return value[0] if value else None


def _devices_of_torch() -> tuple[Device, ...]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(
        Device(index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        for index in range(count)
    )


def _device(cuda: Any, index: int) -> Device:
    handle = _call(cuda.cuDeviceGet(index))
    attributes = cuda.CUdevice_attribute
    major = _call(cuda.cuDeviceGetAttribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
    minor = _call(cuda.cuDeviceGetAttribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
    name = bytes(_call(cuda.cuDeviceGetName(128, handle))).split(b"\0")[0].decode()
    return Device(index, name, (int(major), int(minor)))
