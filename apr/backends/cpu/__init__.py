"""The cpu backend: OpenBLAS and Numba kernels on one pool of threads."""
