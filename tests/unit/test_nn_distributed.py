"""Layers under DDP and FSDP2, and sums of Hessians: two processes with gloo on the CPU do what one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import distributed_cases


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_train_as_one():
    distributed_cases.run("cpu", *distributed_cases.CASES)
