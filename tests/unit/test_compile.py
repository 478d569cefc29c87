"""NVRTC on the small kernels, what is read back from a cubin, and what is said where a tool is missing."""

import importlib.metadata
import re
import sys
import time

import pytest

from fp4gemm import compile as compiler
from fp4gemm import launch, toolchain
from fp4gemm.compile import CompileError, compile_source, read_ints
from fp4gemm.render import render
from fp4gemm.spec import ARCHS, AmaxSpec, DequantizeSpec, PackSpec, QuantizeSpec
from fp4gemm.toolchain import ToolchainError

SOURCE = 'extern "C" __device__ int fp4gemm_meta[3] = {7, -8, sizeof(long)};\nextern "C" __global__ void k() {}\n'
INSTALL = r"pip install 'fp4gemm\[cuda13\]'"


@pytest.fixture(scope="module")
def cubin():
    return compile_source(SOURCE, "tiny", "sm_90a", cutlass=False).cubin


# Python packs these structs, C++ declares them; sizeof(), which the kernel itself reports, must be the packed size.
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "make, packed, threads",
    [
        (lambda a: QuantizeSpec(a, "fp32", "given", "te", "8x4", 128, 2, 4), launch.QUANTIZE_ARGUMENTS, 512),
        (lambda a: AmaxSpec(a, "fp16"), launch.AMAX_ARGUMENTS, 256),
        (lambda a: DequantizeSpec(a, "fp32", "128x4", True), launch.DEQUANTIZE_ARGUMENTS, 256),
        (
            lambda a: QuantizeSpec(a, "fp16", "per_row", "torchao", "linear", 64, 2, 1, output="values"),
            launch.QUANTIZE_ARGUMENTS,
            64,
        ),
    ],
    ids=["quantize", "amax", "dequantize", "values"],
)
def test_kernel_and_python_agree_on_the_argument_struct(arch, make, packed, threads):
    spec = make(arch)
    start = time.process_time()
    compiled = compile_source(render(spec), spec.name, arch, cutlass=False)
    assert time.process_time() - start < 1  # seconds of CPU: no CUTLASS, no standard library
    assert compiled.meta == (threads, 1, 1, 1, 0, packed.size)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert 0 < compiled.registers <= 255
    assert f"'{arch}'" in compiled.log  # ptxas's report


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_packers_agree_on_the_argument_struct(direction):
    spec = PackSpec("sm_90a", "8x4", direction)
    compiled = compile_source(render(spec), spec.name, spec.arch, cutlass=False)
    assert compiled.meta == (256, 1, 1, 1, 0, launch.PACK_ARGUMENTS.size)


def test_refused_source_keeps_log_and_source(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CompileError) as error:
        compile_source("int f() { return no_such_name; }\n", "broken", "sm_90a", cutlass=False)
    assert 'broken.cu(1): error: identifier "no_such_name" is undefined' in error.value.log
    assert error.value.path.read_text() == "int f() { return no_such_name; }\n"
    assert error.value.path.parent == tmp_path
    for part in ("broken", str(error.value.path), error.value.log):
        assert part in str(error.value)


def test_unknown_arch_is_a_compile_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CompileError, match="gpu-architecture"):
        compile_source(SOURCE, "tiny", "sm_1", cutlass=False)


def test_source_without_meta_is_a_value_error():
    with pytest.raises(ValueError, match="no symbol fp4gemm_meta"):
        compile_source('extern "C" __global__ void k() {}', "bare", "sm_90a", cutlass=False)


def test_no_multiplication_is_contracted():
    """docs/numerics.md counts every rounding: a * b + c stays two operations."""
    source = 'extern "C" __device__ int fp4gemm_meta[1] = {0};\nextern "C" __global__ void k(float* x) '
    used = [
        compile_source(source + body, "two", "sm_90a", cutlass=False).cubin
        for body in ("{ *x = x[1] * x[2] + x[3]; }", "{ *x = __fadd_rn(__fmul_rn(x[1], x[2]), x[3]); }")
    ]
    assert used[0] == used[1]


def test_ints_are_read_from_the_cubin(cubin):
    assert read_ints(cubin, "fp4gemm_meta") == (7, -8, 8)


def test_missing_symbol(cubin):
    with pytest.raises(ValueError, match=r"^cubin holds no symbol fp4gemm$"):
        read_ints(cubin, "fp4gemm")


def test_a_cubin_cut_short(cubin):
    for length in range(0, len(cubin) - 512, 97):  # program headers, which nobody reads here, come last
        with pytest.raises(ValueError, match=rf"^cubin of {length} bytes is not a whole ELF file"):
            read_ints(cubin[:length], "fp4gemm_meta")


def test_resources_are_the_most_of_any_entry_point():
    log = (
        "ptxas info : 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\nptxas info : Used 40 registers\n"
        "ptxas info : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info : Used 168 registers\n"
    )
    assert compiler._resources(log) == (168, 16)
    assert compiler._resources("") == (0, 0)


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # makes the import fail


def test_no_nvrtc(monkeypatch):
    def no_wheel(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_wheel)
    assert re.fullmatch(r"\d+\.\d+", toolchain.nvrtc_version.__wrapped__())  # the library answers for itself
    without(monkeypatch, "cuda.bindings", "cuda.bindings.nvrtc")
    with pytest.raises(ToolchainError, match=rf"NVRTC was not found \(.*\): {INSTALL}"):
        toolchain.nvrtc_version.__wrapped__()


