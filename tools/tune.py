"""Measures fp4gemm/sm90_table.json again, on this machine's GPU: `python tools/tune.py [--out FILE] [--sizes M...]`.

Takes about a quarter of an hour with kernels in the cache, and those of CUTLASS's layers most of a minute each
without. A choice that is as fast as any, within noise, stays. With `--sizes` only these rows are new. `--rates`
measures fp4gemm/sm90_rates.json instead, about a second a product: what a launch, a tile and a block of K take of
each kernel. It is of all sizes at once, so that a few go elsewhere (`--out`). `--grouped` prints what each grouped
kernel takes, of which the rule of `select.grouped_spec` was made; sizes are then mean tokens.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fp4gemm import rates, table, tune
from fp4gemm.bench import routing

# Of models, beside the table's: what the rounds of tiles of other shapes take.
RATES = (
    *tune.SHAPES, (28672, 4096), (5120, 5120), (51200, 5120), (5120, 25600), (37888, 3584), (3584, 18944),
    (10240, 8192), (2560, 9728), (19456, 2560), (14336, 4096), (2112, 7168), (7168, 18432), (4608, 3584), (3072, 3072),
    (13824, 5120), (57344, 8192), (28672, 3584), (3584, 14336), (35840, 5120), (5120, 17920), (7680, 5120),
    (24576, 1536), (7168, 16384), (1536, 7168), (7168, 2048), (12288, 4096),
)  # fmt: skip
RATES_SIZES = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
GROUPED = (
    ((8, 14336, 4096), (1, 8, 12, 16, 32, 48, 64, 96, 128, 256, 512, 4096)),
    ((8, 4096, 14336), (1, 8, 12, 16, 32, 48, 64, 96, 128)),
    ((64, 2816, 2048), (1, 8, 12, 16, 32, 48, 64, 96, 128, 256, 512)),
    ((8, 2048, 2048), (4, 16, 64, 256)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: the file of the package")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="M", help="tokens; default: all of the table")
    parser.add_argument("--commit", default="", help="of the sources, where they come without git history")
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--rates", action="store_true")
    args = parser.parse_args()
    if args.rates and args.sizes and args.out is None:
        parser.error("--rates --sizes: rates of a few sizes are not those of the package, expected --out")
    if args.grouped:
        return grouped(args.sizes)
    start, measured = time.monotonic(), []
    about = {"gpu": torch.cuda.get_device_name(), "commit": args.commit, "date": datetime.date.today().isoformat()}
    if args.rates:
        for us in tune.tune(RATES, args.sizes or RATES_SIZES, tune.in_turn):
            measured.append(us)
            print(tune.described(us), flush=True)
        sms, out = torch.cuda.get_device_properties(0).multi_processor_count, args.out or rates.PACKAGED
        rates.write(out, tune.fit_rates(measured, sms), **about)
        print(f"{len(measured)} products, {time.monotonic() - start:.0f} s: {out}")
        return 0
    out = args.out or table.PACKAGED
    before = table.read(table.PACKAGED)
    others = before if args.sizes else ()
    for us in tune.tune(tune.SHAPES, args.sizes or tune.SIZES):
        measured.append(us)
        print(tune.described(us), flush=True)
        table.write(out, tune.merge(others, tune.fewest(measured, before)), **about)
    print(f"{len(measured)} products, {time.monotonic() - start:.0f} s: {out}")
    return 0


def grouped(chosen: list[int] | None) -> int:
    for (experts, n, k), sizes in GROUPED:
        for name in ("balanced", "zipf"):
            for tokens, us in tune.tune_grouped(experts, n, k, chosen or sizes, partial(_counts, name, experts)):
                times = sorted(us.items(), key=lambda item: item[1])
                fastest = "; ".join(f"{'x'.join(map(str, config))} {t:.1f}" for config, t in times)
                print(f"{experts} x {n} x {k}, {tokens} tokens {name}, us: {fastest}", flush=True)
    return 0


def _counts(name: str, experts: int, tokens: int) -> list[int]:
    return routing.counts(name, experts, experts * tokens)


if __name__ == "__main__":
    sys.exit(main())
