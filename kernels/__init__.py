"""Triton kernels, one file an operation; imported only as `fastcontrast.kernels.<op>`."""
