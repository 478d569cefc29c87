"""Builds, several at once, the GEMM kernels that run emulated on a GPU here: `python tests/emulated/prebuild.py`.

Needs NVRTC and no GPU. Prints for each what it took, and which instructions, if any, are not emulated; exits with 1
where there are any or where a build failed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import emulation  # noqa: E402 - the line above must come first
from mutations import MUTATIONS, Mutation  # noqa: E402
from specs import API, GROUPED, SPECS  # noqa: E402

from fp4gemm import builder, cache  # noqa: E402
from fp4gemm.spec import GemmSpec  # noqa: E402

# Large tiles first: they take longest, and nothing is left to share the last one's time with.
KERNELS: list[GemmSpec | Mutation] = sorted(
    [*SPECS, *API, *GROUPED, *MUTATIONS], key=lambda kernel: math.prod(kernel.tile), reverse=True
)


def build(kernel: GemmSpec | Mutation) -> dict[str, Any]:
    """In a process of its own: the entry's meta data, and what is not emulated in it."""
    if isinstance(kernel, Mutation):
        entry = kernel.build()
    else:
        with emulation.emulate(kernel.arch):
            entry = cache.get(kernel)
    return {**entry.meta, "not_emulated": emulation.not_emulated(entry)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="build only the kernels whose names have one of these parts")
    parser.add_argument("--jobs", type=int, help="processes at once (default: the cores)")
    args = parser.parse_args()
    specs = [spec for spec in KERNELS if not args.parts or any(part in spec.name for part in args.parts)]
    start, failed = time.perf_counter(), 0
    for built in builder.build_all(specs, jobs=args.jobs, worker=build):
        problem = built.error or "; ".join(built.meta["not_emulated"])
        failed += bool(problem)
        took = f"{built.meta['seconds']:.0f} s, {built.meta['peak_mb']} MB" if built.meta else "failed"
        print(f"{built.spec.name}: {took} {problem}", flush=True)
    print(f"{len(specs)} kernels, {failed} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
