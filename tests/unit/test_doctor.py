"""The doctor: every kind of machine gets the right verdict, and every problem a remedy."""

import io
import os

import pytest
import torch
from rich.console import Console

from fp4gemm import doctor, toolchain
from fp4gemm.doctor import Device, Driver, Finding

H200 = Device(0, "NVIDIA H200", (9, 0))
L4 = Device(1, "NVIDIA L4", (8, 9))


def only(findings):
    assert len(findings) == 1
    return findings[0]


@pytest.mark.parametrize(
    "driver, status, text",
    [
        (Driver(version=13000, devices=(H200,)), "ok", "CUDA 13.0"),
        (Driver(version=12080, devices=(H200,)), "fail", "CUDA 12.8"),
        (Driver(problem="none: libcuda was not found"), "warn", "libcuda"),
        (Driver(problem="cuda-bindings is not installed"), "warn", "cuda-bindings"),
        (Driver(problem="cuda-bindings is not installed", devices=(H200,)), "fail", "cuda-bindings"),
    ],
)
def test_driver(driver, status, text):
    finding = only(doctor.check_driver(driver))
    assert (finding.status, text in finding.detail) == (status, True)
    assert bool(finding.remedy) == (status != "ok")


def test_driver_error_of_a_call_is_reported(monkeypatch):
    cuda = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(cuda, "cuInit", lambda _: (cuda.CUresult.CUDA_ERROR_NO_DEVICE,))
    assert doctor.query_driver().problem == "cannot be used: it answered CUDA_ERROR_NO_DEVICE"


def test_query_driver_reads_version_and_devices(monkeypatch):
    cuda = pytest.importorskip("cuda.bindings.driver")
    good = cuda.CUresult.CUDA_SUCCESS
    capability = {"MAJOR": 9, "MINOR": 0}
    monkeypatch.setattr(cuda, "cuInit", lambda _: (good,))
    monkeypatch.setattr(cuda, "cuDeviceGetCount", lambda: (good, 1))
    monkeypatch.setattr(cuda, "cuDriverGetVersion", lambda: (good, 13000))
    monkeypatch.setattr(cuda, "cuDeviceGet", lambda index: (good, index))
    monkeypatch.setattr(cuda, "cuDeviceGetName", lambda size, _: (good, b"NVIDIA H200".ljust(size, b"\0")))
    monkeypatch.setattr(cuda, "cuDeviceGetAttribute", lambda what, _: (good, capability[what.name.split("_")[-1]]))
    assert doctor.query_driver() == Driver(13000, (H200,))


def test_gpus_with_and_without_kernels():
    ok, none = doctor.check_gpus(Driver(13000, (H200, L4)))
    assert ok == Finding("GPU 0", "ok", "NVIDIA H200, compute capability 9.0: kernels for sm_90a")
    (unrun,) = doctor.check_gpus(Driver(13000, (Device(0, "NVIDIA Made-Up", (10, 0)),)))
    assert unrun.status == "warn"
    assert "kernels for sm_100a are compiled and tested under emulation, and have never run" in unrun.detail
    assert none.status == "warn"
    assert "8.9: no kernels" in none.detail
    assert only(doctor.check_gpus(Driver(problem="x"))).status == "warn"


@pytest.mark.parametrize(
    "devices, cuda, available, status",
    [
        ((), None, False, "ok"),
        ((H200,), None, False, "fail"),
        ((H200,), "13.0", False, "fail"),
        ((H200,), "13.0", True, "ok"),
    ],
)
def test_torch_build(monkeypatch, devices, cuda, available, status):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert only(doctor.check_torch(Driver(devices=devices))).status == status


@pytest.mark.parametrize("has_gpu, status", [(True, "fail"), (False, "warn")])
@pytest.mark.parametrize("check, function", [("check_nvrtc", "nvrtc_version"), ("check_headers", "find_headers")])
def test_missing_toolchain_matters_where_there_is_a_gpu(monkeypatch, check, function, has_gpu, status):
    def missing():
        raise toolchain.ToolchainError("not found: pip install 'fp4gemm[cuda13]', or set a variable")

    monkeypatch.setattr(toolchain, function, missing)
    finding = only(getattr(doctor, check)(has_gpu=has_gpu))
    assert finding.status == status
    assert finding.detail.startswith("not found")
    assert finding.remedy == "pip install 'fp4gemm[cuda13]', or set a variable"


def test_nvrtc_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(toolchain, "nvrtc_version", lambda: "13.0.88")

    def broken():
        raise RuntimeError("libnvrtc.so.13 is damaged")

    monkeypatch.setattr(doctor, "_load_nvrtc", broken)
    finding = only(doctor.check_nvrtc(has_gpu=True))
    assert (finding.status, "libnvrtc.so.13 is damaged" in finding.detail) == ("fail", True)


def test_installed_toolchain_is_found():
    pytest.importorskip("cuda.bindings")
    assert [finding.status for finding in doctor.check_nvrtc(has_gpu=False)] == ["ok"]
    cutlass, cuda = doctor.check_headers(has_gpu=False)
    assert (cutlass.status, cuda.status) == ("ok", "ok")


def test_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FP4GEMM_")]:
        monkeypatch.delenv(name)
    assert only(doctor.check_environment()).status == "ok"
    monkeypatch.setenv("FP4GEMM_LOG", "info")
    assert only(doctor.check_environment()) == Finding("environment", "ok", "FP4GEMM_LOG=info")
    monkeypatch.setenv("FP4GEMM_LOGS", "info")
    assert only(doctor.check_environment()).status == "fail"
    assert only(doctor.check_cache()).status == "warn"  # not looked at, because the settings cannot be read


def test_cache_counts_entries(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "LOW_SPACE", 0)
    assert f"{tmp_path / 'cache'}: 0 kernels, 0.0 MB" in only(doctor.check_cache()).detail
    assert not (tmp_path / "cache").exists()  # looking changes nothing
    for name in ("a", "b"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "meta.json").write_text("{}")
        (tmp_path / "cache" / name / "kernel.cubin").write_bytes(bytes(1_000_000))
    finding = only(doctor.check_cache())
    assert finding.status == "ok"
    assert "2 kernels, 2.0 MB" in finding.detail


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    finding = only(doctor.check_cache())
    assert finding.status == "fail"
    assert "FP4GEMM_CACHE_DIR" in finding.remedy


def test_full_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "LOW_SPACE", 1 << 62)
    assert only(doctor.check_cache()).status == "warn"


def test_a_machine_without_a_gpu_is_healthy(monkeypatch, tmp_path):
    monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "query_driver", lambda: Driver(problem="none: libcuda was not found"))
    findings = doctor.examine()
    assert doctor.exit_code(findings) == 0
    assert {"driver", "GPU", "torch", "NVRTC", "environment", "cache"} <= {finding.name for finding in findings}


def test_exit_code_counts_failures_only():
    assert doctor.exit_code([Finding("a", "ok", ""), Finding("b", "warn", "")]) == 0
    assert doctor.exit_code([Finding("a", "fail", "")]) == 1


def test_show_prints_detail_and_remedy_as_they_are():
    output = io.StringIO()
    console = Console(file=output, width=200)
    doctor.show([Finding("NVRTC", "fail", "missing", "pip install 'fp4gemm[cuda13]'")], console)
    assert "→ pip install 'fp4gemm[cuda13]'" in output.getvalue()
    assert "0 ok, 0 warnings, 1 failures" in output.getvalue()
