"""Benchmarks: `fp4gemm bench` measures, `fp4gemm.report` records."""
