"""The cache: what a key depends on, and that an entry is whole, or absent, or moved aside and built again."""

import errno
import json
import multiprocessing
import os
import shutil
import stat
import sys
import threading
import warnings
from pathlib import Path

import pytest

from fp4gemm import cache, toolchain
from fp4gemm.cache import CacheError, KernelMissing
from fp4gemm.compile import Compiled, CompileError
from fp4gemm.spec import AmaxSpec, PackedCollectiveSpec, QuantizeSpec

SPEC = AmaxSpec("sm_90a", "bf16")
QUANTIZE = QuantizeSpec("sm_90a", "bf16", "per_row", "te_per_token", "128x4", 128, 4, 4)
GEMM = PackedCollectiveSpec("sm_90a", "bf16", "bf16", None, (64, 256, 64), (1, 1), "pingpong")
CUBIN = b"\x7fELF, or so it says"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder, which does not exist yet."""
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FP4GEMM_DISABLE_JIT", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """Names of what was compiled, by a compiler that takes no time."""
    names = []

    def compile_source(source, name, arch, *, cutlass):
        names.append(name)
        return Compiled(CUBIN, "log", 0.1234, 40, 0, meta=(256, 2, 1, 1, 1024, 40, 192, 128))

    monkeypatch.setattr(cache.compiler, "compile_source", compile_source)
    return names


def no_toolchain(monkeypatch):
    def missing():
        raise toolchain.ToolchainError("NVRTC was not found")

    monkeypatch.setattr(toolchain, "nvrtc_version", missing)


def left_in(folder):
    """Everything but locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# --- keys ---


@pytest.fixture
def headers(monkeypatch, tmp_path):
    """A copy of our own headers that a test may change."""
    shutil.copytree(cache.template_dir() / "include", tmp_path / "templates/include")
    monkeypatch.setattr(cache, "template_dir", lambda: tmp_path / "templates")
    cache._header_digest.cache_clear()
    yield tmp_path / "templates/include"
    cache._header_digest.cache_clear()


def touches(specs, change):
    """Which of the specs get another key by ``change``."""
    before = [cache.key(spec) for spec in specs]
    change()
    cache._header_digest.cache_clear()
    return [spec for spec, key in zip(specs, before, strict=True) if cache.key(spec) != key]


@pytest.mark.parametrize(
    "name, changed",
    [
        ("fp4gemm/dequantize.hpp", []),
        ("fp4gemm/quantize.hpp", [QUANTIZE]),
        ("fp4gemm/amax.hpp", [SPEC]),
        ("fp4gemm/numeric.hpp", [SPEC, QUANTIZE, GEMM]),  # included by an included header
        ("fp4gemm/gemm.hpp", [GEMM]),
        ("fp4gemm/tensor_map.hpp", [GEMM]),  # included by a stand-in
        ("nvrtc/cute/atom/copy_traits_sm90_tma.hpp", [GEMM]),  # included by CUTLASS
    ],
)
def test_key_follows_the_text_of_the_headers_used(headers, name, changed):
    def edit():
        (headers / name).write_text((headers / name).read_text() + "// another line\n")

    assert touches([SPEC, QUANTIZE, GEMM], edit) == changed


@pytest.mark.parametrize(
    "module, function, replacement, changed",
    [
        (cache, "render", lambda spec: f'#include "fp4gemm/quantize.hpp"\n// {spec}', [SPEC, GEMM]),
        (cache.compiler, "options", lambda arch, cutlass: ["-std=c++20"], [SPEC, GEMM]),
        (toolchain, "nvrtc_version", lambda: "13.9.9", [SPEC, GEMM]),
        (toolchain, "cutlass_version", lambda include: "9.9.9", [GEMM]),
        (toolchain, "_cuda_versions", lambda includes: ("13999", "1"), [GEMM]),
    ],
    ids=["source", "options", "nvrtc", "cutlass", "cuda"],
)
def test_key_follows_source_options_and_versions(monkeypatch, module, function, replacement, changed):
    assert touches([SPEC, GEMM], lambda: monkeypatch.setattr(module, function, replacement)) == changed


def test_key_follows_edits_of_a_cutlass_that_the_user_brings(monkeypatch, tmp_path):
    header = tmp_path / "include/cutlass/version.h"
    header.parent.mkdir(parents=True)
    header.write_text((toolchain.cutlass_include() / "cutlass/version.h").read_text())
    monkeypatch.setenv("FP4GEMM_CUTLASS_PATH", str(tmp_path))

    def edit():
        header.with_name("gemm.h").write_text("// edited")
        toolchain._tree_stamp.cache_clear()  # a process sees one state of the tree

    assert touches([SPEC, GEMM], edit) == [GEMM]


