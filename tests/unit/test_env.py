"""Environment variables: defaults, values, and that a misspelt name or value is an error."""

import logging
from pathlib import Path

import pytest

from fp4gemm import env
from fp4gemm.env import Settings


def test_defaults():
    assert env.settings({}) == Settings(Path.home() / ".cache/fp4gemm", None, None, False, None, None)


def test_every_variable_has_its_setting():
    values = {
        "FP4GEMM_CACHE_DIR": "/kernels",
        "FP4GEMM_CUTLASS_PATH": "/cutlass",
        "FP4GEMM_CUDA_HOME": "/cuda",
        "FP4GEMM_DISABLE_JIT": "1",
        "FP4GEMM_LOG": "debug",
        "FP4GEMM_EMULATE": "sm_120a",
    }
    assert values.keys() == env.VARIABLES.keys()
    expected = Settings(Path("/kernels"), Path("/cutlass"), Path("/cuda"), True, "debug", "sm_120a")
    assert env.settings(values) == expected


def test_an_empty_variable_counts_as_unset():
    assert env.settings(dict.fromkeys(env.VARIABLES, "")) == env.settings({})


@pytest.mark.parametrize(
    "environ, folder",
    [
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/fp4gemm")),
        ({"XDG_CACHE_HOME": "/xdg", "FP4GEMM_CACHE_DIR": "/own"}, Path("/own")),
        ({"FP4GEMM_CACHE_DIR": "~/kernels"}, Path.home() / "kernels"),
    ],
)
def test_cache_folder(environ, folder):
    assert env.settings(environ).cache_dir == folder


@pytest.mark.parametrize("name", ["FP4GEMM_CACHEDIR", "FP4GEMM_", "FP4GEMM_log"])
def test_a_misspelt_name_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f"variable {name} is not known") as error:
        env.settings({name: "1"})
    assert all(known in str(error.value) for known in env.VARIABLES)


def test_variables_of_others_are_left_alone():
    assert env.settings({"XFP4GEMM_LOG": "x", "FP4_GEMM": "x", "fp4gemm_log": "x"}) == env.settings({})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("FP4GEMM_DISABLE_JIT", "yes", "FP4GEMM_DISABLE_JIT: got 'yes', expected one of 0, 1"),
        ("FP4GEMM_EMULATE", "sm_90a", "FP4GEMM_EMULATE: got 'sm_90a', expected one of sm_100a, sm_120a"),
        ("FP4GEMM_LOG", "DEBUG", "FP4GEMM_LOG: got 'DEBUG', expected one of debug, info, warning, error"),
    ],
)
def test_a_value_that_cannot_be_is_an_error(name, value, message):
    with pytest.raises(ValueError, match=message):
        env.settings({name: value})


def test_the_process_environment_is_read_each_time(monkeypatch, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setenv("FP4GEMM_CACHE_DIR", str(folder))
        assert env.settings().cache_dir == folder
    monkeypatch.setenv("FP4GEMM_NOPE", "1")
    with pytest.raises(ValueError, match="FP4GEMM_NOPE"):
        env.settings()


@pytest.mark.parametrize("application_handles", [True, False])
def test_logging_has_the_level_asked_for_and_one_handler(monkeypatch, application_handles):
    logger = logging.getLogger("fp4gemm")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()] if application_handles else [])
    monkeypatch.setenv("FP4GEMM_LOG", "info")
    env.configure_logging.__wrapped__()
    env.configure_logging.__wrapped__()
    assert logger.level == logging.INFO
    assert len(logger.handlers) == (0 if application_handles else 1)
