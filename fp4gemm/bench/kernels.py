"""What a kernel costs before it runs: its load from the warm cache in a new process, and its compilation."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch

from fp4gemm import cache, provenance, report, select, variants
from fp4gemm.bench.common import ARCH, Config, Job
from fp4gemm.report import Row
from fp4gemm.spec import PackedCollectiveSpec

_PROBE = "fp4gemm.bench.load_probe"


def default_gemm() -> PackedCollectiveSpec:
    """The first GEMM variant for this backend: the one that the load figure is about."""
    return next(s for s in variants.default_variants((ARCH,)) if isinstance(s, PackedCollectiveSpec))


def gemm_name(M: int, N: int, K: int) -> str:
    """Name of the kernel that `gemm` takes for bf16 activations [M, K] and D [M, N] in bf16, without bias."""
    gpu = select.gpu_of(torch.cuda.current_device())
    return select.packed_spec(gpu, M, N, K, "bf16", "bf16", None, False).name


def grouped_name(experts: int, tokens: int, N: int, K: int) -> str:
    """The same of `gemm_grouped`, where an expert has `tokens` on average."""
    _, sms = select.gpu_of(torch.cuda.current_device())
    return select.grouped_spec(sms, experts, tokens, N, K, "bf16", "bf16", None, False).name


def load_jobs(config: Config) -> Iterator[Job]:
    """The load time of the default GEMM variant."""
    yield Job("load from cache", functools.partial(_load_rows, config))


def _load_rows(config: Config) -> list[Row]:
    wanted = default_gemm()
    cache.get(wanted)  # in the disk cache, and in the page cache, from here on
    runs = [_probe(wanted.name) for _ in range(2 if config.quick else config.repeats)]
    return [
        {
            "bench": "load",
            "kernel": wanted.name,
            "arch": wanted.arch,
            "ms": statistics.median(runs),
            "max_ms": max(runs),
        }
    ]


def _probe(name: str) -> float:
    """Milliseconds of one load in a new process. Raises RuntimeError with that process's words when it fails."""
    path = os.pathsep.join(filter(None, (str(provenance.project_root()), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "FP4GEMM_DISABLE_JIT": "1"}
    command = [sys.executable, "-m", _PROBE, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{_PROBE} {name} ended with {done.returncode}:\n{done.stderr.strip()}")
    return float(json.loads(done.stdout.splitlines()[-1])["ms"])


def compile_jobs(config: Config) -> Iterator[Job]:
    """What the compiler said about every default variant that the cache holds; nothing is built here."""
    yield Job("compile", _compile_rows)


def _compile_rows() -> list[Row]:
    entries = ((s, cache.lookup(s)) for s in variants.default_variants())
    return [report.compile_row(s.name, s.arch, entry.meta) for s, entry in entries if entry is not None]
