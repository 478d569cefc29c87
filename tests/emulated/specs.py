"""The kernels that run emulated: Blackwell's default variants, what select takes for the tests, and others."""

from __future__ import annotations

from fp4gemm.spec import GemmSpec, GroupedGemmSpec
from fp4gemm.variants import default_variants

_BLOCK_SCALED = [spec for spec in default_variants(("sm_100a", "sm_120a")) if isinstance(spec, GemmSpec)]
VARIANTS = [spec for spec in _BLOCK_SCALED if not isinstance(spec, GroupedGemmSpec)]


def _sm100(
    tile: tuple[int, int], cluster: tuple[int, int], schedule: str, out: str, bias: str | None = None, **terms: object
) -> GemmSpec:
    return GemmSpec("sm_100a", out, bias, (*tile, 256), cluster, schedule, **terms)  # type: ignore[arg-type]


def _sm120(tile: tuple[int, int, int], schedule: str, out: str, bias: str | None = None, **terms: object) -> GemmSpec:
    return GemmSpec("sm_120a", out, bias, tile, (1, 1), schedule, **terms)  # type: ignore[arg-type]


def _grouped(arch: str, columns: int, out: str, bias: str | None = None, source: str | None = None) -> GroupedGemmSpec:
    k, schedule = (256, "static") if arch == "sm_100a" else (128, "cooperative")
    return GroupedGemmSpec(arch, out, bias, (128, columns, k), (1, 1), schedule, source)


# What select takes for the calls of test_blackwell_api_gpu.py, beside those.
_EVERYTHING = {"source": "fp32", "activation": "relu", "column_major": True}
CHOSEN = [
    _sm100((128, 64), (1, 1), "static", "bf16"),
    _sm100((128, 64), (1, 1), "static", "fp16", "fp16"),
    _sm100((128, 64), (1, 1), "static", "fp32", "bf16", **_EVERYTHING),
    _sm100((256, 256), (2, 1), "static", "fp32", "fp32"),
    _sm100((128, 64), (1, 1), "static", "fp4", sf_layout="128x4"),
    _sm120((128, 128, 128), "cooperative", "fp16", "fp16"),
    _sm120((128, 128, 128), "cooperative", "fp32", "bf16", **_EVERYTHING),
    _sm120((128, 128, 128), "cooperative", "fp4", activation="relu", sf_layout="128x4"),
]

# Each tile in the cluster in which select takes it, in other clusters, and under the other schedule; every activation
# and dtype with a source and without; an NVFP4 D of each tile.
_MORE = [
    _sm100((128, 128), (4, 2), "clc", "bf16", "fp32", source="bf16"),
    _sm100((128, 192), (1, 1), "static", "fp32", column_major=True),
    _sm100((128, 256), (1, 1), "static", "bf16", activation="relu"),
    _sm100((128, 128), (2, 2), "static", "bf16", "bf16", activation="gelu", column_major=True),
    _sm100((128, 192), (2, 1), "static", "bf16", activation="silu"),
    _sm100((256, 128), (2, 2), "static", "fp16", "fp32", source="fp16"),
    _sm100((256, 128), (4, 2), "clc", "fp32", "fp16", source="fp32", activation="silu", column_major=True),
    _sm100((256, 256), (2, 1), "clc", "bf16", "bf16", source="bf16"),
    _sm100((128, 192), (2, 1), "static", "fp4", "fp32", sf_layout="linear"),
    _sm100((128, 128), (1, 1), "static", "fp4", activation="relu", sf_layout="128x4"),
    _sm100((256, 256), (2, 1), "static", "fp4", "bf16", sf_layout="linear"),
    _sm100((256, 128), (2, 2), "static", "fp4", "fp16", activation="relu", sf_layout="128x4"),
    _sm120((256, 128, 128), "cooperative", "fp16", "bf16", activation="silu"),
    _sm120((128, 128, 256), "cooperative", "bf16", "fp32", source="bf16"),
    _sm120((128, 128, 256), "pingpong", "fp32", "fp16", source="fp32", activation="relu", column_major=True),
    _sm120((256, 128, 128), "cooperative", "fp4", "fp16", activation="relu", sf_layout="linear"),
]
SPECS = [*VARIANTS, *CHOSEN, *_MORE]

# A thread stores the rows of a tile on the border itself: with a source and without, and each dtype.
_MORE_GROUPED = [_grouped("sm_100a", 256, "fp16", "fp16", source="fp16")]
GROUPED = [
    *(spec for spec in _BLOCK_SCALED if isinstance(spec, GroupedGemmSpec)),
    _grouped("sm_100a", 128, "fp32", "bf16", source="fp32"),
    _grouped("sm_120a", 128, "fp32", "bf16", source="fp32"),
    *_MORE_GROUPED,
]

ONLY_ON_REQUEST = frozenset([*_MORE, *_MORE_GROUPED])  # --all-kernels
