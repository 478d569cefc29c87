"""What is measured for the table of kernels, and how results are kept; times are made up."""

import math

import pytest
import torch
from typer.testing import CliRunner

from fp4gemm import cli, select, table, tune
from fp4gemm.bench import timing
from fp4gemm.division import divide
from fp4gemm.engine import Weight
from fp4gemm.spec import PackedCollectiveSpec, check
from fp4gemm.table import Choice

SMS = 132


@pytest.mark.parametrize("n, k", [*tune.SHAPES, (8, 16), (65, 100), (128256, 4096)])
def test_every_product_has_candidates_and_they_can_serve_it(n, k):
    for m in (*tune.SIZES, 3, 100000):
        specs = tune.candidates(m, n, k, SMS)
        assert specs
        assert len({spec.name for spec in specs}) == len(specs)
        for spec in specs:
            assert check(spec) is None
            if isinstance(spec, PackedCollectiveSpec):
                assert n % 8 == 0
            else:
                assert divide(spec, m, n, k, SMS) is not None


def test_every_configuration_is_a_candidate_somewhere():
    everywhere = {spec for m in tune.SIZES for n, k in tune.SHAPES for spec in tune.candidates(m, n, k, SMS)}
    for kernel, configs in tune.CONFIGS.items():
        for config in configs:
            assert select.packed_of(kernel, config, "bf16", "bf16", None, False) in everywhere


def test_the_packaged_table_names_candidates_only():
    known = {(kernel, config) for kernel, configs in tune.CONFIGS.items() for config in configs}
    assert {(row.kernel, row.config) for row in table.read(table.PACKAGED)} <= known


def test_times_in_turn_and_at_own_clocks_both_count(monkeypatch):
    fast, even, slow = (Choice(1, 64, 64, "mma", config) for config in tune.MMA[:3])
    shared = {(fast, False): 9.0, (fast, True): 4.0, (even, False): 8.0, (even, True): 4.5, (slow, False): 9.0}
    shared[slow, True] = 5.0  # 12 % behind: not timed again
    own = {(fast, False): 16.0, (fast, True): 9.0, (even, False): 9.0, (even, True): 4.0}
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "GraphSampler", lambda calls: None)
    monkeypatch.setattr(timing, "interleave", lambda samplers, repeats: {key: shared[key] for key in samplers})
    monkeypatch.setattr(timing, "in_turns", lambda samplers, repeats: {key: own[key] for key in samplers})
    us = tune.both_ways(1, [Weight(torch.empty(0), torch.ones(()), 64, 64)], dict.fromkeys((fast, even, slow)))
    assert us == pytest.approx({fast: math.sqrt(6 * 12), even: 6.0})


def test_new_rows_replace_those_of_the_same_products():
    old = [Choice(1, 64, 64, "mma", tune.MMA[0]), Choice(8, 64, 64, "mma", tune.MMA[0])]
    new = [Choice(8, 64, 64, "mma", tune.MMA[1]), Choice(16, 64, 64, "wgmma", tune.WGMMA[0])]
    merged = tune.merge(old, new)
    assert sorted(merged, key=lambda row: row.m) == [old[0], *new]


def test_few_kernels_are_kept_where_times_are_close():
    mma, other, third = (("mma", config) for config in tune.MMA[:3])

    def product(m, **us):
        return {Choice(m, 64, 64, *{"a": mma, "b": other, "c": third}[name]): t for name, t in us.items()}

    measured = [
        product(1, a=10.0, b=10.02),
        product(2, b=20.0, c=19.9),
        product(4, a=31.0, b=30.9),
        product(8, c=9, b=10),
    ]
    kept = tune.fewest(measured)
    assert [(row.m, row.kernel, row.config) for row in kept] == [(1, *other), (2, *third), (4, *other), (8, *third)]
    for us, row in zip(measured, kept, strict=True):
        assert us[row] <= 1.005 * min(us.values())
    assert [row.config for row in tune.fewest(measured, slack=0)] == [mma[1], third[1], other[1], third[1]]

    before = [Choice(1, 64, 64, *mma), Choice(2, 64, 64, *mma), Choice(8, 64, 64, *other)]
    kept = tune.fewest(measured, before)  # one stays; one is no candidate any more, one too slow now
    assert {row.m: row.config for row in kept} == {1: mma[1], 2: third[1], 4: mma[1], 8: third[1]}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The command with a made-up GPU and made-up times: the last candidate is fastest."""

    def measure(shapes, sizes):
        for n, k in shapes:
            for m in sizes:
                kernels = [(kernel, config) for kernel, config, _ in tune._candidates(m, n, k, SMS)]
                yield {Choice(m, n, k, *kernel): 100.0 - i for i, kernel in enumerate(kernels)}

    monkeypatch.setattr(tune, "tune", measure)
    monkeypatch.setattr(cli, "_gpu_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(select, "arch_of", lambda device: "sm_90a")
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "cache"))
    return CliRunner()


def test_the_command_remembers_what_it_measured(measured, tmp_path):
    arguments = ["tune", "--shape", "4096x4096", "--m", "1", "--m", "16"]
    first = measured.invoke(cli.app, arguments)
    assert first.exit_code == 0, first.output
    path = table.tuned_path("NVIDIA Test")
    assert {(row.m, row.n, row.k) for row in table.read(path)} == {(1, 4096, 4096), (16, 4096, 4096)}
    second = measured.invoke(cli.app, ["tune", "--shape", "8192x4096", "--m", "1"])
    assert second.exit_code == 0, second.output
    assert len(table.read(path)) == 3
    assert "1x8192x4096" in second.output


@pytest.mark.parametrize("shape", ["4096", "x4096", "4096x", "0x64", "axb", "64x64x64"])
def test_a_bad_shape_is_named(measured, shape):
    result = measured.invoke(cli.app, ["tune", "--shape", shape])
    assert result.exit_code == 1
    assert f"--shape: got '{shape}', expected NxK" in result.output


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["tune", "--shape", "64x64"])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