def test_nvrtc_wheel_without_cuda_bindings(monkeypatch):
    without(monkeypatch, "cuda.bindings", "cuda.bindings.nvrtc")
    with pytest.raises(ToolchainError, match=INSTALL):
        compile_source(SOURCE, "tiny", "sm_90a", cutlass=False)


def test_no_cutlass(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "_package", lambda name: [])
    with pytest.raises(ToolchainError, match=f"CUTLASS is not installed: {INSTALL}, or set FP4GEMM_CUTLASS_PATH"):
        compile_source(SOURCE, "tiny", "sm_90a", cutlass=True)
    monkeypatch.setenv("FP4GEMM_CUTLASS_PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=f"FP4GEMM_CUTLASS_PATH={re.escape(str(tmp_path))} has no include/cutlass"):
        toolchain.cutlass_include()


def test_no_cuda_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "_cuda_roots", lambda: [tmp_path])
    with pytest.raises(ToolchainError, match=f"no CUDA headers with CCCL in the installed wheels.*: {INSTALL}"):
        toolchain.find_headers()
    monkeypatch.setenv("FP4GEMM_CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError, match=r"FP4GEMM_CUDA_HOME=.*/cuda"):
        toolchain.cuda_includes()


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("inside", ["include", "."], ids=["checkout", "include-folder"])
def test_cutlass_path_is_a_checkout_or_its_include_folder(monkeypatch, tmp_path, inside):
    version = tmp_path / inside / "cutlass/version.h"
    touch(version)
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 12\n#define CUTLASS_PATCH  3\n")
    monkeypatch.setenv("FP4GEMM_CUTLASS_PATH", str(tmp_path))
    assert toolchain.cutlass_include() == version.parent.parent
    assert toolchain.cutlass_version(version.parent.parent) == "4.12.3"


@pytest.mark.parametrize("cccl", ["include/cccl", "include"])
def test_cuda_home_goes_before_the_wheels(monkeypatch, tmp_path, cccl):
    touch(tmp_path / "include/cuda_fp16.h", tmp_path / cccl / "cuda/std/type_traits")
    monkeypatch.setenv("FP4GEMM_CUDA_HOME", str(tmp_path))
    assert toolchain.cuda_includes() == tuple(dict.fromkeys((tmp_path / cccl, tmp_path / "include")))


def test_installed_headers_come_after_our_own():
    folders = [option.removeprefix("-I") for option in compiler.include_options("sm_90a", cutlass=True)]
    headers = toolchain.find_headers()
    own = str(compiler.template_dir() / "include")
    assert folders == [own, f"{own}/nvrtc", str(headers.cutlass), *map(str, headers.cuda)]
    assert compiler.include_options("sm_90a", cutlass=False) == [f"-I{own}"]


def test_gemms_of_sm120_are_assembled_with_o2():
    level = {(arch, cutlass): "--ptxas-options=-O2" in compiler.options(arch, cutlass=cutlass)
             for arch in ARCHS for cutlass in (False, True)}  # fmt: skip
    assert {key for key, lower in level.items() if lower} == {("sm_120a", True)}


# --- FP4GEMM_EMULATE --------------------------------------------------------------------------------------------------


def test_emulation_needs_an_overlay(monkeypatch):
    monkeypatch.setenv("FP4GEMM_EMULATE", "sm_120a")
    with pytest.raises(ToolchainError, match="FP4GEMM_EMULATE=sm_120a is for fp4gemm's tests"):
        compiler.options("sm_120a")
    assert "--gpu-architecture=sm_100a" in compiler.options("sm_100a")


def test_an_overlay_counts_by_its_content_and_for_one_arch(monkeypatch, tmp_path):
    plain = {arch: compiler.options(arch) for arch in ARCHS}
    monkeypatch.setattr(compiler, "_overlay", None)
    monkeypatch.setenv("FP4GEMM_EMULATE", "sm_120a")
    emulated = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        touch(tmp_path / folder / "cute/x.hpp")
        (tmp_path / folder / "cute/x.hpp").write_text(text)
        compiler.use_overlay(tmp_path / folder)
        assert [compiler.options(arch) for arch in ARCHS[:2]] == [plain[arch] for arch in ARCHS[:2]]
        emulated.append(compiler.options("sm_120a"))
        assert "--gpu-architecture=sm_90a" in emulated[-1]
        folders = compiler.include_options("sm_120a", cutlass=True)
        assert folders[2] == f"-I{tmp_path / folder}"
        assert compiler.include_options("sm_100a", cutlass=True) == folders[:2] + folders[3:]
    assert emulated[0] == emulated[1] != emulated[2]


def test_an_emulated_kernel_is_one_for_sm_90a(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "_overlay", None)
    monkeypatch.setenv("FP4GEMM_EMULATE", "sm_100a")
    compiler.use_overlay(tmp_path)
    source = SOURCE + "#ifndef FP4GEMM_EMULATE\n#error not emulated\n#endif\n"
    assert "'sm_90a'" in compile_source(source, "tiny", "sm_100a", cutlass=False).log
