"""Measures fp4gemm/sm90_table.json again, on this machine's GPU: `python tools/tune.py [--out FILE] [--sizes M...]`.

Takes a few minutes with kernels in the cache, and those of CUTLASS's layers most of a minute each without. With
`--sizes` only these rows are new.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fp4gemm import table, tune


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=table.PACKAGED)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="M", help="tokens; default: all of the table")
    parser.add_argument("--commit", default="", help="of the sources, where they come without git history")
    args = parser.parse_args()
    start, measured = time.monotonic(), []
    others = table.read(table.PACKAGED) if args.sizes else ()
    for us in tune.tune(tune.SHAPES, args.sizes or tune.SIZES):
        measured.append(us)
        print(tune.described(us), flush=True)
        about = {"gpu": torch.cuda.get_device_name(), "commit": args.commit}
        rows = tune.merge(others, tune.fewest(measured))
        table.write(args.out, rows, **about, date=datetime.date.today().isoformat())
    print(f"{len(measured)} products, {time.monotonic() - start:.0f} s: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
