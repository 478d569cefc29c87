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
from fp4gemm.compile import compile_source, read_ints
from fp4gemm.division import mma_shared_bytes, wgmma_shared_bytes
from fp4gemm.formats import NORMS
from fp4gemm.group.calls import (
    GROUP_AMAX_ARGUMENTS,
    GROUP_ROWS_ARGUMENTS,
    GROUP_SUMS_ARGUMENTS,
    GROUP_TILE_ARGUMENTS,
    UNIFORM_ROWS_ARGUMENTS,
)
from fp4gemm.launch import (
    AMAX_ARGUMENTS,
    DEQUANTIZE_ARGUMENTS,
    NORM_ARGUMENTS,
    PACK_ARGUMENTS,
    QUANTIZE_ARGUMENTS,
)
from fp4gemm.packed_plan import PACKED_GEMM_BYTES
from fp4gemm.render import render
from fp4gemm.spec import (
    ARCHS,
    AmaxSpec,
    DequantizeSpec,
    GemmSpec,
    GroupSpec,
    GroupSumsSpec,
    KernelSpec,
    PackedCollectiveSpec,
    PackedMmaSpec,
    PackedWgmmaSpec,
    PackSpec,
    QuantizeSpec,
    TileAmaxSpec,
    TileQuantizeSpec,
)
from fp4gemm.tile_calls import TILE_AMAX_ARGUMENTS, TILE_QUANTIZE_ARGUMENTS
from fp4gemm.variants import default_variants

pytestmark = pytest.mark.compile

