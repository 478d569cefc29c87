"""How time is measured: cold rotating inputs, CUDA-graph or eager samples, candidates interleaved or
each at its own clock, medians."""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]  # one sample: microseconds per call
_Name = TypeVar("_Name", bound=Hashable)

DEVICE = "cuda"  # the current one
MODES = ("graph", "eager")
DEFAULT_REPEATS = 9
MIN_REPEATS = 7
_SAMPLE_US = 2000.0  # a sample lasts at least this long: event resolution (0.5 us) and launch gaps stay below 1 %
_MIN_CALLS = 8  # of a sample, so that a gap is shared by several of them; fewer where calls are long
_EAGER_US = 4 * _SAMPLE_US  # the CPU's share of the first call, tens of microseconds, stays below 1 % too
_MAX_EAGER_CALLS = 200  # below the launch queue's depth, and a bound on the time of one sample
_WARM_SAMPLES = 50  # a fifth of a second, in which an idle GPU reaches its clocks
SETTLE_S = 0.15  # behind large products times are up to a fifth longer, for about 0.1 s
TURN_S = 0.2  # behind a large product a lighter one's clock rises for 0.1 to 0.15 s, to what its own power leaves
_TURN_SAMPLES = 4
_L2_BYTES = 60 << 20  # where the driver does not say


def l2_bytes() -> int:
    """Size of the current device's L2 cache in bytes."""
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)) or _L2_BYTES


def rotation(nbytes: int, l2: int | None = None) -> int:
    """How many copies of an input of `nbytes` exceed twice the L2, so that none is still cached at its next turn."""
    cold = 2 * max(l2 if l2 is not None else l2_bytes(), _L2_BYTES)
    return max(2, cold // max(nbytes, 1) + 1)


def _timed(run: Callable[[], None]) -> float:
    """Microseconds between two events around `run` on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _enough_calls(us: float, sample_us: float) -> int:
    """Calls of `us` each that make a sample: _MIN_CALLS, or as many as last `sample_us`.

    Long samples are bad samples. Matrix products of milliseconds run at the clock that the power limit leaves, which
    follows the power of the last tenths of a second: candidates share it only if they take turns more often than that.
    """
    return min(_MIN_CALLS, math.ceil(sample_us / us))


class GraphSampler:
    """Replays a CUDA graph of all `calls` (one per rotated input); a sample is the time of one call.

    Results stay alive for a whole rotation during the capture. Else the allocator would hand every call the same output
    memory, which the L2 absorbs, and the bandwidth would look better than it is.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._replays = 1
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # builds and loads kernels, which a capture cannot
                call()
            us = _timed(functools.partial(_run_all, calls)) / len(calls)
        torch.cuda.synchronize()
        rounds = math.ceil(_enough_calls(us, _SAMPLE_US) / len(calls))
        self._calls = len(calls) * rounds
        held: deque[object] = deque(maxlen=len(calls))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    held.append(call())
        self._held = held
        self()  # the first replay uploads the graph
        self._replays = max(1, math.ceil(_SAMPLE_US / (self() * self._calls)))

    def _replay(self) -> None:
        for _ in range(self._replays):
            self._graph.replay()

    def __call__(self) -> float:
        return _timed(self._replay) / (self._replays * self._calls)


class EagerSampler:
    """Calls as a user does, results dropped at once; goes on through the rotation where the last sample stopped."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._cycle = itertools.cycle(calls)
        self._count = _MIN_CALLS
        self()
        us = self()
        self._count = min(max(_enough_calls(us, _EAGER_US), math.ceil(_SAMPLE_US / us)), _MAX_EAGER_CALLS)

    def _run(self) -> None:
        for _ in range(self._count):
            next(self._cycle)()

    def __call__(self) -> float:
        return _timed(self._run) / self._count


def sampler(mode: str, calls: Sequence[Call]) -> Sampler:
    """A sampler for one of MODES."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return GraphSampler(calls) if mode == "graph" else EagerSampler(calls)


def interleave(samplers: Mapping[_Name, Sampler], repeats: int, settle_s: float = SETTLE_S) -> dict[_Name, float]:
    """Median of `repeats` samples of each candidate, taken in turn so that clocks and temperature are shared.

    The order is another one in each round: what ran just before decides the clock that the power limit leaves, and in
    a fixed order large matrix products differed from themselves by 10 %. Rounds of the first `settle_s` seconds do not
    count, for the same reason: just after large products, kernels of 15 us took 18.
    """
    samples: dict[_Name, list[float]] = {name: [] for name in samplers}
    order, shuffled = list(samplers), random.Random(0)
    settled = time.perf_counter() + settle_s
    while len(samples[order[0]]) < repeats:
        counts = time.perf_counter() >= settled
        shuffled.shuffle(order)
        for name in order:
            us = samplers[name]()
            if counts:
                samples[name].append(us)
    return {name: statistics.median(times) for name, times in samples.items()}


def in_turns(samplers: Mapping[_Name, Sampler], repeats: int, turn_s: float = TURN_S) -> dict[_Name, float]:
    """Median of at least `repeats` samples of each candidate at the clock that it has when it runs alone.

    Large matrix products run at the power limit, and those that take less power at a higher clock. Candidates that take
    turns with every sample share one clock; a program that runs one of them for long has another. So a turn here is
    `turn_s` seconds of a candidate and then some samples; the order is another one in each round.
    """
    samples: dict[_Name, list[float]] = {name: [] for name in samplers}
    order, shuffled = list(samplers), random.Random(0)
    for _ in range(math.ceil(repeats / _TURN_SAMPLES)):
        shuffled.shuffle(order)
        for name in order:
            settled = time.perf_counter() + turn_s
            while time.perf_counter() < settled:
                samplers[name]()
            samples[name] += [samplers[name]() for _ in range(_TURN_SAMPLES)]
    return {name: statistics.median(times) for name, times in samples.items()}


def compare(
    candidates: Mapping[str, Sequence[Call]], mode: str, repeats: int, settle_s: float = SETTLE_S
) -> dict[str, float]:
    """Microseconds per call of every candidate, measured in turn in one process."""
    samplers = {name: sampler(mode, calls) for name, calls in candidates.items()}
    return interleave(samplers, repeats, settle_s)


def copies_of(nbytes: int) -> list[Call]:
    """Cold copies that move `nbytes` each, half read and half written: the yardstick of a memory-bound kernel."""
    half = max(nbytes // 2 // 16 * 16, 16)
    source = random_bytes(rotation(half), half)
    target = torch.empty_like(source)
    return [functools.partial(_copy, s, t) for s, t in zip(source, target, strict=True)]


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    # An elementwise kernel. In a graph `copy_` becomes a memcpy node, which reaches two thirds of its bandwidth.
    torch.bitwise_not(source.view(torch.int32), out=target.view(torch.int32))


def random_bytes(*shape: int) -> torch.Tensor:
    """Random uint8 on the GPU: zeros draw less power and compress, so they would flatter."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def copy_tb_s(repeats: int, nbytes: int = 1 << 30) -> float:
    """Copy bandwidth in TB/s, bytes read + written, of a device-to-device copy of `nbytes` (at least 1 GiB)."""
    source = random_bytes(nbytes)
    target = torch.empty_like(source)
    sample = EagerSampler([functools.partial(_copy, source, target)])
    for _ in range(_WARM_SAMPLES):
        sample()
    us = interleave({"copy": sample}, repeats)["copy"]
    return 2 * nbytes / us / 1e6
