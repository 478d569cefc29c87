"""Every default variant of every arch through NVRTC with a cold cache, then what came out: resources and machine code.

No GPU is needed; on two cores it takes minutes. `FP4GEMM_CACHE_DIR` is respected, so that CI chooses where the cold
cache is; otherwise it is a temporary folder.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fp4gemm import builder, cache
from fp4gemm.compile import read_ints
from fp4gemm.launch import AMAX_ARGUMENTS, DEQUANTIZE_ARGUMENTS, PACK_ARGUMENTS, QUANTIZE_ARGUMENTS
from fp4gemm.spec import ARCHS, AmaxSpec, DequantizeSpec, GemmSpec, KernelSpec, PackSpec, QuantizeSpec, default_variants

pytestmark = pytest.mark.compile

VARIANTS = default_variants()
GEMMS = [spec for spec in VARIANTS if isinstance(spec, GemmSpec)]
ARGUMENTS = {
    QuantizeSpec: QUANTIZE_ARGUMENTS,
    AmaxSpec: AMAX_ARGUMENTS,
    DequantizeSpec: DEQUANTIZE_ARGUMENTS,
    PackSpec: PACK_ARGUMENTS,
}
# Dynamic shared memory that a CTA may ask for.
SHARED = {"sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
REGISTER_FILE = 65536
PARAMS = 4096  # bytes of kernel arguments that every driver takes
# The instruction that multiplies, for each arch; all of them load tiles through TMA.
MULTIPLIES = {"sm_90a": "HGMMA", "sm_100a": "UTCOMMA", "sm_120a": "OMMA"}


def variants(specs: list[KernelSpec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory):
    """Name -> result of ``builder.build_all`` over all variants; the cache folder stays in place for the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("FP4GEMM_CACHE_DIR"):
            patch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path_factory.mktemp("cold-cache")))
        patch.delenv("FP4GEMM_DISABLE_JIT", raising=False)
        yield {result.spec.name: result for result in builder.build_all(VARIANTS)}


@pytest.fixture
def entry(built: dict[str, builder.Built], spec: KernelSpec) -> cache.Entry:
    assert built[spec.name].error is None
    found = cache.lookup(spec)
    assert found is not None
    return found


def test_every_arch_has_a_gemm() -> None:
    assert {spec.arch for spec in GEMMS} == set(ARCHS)


@variants(VARIANTS)
def test_entry(entry: cache.Entry, spec: KernelSpec, built: dict[str, builder.Built]) -> None:
    assert built[spec.name].meta == entry.meta
    assert sorted(path.name for path in entry.path.iterdir()) == ["kernel.cu", "kernel.cubin", "meta.json"]
    assert (entry.meta["name"], entry.meta["arch"]) == (spec.name, spec.arch)
    assert entry.meta["entry_points"] == list(spec.entry_points)
    for name in spec.entry_points:
        assert read_ints(entry.cubin, name), f"{name}: a symbol without machine code"


@variants(VARIANTS)
def test_resources(entry: cache.Entry, spec: KernelSpec) -> None:
    meta = entry.meta
    assert meta["spill_bytes"] == 0
    assert 0 < meta["registers"] <= 255
    assert meta["smem_bytes"] <= SHARED[spec.arch]
    assert 0 < meta["params_bytes"] <= PARAMS
    assert meta["threads"] in range(32, 1025, 32)
    assert -(-meta["registers"] // 8) * 8 * meta["threads"] <= REGISTER_FILE


@variants([spec for spec in VARIANTS if not isinstance(spec, GemmSpec)])
def test_small_kernels(entry: cache.Entry, spec: KernelSpec) -> None:
    assert entry.meta["params_bytes"] == ARGUMENTS[type(spec)].size
    assert entry.meta["threads"] == spec.threads * getattr(spec, "rows", 1)
    assert entry.meta["cluster"] == [1, 1, 1]


@variants(GEMMS)
def test_gemm_launch_struct(entry: cache.Entry, spec: GemmSpec) -> None:
    """``launch._split`` cuts Params and the grid out of the Launch struct by these numbers."""
    meta = entry.meta
    assert meta["cluster"] == [*spec.cluster, 1]
    assert meta["params_bytes"] <= meta["grid_offset"] < meta["params_bytes"] + 64
    assert meta["grid_offset"] % 64 == 0
    assert meta["launch_bytes"] == meta["grid_offset"] + 64


def nvdisasm() -> str | None:
    wheels = importlib.util.find_spec("nvidia")
    folders = [str(Path(path) / "cu13/bin") for path in (wheels.submodule_search_locations or ())] if wheels else []
    return shutil.which("nvdisasm", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


@functools.cache
def disassembled(cubin: Path) -> dict[str, str]:
    """Entry point -> its machine code as text."""
    if (tool := nvdisasm()) is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@variants(GEMMS)
def test_gemm_uses_the_tensor_core_and_tma(entry: cache.Entry, spec: GemmSpec) -> None:
    code = disassembled(entry.path / "kernel.cubin")["gemm"]
    for instruction in (MULTIPLIES[spec.arch], "UTMALDG", "UTMASTG"):
        assert re.search(rf"\s{instruction}\b", code), f"no {instruction}"


@variants(GEMMS)
def test_make_params_has_no_breakpoint(entry: cache.Entry, spec: GemmSpec) -> None:
    """CUTLASS's own uint128 divides through a breakpoint, at shapes that make_params is given: nvrtc/std.hpp."""
    code = disassembled(entry.path / "kernel.cubin")["make_params"]
    assert "EXIT" in code
    assert "BPT" not in code