def test_key_does_not_follow_settings(monkeypatch, tmp_path):
    def change():
        monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "other"))
        monkeypatch.setenv("FP4GEMM_LOG", "debug")
        monkeypatch.setenv("FP4GEMM_DISABLE_JIT", "1")
        options = cache.compiler.options("sm_90a")
        monkeypatch.setattr(cache.compiler, "options", lambda arch, cutlass: options[::-1])

    assert touches([SPEC, GEMM], change) == []


def test_every_spec_has_its_own_key():
    assert len({cache.key(spec) for spec in (SPEC, QUANTIZE, GEMM, AmaxSpec("sm_100a", "bf16"))}) == 4


# --- entries ---


def test_a_hit_does_not_build_again(folder, compiled):
    assert cache.lookup(SPEC) is None
    assert not folder.exists()  # looking leaves no trace
    first = cache.get(SPEC)
    assert cache.get(SPEC) == cache.lookup(SPEC) == first
    assert compiled == [SPEC.name]
    assert left_in(folder) == [first.path.name] == [f"{SPEC.name}-{cache.key(SPEC)[:20]}"]
    assert first.cubin == CUBIN
    assert (first.path / "kernel.cu").read_text() == cache.render(SPEC)


def test_meta_says_how_to_launch_and_what_built_it(compiled):
    meta = cache.get(GEMM).meta
    assert (meta["threads"], meta["cluster"], meta["smem_bytes"], meta["params_bytes"]) == (256, [2, 1, 1], 1024, 40)
    assert (meta["launch_bytes"], meta["grid_offset"]) == (192, 128)
    assert (meta["name"], meta["arch"], meta["entry_points"]) == (GEMM.name, "sm_90a", ["gemm", "make_params"])
    assert (meta["registers"], meta["spill_bytes"], meta["seconds"], meta["cubin_bytes"]) == (40, 0, 0.12, len(CUBIN))
    assert (meta["nvrtc"], meta["cutlass"]) == (toolchain.nvrtc_version(), toolchain.find_headers().cutlass_version)
    assert cache.get(SPEC).meta["cutlass"] is None


def test_the_folder_is_the_users_own(folder, compiled):
    entry = cache.get(SPEC)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o700


def cut(entry):
    cubin = entry / "kernel.cubin"
    os.truncate(cubin, cubin.stat().st_size - 1)


@pytest.mark.parametrize(
    "harm, problem",
    [
        (cut, f"kernel.cubin has {len(CUBIN) - 1} bytes, expected {len(CUBIN)}"),
        (lambda entry: (entry / "kernel.cubin").unlink(), "a file is missing"),
        (lambda entry: (entry / "meta.json").unlink(), "a file is missing"),
        (lambda entry: (entry / "meta.json").write_text('{"cubin_'), "Unterminated string"),
        (lambda entry: (entry / "meta.json").write_bytes(b"\xff\x00\xfe"), "utf-8"),
        (lambda entry: (entry / "meta.json").write_text("{}"), "cubin_bytes"),
        (lambda entry: (entry / "meta.json").write_text("[1]"), ""),
        (lambda entry: (entry / "meta.json").write_text("null"), ""),
        pytest.param(
            lambda entry: (entry / "meta.json").write_text(json.dumps({"cubin_bytes": len(CUBIN)})), "source_key"
        ),
    ],
    ids=["cut", "no-cubin", "no-meta", "half-json", "bytes", "empty", "list", "null", "no-source-key"],
)
def test_a_broken_entry_is_moved_aside_and_built_again(folder, compiled, harm, problem):
    first = cache.get(SPEC)
    harm(first.path)
    with pytest.warns(UserWarning, match="is broken") as warnings:
        again = cache.get(SPEC)
    assert problem in str(warnings[0].message)
    assert compiled == [SPEC.name] * 2
    assert again == first == cache.lookup(SPEC)
    aside, whole = left_in(folder)
    assert aside.startswith(f".broken-{SPEC.name}-")
    assert whole == first.path.name
    assert (folder / aside / whole / "kernel.cu").is_file()  # still there to be looked at


def test_disabled_jit_finds_what_is_there_and_refuses_to_build(folder, compiled, monkeypatch):
    cache.get(SPEC)
    monkeypatch.setenv("FP4GEMM_DISABLE_JIT", "1")
    assert cache.get(SPEC).cubin == CUBIN
    with pytest.raises(KernelMissing, match=f"fp4gemm build {QUANTIZE.name}") as error:
        cache.get(QUANTIZE)
    assert str(folder) in str(error.value)
    assert compiled == [SPEC.name]


def test_without_a_toolchain_an_entry_of_the_same_source_is_found(compiled, monkeypatch):
    with monkeypatch.context() as builder:
        builder.setattr(toolchain, "nvrtc_version", lambda: "13.0.1")
        built = cache.get(SPEC)
    assert cache.lookup(SPEC) is None  # another NVRTC is installed here
    no_toolchain(monkeypatch)
    assert cache.lookup(SPEC) == cache.get(SPEC) == built
    assert cache.lookup(QUANTIZE) is None
    with pytest.raises(toolchain.ToolchainError, match="NVRTC was not found"):
        cache.get(QUANTIZE)
    monkeypatch.setattr(cache, "source_key", lambda spec: "of a changed template")
    assert cache.lookup(SPEC) is None


