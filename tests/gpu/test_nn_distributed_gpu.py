"""Layers under DDP and FSDP2: two GPUs with NCCL train as one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import distributed_cases


@pytest.mark.parametrize("case", distributed_cases.CASES)
def test_two_devices_train_as_one(case: str, cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    distributed_cases.run("cuda", case)
