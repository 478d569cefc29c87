"""`python -m fp4gemm` is the `fp4gemm` command."""

from fp4gemm.cli import app

app()
