"""The default variants: a kernel of each kind, which ``generated/`` shows and ``fp4gemm build --all`` builds."""

from __future__ import annotations

from collections.abc import Iterable

from fp4gemm.formats import METRICS, PREPACKED, PRODUCERS, RECIPE_SIGNS, SF_LAYOUTS, VALUES
from fp4gemm.spec import (
    ANY_SIGNS,
    ARCHS,
    AmaxSpec,
    DequantizeSpec,
    GemmSpec,
    GroupedGemmSpec,
    GroupSpec,
    GroupSumsSpec,
    KernelSpec,
    PackedCollectiveSpec,
    PackedMmaSpec,
    PackedWgmmaSpec,
    PackSpec,
    QuantizeSpec,
    SearchSpec,
    TileAmaxSpec,
    TileQuantizeSpec,
)


def _sm90_values() -> list[KernelSpec]:
    """Quantizers that write values: for few rows of K = 8192, and for many."""
    few = {"per_row": (128, 4, 1), "given": (128, 1, 1)}
    return [
        QuantizeSpec("sm_90a", "bf16", scaling, "te_per_token", "linear", *tile, output="values")
        for scaling in few
        for tile in (few[scaling], (256, 2, 1))
    ]


def _tiles(arch: str) -> list[KernelSpec]:
    """Both ways at once, plainly and as in training, transposed alone, squares for weights; and their amaxes. On Hopper
    the operands of training, too."""
    per_token = (arch, "bf16", "amax", "te_per_token")
    ctas = 2 if arch == "sm_120a" else 4
    operands = [
        TileQuantizeSpec(*per_token, VALUES, VALUES),
        TileQuantizeSpec(*per_token, VALUES, VALUES, hadamard=RECIPE_SIGNS, stochastic=True),
        TileQuantizeSpec(*per_token, VALUES, PREPACKED, hadamard=RECIPE_SIGNS),
        TileQuantizeSpec(arch, "bf16", "amax", "te", PREPACKED, PREPACKED, square=True),
    ]
    return [
        *(operands if arch == "sm_90a" else []),
        TileQuantizeSpec(*per_token, "128x4", "128x4", ctas=ctas),
        TileQuantizeSpec(*per_token, "128x4", "128x4", hadamard=RECIPE_SIGNS, stochastic=True, ctas=ctas),
        TileQuantizeSpec(*per_token, "128x4", "128x4", hadamard=ANY_SIGNS, stochastic=True, ctas=ctas),
        TileQuantizeSpec(*per_token, None, "128x4", ctas=ctas),
        TileQuantizeSpec(arch, "bf16", "amax", "te", "128x4", "128x4", square=True, ctas=ctas),
        TileAmaxSpec(arch, "bf16", True, True, ctas=ctas),
        TileAmaxSpec(arch, "bf16", True, True, RECIPE_SIGNS, ctas=ctas),
        TileAmaxSpec(arch, "bf16", True, True, ANY_SIGNS, ctas=ctas),
        TileAmaxSpec(arch, "bf16", True, True, RECIPE_SIGNS, ctas=ctas, sums=True),
    ]


def _groups(arch: str) -> list[KernelSpec]:
    """Members of K = 8192 by rows, of any K by rows and both ways as in training, their amaxes, and sums of columns."""
    per_token = (arch, "bf16", "amax", "te_per_token")
    per_row = (arch, "bf16", "per_row", "te_per_token", "128x4")
    ctas = 2 if arch == "sm_120a" else 4
    noisy = min(ctas, 3)
    return [
        GroupSpec(QuantizeSpec(*per_row, 128, 4, 4)),
        GroupSpec(QuantizeSpec(*per_row, 128, 4, 4), uniform=True),
        GroupSpec(QuantizeSpec(*per_row, 128, 2, 4, resident=False)),
        GroupSpec(TileQuantizeSpec(*per_token, "128x4", "128x4", hadamard=RECIPE_SIGNS, stochastic=True, ctas=noisy)),
        GroupSpec(TileAmaxSpec(arch, "bf16", True, True, RECIPE_SIGNS, ctas=ctas, sums=True)),
        GroupSumsSpec(arch, 8),
    ]


def _with_options(arch: str) -> list[KernelSpec]:
    """Quantizers of bf16 at K = 8192 with each option and producer, and of e4m3."""
    per_row, wide, tiled = ("per_row", "te_per_token"), (128, 4, 2), (128, 4, 4)
    adding = (256, 2, 2) if arch == "sm_90a" else wide
    return [
        QuantizeSpec(arch, "bf16", *per_row, "linear", *wide, stochastic=True),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *tiled, stochastic=True),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *wide, adaptive="mse"),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *wide, adaptive="mae"),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *wide, residual="activation"),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *wide, residual="activation", gathered=True),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *wide, residual="weight"),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *tiled, noop=True),
        QuantizeSpec(arch, "e4m3", *per_row, "128x4", *tiled),
        *(QuantizeSpec(arch, "bf16", *per_row, "128x4", *tiled, producer=name) for name in PRODUCERS),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *wide, producer="rmsnorm"),
        QuantizeSpec(arch, "bf16", *per_row, "128x4", *adding, producer="add_rmsnorm"),
    ]


