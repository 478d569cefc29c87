"""Problem -> spec: which kernel serves a call. Everything that depends on shape or device is decided here."""

from __future__ import annotations

from fp4gemm import rates, table
from fp4gemm.formats import BLOCK, SF_LAYOUTS
from fp4gemm.select.blockscaled import gemm_spec, grouped_gemm_spec, plain_gemms
from fp4gemm.select.device import DTYPE_NAMES, EXECUTED, INPUT_NAMES, LAUNCHABLE, arch_of, gpu_of, pick_device
from fp4gemm.select.packed import (
    FALLBACK,
    QUANTIZED_ROWS,
    by_time,
    grouped_configs,
    grouped_of,
    grouped_spec,
    is_about,
    pack_spec,
    packed_of,
    packed_spec,
    quantizing,
    stand_in,
    token_tile,
)
from fp4gemm.select.quantizers import (
    FEW_ROWS,
    FEW_VALUES_ROWS,
    amax_spec,
    dequantize_spec,
    early,
    group_amax_spec,
    group_rows_spec,
    group_sums_spec,
    group_tile_spec,
    known_signs,
    prefetch_ctas,
    quantize_spec,
    tile_amax_spec,
    tile_quantize_spec,
    uniform_rows_spec,
    values_spec,
)
from fp4gemm.spec import KernelSpec

__all__ = [
    "DTYPE_NAMES",
    "EXECUTED",
    "FALLBACK",
    "FEW_ROWS",
    "INPUT_NAMES",
    "LAUNCHABLE",
    "QUANTIZED_ROWS",
    "amax_spec",
    "arch_of",
    "bf16_specs",
    "by_time",
    "chosen_kernels",
    "dequantize_spec",
    "early",
    "gemm_spec",
    "gpu_of",
    "group_amax_spec",
    "group_rows_spec",
    "group_sums_spec",
    "group_tile_spec",
    "grouped_configs",
    "grouped_gemm_spec",
    "grouped_spec",
    "is_about",
    "known_signs",
    "pack_spec",
    "packed_of",
    "packed_spec",
    "pick_device",
    "prefetch_ctas",
    "quantize_spec",
    "quantizing",
    "stand_in",
    "tile_amax_spec",
    "tile_quantize_spec",
    "token_tile",
    "uniform_rows_spec",
    "values_spec",
]


def chosen_kernels() -> list[table.Kernel]:
    """Of products on prepacked weights with bf16 results and no C, by what comes with the package."""
    measured = [(row.kernel, row.config) for row in table.read(table.PACKAGED)]
    elsewhere = [(rate.kernel, rate.config) for rate in rates.packaged()]
    return list(dict.fromkeys([*measured, *elsewhere, FALLBACK]))


def bf16_specs(arch: str, k: int) -> list[KernelSpec]:
    """Every kernel that bf16 tensors of ``k`` columns ask for, without options of ``quantize`` and bias: what to build
    before serving."""
    quantizers = [
        quantize_spec(arch, "bf16", k, scaling, convention, sf_layout, vectorized=k % BLOCK == 0, few=few)
        for scaling, convention in (("per_row", "te_per_token"), ("per_tensor", "te"), ("given", "te_per_token"))
        for sf_layout in SF_LAYOUTS
        for few in (False, True)
    ]
    dequantizers = [
        dequantize_spec(arch, "bf16", sf_layout, outer) for sf_layout in SF_LAYOUTS for outer in (True, False)
    ]
    aligned = k % 8 == 0  # rows of whole 16 bytes
    turned = [
        tile_quantize_spec(arch, "bf16", scaling, "te_per_token", None, sf_layout, None, False, False, aligned)
        for scaling in ("amax", "given")
        for sf_layout in SF_LAYOUTS
    ]
    small: list[KernelSpec] = [
        *dict.fromkeys(quantizers),
        amax_spec(arch, "bf16", k % BLOCK == 0),
        *dequantizers,
        *turned,
    ]
    small.append(tile_amax_spec(arch, "bf16", False, True, None, aligned))
    if arch != "sm_90a":
        return [*small, *plain_gemms(arch)]
    values = [
        values_spec(arch, "bf16", m, k, scaling, "te_per_token", vectorized=k % BLOCK == 0)[0]
        for scaling in ("per_row", "given")
        for m in (1, FEW_VALUES_ROWS, FEW_VALUES_ROWS + 1)
    ]
    packers = [pack_spec(arch, sf_layout, way) for sf_layout in SF_LAYOUTS for way in ("pack", "unpack")]
    gemms = [packed_of(*kernel, "bf16", "bf16", None, False) for kernel in chosen_kernels()]
    grouped = [grouped_of(config, "bf16", "bf16", None, False) for config in grouped_configs()]
    return [*small, *dict.fromkeys(values), *packers, *gemms, *grouped]
