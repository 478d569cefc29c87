"""Copies of a few CUTLASS headers in which the Blackwell-only instructions are calls of blackwell.hpp.

They are made from the CUTLASS that is installed. Every edit says what it expects to find there, and anything else is an
error that names CUTLASS's version: a header that changed is never emulated by half.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fp4gemm import toolchain

EMULATOR = Path(__file__).with_name("blackwell.hpp")
_INCLUDE = "#pragma once\n#include <emulation/blackwell.hpp>\n"
_CALL = "::fp4gemm::emulation::"


class OverlayError(RuntimeError):
    """CUTLASS's headers are not what the edits expect."""


@dataclass(frozen=True)
class Guarded:
    """A definition whose PTX stands under ``#if defined(guard)``, once for each call that replaces it, in order.

    ``begins``: how it begins, a regular expression that matches once in the file; it ends at the next ``}`` that begins
    a line. A call may name the parameters of the function around it; ``{outputs}`` are those that are ``uint32_t&``.
    """

    begins: str
    guard: str
    calls: tuple[str, ...]

    def __call__(self, text: str) -> str:
        start, end = _definition(text, self.begins)
        body = text[start:end]
        guard = rf"^[ ]*#if defined\({self.guard}\)$"
        if (count := len(re.findall(guard, body, re.MULTILINE))) != len(self.calls):
            raise OverlayError(f"{self.begins}: {count} times #if defined({self.guard}), expected {len(self.calls)}")
        outputs = ", ".join(re.findall(r"\buint32_t& (\w+)", body))
        calls = iter(self.calls)

        def replace(_: re.Match[str]) -> str:
            call = next(calls).format(outputs=outputs)
            return f"#if defined(FP4GEMM_EMULATE)\n  {call};\n#elif defined({self.guard})"

        return text[:start] + re.sub(guard, replace, body, flags=re.MULTILINE) + text[end:]


@dataclass(frozen=True)
class Replaced:
    """A text that a definition holds so many times, and what stands there instead."""

    begins: str
    old: str
    new: str
    times: int = 1

    def __call__(self, text: str) -> str:
        start, end = _definition(text, self.begins)
        if (count := text.count(self.old, start, end)) != self.times:
            raise OverlayError(f"{self.begins}: {count} times {self.old!r}, expected {self.times}")
        return text[:start] + text[start:end].replace(self.old, self.new) + text[end:]


Edit = Callable[[str], str]
Edits = tuple[tuple[str, tuple[Edit, ...]], ...]  # of headers, by their names


def _definition(text: str, begins: str) -> tuple[int, int]:
    found = list(re.finditer(begins, text, re.MULTILINE))
    if len(found) != 1:
        raise OverlayError(f"{begins}: {len(found)} definitions begin so, expected 1")
    end = text.find("\n}", found[0].end())
    if end < 0:
        raise OverlayError(f"{begins}: the definition does not end")
    return found[0].start(), end


def _struct(name: str) -> str:
    return rf"^struct {name}$"


def _tmem() -> Iterable[Edit]:
    guard = "CUTE_ARCH_TCGEN05_TMEM_ENABLED"
    for repeat in (1, 2, 4, 8, 16, 32, 64, 128):
        call = f"{_CALL}tmem_load(src_addr, {{outputs}})"
        yield Guarded(_struct(f"SM100_TMEM_LOAD_32dp32b{repeat}x"), guard, (call,))
    for ctas in (1, 2):
        call = f"{_CALL}copy_scales<{ctas}>(src_addr, dst_addr)"
        yield Guarded(_struct(f"SM100_UTCCP_4x32dp128bit_{ctas}cta"), guard, (call,))


def _allocators() -> Iterable[Edit]:
    for ctas in (1, 2):
        calls = (
            f"{_CALL}tmem_allocate<{ctas}>(dst_ptr, static_cast<uint32_t>(num_columns))",
            f"{_CALL}tmem_free(tmem_ptr, static_cast<uint32_t>(num_columns))",
            "",  # the permit to allocate: nobody else wants one
        )
        yield Guarded(rf"^class Allocator{ctas}Sm \{{$", "CUTE_ARCH_TCGEN05_TMEM_ENABLED", calls)


def _multiplications() -> Iterable[Edit]:
    arguments = "tmem_c, desc_a, desc_b, static_cast<uint32_t>(idescE >> 32), scaleC, tsfa_addr, tsfb_addr"
    for name, ctas in (("SM100_MMA_MXF4_SS", 1), ("SM100_MMA_MXF4_2x1SM_SS", 2)):
        yield Guarded(_struct(name), "CUTE_ARCH_TCGEN05_MXF4NVF4_MMA_ENABLED", (f"{_CALL}mma<{ctas}>({arguments})",))


def _warp_multiplication() -> Iterable[Edit]:
    call = (
        "static_assert(VS == 16 && tidA == 0 && bidA == 0 && tidB == 0 && bidB == 0);\n"
        "  float d[4];\n"
        f"  {_CALL}mma_m16n8k64(d, {{{{a0, a1, a2, a3}}}}, {{{{b0, b1}}}}, {{{{c0, c1, c2, c3}}}}, sfa0, sfb0);\n"
        "  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3]"
    )
    begins = r"^struct SM120_16x8x64_TN_VS<float_e2m1_t, float_e2m1_t, float, float_ue4m3_t, VS>$"
    yield Guarded(begins, "CUTE_ARCH_MXF4NVF4_4X_UE4M3_MMA_ENABLED", (call,))


