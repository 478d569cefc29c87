"""Which kernels run on a device, and what dtypes are called in specs."""

from __future__ import annotations

from functools import cache

import torch

from fp4gemm import env

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INPUT_NAMES = {**DTYPE_NAMES, torch.float8_e4m3fn: "e4m3"}  # what quantizers read
LAUNCHABLE = {(9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}  # compute capability -> arch
EXECUTED = ("sm_90a",)  # archs whose kernels have run on their own hardware


@cache
def arch_of(device: int) -> str:
    """The arch whose kernels run on CUDA device ``device``. Raises NotImplementedError where there are none."""
    capability = torch.cuda.get_device_capability(device)
    emulated = env.settings().emulate
    if emulated and capability == (9, 0):
        return emulated
    if arch := LAUNCHABLE.get(capability):
        return arch
    name = torch.cuda.get_device_name(device)
    here = f"{name} has compute capability {capability[0]}.{capability[1]}"
    known = ", ".join(f"{major}.{minor} ({arch})" for (major, minor), arch in LAUNCHABLE.items())
    raise NotImplementedError(f"{here}: fp4gemm has CUDA kernels for {known}; use CPU tensors")


def pick_device(wanted: str) -> tuple[torch.device, str]:
    """The device to run on, and a sentence that says what runs there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {wanted!r}, expected 'auto', 'cpu' or 'cuda'")
    if wanted == "cpu" or not torch.cuda.is_available():
        if wanted == "cuda":
            raise ValueError("device: got 'cuda', but torch sees no GPU here; `fp4gemm doctor` says why")
        return torch.device("cpu"), "reference on the CPU"
    try:
        arch = arch_of(torch.cuda.current_device())
    except NotImplementedError as error:
        if wanted == "cuda":
            raise
        return torch.device("cpu"), f"reference on the CPU ({error})"
    return torch.device("cuda"), f"{arch} kernels on {torch.cuda.get_device_name()}"


@cache
def gpu_of(device: int) -> tuple[str, int]:
    """Name and number of SMs."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
