"""`python -m fp4gemm.bench.load_probe NAME`: the time to find and load a cached kernel in a new process, as JSON.

The caller sets FP4GEMM_DISABLE_JIT, so that a kernel missing from the cache is an error and never a timed build.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from fp4gemm import load, variants


def probe(name: str) -> dict[str, float]:
    """{"ms": milliseconds of one `load.load`}; CUDA is initialised before the clock starts."""
    wanted = next(s for s in variants.default_variants() if s.name == name)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    load.load(wanted)
    torch.cuda.synchronize()
    return {"ms": (time.perf_counter() - start) * 1e3}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
