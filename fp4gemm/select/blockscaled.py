"""Blackwell: block-scaled products, by an estimate that nobody has measured."""

from __future__ import annotations

from fp4gemm.spec import GemmSpec, GroupedGemmSpec, KernelSpec, check
from fp4gemm.spec.gemm import GROUPED_TILES

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


def plain_gemms(arch: str) -> list[KernelSpec]:
    """Every block-scaled GEMM that bf16 results without bias may get, of groups too."""
    if arch == "sm_100a":
        chosen = [(tile, cluster, "static") for tile, cluster, _ in _SM100_CHOICES]
    else:
        chosen = [(tile, (1, 1), "cooperative") for tile in ((128, 128, 128), (256, 128, 128))]
    return [*(GemmSpec(arch, "bf16", None, *each) for each in chosen), *_grouped_gemms(arch, "bf16", None, None)]


def _estimate(tile: tuple[int, int, int], cost: int, rows: int, columns: int, sms: int, members: int) -> int:
    pairs = tile[0] // 128
    return -(-(-(-rows // tile[0]) * pairs * -(-columns // tile[1]) * members) // sms) * cost
