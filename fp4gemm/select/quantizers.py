"""Quantizers, amaxes and dequantizers: how many threads, blocks and rows each CTA has."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp4gemm.formats import NORMS, PLAIN, PREPACKED, RECIPE_SIGNS, QuantizeOptions, scale_columns
from fp4gemm.select.device import INPUT_NAMES
from fp4gemm.spec import (
    ANY_SIGNS,
    AmaxSpec,
    DequantizeSpec,
    GroupSpec,
    GroupSumsSpec,
    QuantizeSpec,
    TileAmaxSpec,
    TileQuantizeSpec,
)

_INPUT_BYTES = {name: dtype.itemsize for dtype, name in INPUT_NAMES.items()}

FEW_ROWS = 256  # about two for each SM


def quantize_spec(
    arch: str, dtype: str, k: int, scaling: str, convention: str, sf_layout: str, vectorized: bool,
    options: QuantizeOptions = PLAIN, *, gathered: bool = False, noop: bool = False, few: bool = False,
) -> QuantizeSpec:  # fmt: skip
    """Whole rows on chip where they fit, as many rows to a CTA as give it 256 threads.

    A tiled layout wants four rows, or two (layout.hpp), in up to 512 threads, for some options more or fewer; four
    blocks a thread leave room for them. fp32 takes twice the registers: two blocks. ``few``: of rows, which leave most
    SMs idle; each has a CTA of its own then, with more threads, where it is long enough to need them. The figures are
    in docs/performance.md.
    """
    columns = (scale_columns(k) + 3) // 4 * 4  # with the padding a tiled layout has
    threads, blocks, rows, resident = (few and _few_rows_shape(columns, dtype, options)) or _rows_shape(
        arch, columns, dtype, sf_layout != "linear", scaling == "per_row", options
    )
    return QuantizeSpec(
        arch, dtype, scaling, convention, sf_layout, threads, blocks, rows, vectorized, resident,
        stochastic=options.stochastic, adaptive=options.adaptive,
        residual=options.residual_side if options.residual else None, gathered=gathered, noop=noop,
        producer=options.producer,
    )  # fmt: skip


_Shape = tuple[int, int, int, bool]  # threads of a row, blocks of a thread, rows of a CTA, and whether that is a row


def _rows_shape(arch: str, columns: int, dtype: str, tiled: bool, per_row: bool, options: QuantizeOptions) -> _Shape:
    fp32, norm = dtype == "fp32", options.producer in NORMS
    # All of x and of the residual is on its way at once; elsewhere CTAs so wide would spill registers.
    wide = (
        options.producer == "add_rmsnorm" and not options.adaptive and arch == "sm_90a" and not fp32
        and _threads(columns, 2) <= 512
    )  # fmt: skip
    # Of CTAs of long rows with two blocks a thread an SM has room for one or two, which all wait at once. Rows of more
    # than 2048 columns are streamed, by two blocks.
    alone = (768 if options.adaptive or options.producer == "gelu_tanh" else 896) < columns <= 2048
    # Noise and companions cost instructions, and more blocks share what a thread does once; for norms it was measured.
    four = tiled or options.stochastic or options.residual or norm or alone
    blocks = min(4 if four and not wide and not fp32 else 2, max(1, columns // 32))
    threads = _threads(columns, blocks)
    resident = threads <= 1024
    if not resident:
        threads, blocks = 512, 2
    rows = max(1, 1 << (256 // threads).bit_length() >> 1)
    if tiled and not options.residual:  # companions take registers: a CTA of 512 threads would have too few
        rows = max(rows, _rows_together(threads, fp32, wide, per_row or norm, options))
    elif not four and per_row and not fp32 and 128 < threads <= (192 if options.adaptive else 224):
        rows = 2
    if options.stochastic and not options.residual and not (per_row or norm) and threads * rows == 512:
        threads //= 2  # without a row to reduce; a CTA of 512 threads has too few registers
    return threads, blocks, rows, resident


def _rows_together(threads: int, fp32: bool, wide: bool, reduced: bool, options: QuantizeOptions) -> int:
    """How many rows of a tiled layout, of so many threads each, a CTA has for the sake of their scales: 4, 2 or 1."""
    four, two = 128, 256
    if wide:
        four, two = 160, 384
    elif options.adaptive or options.producer in NORMS:
        four, two = 64, 128  # what does more for a row is quicker in small CTAs
    elif options.stochastic and not reduced:
        two = 0  # too few registers
    elif fp32:
        two = 224
    return 4 if threads <= four else 2 if threads <= two else 1


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
        spec = quantize_spec(arch, dtype, k, scaling, convention, sf_layout, vectorized, options)
        # With noise and what a member is, two long rows would spill registers.
        return GroupSpec(replace(spec, rows=1) if stochastic and spec.threads > 128 else spec)
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


FEW_VALUES_ROWS = 128


def values_spec(
    arch: str, dtype: str, m: int, k: int, scaling: str, convention: str, vectorized: bool,
    options: QuantizeOptions = PLAIN, *, gathered: bool = False,
) -> tuple[QuantizeSpec, int]:  # fmt: skip
    """The quantizer of [m, k] that writes values, and how many CTAs share a row.

    Few rows leave most SMs idle, and one SM takes over a microsecond to encode a long row. So CTAs share one: with
    per-row scaling each of them reads and reduces all of it, which is quick, and encodes one of the blocks of each
    thread, or, of a row that is streamed, every so many steps.
    """
    spec = quantize_spec(arch, dtype, k, scaling, convention, "linear", vectorized, options, gathered=gathered)
    spec = replace(spec, output="values")
    columns = scale_columns(k)
    if scaling != "per_row":
        if m <= FEW_VALUES_ROWS:
            spec = replace(spec, threads=128, blocks=1, rows=1, resident=True)  # without an amax any row is read once
        return spec, -(-columns // (spec.threads * spec.blocks))
    if m > FEW_VALUES_ROWS:
        return spec, 1
    blocks = 1 if columns < 256 else 4 if m <= 16 and columns >= 512 else 2
    if _threads(columns, blocks) >= 512:
        blocks = 4
    threads = _threads(columns, blocks)
    if threads > 512:  # a thread would have too few registers: rows are streamed
        return spec, 1 if spec.resident else 8
    return replace(spec, threads=threads, blocks=blocks, rows=1, resident=True), blocks


def early(m: int, ctas: int, sms: int) -> int | None:
    """Of how many CTAs an SM has room, if a quantizer of values of [m, k] is launched before the kernel in front has
    ended, which it waits for; None where it is not.

    CTAs that stand ready begin a launch's time sooner. But all that an SM has room for would gather on the few SMs that
    the GEMM of the call before leaves idle: so it has no room for more than there must be (docs/performance.md).
    """
    of_sm = -(-ctas // sms)
    return of_sm if of_sm <= (8 if m <= FEW_VALUES_ROWS else 2) else None


_PREFETCH_BYTES = 64 << 10  # of rows ahead for each SM


def prefetch_ctas(spec: QuantizeSpec, k: int, device: int) -> int:
    """How many CTAs ahead a quantizer of whole rows fetches rows into L2; 0 where it does not."""
    if not spec.resident or not spec.vectorized:
        return 0
    cta_bytes = spec.rows * k * _INPUT_BYTES[spec.dtype]
    sms: int = torch.cuda.get_device_properties(device).multi_processor_count
    return sms * max(1, round(_PREFETCH_BYTES / cta_bytes))


def amax_spec(arch: str, dtype: str, vectorized: bool, producer: str | None = None) -> AmaxSpec:
    return AmaxSpec(arch, dtype, vectorized, producer)


def known_signs(hadamard: int | None) -> int | None:
    """What a kernel knows of a transform with this mask: that of recipes, which then costs no instructions."""
    return hadamard if hadamard in (None, RECIPE_SIGNS) else ANY_SIGNS


def tile_quantize_spec(
    arch: str, dtype: str, scaling: str, convention: str, rows: str | None, columns: str | None,
    hadamard: int | None = None, stochastic: bool = False, square: bool = False, vectorized: bool = True,
) -> TileQuantizeSpec:  # fmt: skip
    """As many CTAs of an SM as shared memory has room for and registers suffice for."""
    flags = (hadamard, stochastic, square, vectorized)
    ctas = _tile_ctas(arch, dtype)
    # What would spill registers has one CTA less.
    quick = convention in ("te_per_token", "te")
    if stochastic and (hadamard is not None if dtype == "fp32" else square or not quick or dtype == "e4m3"):
        ctas = max(1, ctas - 1)
    if dtype == "fp32" and PREPACKED in (rows, columns):
        ctas = min(ctas, 2)  # shared memory has codes as well as a tile of 64 KB
    return TileQuantizeSpec(arch, dtype, scaling, convention, rows, columns, *flags, ctas)


def tile_amax_spec(
    arch: str, dtype: str, rows: bool, columns: bool, hadamard: int | None = None, vectorized: bool = True,
    sums: bool = False,
) -> TileAmaxSpec:  # fmt: skip
    return TileAmaxSpec(arch, dtype, rows, columns, hadamard, vectorized, _tile_ctas(arch, dtype), sums)


def group_tile_spec(
    arch: str, dtype: str, scaling: str, convention: str, rows: str | None, columns: str | None, hadamard: int | None,
    stochastic: bool, vectorized: bool, gradient: str | None = None,
) -> GroupSpec:  # fmt: skip
    spec = tile_quantize_spec(
        arch, dtype, scaling, convention, rows, columns, hadamard, stochastic, False, vectorized
    )  # fmt: skip
    # Would spill registers: what a member is takes some.
    if stochastic and (hadamard is None or arch != "sm_120a") and spec.ctas > 1:
        spec = replace(spec, ctas=spec.ctas - 1)
    return GroupSpec(replace(spec, gradient=gradient))


def group_amax_spec(
    arch: str, dtype: str, rows: bool, columns: bool, hadamard: int | None, vectorized: bool, sums: bool,
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
