"""Builds, several at once, the GEMM kernels that the tests of this folder launch: `python tests/gpu/prebuild.py`.

Needs NVRTC and no GPU. Left to themselves the tests would build them one after the other, a second or two each, those
made of CUTLASS's collectives most of a minute; the other kernels take a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import gpu_cases as cases  # noqa: E402 - the line above must come first
import sanitize_cases  # noqa: E402

from fp4gemm import builder, cache, select  # noqa: E402
from fp4gemm.spec import DTYPES, KernelSpec, PackedCollectiveSpec, check  # noqa: E402


def wanted() -> list[KernelSpec]:
    """What test_gemm_gpu, test_torch_gpu, test_engine_gpu, test_gemm_grouped_gpu,
    sanitize_cases and examples/train.py launch."""
    nvfp4 = [("bf16", out, bias, False) for out in DTYPES for bias in (None, *DTYPES)]
    configs = cases.chosen_configs()
    collectives = [config for config in configs if config[0] in ("collective", "stream_k")]
    pairs = [
        *product([config for config in configs if config not in collectives], (*nvfp4, *cases.PLAIN_VARIANTS)),
        # They take most of a minute each: what large products of the tests need.
        *product(collectives, [v for v in nvfp4 if v[2] in (None, v[1])] + list(cases.FORCED_VARIANTS)),
        *product(cases.EXTRA_CONFIGS, cases.FORCED_VARIANTS),
        *product(sanitize_cases.ENGINE_CONFIGS, [("bf16", "bf16", "bf16", source) for source in (True, False)]),
    ]
    pairs += product([("stream_k", (128, 256, cluster)) for cluster in (1, 2)], [("bf16", "bf16", None, True)])
    # A layer under autocast whose bias is float32, as examples/train.py has them.
    pairs += product(collectives, [("bf16", "bf16", "fp32", False)])
    specs = dict.fromkeys(select.packed_of(*config, *variant) for config, variant in pairs)
    specs |= dict.fromkeys(cases.grouped_spec(*pair) for pair in cases.grouped_kernels())
    return [spec for spec in specs if check(spec) is None]


def build(spec: KernelSpec) -> str | None:
    """Why it failed, or None."""
    try:
        builder.build_one(spec)
    except Exception as error:
        return f"{spec.name}: {type(error).__name__}: {error}"
    return None


def main() -> int:
    missing = [spec for spec in wanted() if cache.lookup(spec) is None]
    collectives = [spec for spec in missing if isinstance(spec, PackedCollectiveSpec)]
    small = [spec for spec in missing if not isinstance(spec, PackedCollectiveSpec)]
    start = time.perf_counter()
    # Not all by builder.build_all: it starts a process for each kernel, which takes longer than a small one does.
    with ProcessPoolExecutor(builder.default_jobs(), multiprocessing.get_context("spawn")) as pool:
        errors = [error for error in pool.map(build, small) if error]
    errors += [f"{built.spec.name}: {built.error}" for built in builder.build_all(collectives) if built.error]
    print(*errors, f"{len(missing)} kernels, {len(errors)} failed, {time.perf_counter() - start:.0f} s", sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
