"""Builds, several at once, the GEMM kernels that run emulated on a GPU: the tests do so as they begin.

`python tests/emulated/build_kernels.py` does it where there is no GPU. Needs NVRTC. Prints for each kernel what it
took, and which instructions, if any, are not emulated; exits with 1 where there are any or where a build failed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import emulation  # noqa: E402 - the line above must come first
from mutations import MUTATIONS, Mutation  # noqa: E402
from specs import GROUPED, ONLY_ON_REQUEST, SPECS  # noqa: E402

from fp4gemm import builder, cache  # noqa: E402
from fp4gemm.spec import GemmSpec  # noqa: E402

Kernel = GemmSpec | Mutation


def _cost(kernel: Kernel) -> tuple[int, int]:
    return builder.memory_need(kernel), math.prod(kernel.tile)  # type: ignore[arg-type]


# What takes longest first, as builder does it: nothing is left to share the last one's time with.
KERNELS: list[Kernel] = sorted([*SPECS, *GROUPED, *MUTATIONS], key=_cost, reverse=True)


@contextmanager
def _emulated(kernel: Kernel) -> Iterator[GemmSpec]:
    """The spec, while its kernel is compiled for the emulation."""
    spec, edits = (kernel.spec, kernel.edits) if isinstance(kernel, Mutation) else (kernel, ())
    with emulation.emulate(kernel.arch, edits):
        yield spec


def build(kernel: Kernel) -> dict[str, Any]:
    """In a process of its own: the entry's meta data, and what is not emulated in it."""
    with _emulated(kernel) as spec:
        entry = cache.get(spec)
    return {**entry.meta, "not_emulated": emulation.not_emulated(entry)}


def lookup(kernel: Kernel) -> cache.Entry | None:
    with _emulated(kernel) as spec:
        return cache.lookup(spec)


class Building:
    """Kernels that are built while other tests run; a test waits for its own."""

    def __init__(self, kernels: Iterable[Kernel], jobs: int | None = None) -> None:
        self._built: dict[str, Future[None]] = {kernel.name: Future() for kernel in kernels}
        missing = [kernel for kernel in kernels if lookup(kernel) is None]
        for name in self._built.keys() - {kernel.name for kernel in missing}:
            self._built[name].set_result(None)
        self._stopped = False
        self._thread = threading.Thread(target=self._build, args=(missing, jobs), daemon=True)
        self._thread.start()

    def wait(self, kernels: Iterable[Kernel]) -> None:
        """Returns when these are in the cache. Raises RuntimeError with the build's error where one is not."""
        for kernel in kernels:
            self._built[kernel.name].result()

    def stop(self) -> None:
        """Builds that are under way end without a result: nobody waits for them."""
        self._stopped = True
        while self._thread.is_alive():
            for process in multiprocessing.active_children():
                process.terminate()
            self._thread.join(0.1)

    def _build(self, kernels: list[Kernel], jobs: int | None) -> None:
        for built in builder.build_all(kernels, jobs=jobs, worker=build):  # type: ignore[arg-type]
            if self._stopped:
                return
            problem = built.error or "; ".join(built.meta["not_emulated"])
            if problem:
                self._built[built.spec.name].set_exception(RuntimeError(f"{built.spec.name}: {problem}"))
            else:
                self._built[built.spec.name].set_result(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="build only the kernels whose names have one of these parts")
    parser.add_argument("--jobs", type=int, help="processes at once (default: the cores)")
    parser.add_argument("--all-kernels", action="store_true", help="also those that tests run only on request")
    args = parser.parse_args()
    chosen = [kernel for kernel in KERNELS if args.all_kernels or kernel not in ONLY_ON_REQUEST]
    kernels = [kernel for kernel in chosen if not args.parts or any(part in kernel.name for part in args.parts)]
    start, failed = time.perf_counter(), 0
    for built in builder.build_all(kernels, jobs=args.jobs, worker=build):  # type: ignore[arg-type]
        problem = built.error or "; ".join(built.meta["not_emulated"])
        failed += bool(problem)
        took = f"{built.meta['seconds']:.0f} s, {built.meta['peak_mb']} MB" if built.meta else "failed"
        print(f"{time.perf_counter() - start:4.0f} s  {built.spec.name}: {took} {problem}", flush=True)
    print(f"{len(kernels)} kernels, {failed} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