# --- folders that cannot be used ---


def check_refusal(folder, reason):
    with pytest.raises(CacheError, match=reason) as error:
        cache.get(SPEC)
    assert str(folder) in str(error.value)
    assert "set FP4GEMM_CACHE_DIR to another folder" in str(error.value)


def test_a_folder_that_cannot_be_made(tmp_path, compiled, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "file/cache"))
    assert cache.lookup(SPEC) is None
    check_refusal(tmp_path / "file/cache", "cannot lock a kernel in the cache folder .*Not a directory")
    assert compiled == []


def refuse(**kwargs):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_cannot_be_written(folder, compiled, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    check_refusal(folder, "cannot write to the cache folder .*Permission denied")
    assert compiled == []


def test_a_broken_entry_in_a_folder_that_cannot_be_written(folder, compiled, monkeypatch):
    cut(cache.get(SPEC).path)
    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    check_refusal(folder, "cannot .* the cache folder .*Permission denied")


@pytest.mark.parametrize("file", ["kernel.cu", "kernel.cubin", "meta.json"])
def test_a_full_disk_leaves_nothing_behind(folder, compiled, monkeypatch, file):
    def write(path, content):
        with path.open("wb") as opened:
            if path.name == file:  # now it is there, without its content
                raise OSError(errno.ENOSPC, "No space left on device")
            opened.write(content if isinstance(content, bytes) else content.encode())

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", write)
        disk.setattr(Path, "write_bytes", write)
        check_refusal(folder, "cannot write to the cache folder .*No space left on device")
    assert left_in(folder) == []
    assert cache.lookup(SPEC) is None
    assert cache.get(SPEC).cubin == CUBIN  # and the lock is free


def test_a_failed_compilation_leaves_nothing_behind(folder, monkeypatch):
    def fail(source, name, arch, *, cutlass):
        raise CompileError(name, "log", Path("saved.cu"))

    monkeypatch.setattr(cache.compiler, "compile_source", fail)
    with pytest.raises(CompileError):
        cache.get(SPEC)
    assert left_in(folder) == []


# --- at once ---


def build_at_once(log, everyone_missed, errors):
    """In a process of its own: look, wait until the others have looked too, then build."""
    lookup, compile_source = cache.lookup, cache.compiler.compile_source
    looked = []

    def lookup_then_wait(spec):
        found = lookup(spec)
        if not looked:
            looked.append(spec)
            everyone_missed.wait(timeout=120)
        return found

    def compile_and_log(*args, **kwargs):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return compile_source(*args, **kwargs)

    cache.lookup, cache.compiler.compile_source = lookup_then_wait, compile_and_log
    try:
        assert cache.get(SPEC).cubin[:4] == b"\x7fELF"
    except BaseException as error:
        errors.put(repr(error))
        sys.exit(1)


def test_processes_that_build_the_same_key_compile_it_once(folder, tmp_path):
    spawn = multiprocessing.get_context("spawn")  # with the real NVRTC
    barrier, errors = spawn.Barrier(2), spawn.Queue()
    log = tmp_path / "log"
    processes = [spawn.Process(target=build_at_once, args=(log, barrier, errors)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
    assert [process.exitcode for process in processes] == [0, 0], errors.get(timeout=5)
    assert len(log.read_text().split()) == 1
    assert left_in(folder) == [cache.lookup(SPEC).path.name]


def test_an_entry_that_appears_while_it_is_looked_for_is_not_broken(compiled, monkeypatch):
    """Another process renames its entry into place between two looks of this one."""
    place = cache.get(SPEC).path
    hidden = place.with_name("hidden")
    place.rename(hidden)
    read_text = type(place).read_text

    def late(path, *args, **kwargs):
        if path == place / "meta.json" and hidden.exists():
            hidden.rename(place)
            raise FileNotFoundError(path)
        return read_text(path, *args, **kwargs)

    exists = type(place).exists

    def appears(path, **kwargs):
        found = exists(path, **kwargs)
        if path == place and hidden.exists():
            hidden.rename(place)
        return found

    monkeypatch.setattr(type(place), "read_text", late)
    monkeypatch.setattr(type(place), "exists", appears)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.lookup(SPEC)
    monkeypatch.undo()
    assert (place / "meta.json").exists()


def test_threads_that_build_the_same_key_compile_it_once(compiled):
    barrier = threading.Barrier(4)
    found = []

    def build():
        barrier.wait(timeout=60)
        found.append(cache.get(SPEC))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4
    assert found == found[:1] * 4
    assert compiled == [SPEC.name]
