"""Kernels with a fault in them, which the comparisons of test_blackwell_gpu.py must notice: edits of CUTLASS's headers.

`python mutations.py NAME` runs one of them, or a kernel as it is, and exits with 0 where its results are right and with
``WRONG`` where they are not. It is a process of its own, since a fault may also keep a kernel from ending.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "gpu"), str(Path(__file__).parents[2])]

import emulation  # noqa: E402 - the line above must come first
import overlay  # noqa: E402

from fp4gemm import load  # noqa: E402
from fp4gemm.spec import GemmSpec  # noqa: E402

WRONG = 3  # exit status


@dataclass(frozen=True)
class Mutation:
    """A spec whose CUTLASS has edits; without any it is the kernel as it is. builder.py takes it for a spec."""

    name: str
    spec: GemmSpec
    edits: overlay.Edits = ()

    @property
    def arch(self) -> str:
        return self.spec.arch

    @property
    def tile(self) -> tuple[int, int, int]:
        return self.spec.tile

    @property
    def entry_points(self) -> tuple[str, ...]:
        return self.spec.entry_points


@dataclass(frozen=True)
class Beside:
    """Names a folder in front of the headers that a header includes from its own: a copy stands in another."""

    folder: str

    def __call__(self, text: str) -> str:
        return re.sub(r'^#include "(\w+\.hpp)"', rf'#include "{self.folder}/\1"', text, flags=re.MULTILINE)


_SM100 = GemmSpec("sm_100a", "bf16", None, (128, 128, 256), (1, 1), "static")
_SM120 = GemmSpec("sm_120a", "bf16", None, (128, 128, 128), (1, 1), "cooperative")
_MMA = r"^struct CollectiveMma<$"
_MMA_SM100 = "cutlass/gemm/collective/sm100_blockscaled_mma_warpspecialized.hpp"
_MMA_SM120 = "cutlass/gemm/collective/sm120_blockscaled_mma_tma.hpp"
_SFA, _SFB = "make_tensor(args.ptr_SF{}, args.layout_SFA)", "make_tensor(args.ptr_SF{}, args.layout_SFB)"
_COPY_SFA = "copy(tiled_copy_s2t_SFA, "


def _mutation(name: str, spec: GemmSpec, header: str, *edits: overlay.Edit) -> Mutation:
    return Mutation(name, spec, ((header, edits),))


INTACT = [Mutation("intact_sm100", _SM100), Mutation("intact_sm120", _SM120)]
MUTATIONS = [
    _mutation(
        "scales_of_a_and_b_swapped",
        _SM120,
        _MMA_SM120,
        overlay.Replaced(_MMA, _SFA.format("A"), _SFA.format("B")),
        overlay.Replaced(_MMA, _SFB.format("B"), _SFB.format("A")),
    ),
    # A row of B has the block scales of the row 32 further on.
    _mutation(
        "scales_of_b_a_column_of_tensor_memory_off",
        _SM100,
        _MMA_SM100,
        overlay.Replaced(
            _MMA, "return tCtSFB;", "auto shifted = tCtSFB; shifted.data() = shifted.data().get() + 1; return shifted;"
        ),
    ),
    # The epilogue reads sums that are not there yet. A wait for operands would not show: software multiplies so slowly
    # that TMA is always done before.
    _mutation(
        "no_wait_for_accumulators",
        _SM100,
        "cutlass/pipeline/sm100_pipeline.hpp",
        Beside("cutlass/pipeline"),
        overlay.Replaced(r"^class PipelineUmmaAsync \{$", "impl_.consumer_wait(state, barrier_token);", ""),
    ),
    # The last 256 values along K have the block scales of those before.
    _mutation(
        "scales_of_a_step_along_k_skipped",
        _SM100,
        _MMA_SM100,
        overlay.Replaced(_MMA, _COPY_SFA, f"if (k_tile_count > 0) {_COPY_SFA}", times=2),
    ),
    # A thread takes the outer scale of its first column for all of them.
    _mutation(
        "outer_scales_of_b_repeated",
        _SM120,
        "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp",
        Beside("cutlass/epilogue/fusion"),
        overlay.Replaced(r"^struct Sm90RowBroadcast \{$", "tSR_rRow(epi_v * FragmentSize + i)", "tSR_rRow(0)"),
    ),
]
KERNELS = [*INTACT, *MUTATIONS]


def main(name: str) -> int:
    import gpu_cases as cases
    from test_blackwell_gpu import check

    chosen = next(kernel for kernel in KERNELS if kernel.name == name)
    with emulation.emulate(chosen.arch, chosen.edits):
        load.load(chosen.spec)  # all launches of this process have it from here
    rows, k = 256, 768  # two tiles each way, three steps along K or six
    try:
        for seed in (1, 3):  # what the first leaves in memory is wrong for the second
            a, b = (cases.exact_operand(rows, k, "128x4", "per_row", seed + i) for i in range(2))
            check(chosen.spec, a, b, f"seed {seed}")
    except AssertionError as error:
        print(error)
        return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
