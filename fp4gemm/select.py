"""Problem -> spec: which kernel serves a call. Everything that depends on shape or device is decided here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch

from fp4gemm import env, table
from fp4gemm.division import divide
from fp4gemm.formats import BLOCK, NORMS, PLAIN, SF_LAYOUTS, QuantizeOptions, scale_columns
from fp4gemm.spec import (
    AmaxSpec,
    DequantizeSpec,
    GemmSpec,
    GroupedGemmSpec,
    GroupSpec,
    GroupSumsSpec,
    KernelSpec,
    PackedCollectiveSpec,
    PackedMmaSpec,
    PackedSpec,
    PackedWgmmaSpec,
    PackSpec,
    QuantizeSpec,
    TileAmaxSpec,
    TileQuantizeSpec,
    check,
)
from fp4gemm.spec.gemm import GROUPED_TILES

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INPUT_NAMES = {**DTYPE_NAMES, torch.float8_e4m3fn: "e4m3"}  # what quantizers read
_INPUT_BYTES = {name: dtype.itemsize for dtype, name in INPUT_NAMES.items()}
LAUNCHABLE = {(9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}  # compute capability -> arch
EXECUTED = ("sm_90a",)  # archs whose kernels have run on their own hardware


@cache
def arch_of(device: int) -> str:
    """The arch whose kernels run on CUDA device ``device``. Raises NotImplementedError where there are none."""
    capability = torch.cuda.get_device_capability(device)
    emulated = env.settings().emulate
    if emulated and capability == (9, 0):
        return emulated
    if arch := LAUNCHABLE.get(capability):
        return arch
    name = torch.cuda.get_device_name(device)
    here = f"{name} has compute capability {capability[0]}.{capability[1]}"
    known = ", ".join(f"{major}.{minor} ({arch})" for (major, minor), arch in LAUNCHABLE.items())
    raise NotImplementedError(f"{here}: fp4gemm has CUDA kernels for {known}; use CPU tensors")


def pick_device(wanted: str) -> tuple[torch.device, str]:
    """The device to run on, and a sentence that says what runs there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {wanted!r}, expected 'auto', 'cpu' or 'cuda'")
    if wanted == "cpu" or not torch.cuda.is_available():
        if wanted == "cuda":
            raise ValueError("device: got 'cuda', but torch sees no GPU here; `fp4gemm doctor` says why")
        return torch.device("cpu"), "reference on the CPU"
    try:
        arch = arch_of(torch.cuda.current_device())
    except NotImplementedError as error:
        if wanted == "cuda":
            raise
        return torch.device("cpu"), f"reference on the CPU ({error})"
    return torch.device("cuda"), f"{arch} kernels on {torch.cuda.get_device_name()}"


FEW_ROWS = 256  # about two for each SM


def quantize_spec(
    arch: str, dtype: str, k: int, scaling: str, convention: str, sf_layout: str, vectorized: bool,
    options: QuantizeOptions = PLAIN, *, gathered: bool = False, noop: bool = False, few: bool = False,
) -> QuantizeSpec:  # fmt: skip
    """Whole rows on chip where they fit, as many rows to a CTA as give it 256 threads.

    A tiled layout wants four rows at least (layout.hpp), for which four blocks a thread leave room; fp32 takes twice
    the registers: two blocks. ``few``: of rows, which leave most SMs idle; each has a CTA of its own then, with more
    threads, where it is long enough to need them. The figures are in docs/performance.md.
    """
    columns = (scale_columns(k) + 3) // 4 * 4  # with the padding a tiled layout has
    threads, blocks, rows, resident = (few and _few_rows_shape(columns, dtype, options)) or _rows_shape(
        columns, dtype, sf_layout != "linear", scaling == "per_row", options
    )
    return QuantizeSpec(
        arch, dtype, scaling, convention, sf_layout, threads, blocks, rows, vectorized, resident,
        stochastic=options.stochastic, adaptive=options.adaptive,
        residual=options.residual_side if options.residual else None, gathered=gathered, noop=noop,
        producer=options.producer,
    )  # fmt: skip