def _sm90_packed() -> list[KernelSpec]:
    """GEMMs on prepacked weights: of each kind those for few tokens and for many, and each term and dtype once."""
    one, two = (1, 16, 3, 1, 2, 0, 0), (2, 14, 2, 1, 2, 2, 1)
    few, many = (16, 1, 1, 4, 1, 2, 16), (256, 1, 2, 1, 2, 1, 6)
    return [
        PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, *one),
        PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, *two),
        PackedMmaSpec("sm_90a", "fp16", "fp16", None, False, *one),
        PackedMmaSpec("sm_90a", "bf16", "bf16", "bf16", False, *one),
        PackedMmaSpec("sm_90a", "bf16", "bf16", None, False, *one, quantize="bf16"),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, *few),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 64, 7, 4, 1, 1, 2, 6),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 128, 2, 2, 1, 1, 2, 8),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 128, 4, 2, 1, 1, 1, 8),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, *many),
        PackedWgmmaSpec("sm_90a", "fp16", "fp16", None, False, *many),
        PackedWgmmaSpec("sm_90a", "bf16", "fp32", None, False, *few),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, True, 128, 2, 2, 1, 1, 1, 8),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, 16, 4, 2, 2, 1, 1, 16, grouped=True),
        PackedWgmmaSpec("sm_90a", "bf16", "bf16", None, False, *many, grouped=True),
        PackedCollectiveSpec("sm_90a", "bf16", "bf16", None, (64, 256, 64), (1, 1), "pingpong"),
        PackedCollectiveSpec("sm_90a", "bf16", "bf16", None, (128, 256, 64), (2, 1), "cooperative"),
        PackedCollectiveSpec("sm_90a", "bf16", "bf16", None, (128, 256, 64), (2, 1), "cooperative", stream_k=True),
    ]


def _sm100_gemms() -> list[KernelSpec]:
    """Every tile, cluster and schedule, and every term, activation and dtype, in as few kernels as hold them."""
    arch, bf16 = "sm_100a", ("sm_100a", "bf16", None)
    return [
        GemmSpec(*bf16, (128, 128, 256), (1, 1), "static"),
        GemmSpec(arch, "fp16", "bf16", (128, 64, 256), (2, 2), "clc", activation="silu"),
        GemmSpec(arch, "fp32", "fp32", (128, 192, 256), (2, 2), "static", source="fp32", activation="gelu"),
        GemmSpec(arch, "fp4", "bf16", (128, 256, 256), (1, 1), "clc", sf_layout="128x4"),
        GemmSpec(arch, "bf16", "fp16", (256, 128, 256), (2, 1), "static", source="bf16", column_major=True),
        GemmSpec(*bf16, (256, 256, 256), (4, 2), "clc", activation="relu"),
        GemmSpec(arch, "fp4", None, (256, 256, 256), (2, 1), "static", activation="relu", sf_layout="linear"),
        GroupedGemmSpec(*bf16, (128, 128, 256), (1, 1), "static"),
    ]


def _sm120_gemms() -> list[KernelSpec]:
    arch, bf16 = "sm_120a", ("sm_120a", "bf16", None)
    return [
        GemmSpec(*bf16, (128, 128, 128), (1, 1), "cooperative"),
        GemmSpec(*bf16, (256, 128, 128), (1, 1), "cooperative"),
        GemmSpec(arch, "fp32", "fp32", (128, 128, 256), (1, 1), "cooperative", activation="gelu", column_major=True),
        GemmSpec(arch, "fp16", "fp16", (128, 128, 128), (1, 1), "cooperative", source="fp16"),
        GemmSpec(*bf16, (128, 128, 128), (1, 1), "pingpong", activation="silu"),
        GemmSpec(arch, "fp4", None, (128, 128, 256), (1, 1), "pingpong", activation="relu", sf_layout="128x4"),
        GemmSpec(arch, "fp4", "bf16", (128, 128, 128), (1, 1), "cooperative", sf_layout="linear"),
        GroupedGemmSpec(*bf16, (128, 128, 128), (1, 1), "cooperative"),
    ]


def default_variants(archs: Iterable[str] = ARCHS) -> list[KernelSpec]:
    """For each arch a bf16 kernel of each kind, and the GEMMs: what ``generated/`` shows, ``build --all`` builds."""
    specs: list[KernelSpec] = []
    for arch in archs:
        specs += [
            QuantizeSpec(
                arch, "bf16", scaling, convention, layout, *((256, 2, 1) if layout == "linear" else (128, 4, 4))
            )
            for scaling, convention in (("per_row", "te_per_token"), ("per_tensor", "te"), ("given", "te_per_token"))
            for layout in SF_LAYOUTS
        ]
        specs += _with_options(arch)
        specs.append(AmaxSpec(arch, "bf16"))
        specs += _tiles(arch)
        specs += _groups(arch)
        specs += [SearchSpec(arch, "bf16", "amax", metric, "128x4") for metric in METRICS]
        specs += [DequantizeSpec(arch, "bf16", layout, False) for layout in SF_LAYOUTS]
        if arch == "sm_90a":
            specs += _sm90_values()
            specs += [PackSpec(arch, layout, way) for layout in SF_LAYOUTS for way in ("pack", "unpack")]
            specs += _sm90_packed()
        else:
            specs += _sm100_gemms() if arch == "sm_100a" else _sm120_gemms()
    return specs
