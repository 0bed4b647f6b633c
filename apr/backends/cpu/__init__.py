"""The cpu backend: OpenBLAS and Numba kernels on one pool of threads."""

from .start import start_numba

# Before any module here asks Numba for anything.
start_numba()