_Shape = tuple[int, int, int, bool]  # threads of a row, blocks of a thread, rows of a CTA, and whether that is a row


def _rows_shape(columns: int, dtype: str, tiled: bool, per_row: bool, options: QuantizeOptions) -> _Shape:
    # Noise and companions cost instructions, and more blocks share what a thread does once.
    most = 4 if (tiled or options.stochastic or options.residual) and dtype != "fp32" else 2
    blocks = min(most, max(1, columns // 32))
    threads = _threads(columns, blocks)
    resident = threads <= 1024
    if not resident:
        threads, blocks = 512, 2
    # Companions take registers: a CTA of 512 threads would have too few.
    staged = tiled and threads <= 128 and not options.residual
    rows = max(4 if staged else 1, 1 << (256 // threads).bit_length() >> 1)
    reduced = per_row or options.producer in NORMS
    if options.stochastic and not options.residual and not reduced and threads * rows == 512:
        threads //= 2  # without a row to reduce; a CTA of 512 threads has too few registers
    return threads, blocks, rows, resident


def _few_rows_shape(columns: int, dtype: str, options: QuantizeOptions) -> _Shape | None:
    """None where a row is too short to need more threads, or too long for one CTA of them."""
    long = options.producer in ("silu_mul", "gelu_tanh") and columns <= 512
    blocks = 1 if long or dtype == "fp32" else 2
    threads = _threads(columns, blocks)
    most = 256 if options.residual else 512  # companions take registers
    return (threads, blocks, 1, True) if columns >= 128 and threads <= most else None


def group_rows_spec(
    arch: str, dtype: str, k: int | None, scaling: str, convention: str, sf_layout: str, vectorized: bool,
    stochastic: bool,
) -> GroupSpec:  # fmt: skip
    """The quantizer of rows of a group of members with ``k`` columns, None: each with its own number of them."""
    options = QuantizeOptions(stochastic=True) if stochastic else PLAIN
    if k is not None and scaling == "per_row":
        return GroupSpec(quantize_spec(arch, dtype, k, scaling, convention, sf_layout, vectorized, options))
    # Rows in parts: nothing is reduced, or no number of registers fits all rows, which are read twice then.
    blocks = 1 if dtype == "fp32" else 2
    return GroupSpec(
        QuantizeSpec(
            arch, dtype, scaling, convention, sf_layout, 128, blocks, 4, vectorized, False, stochastic=stochastic
        )
    )


def uniform_rows_spec(arch: str, dtype: str, k: int, convention: str, sf_layout: str, vectorized: bool) -> GroupSpec:
    """The quantizer of rows of members of one shape that together are one matrix of ``k`` columns."""
    return GroupSpec(quantize_spec(arch, dtype, k, "per_row", convention, sf_layout, vectorized), uniform=True)


def _threads(columns: int, blocks: int) -> int:
    """Whole warps that hold a row, so many blocks a thread."""
    return -(-columns // (32 * blocks)) * 32


_FEW_VALUES_ROWS = 64


def values_spec(
    arch: str, dtype: str, m: int, k: int, scaling: str, convention: str, vectorized: bool,
    options: QuantizeOptions = PLAIN, *, gathered: bool = False,
) -> tuple[QuantizeSpec, int]:  # fmt: skip
    """The quantizer of [m, k] that writes values, and how many CTAs share a row.

    Few rows leave most SMs idle, and one SM takes over a microsecond to encode a long row. So CTAs share one: with
    per-row scaling each of them reads and reduces all of it, which is quick, and encodes every so many blocks of it.
    """
    spec = quantize_spec(arch, dtype, k, scaling, convention, "linear", vectorized, options, gathered=gathered)
    spec = replace(spec, output="values")
    columns = scale_columns(k)
    if scaling != "per_row":
        if m <= _FEW_VALUES_ROWS:
            spec = replace(spec, threads=128, blocks=1, rows=1, resident=True)  # without an amax any row is read once
        return spec, -(-columns // (spec.threads * spec.blocks))
    if m > _FEW_VALUES_ROWS:
        return spec, 1
    blocks = 4 if columns >= 512 else 2 if columns >= 256 else 1
    threads = _threads(columns, blocks)
    if threads > 512:  # a thread would have too few registers: rows are streamed
        return spec, 1 if spec.resident else 8
    return replace(spec, threads=threads, blocks=blocks, rows=1, resident=True), blocks


def early(spec: QuantizeSpec, m: int) -> bool:
    """Whether a quantizer of values of [m, k] is launched before the kernel in front has ended, which it waits for.

    Its CTAs then stand ready beside those of the GEMM of the call before, where they are few and small enough for the
    registers that it leaves. Elsewhere its GEMM would take the places it needs (docs/performance.md).
    """
    return m <= _FEW_VALUES_ROWS and spec.threads * spec.rows <= 128


_PREFETCH_BYTES = 64 << 10  # of rows ahead for each SM


def prefetch_ctas(spec: QuantizeSpec, k: int, device: int) -> int:
    """How many CTAs ahead a quantizer of whole rows fetches rows into L2; 0 where it does not."""
    if not spec.resident or not spec.vectorized:
        return 0
    cta_bytes = spec.rows * k * _INPUT_BYTES[spec.dtype]
    sms: int = torch.cuda.get_device_properties(device).multi_processor_count
    return sms * max(1, round(_PREFETCH_BYTES / cta_bytes))


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
        tile_quantize_spec(arch, "bf16", scaling, "te_per_token", None, sf_layout, False, False, False, aligned)
        for scaling in ("amax", "given")
        for sf_layout in SF_LAYOUTS
    ]
    small: list[KernelSpec] = [
        *dict.fromkeys(quantizers),
        amax_spec(arch, "bf16", k % BLOCK == 0),
        *dequantizers,
        *turned,
    ]
    small.append(tile_amax_spec(arch, "bf16", False, True, False, aligned))
    if arch != "sm_90a":
        return [*small, *_plain_gemms(arch)]
    values = [
        values_spec(arch, "bf16", m, k, scaling, "te_per_token", vectorized=k % BLOCK == 0)[0]
        for scaling in ("per_row", "given")
        for m in (1, _FEW_VALUES_ROWS + 1)
    ]
    packers = [pack_spec(arch, sf_layout, way) for sf_layout in SF_LAYOUTS for way in ("pack", "unpack")]
    chosen = dict.fromkeys((c.kernel, c.config) for c in table.read(table.PACKAGED))
    gemms = [packed_of(kernel, config, "bf16", "bf16", None, False) for kernel, config in chosen]
    grouped = [_grouped_of(config, "bf16", "bf16", None, False) for config in grouped_configs()]
    return [*small, *values, *packers, *gemms, *grouped]


def pack_spec(arch: str, sf_layout: str, direction: str) -> PackSpec:
    """Raises NotImplementedError on an arch whose GEMMs read plain NVFP4."""
    if arch != "sm_90a":
        raise NotImplementedError(f"{arch}: the prepacked form is Hopper's; GEMMs read plain FP4Tensors here")
    return PackSpec(arch, sf_layout, direction)


def amax_spec(arch: str, dtype: str, vectorized: bool, producer: str | None = None) -> AmaxSpec:
    return AmaxSpec(arch, dtype, vectorized, producer)


def tile_quantize_spec(
    arch: str, dtype: str, scaling: str, convention: str, rows: str | None, columns: str | None,
    hadamard: bool = False, stochastic: bool = False, square: bool = False, vectorized: bool = True,
) -> TileQuantizeSpec:  # fmt: skip
    """As many CTAs of an SM as shared memory has room for and registers suffice for."""
    flags = (hadamard, stochastic, square, vectorized)
    ctas = _tile_ctas(arch, dtype)
    # What would spill registers has one CTA less.
    quick = convention in ("te_per_token", "te")
    if stochastic and (hadamard if dtype == "fp32" else square or not quick or dtype == "e4m3"):
        ctas = max(1, ctas - 1)
    return TileQuantizeSpec(arch, dtype, scaling, convention, rows, columns, *flags, ctas)


def tile_amax_spec(
    arch: str, dtype: str, rows: bool, columns: bool, hadamard: bool = False, vectorized: bool = True,
    sums: bool = False,
) -> TileAmaxSpec:  # fmt: skip
    return TileAmaxSpec(arch, dtype, rows, columns, hadamard, vectorized, _tile_ctas(arch, dtype), sums)


def group_tile_spec(
    arch: str, dtype: str, scaling: str, convention: str, rows: str | None, columns: str | None, hadamard: bool,
    stochastic: bool, vectorized: bool, gradient: str | None = None,
) -> GroupSpec:  # fmt: skip
    spec = tile_quantize_spec(
        arch, dtype, scaling, convention, rows, columns, hadamard, stochastic, False, vectorized
    )  # fmt: skip
    # Would spill registers: what a member is takes some.
    if stochastic and (not hadamard or arch == "sm_100a") and spec.ctas > 1:
        spec = replace(spec, ctas=spec.ctas - 1)
    return GroupSpec(replace(spec, gradient=gradient))


def group_amax_spec(
    arch: str, dtype: str, rows: bool, columns: bool, hadamard: bool, vectorized: bool, sums: bool,
    gradient: str | None = None,
) -> GroupSpec:  # fmt: skip
    return GroupSpec(replace(tile_amax_spec(arch, dtype, rows, columns, hadamard, vectorized, sums), gradient=gradient))


def group_sums_spec(arch: str, alignment: int) -> GroupSumsSpec:
    """``alignment``: elements on which members begin."""
    return GroupSumsSpec(arch, alignment)


def _tile_ctas(arch: str, dtype: str) -> int:
    tile = 3 if dtype == "fp32" else 4
    return 1 if arch == "sm_120a" and dtype == "fp32" else 2 if arch == "sm_120a" else tile


def dequantize_spec(arch: str, dtype: str, sf_layout: str, outer: bool) -> DequantizeSpec:
    return DequantizeSpec(arch, dtype, sf_layout, outer)


FALLBACK = ("wgmma", (128, 2, 2, 1, 1, 1, 6))  # serves everything
_SCHEDULES = {128: "cooperative", 64: "pingpong"}  # of the collective, by its weight rows


def packed_of(
    kernel: str, config: tuple[int, ...], a_dtype: str, out_dtype: str, bias: str | None, source: bool
) -> PackedSpec:
    """The spec of a row of the table; a collective's configuration is (weight rows, tokens, cluster along rows)."""
    if kernel == "collective":
        rows, tokens, cluster = config
        tile, schedule = (rows, tokens, 64), _SCHEDULES[rows]
        c = out_dtype if source else None
        return PackedCollectiveSpec("sm_90a", a_dtype, out_dtype, bias, tile, (cluster, 1), schedule, c)
    terms = ("sm_90a", a_dtype, out_dtype, bias, source)
    if kernel == "mma":
        tiles, warps, stages, blocks, split, loaders, pairs = config
        return PackedMmaSpec(*terms, tiles, warps, stages, blocks, split, loaders, pairs)
    tokens, panels, row_groups, depth_groups, multicast, split, stages = config
    return PackedWgmmaSpec(*terms, tokens, panels, row_groups, depth_groups, multicast, split, stages)


def quantizing(spec: PackedSpec, x_dtype: str, m: int) -> PackedMmaSpec | None:
    """``spec`` made to quantize x of this dtype, with given outer scales, on its way in; None where that does not pay.

    Every CTA quantizes the tokens again: for one that takes about as long as a launch of its own, and less in a chain
    of dependent launches; from a few on it takes longer (docs/performance.md).
    """
    if not isinstance(spec, PackedMmaSpec) or m > 1:
        return None
    fused = replace(spec, quantize=x_dtype)
    return fused if check(fused) is None else None


@cache
def gpu_of(device: int) -> tuple[str, int]:
    """Name and number of SMs."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def packed_spec(
    gpu: tuple[str, int], m: int, n: int, k: int, a_dtype: str, out_dtype: str, bias: str | None, source: bool,
    tma_output: bool = True,
) -> PackedSpec:  # fmt: skip
    """The GEMM on a prepacked weight: that of the nearest measured shape that can serve this one.

    ``tma_output``: D is row-major, and rows are whole 16 bytes, as the collective's epilogue stores them.
    """
    name, sms = gpu
    for kernel, config in [*((c.kernel, c.config) for c in table.by_distance(table.rows_for(name), m, n, k)), FALLBACK]:
        for spec in _for_terms(packed_of(kernel, config, a_dtype, out_dtype, bias, source)):
            if check(spec) is None and (
                tma_output if isinstance(spec, PackedCollectiveSpec) else divide(spec, m, n, k, sms)
            ):
                return spec
    raise AssertionError("the fallback serves everything")


def _for_terms(spec: PackedSpec) -> Iterator[PackedSpec]:
    """The kernel, measured with bf16 results and no C, behind what is better with the terms that ``spec`` has.

    Warpgroups that take turns leave no registers for C, and write fp32 in parts of lines: the collective with the same
    tile does neither.
    """
    if isinstance(spec, PackedWgmmaSpec) and spec.turns and (spec.source or spec.out_dtype == "fp32"):
        config = (64 * spec.panels, spec.tokens, spec.multicast)
        yield packed_of("collective", config, spec.a_dtype, spec.out_dtype, spec.bias, spec.source)
    yield spec


# Grouped kernels, WGMMA configurations by the mean number of tokens of an expert, as `tools/tune.py --grouped` measures
# them for experts of equal size and for skewed ones: tiles for few tokens have room for more than the mean, because
# each tile more reads a weight again. The second kernels share K, for weights with fewer row tiles than SMs.
_GROUPED = (
    (2, (8, 4, 2, 2, 1, 1, 20), (8, 1, 1, 4, 1, 1, 40)),
    (8, (16, 4, 2, 2, 1, 1, 16), (16, 1, 1, 4, 1, 2, 16)),
    (32, (32, 4, 2, 2, 1, 1, 12), (32, 1, 1, 4, 1, 2, 16)),
    (64, (64, 6, 3, 1, 1, 1, 8), (64, 1, 1, 2, 1, 2, 14)),
    (1024, (128, 2, 2, 1, 2, 1, 10), (128, 1, 1, 1, 1, 2, 8)),
)
_GROUPED_MANY = (256, 1, 2, 1, 2, 1, 6)


def grouped_configs() -> list[tuple[int, ...]]:
    """Every configuration that ``grouped_spec`` may choose."""
    return sorted({config for _, *configs in _GROUPED for config in configs} | {_GROUPED_MANY, FALLBACK[1]})


def _grouped_config(sms: int, experts: int, tokens: int, n: int) -> tuple[int, ...]:
    for most, alone, sharing in _GROUPED:
        if tokens <= most:
            panels = _grouped_of(alone, "bf16", "bf16", None, False).least_panels
            return alone if experts * -(-n // (64 * panels)) >= sms else sharing
    return _GROUPED_MANY


def _grouped_of(
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
        spec = _grouped_of(chosen, a_dtype, out_dtype, bias, source)
        if check(spec) is None and divide(spec, experts * tokens, n, k, sms, experts):
            return spec
    raise AssertionError("the fallback serves everything")


# Tiles of one MMA on sm_100a with the cluster each takes, and what a tile costs in a CTA: its columns, and some for A,
# fewer where two SMs share B. Tiles and clusters are those that CUTLASS's examples and its users choose among. The
# costs are a guess: none of it has been measured on a Blackwell GPU.
_SM100_CHOICES = (
    ((256, 256, 256), (2, 1), 256 + 32),
    ((256, 128, 256), (2, 1), 128 + 32),
    ((128, 256, 256), (1, 1), 256 + 64),
    ((128, 192, 256), (1, 1), 192 + 64),
    ((128, 128, 256), (1, 1), 128 + 64),
    ((128, 64, 256), (1, 1), 64 + 64),
)


def gemm_spec(
    arch: str, sms: int, m: int, n: int, k: int, out_dtype: str, bias: str | None, source: bool,
    activation: str | None, column_major: bool, sf_layout: str | None = None, members: int = 1,
) -> GemmSpec:  # fmt: skip
    """The block-scaled GEMM of a problem on Blackwell, or of a batch of them. Unmeasured: no such GPU was at hand.

    On sm_100a that with the least estimated time, waves of CTAs times the cost of a tile; on sm_120a tiles of 256 rows
    where there are more than 256. Scheduling is static, and on sm_120a cooperative: CUTLASS 4.2's pingpong kernel has a
    fault with cluster launch control.
    """
    rows, columns = (n, m) if column_major else (m, n)

    def spec(tile: tuple[int, int, int], cluster: tuple[int, int], schedule: str) -> GemmSpec:
        c = out_dtype if source else None
        return GemmSpec(arch, out_dtype, bias, tile, cluster, schedule, c, activation, column_major, sf_layout)

    if arch == "sm_120a":
        return spec((256 if rows > 256 else 128, 128, 128), (1, 1), "cooperative")
    choices = ((cost, spec(tile, cluster, "static")) for tile, cluster, cost in _SM100_CHOICES)
    possible = [(cost, chosen) for cost, chosen in choices if check(chosen) is None]
    return min(possible, key=lambda choice: _estimate(choice[1].tile, choice[0], rows, columns, sms, members))[1]


def grouped_gemm_spec(
    arch: str, sms: int, experts: int, tokens: int, n: int, out_dtype: str, bias: str | None, source: bool
) -> GroupedGemmSpec:
    """The block-scaled GEMM of ``experts`` weights of n rows with about so many ``tokens`` each, on Blackwell: the one
    that ``gemm_spec`` would take for a batch of them, by its estimate."""
    specs = _grouped_gemms(arch, out_dtype, bias, out_dtype if source else None)
    costs = {tile: cost for tile, _, cost in _SM100_CHOICES}
    possible = (spec for spec in specs if check(spec) is None)
    return min(possible, key=lambda spec: _estimate(spec.tile, costs.get(spec.tile, 1), tokens, n, sms, experts))


def _grouped_gemms(arch: str, out_dtype: str, bias: str | None, source: str | None) -> list[GroupedGemmSpec]:
    schedule = "static" if arch == "sm_100a" else "cooperative"
    return [GroupedGemmSpec(arch, out_dtype, bias, tile, (1, 1), schedule, source) for tile in GROUPED_TILES[arch]]


def _plain_gemms(arch: str) -> list[KernelSpec]:
    """Every block-scaled GEMM that bf16 results without bias may get, of groups too."""
    if arch == "sm_100a":
        chosen = [(tile, cluster, "static") for tile, cluster, _ in _SM100_CHOICES]
    else:
        chosen = [(tile, (1, 1), "cooperative") for tile in ((128, 128, 128), (256, 128, 128))]
    return [*(GemmSpec(arch, "bf16", None, *each) for each in chosen), *_grouped_gemms(arch, "bf16", None, None)]


def _estimate(tile: tuple[int, int, int], cost: int, rows: int, columns: int, sms: int, members: int) -> int:
    pairs = tile[0] // 128
    return -(-(-(-rows // tile[0]) * pairs * -(-columns // tile[1]) * members) // sms) * cost