def _barriers() -> Iterable[Edit]:
    guard = "CUTLASS_ARCH_TCGEN_ENABLED"
    calls = {
        "void umma_arrive": "commit(smem_ptr)",
        "void umma_arrive_2x1SM": "commit(smem_ptr)",
        "void umma_arrive_multicast": "commit(smem_ptr, cta_mask)",
        "void umma_arrive_multicast_2x1SM": "commit(smem_ptr, cta_mask)",
        "void umma_arrive_2x1SM_sm0": "arrive_at_leader(smem_ptr)",
    }
    for name, call in calls.items():
        yield Guarded(rf"^{name}\(", guard, (_CALL + call,))
    for name in ("load", "store"):  # everything was done at once
        yield Guarded(rf"^CUTE_DEVICE static void fence_view_async_tmem_{name}\(", guard, ("",))


def _pair_loads() -> Iterable[Edit]:
    for multicast, ctas in (("", "1u << ::fp4gemm::emulation::cta_rank()"), ("_MULTICAST", "multicast_mask")):
        for rank in range(1, 6):
            coordinates = ", ".join(f"crd{i}" for i in range(rank))
            call = f"{_CALL}load_for_pair(desc_ptr, mbar_ptr, {ctas}, smem_ptr, {coordinates})"
            yield Guarded(_struct(f"SM100_TMA_2SM_LOAD{multicast}_{rank}D"), "CUTE_ARCH_TMA_SM100_ENABLED", (call,))


def _descriptors() -> Iterable[Edit]:
    atom = r"^make_tma_copy_atom\(CopyOp,$"
    yield Replaced(
        atom, "TmaInternalType>", f"{_CALL}TmaType<sizeof_bits_v<TmaInternalType>, TmaInternalType>>", times=3
    )
    keep = f"  {_CALL}keep_request_of_pair_load<CopyOp>(tma_desc);\n"
    yield Replaced(atom, "num_multicast);\n", f"num_multicast);\n{keep}")


def _launch_control() -> Iterable[Edit]:
    calls = (
        f"{_CALL}try_cancel(&clc_response_ptr[state.index()], mbarrier_addr)",
        f"{_CALL}query_cancel(result_addr, work_tile_info.M_idx, work_tile_info.N_idx, work_tile_info.L_idx, valid)",
    )
    yield Guarded(r"^class PersistentTileSchedulerSm100 \{$", "CUTLASS_ARCH_CLC_ENABLED", calls)


EDITS: dict[str, tuple[Edit, ...]] = {
    "cute/arch/copy_sm100.hpp": tuple(_tmem()),
    "cute/arch/copy_sm100_tma.hpp": tuple(_pair_loads()),
    # A request that stays one is no descriptor to prefetch.
    "cute/arch/copy_sm90_desc.hpp": (
        Guarded(r"^prefetch_tma_descriptor\(", "CUTE_ARCH_TMA_SM90_ENABLED", ("static_cast<void>(desc_ptr)",)),
    ),
    "cute/arch/mma_sm100_umma.hpp": tuple(_multiplications()),
    "cute/arch/mma_sm120.hpp": tuple(_warp_multiplication()),
    "cute/arch/tmem_allocator_sm100.hpp": tuple(_allocators()),
    "cute/atom/copy_traits_sm90_tma.hpp": tuple(_descriptors()),
    "cutlass/arch/barrier.h": tuple(_barriers()),
    "cutlass/gemm/kernel/sm100_tile_scheduler.hpp": tuple(_launch_control()),
}


def make(folder: Path, cutlass: Path | None = None, more: Edits = ()) -> Path:
    """Write the overlay for a CUTLASS include folder (default: the installed one) into ``folder`` and return it.

    ``more``: edits that come after those of ``EDITS``. Raises OverlayError naming header, edit and CUTLASS's version
    where a header is not as expected.
    """
    cutlass = cutlass or toolchain.cutlass_include()
    for name, edits in [*EDITS.items(), *((name, (*EDITS.get(name, ()), *edits)) for name, edits in more)]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_edited(cutlass, name, edits))
    (folder / "emulation").mkdir(exist_ok=True)
    shutil.copyfile(EMULATOR, folder / "emulation" / EMULATOR.name)
    return folder


def _edited(cutlass: Path, name: str, edits: Iterable[Edit]) -> str:
    try:
        text = (cutlass / name).read_text()
        for edit in edits:
            text = edit(text)
        if text.count("#pragma once\n") != 1:
            raise OverlayError("not one #pragma once")
    except (OSError, OverlayError) as error:
        version = toolchain.cutlass_version(cutlass)
        raise OverlayError(f"CUTLASS {version} cannot be emulated: {name}: {error}") from error
    return text.replace("#pragma once\n", _INCLUDE)
