"""Hopper: products on prepacked weights, by a measured table and rates, and the packers of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from fp4gemm import rates, table
from fp4gemm.division import divide, longest_sequence
from fp4gemm.spec import PackedCollectiveSpec, PackedMmaSpec, PackedSpec, PackedWgmmaSpec, PackSpec, check

FALLBACK = ("wgmma", (128, 2, 2, 1, 1, 1, 6))  # serves everything
# The largest tile. Rates do not know the power limit; from eight of these on smaller tiles were slower than they say.
_MANY_TOKENS = 256
_SCHEDULES = {128: "cooperative", 64: "pingpong"}  # of the collective, by its weight rows


def pack_spec(arch: str, sf_layout: str, direction: str) -> PackSpec:
    """Raises NotImplementedError on an arch whose GEMMs read plain NVFP4."""
    if arch != "sm_90a":
        raise NotImplementedError(f"{arch}: the prepacked form is Hopper's; GEMMs read plain FP4Tensors here")
    return PackSpec(arch, sf_layout, direction)


@lru_cache(maxsize=1024)
def packed_of(
    kernel: str, config: tuple[int, ...], a_dtype: str, out_dtype: str, bias: str | None, source: bool
) -> PackedSpec:
    """The spec of a row of the table; a collective's configuration is (weight rows, tokens, cluster along rows).

    "stream_k" is a collective whose clusters share the K of tiles that are no whole round.
    """
    if kernel in ("collective", "stream_k"):
        rows, tokens, cluster = config
        tile, schedule = (rows, tokens, 64), _SCHEDULES[rows]
        c, stream_k = out_dtype if source else None, kernel == "stream_k"
        return PackedCollectiveSpec("sm_90a", a_dtype, out_dtype, bias, tile, (cluster, 1), schedule, c, stream_k)
    terms = ("sm_90a", a_dtype, out_dtype, bias, source)
    if kernel == "mma":
        tiles, warps, stages, blocks, split, loaders, pairs = config
        return PackedMmaSpec(*terms, tiles, warps, stages, blocks, split, loaders, pairs)
    tokens, panels, row_groups, depth_groups, multicast, split, stages = config
    return PackedWgmmaSpec(*terms, tokens, panels, row_groups, depth_groups, multicast, split, stages)


QUANTIZED_ROWS = 1  # up to so many tokens a GEMM quantizes itself, if its kernel can


def quantizing(spec: PackedSpec, x_dtype: str, m: int) -> PackedMmaSpec | None:
    """``spec`` made to quantize x of this dtype, with given outer scales, on its way in; None where that does not pay.

    Every CTA quantizes the tokens again: for one that takes about as long as a launch of its own, and less in a chain
    of dependent launches; from a few on it takes longer (docs/performance.md).
    """
    if not isinstance(spec, PackedMmaSpec) or m > QUANTIZED_ROWS:
        return None
    fused = replace(spec, quantize=x_dtype)
    return fused if check(fused) is None else None


def packed_spec(
    gpu: tuple[str, int], m: int, n: int, k: int, a_dtype: str, out_dtype: str, bias: str | None, source: bool,
    tma_output: bool = True,
) -> PackedSpec:  # fmt: skip
    """The GEMM on a prepacked weight: the first of ``_preferred`` that can serve this product.

    ``tma_output``: D is row-major, and rows are whole 16 bytes, as the collective's epilogue stores them.
    """
    name, sms = gpu
    for kernel, config in _preferred(name, m, n, k, sms):
        for spec in _for_terms(packed_of(kernel, config, a_dtype, out_dtype, bias, source)):
            if check(spec) is None and (
                tma_output if isinstance(spec, PackedCollectiveSpec) else divide(spec, m, n, k, sms)
            ):
                return spec
    raise AssertionError("the fallback serves everything")


def _preferred(gpu: str, m: int, n: int, k: int, sms: int) -> Iterator[table.Kernel]:
    """What was fastest where this product was measured, or one of this shape with as many tiles; then what takes the
    least time by its rates. Another product would say nothing about how full the last round of tiles is."""
    row = table.measured(table.rows_for(gpu), m, n, k)
    if row is not None:
        tokens = token_tile(packed_of(row.kernel, row.config, "bf16", "bf16", None, False))
        if -(-m // tokens) == -(-row.m // tokens):
            yield row.kernel, row.config
    yield from by_time(rates.packaged(), m, n, k, sms)
    yield FALLBACK


def by_time(of_kernels: Iterable[rates.Rate], m: int, n: int, k: int, sms: int) -> list[table.Kernel]:
    """Those that can divide the product, with tiles for about as many tokens, from the least time on."""
    us: dict[table.Kernel, float] = {}
    for rate in of_kernels:
        spec = packed_of(rate.kernel, rate.config, "bf16", "bf16", None, False)
        longest = longest_sequence(spec, m, n, k, sms) if is_about(spec, m) else None
        if longest is not None:
            us[rate.kernel, rate.config] = rate.microseconds(longest)
    return sorted(us, key=us.__getitem__)


def is_about(spec: PackedSpec, m: int) -> bool:
    """Whether tiles are neither mostly padding nor very many: what is worth a measurement."""
    return min(_MANY_TOKENS, m // 8) <= token_tile(spec) <= max(16, 2 * m)


def token_tile(spec: PackedSpec) -> int:
    """Tokens of a tile of D."""
    if isinstance(spec, PackedMmaSpec):
        return 8 * spec.token_tiles
    return spec.tile[1] if isinstance(spec, PackedCollectiveSpec) else spec.tokens


def _for_terms(spec: PackedSpec) -> Iterator[PackedSpec]:
    """The kernel, measured with bf16 results and no C, behind what is better with the terms that ``spec`` has."""
    if isinstance(spec, PackedWgmmaSpec) and spec.turns and (spec.source or spec.out_dtype == "fp32"):
        yield packed_of(*stand_in(spec), spec.a_dtype, spec.out_dtype, spec.bias, spec.source)
    yield spec


def stand_in(spec: PackedWgmmaSpec) -> table.Kernel:
    """The collective with the tile of warpgroups that take turns: these leave no registers for C, and write fp32 in
    parts of lines. It does neither."""
    return "collective", (64 * spec.panels, spec.tokens, spec.multicast)


# Grouped kernels, WGMMA configurations by the mean number of tokens of an expert, as `tools/tune.py --grouped` measures
# them for experts of equal size and for skewed ones: tiles for few tokens have room for more than the mean, because
# each tile more reads a weight again. Of a row the first that has row tiles for most SMs; the last ones share K.
_GROUPED = (
    (2, (8, 4, 2, 2, 1, 1, 20), (8, 1, 1, 4, 1, 1, 40)),
    (8, (16, 4, 2, 2, 1, 1, 16), (16, 1, 1, 4, 1, 2, 16)),
    (12, (32, 4, 2, 2, 1, 1, 12), (32, 1, 1, 4, 1, 2, 16)),
    (48, (48, 7, 4, 1, 1, 1, 8), (48, 4, 2, 2, 1, 1, 8), (48, 1, 1, 4, 1, 2, 16)),
    (64, (64, 6, 3, 1, 1, 1, 8), (64, 1, 1, 2, 1, 2, 14)),
    (96, (96, 6, 3, 1, 1, 1, 7), (96, 1, 1, 2, 1, 2, 10)),
    (1024, (128, 2, 2, 1, 2, 1, 10), (128, 1, 1, 1, 1, 2, 8)),
)
_GROUPED_MANY = (256, 1, 2, 1, 2, 1, 6)
_MOST_SMS = 0.6  # measured: row tiles for 0.67 of them and more are faster without a split


def grouped_configs() -> list[tuple[int, ...]]:
    """Every configuration that ``grouped_spec`` may choose."""
    return sorted({config for _, *configs in _GROUPED for config in configs} | {_GROUPED_MANY, FALLBACK[1]})


def _grouped_config(sms: int, experts: int, tokens: int, n: int) -> tuple[int, ...]:
    for most, *configs in _GROUPED:
        if tokens <= most:
            for config in configs:
                panels = grouped_of(config, "bf16", "bf16", None, False).least_panels
                if experts * -(-n // (64 * panels)) >= _MOST_SMS * sms:
                    return config
            return configs[-1]
    return _GROUPED_MANY


def grouped_of(
    config: tuple[int, ...], a_dtype: str, out_dtype: str, bias: str | None, source: bool
) -> PackedWgmmaSpec:
    spec = packed_of("wgmma", config, a_dtype, out_dtype, bias, source)
    assert isinstance(spec, PackedWgmmaSpec)
    return replace(spec, grouped=True)


def grouped_spec(
    sms: int, experts: int, tokens: int, n: int, k: int, a_dtype: str, out_dtype: str, bias: str | None, source: bool
) -> PackedWgmmaSpec:
    """The GEMM of ``experts`` prepacked weights [n, k] with about so many ``tokens`` each, on a GPU of ``sms`` SMs.

    The sizes of experts are on the device, so their mean decides.
    """
    for chosen in (_grouped_config(sms, experts, tokens, n), FALLBACK[1]):
        spec = grouped_of(chosen, a_dtype, out_dtype, bias, source)
        if check(spec) is None and divide(spec, experts * tokens, n, k, sms, experts):
            return spec
    raise AssertionError("the fallback serves everything")
