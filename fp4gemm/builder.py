"""Build many kernels at once: each in a process, as many as memory holds.

NVRTC compiles one translation unit on one core and a CUTLASS GEMM takes gigabytes while it does, so the number of
processes follows from free memory first and from the cores second.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp4gemm.spec import KernelSpec

GB = 1 << 30
GEMM_BYTES = {"sm_90a": 6 * GB, "sm_100a": 6 * GB, "sm_120a": 7 * GB}
OTHER_BYTES = 1 * GB


@dataclass(frozen=True)
class Built:
    """How one kernel ended: `meta` of its cache entry, or the error text."""

    spec: KernelSpec
    meta: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


Worker = Callable[["KernelSpec"], dict[str, Any]]


def build_one(spec: KernelSpec) -> dict[str, Any]:
    """Build `spec` into the cache (in a worker process) and return its meta data."""
    from fp4gemm import cache

    return dict(cache.get(spec).meta)


def memory_need(spec: KernelSpec) -> int:
    """Bytes to reserve for compiling `spec`: measured peaks, rounded up."""
    # CUTLASS's kernel layers are what takes memory, and they are what needs a make_params.
    return GEMM_BYTES[spec.arch] if "make_params" in spec.entry_points else OTHER_BYTES


def free_memory() -> int:
    """Bytes this process may still take: the smaller of the machine's and the control group's; 8 GB where unknown."""
    candidates = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    return min(candidates, default=8 * GB)


def default_jobs() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_all(
    specs: Sequence[KernelSpec], *, jobs: int | None = None, memory: int | None = None, worker: Worker = build_one
) -> Iterator[Built]:
    """Build every spec and yield each result as it comes; one that fails does not stop the others.

    Args:
        specs: what to build, in any order: the ones that need most memory (the slow ones) start first.
        jobs: processes at once; default: the cores of this machine.
        memory: bytes that running compilations may reserve together; default: what is free now. One always runs.
        worker: picklable function of a spec, called in a fresh process.
    """
    jobs = default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected at least 1")
    memory = free_memory() if memory is None else memory
    waiting = sorted(specs, key=memory_need, reverse=True)
    running: dict[Future[Built], KernelSpec] = {}
    processes = _Processes()
    try:
        while waiting or running:
            while (chosen := _next(waiting, list(running.values()), jobs, memory)) is not None:
                waiting.remove(chosen)
                running[processes.start(worker, chosen)] = chosen
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                processes.end(future)
                yield _result(running.pop(future), future)
    finally:
        processes.close()


def _next(waiting: Sequence[KernelSpec], running: Sequence[KernelSpec], jobs: int, memory: int) -> KernelSpec | None:
    if not running:
        return next(iter(waiting), None)
    if len(running) >= jobs:
        return None
    left = memory - sum(map(memory_need, running))
    return next((spec for spec in waiting if memory_need(spec) <= left), None)


class _Processes:
    """One for each kernel at a time. That of a large one ends with it: its memory goes back to the system, and its peak
    is its own. Small ones take a process over: to start one takes longer than most of them do. One that the system
    kills for memory takes no other build with it."""

    def __init__(self) -> None:
        self._busy: dict[Future[Built], ProcessPoolExecutor] = {}
        self._idle: list[ProcessPoolExecutor] = []

    def start(self, worker: Worker, spec: KernelSpec) -> Future[Built]:
        if memory_need(spec) > OTHER_BYTES:
            self._end_idle()
        if self._idle:
            pool = self._idle.pop()
        else:
            # Spawn: CUDA and threads do not fork.
            pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        try:
            future = pool.submit(_guarded, worker, spec)
        except BrokenProcessPool:  # killed while it was idle
            return self.start(worker, spec)
        if memory_need(spec) > OTHER_BYTES:
            pool.shutdown(wait=False)
        else:
            self._busy[future] = pool
        return future

    def end(self, future: Future[Built]) -> None:
        if (pool := self._busy.pop(future, None)) is not None and future.exception() is None:
            self._idle.append(pool)

    def close(self) -> None:
        self._end_idle()
        for pool in self._busy.values():
            pool.shutdown(wait=False)

    def _end_idle(self) -> None:
        while self._idle:
            self._idle.pop().shutdown()


def _guarded(worker: Worker, spec: KernelSpec) -> Built:
    # Errors come home as text: not every exception survives pickling.
    try:
        return Built(spec, meta=worker(spec))
    except Exception as error:
        return Built(spec, error=f"{type(error).__name__}: {error}")


def _result(spec: KernelSpec, future: Future[Built]) -> Built:
    try:
        return future.result()
    except BrokenProcessPool:
        return Built(spec, error="its process died without a word; that is how running out of memory looks")


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - used, 0)
