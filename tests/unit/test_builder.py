"""The builder: what it starts when, and that one failure stays one failure."""

import os
from dataclasses import dataclass

import pytest

from fp4gemm import builder
from fp4gemm.builder import GB, GEMM_BYTES, OTHER_BYTES
from fp4gemm.spec import AmaxSpec, GemmSpec


@dataclass(frozen=True)
class Spec:
    name: str
    entry_points = ("main",)


class CannotBePickled(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def worker(spec: Spec) -> dict[str, object]:
    if spec.name == "raises":
        raise CannotBePickled(1, 2)
    if spec.name == "dies":
        os._exit(9)
    return {"name": spec.name, "pid": os.getpid()}


GEMM, SMALL = GemmSpec("sm_100a", "bf16", None, (128, 128, 256), (1, 1), "static"), AmaxSpec("sm_90a", "bf16")
GEMM_NEED = GEMM_BYTES["sm_100a"]


@pytest.mark.parametrize(
    "waiting, running, jobs, memory, expected",
    [
        ([GEMM, SMALL], [], 2, 64 * GB, GEMM),
        ([GEMM, SMALL], [], 1, 0, GEMM),  # one always runs, however little memory there is
        ([GEMM, SMALL], [GEMM], 2, 2 * GEMM_NEED, GEMM),
        ([GEMM, SMALL], [GEMM], 2, 2 * GEMM_NEED - 1, SMALL),  # a small one fills what a GEMM does not fit into
        ([GEMM, SMALL], [GEMM], 2, GEMM_NEED + OTHER_BYTES - 1, None),
        ([GEMM, SMALL], [SMALL, SMALL], 2, 64 * GB, None),  # every process is busy
        ([], [GEMM], 2, 64 * GB, None),
        ([], [], 2, 64 * GB, None),
    ],
)
def test_next_respects_jobs_and_memory(waiting, running, jobs, memory, expected):
    assert builder._next(waiting, running, jobs, memory) == expected


def test_failures_and_deaths_stay_alone():
    specs = [Spec("raises"), Spec("fine"), Spec("dies")]
    results = {built.spec.name: built for built in builder.build_all(specs, jobs=2, memory=4 * GB, worker=worker)}
    assert set(results) == {"raises", "fine", "dies"}
    assert results["fine"].error is None
    assert results["fine"].meta["name"] == "fine"
    assert results["fine"].meta["pid"] != os.getpid()
    assert results["raises"].error == "CannotBePickled: 1 and 2"
    assert "died" in results["dies"].error


def test_small_kernels_share_a_process():
    specs = [Spec(name) for name in ("one", "two", "three")]
    built = list(builder.build_all(specs, jobs=1, memory=4 * GB, worker=worker))
    assert [b.spec for b in built] == specs
    assert len({b.meta["pid"] for b in built}) == 1


def test_jobs_must_be_positive():
    with pytest.raises(ValueError, match="jobs: got 0, expected at least 1"):
        list(builder.build_all([GEMM], jobs=0))


def test_nothing_to_build():
    assert list(builder.build_all([], worker=worker)) == []


def test_free_memory_and_jobs_are_what_the_machine_has():
    assert 0 < builder.free_memory() < 1 << 50
    assert 1 <= builder.default_jobs() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("meminfo, cgroup, expected", [(7, 3, 3), (7, None, 7), (None, 3, 3), (None, None, 8 * GB)])
def test_free_memory_takes_the_smaller_limit(monkeypatch, meminfo, cgroup, expected):
    monkeypatch.setattr(builder, "_meminfo_available", lambda: meminfo)
    monkeypatch.setattr(builder, "_cgroup_available", lambda: cgroup)
    assert builder.free_memory() == expected
