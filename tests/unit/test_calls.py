"""How the CUDA side of quantizers of values is launched, and what it refuses before it loads a kernel."""

from __future__ import annotations

import pytest
import torch

from fp4gemm import calls, select
from fp4gemm.division import room_for
from fp4gemm.formats import PLAIN


def test_rows_too_long_for_a_grid_are_refused(monkeypatch):
    """Values have a CTA for each step of a row, and no loop."""
    monkeypatch.setattr(select, "arch_of", lambda _: "sm_90a")
    k = 65535 * 128 * 16 + 16
    with pytest.raises(ValueError, match=rf"x: got rows of {k} values, expected at most {k - 16}"):
        calls._ValuesQuantizer(0, torch.bfloat16, 1, k, "given", "te_per_token", True, 0, PLAIN, False)


@pytest.mark.parametrize(
    "m, k, scaling, grid, of_sm",
    [
        (16, 8192, "per_row", (16, 4, 1), 1),
        (128, 8192, "per_row", (128, 2, 1), 2),
        (128, 14336, "given", (128, 7, 1), 7),
        (1024, 8192, "per_row", (1024, 1, 1), None),
    ],
)
def test_quantizers_of_few_ctas_begin_early_and_spread(monkeypatch, m, k, scaling, grid, of_sm):
    launched = []
    monkeypatch.setattr(select, "arch_of", lambda _: "sm_90a")
    monkeypatch.setattr(select, "gpu_of", lambda _: ("", 132))
    monkeypatch.setattr(select, "prefetch_ctas", lambda *_: 0)
    monkeypatch.setattr(calls, "Launcher", lambda spec, arguments, **how: launched.append(how))
    made = calls._ValuesQuantizer(0, torch.bfloat16, m, k, scaling, "te_per_token", True, 0, PLAIN, False)
    spread = {} if of_sm is None else {"dependent": True, "shared_bytes": room_for(of_sm)}
    assert (made.grid, launched) == (grid, [{"waits": True} | spread])
