"""Cache entry -> kernel handle of the driver, once per process and for all devices."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch

from fp4gemm import cache
from fp4gemm.spec import KernelSpec, QuantizeSpec


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a cuda.bindings driver call. Raises DriverError naming what was tried."""
    status, *values = result
    if status != 0:
        raise DriverError(f"{what}: {status.name}")
    return values[0] if len(values) == 1 else values


def bind_context(device: int) -> None:
    """Make torch's context of ``device`` current in this thread; one that never called the CUDA runtime has none."""
    from cuda.bindings import driver

    check(driver.cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


@functools.cache
def _primary_context(device: int) -> Any:
    from cuda.bindings import driver

    return check(
        driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(device), "cuDeviceGet")), "retain the context"
    )


@dataclass(frozen=True, eq=False)
class Kernel:
    """Entry points by name, as handles that serve every device, and what a launch needs to know."""

    spec: KernelSpec
    meta: dict[str, Any]
    entry_points: dict[str, Any]
    library: Any  # keeps the code loaded


_lock = threading.Lock()


def load(spec: KernelSpec) -> Kernel:
    """The kernel of a spec, built if it is not in the cache. Raises what ``cache.get`` raises, and DriverError."""
    with _lock:
        return _load(spec)


@functools.cache
def _load(spec: KernelSpec) -> Kernel:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    entry = cache.get(spec)
    try:
        return _open(spec, entry)
    except DriverError as error:
        cache.discard(entry.path, str(error))
    return _open(spec, cache.get(spec))


def _open(spec: KernelSpec, entry: cache.Entry) -> Kernel:
    from cuda.bindings import driver

    library = check(driver.cuLibraryLoadData(entry.cubin, [], [], 0, [], [], 0), f"load {entry.path}/kernel.cubin")
    points = {
        name: check(driver.cuLibraryGetKernel(library, name.encode()), f"find {name} in {entry.path}")
        for name in entry.meta["entry_points"]
    }
    # At least: some kernels keep more there, as much as a problem needs; quantizers of values keep others away with it.
    if entry.meta["smem_bytes"] or (isinstance(spec, QuantizeSpec) and spec.output == "values"):
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        static = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        for index in range(torch.cuda.device_count()):
            device = check(driver.cuDeviceGet(index), "cuDeviceGet")
            main = points[entry.meta["entry_points"][0]]
            size = check(driver.cuDeviceGetAttribute(most, device), "query shared memory")
            size -= check(driver.cuKernelGetAttribute(static, main, device), "query a kernel's shared memory")
            check(driver.cuKernelSetAttribute(attribute, size, main, device), "set shared memory")
    return Kernel(spec, entry.meta, points, library)
