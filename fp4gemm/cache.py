"""The folder of compiled kernels. An entry is ``<name>-<key>/{kernel.cu, kernel.cubin, meta.json}``, written in a
temporary sibling and renamed into place, so it is whole or absent; a broken one is moved aside and built again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fp4gemm import compile as compiler
from fp4gemm import env, toolchain
from fp4gemm.render import render, template_dir
from fp4gemm.spec import KernelSpec

_log = logging.getLogger(__name__)


class KernelMissing(RuntimeError):
    """The kernel is not in the cache and FP4GEMM_DISABLE_JIT forbids building it."""


class CacheError(RuntimeError):
    """The cache folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    path: Path
    meta: dict[str, Any]

    @property
    def cubin(self) -> bytes:
        return (self.path / "kernel.cubin").read_bytes()


@cache
def _header_digest(name: str) -> bytes:
    """Digest of one own header and of all own headers it includes."""
    include = template_dir() / "include"
    text = (include / name).read_text()
    digest = hashlib.sha256(text.encode())
    for included in re.findall(r'#include "(fp4gemm/[^"]+|nvrtc/[^"]+)"', text):
        digest.update(_header_digest(included))
    return digest.digest()


def _included_headers(source: str, cutlass: bool) -> Iterator[str]:
    yield from re.findall(r'#include "(fp4gemm/[^"]+)"', source)
    if cutlass:  # the stand-ins are included by CUTLASS's own headers
        include = template_dir() / "include"
        yield from sorted(str(p.relative_to(include)) for p in (include / "nvrtc").rglob("*.h*"))


def source_key(spec: KernelSpec) -> str:
    """sha256 over all that this package puts into a kernel: rendered source, own headers, arch and options."""
    source = render(spec)
    digest = hashlib.sha256(source.encode())
    for name in _included_headers(source, spec.uses_cutlass):
        digest.update(_header_digest(name))
    digest.update("\0".join(sorted(compiler.options(spec.arch, cutlass=spec.uses_cutlass))).encode())
    return digest.hexdigest()


def key(spec: KernelSpec) -> str:
    """``source_key`` with the versions of NVRTC and, where used, CUTLASS. Raises ToolchainError without them."""
    return _key(spec, source_key(spec))


def _key(spec: KernelSpec, source: str) -> str:
    versions = [toolchain.nvrtc_version(), toolchain.header_versions() if spec.uses_cutlass else ""]
    return hashlib.sha256("\0".join([source, *versions]).encode()).hexdigest()


def _cutlass_version() -> str:
    return toolchain.cutlass_version(toolchain.cutlass_include())


def cache_dir() -> Path:
    return env.settings().cache_dir


def _place(spec: KernelSpec, digest: str) -> Path:
    return cache_dir() / f"{spec.name}-{digest[:20]}"


def lookup(spec: KernelSpec) -> Entry | None:
    """The entry of a kernel if it is there and whole.

    Where no toolchain is installed, as on a serving machine, any entry of the same source counts, whatever built it.
    """
    source = source_key(spec)
    try:
        places = [_place(spec, _key(spec, source))]
    except toolchain.ToolchainError:
        places = sorted(cache_dir().glob(f"{spec.name}-*"))
    entries = (_read(place) for place in places)
    return next((entry for entry in entries if entry and entry.meta["source_key"] == source), None)


_NEEDED = {"source_key", "entry_points", "threads", "smem_bytes", "params_bytes"}  # by lookup, load and launch


def _read(place: Path) -> Entry | None:
    """An entry, or None where there is none; a broken one is moved aside with a warning."""
    if not place.exists():  # before its files are looked for: it may come between the two
        return None
    try:
        meta = json.loads((place / "meta.json").read_text())
        if (size := (place / "kernel.cubin").stat().st_size) != meta["cubin_bytes"]:
            raise ValueError(f"kernel.cubin has {size} bytes, expected {meta['cubin_bytes']}")
        if missing := _NEEDED - meta.keys():
            raise ValueError(f"meta.json lacks {', '.join(sorted(missing))}")
        return Entry(place, meta)
    except (FileNotFoundError, NotADirectoryError):
        if not place.exists():  # moved aside meanwhile
            return None
        problem = "a file is missing"
    except (ValueError, KeyError, TypeError) as error:
        problem = str(error)
    discard(place, problem)
    return None


def discard(place: Path, problem: str) -> None:
    """Move a broken entry aside, so that it is built again and can still be looked at."""
    with _explained("move a broken entry aside in"):
        aside = Path(tempfile.mkdtemp(prefix=f".broken-{place.name}-", dir=place.parent))
    try:
        place.rename(aside / place.name)
    except OSError:
        aside.rmdir()
        return  # another process was quicker
    warnings.warn(f"fp4gemm cache entry {place} is broken ({problem}); moved to {aside} and built again", stacklevel=4)


def get(spec: KernelSpec) -> Entry:
    """The entry of a kernel, built if it is missing. One process builds a key, others wait for it.

    Raises KernelMissing, CacheError, compile.CompileError or toolchain.ToolchainError.
    """
    env.configure_logging()
    if entry := lookup(spec):
        return entry
    if env.settings().disable_jit:
        raise KernelMissing(
            f"kernel {spec.name} is not in {cache_dir()} and FP4GEMM_DISABLE_JIT=1: "
            f"build it where NVRTC is (fp4gemm build {spec.name}) or unset the variable"
        )
    with _lock(spec):
        return lookup(spec) or _build(spec)


@contextmanager
def _lock(spec: KernelSpec) -> Iterator[None]:
    import filelock

    with _explained("lock a kernel in"):
        cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = filelock.FileLock(cache_dir() / f".{spec.name}-{key(spec)[:20]}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot {action} the cache folder {cache_dir()}: {error.strerror or error}; "
            f"free space or permissions are needed there, or set FP4GEMM_CACHE_DIR to another folder"
        ) from error


def _build(spec: KernelSpec) -> Entry:
    source = render(spec)
    with _explained("write to"):
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=cache_dir()))
    try:
        compiled = compiler.compile_source(source, spec.name, spec.arch, cutlass=spec.uses_cutlass)
        meta = _meta(spec, compiled)
        place = _place(spec, key(spec))
        with _explained("write to"):
            (scratch / "kernel.cu").write_text(source)
            (scratch / "kernel.cubin").write_bytes(compiled.cubin)
            (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
            os.replace(scratch, place)
        return Entry(place, meta)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _meta(spec: KernelSpec, compiled: compiler.Compiled) -> dict[str, Any]:
    import resource

    threads, *cluster, smem_bytes, params_bytes = compiled.meta[:6]
    meta: dict[str, Any] = {
        "name": spec.name,
        "arch": spec.arch,
        "source_key": source_key(spec),
        "entry_points": list(spec.entry_points),
        "threads": threads,
        "cluster": cluster,
        "smem_bytes": smem_bytes,
        "params_bytes": params_bytes,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "seconds": round(compiled.seconds, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "nvrtc": toolchain.nvrtc_version(),
        "cutlass": _cutlass_version() if spec.uses_cutlass else None,
        "cubin_bytes": len(compiled.cubin),
    }
    if "make_params" in spec.entry_points:
        meta["launch_bytes"], meta["grid_offset"] = compiled.meta[6:8]
    return meta
