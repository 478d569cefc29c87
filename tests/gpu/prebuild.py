"""Builds, several at once, the GEMM kernels that the tests of this folder launch: `python tests/gpu/prebuild.py`.

Needs NVRTC and no GPU. Left to themselves the tests would build them one after the other, most of a minute each; the
other kernels take a fraction of a second.
"""

from __future__ import annotations

import sys
import time

from fp4gemm import builder, cache
from fp4gemm.spec import DTYPES, default_variants, sm90_gemms


def main() -> int:
    biases = [(out, bias) for out in DTYPES for bias in (None, *DTYPES)]
    wanted = dict.fromkeys([*default_variants(["sm_90a"]), *(spec for pair in biases for spec in sm90_gemms(*pair))])
    missing = [spec for spec in wanted if cache.lookup(spec) is None]
    start, failed = time.perf_counter(), 0
    for built in builder.build_all(missing):
        failed += built.error is not None
        print(built.spec.name, built.error or f"{built.meta['seconds']} s", flush=True)
    print(f"{len(missing)} kernels, {failed} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
