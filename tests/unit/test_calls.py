"""What the CUDA side of quantizers refuses before it loads a kernel."""

from __future__ import annotations

import pytest
import torch

from fp4gemm import calls, select
from fp4gemm.formats import PLAIN


def test_rows_too_long_for_a_grid_are_refused(monkeypatch):
    """Values have a CTA for each step of a row, and no loop."""
    monkeypatch.setattr(select, "arch_of", lambda _: "sm_90a")
    k = 65535 * 128 * 16 + 16
    with pytest.raises(ValueError, match=rf"x: got rows of {k} values, expected at most {k - 16}"):
        calls._ValuesQuantizer(0, torch.bfloat16, 1, k, "given", "te_per_token", True, 0, PLAIN, False)
