"""Benchmarks, one file an operation; run by `fastcontrast bench` and by pytest-benchmark."""