VARIANTS = default_variants()
GEMMS = [spec for spec in VARIANTS if "make_params" in spec.entry_points]  # of CUTLASS's kernel layers
BLOCK_SCALED = [spec for spec in VARIANTS if isinstance(spec, GemmSpec)]
ENGINE = [spec for spec in VARIANTS if isinstance(spec, (PackedMmaSpec, PackedWgmmaSpec))]
ARGUMENTS = {
    QuantizeSpec: QUANTIZE_ARGUMENTS,  # of a norm: NORM_ARGUMENTS
    AmaxSpec: AMAX_ARGUMENTS,
    DequantizeSpec: DEQUANTIZE_ARGUMENTS,
    PackSpec: PACK_ARGUMENTS,
    TileQuantizeSpec: TILE_QUANTIZE_ARGUMENTS,
    TileAmaxSpec: TILE_AMAX_ARGUMENTS,
    GroupSumsSpec: GROUP_SUMS_ARGUMENTS,
}
GROUP_ARGUMENTS = {  # by the kernel that goes through a group
    QuantizeSpec: GROUP_ROWS_ARGUMENTS,
    TileQuantizeSpec: GROUP_TILE_ARGUMENTS,
    TileAmaxSpec: GROUP_AMAX_ARGUMENTS,
}
# Dynamic shared memory that a CTA may ask for.
SHARED = {"sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
REGISTER_FILE = 65536
PARAMS = 4096  # bytes of kernel arguments that every driver takes
# What multiplies, for each arch, and what brings its operands. On Blackwell: packed NVFP4, e4m3 scales of 16 values;
# on sm_100a block scales go to tensor memory, from where sums come.
MULTIPLIES = {
    "sm_90a": [r"HGMMA\b"],
    "sm_100a": [r"UTCOMMA\.(2CTA\.)?4X\b", r"UTCCP\.T\.S\.(2CTA\.)?4x32dp128bit\b", r"LDTM\.x\d"],
    "sm_120a": [r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X\b", r"LDSM\b"],
}


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
    assert {type(spec) for spec in VARIANTS if spec.arch == "sm_90a"} >= {
        PackedMmaSpec,
        PackedWgmmaSpec,
        PackedCollectiveSpec,
    }


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


@variants([spec for spec in VARIANTS if type(spec) in ARGUMENTS])
def test_small_kernels(entry: cache.Entry, spec: KernelSpec) -> None:
    norm = getattr(spec, "producer", None) in NORMS
    assert entry.meta["params_bytes"] == (NORM_ARGUMENTS if norm else ARGUMENTS[type(spec)]).size
    assert entry.meta["threads"] == spec.threads * (spec.rows if isinstance(spec, QuantizeSpec) else 1)
    assert entry.meta["cluster"] == [1, 1, 1]
    assert (entry.meta["smem_bytes"] > 0) == isinstance(spec, (TileQuantizeSpec, TileAmaxSpec))


@variants([spec for spec in VARIANTS if isinstance(spec, GroupSpec)])
def test_kernels_of_groups(entry: cache.Entry, spec: GroupSpec) -> None:
    """Also that as many CTAs as a launch counts on fit on an SM."""
    meta = entry.meta
    arguments = UNIFORM_ROWS_ARGUMENTS if spec.uniform else GROUP_ARGUMENTS[type(spec.kernel)]
    assert meta["params_bytes"] == arguments.size
    assert meta["threads"] == spec.threads
    assert meta["registers"] * meta["threads"] * spec.ctas <= REGISTER_FILE
    assert (meta["smem_bytes"] + 1024) * spec.ctas <= SHARED[spec.arch] + 1024


@variants(ENGINE)
def test_engine_launch(entry: cache.Entry, spec: PackedMmaSpec | PackedWgmmaSpec) -> None:
    """What ``packed_plan`` and ``division`` take for granted."""
    meta = entry.meta
    assert meta["params_bytes"] == PACKED_GEMM_BYTES
    if isinstance(spec, PackedMmaSpec):
        assert meta["smem_bytes"] == mma_shared_bytes(spec, panels=0)
        assert (meta["threads"], meta["cluster"]) == (32 * (spec.warps + spec.loaders), [spec.split, 1, 1])
    else:
        assert meta["smem_bytes"] == wgmma_shared_bytes(spec)
        assert meta["threads"] == 128 * (spec.row_groups * spec.depth_groups + 1)
        assert meta["cluster"] == [spec.multicast * spec.split, 1, 1]


@variants([spec for spec in ENGINE if isinstance(spec, PackedWgmmaSpec)])
def test_ptxas_leaves_wgmma_asynchronous(spec: PackedWgmmaSpec) -> None:
    """It says so where it serializes WGMMAs (C7510 and its like), which makes a kernel several times slower."""
    log = compile_source(render(spec), spec.name, spec.arch, cutlass=True).log
    assert "Used" in log  # ptxas's report is there
    assert not re.search(r"C75\d\d|serializ", log, re.IGNORECASE), log


@variants(GEMMS)
def test_gemm_launch_struct(entry: cache.Entry, spec: GemmSpec | PackedCollectiveSpec) -> None:
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
def test_gemm_uses_the_tensor_core_and_tma(entry: cache.Entry, spec: GemmSpec | PackedCollectiveSpec) -> None:
    code = disassembled(entry.path / "kernel.cubin")["gemm"]
    for instruction in (*MULTIPLIES[spec.arch], r"UTMALDG\b", r"UTMASTG\b"):
        assert re.search(rf"\s{instruction}", code), f"no {instruction}"


@variants(BLOCK_SCALED)
def test_block_scaled_machine_code(entry: cache.Entry, spec: GemmSpec) -> None:
    """What the spec asks for, and nothing else: pairs of SMs, multicast, work from the hardware, codes from it."""
    code = disassembled(entry.path / "kernel.cubin")["gemm"]

    def has(instruction: str) -> bool:
        return re.search(rf"\s{instruction}", code) is not None

    assert has(r"UTCOMMA\.2CTA") == spec.two_sm
    assert has(r"UTMALDG\.\dD\.MULTICAST") == (spec.cluster != (1, 1))
    assert has("UGETNEXTWORKID") == (spec.schedule == "clc")
    assert has(r"F2FP\.SATFINITE\.E2M1\.F32") == (spec.out_dtype == "fp4")
    assert not has(r"(LDL|STL)\b")


@variants([spec for spec in VARIANTS if isinstance(spec, (TileQuantizeSpec, TileAmaxSpec))])
def test_tile_machine_code(entry: cache.Entry, spec: TileQuantizeSpec | TileAmaxSpec) -> None:
    """Tiles come by asynchronous copies, columns leave by transposing loads; results by 16 bytes."""
    code = disassembled(entry.path / "kernel.cubin")[spec.entry_points[0]]
    for instruction in ("LDGSTS", *(["LDSM"] if spec.columns else [])):
        assert re.search(rf"\s{instruction}\b", code), f"no {instruction}"
    assert isinstance(spec, TileAmaxSpec) or "STG.E.128" in code
    assert not re.search(r"\s(LDL|STL)\b", code)


@variants(ENGINE)
def test_engine_machine_code(entry: cache.Entry, spec: PackedMmaSpec | PackedWgmmaSpec) -> None:
    """Weights come by bulk copies, tokens by TMA or cp.async; codes become operands without a conversion."""
    code = disassembled(entry.path / "kernel.cubin")["gemm"]
    if isinstance(spec, PackedWgmmaSpec):
        needed = ["HGMMA", "UBLKCP", "UTMALDG"]
    else:  # a token that is quantized on its way in goes through registers
        needed = ["HMMA", "UBLKCP", "LDSM", "STS" if spec.quantize else "LDGSTS"]
    for instruction in needed:
        assert re.search(rf"\s{instruction}\b", code), f"no {instruction}"
    # A block scale is half of a register pair, which the multiplication broadcasts.
    multiply = r"HMUL2\.BF16" if spec.a_dtype == "bf16" else r"HMUL2"
    for half in ("H0_H0", "H1_H1"):
        assert re.search(rf"{multiply}\S* .*\.{half}", code), f"no {multiply} with {half}"
    assert not re.search(r"\s(LDL|STL)\b", code)
    assert "ACQBULK" in code, "no wait for the kernel in front (griddepcontrol)"
    assert "PREEXIT" in code, "the kernel behind may not begin early"


@variants([spec for spec in VARIANTS if isinstance(spec, QuantizeSpec) and spec.arch != "sm_90a"])
def test_blackwell_rounds_in_hardware(entry: cache.Entry, spec: QuantizeSpec) -> None:
    """To nearest; stochastic rounding is the kernel's own. The errors of 4/6 are those of values that it reads back."""
    code = disassembled(entry.path / "kernel.cubin")["quantize"]
    assert ("F2FP.SATFINITE.E2M1.F32" in code) is not spec.stochastic
    assert ("F2FP.F16.E2M1.UNPACK" in code) is bool(spec.adaptive)


@variants(GEMMS)
def test_make_params_has_no_breakpoint(entry: cache.Entry, spec: GemmSpec | PackedCollectiveSpec) -> None:
    """CUTLASS's own uint128 divides through a breakpoint, at shapes that make_params is given: nvrtc/std.hpp."""
    code = disassembled(entry.path / "kernel.cubin")["make_params"]
    assert "EXIT" in code
    assert "BPT" not in code
