"""The cuda backend: CuPy arrays on one NVIDIA GPU, cuBLASLt and our own CUDA kernels. Only device and launch need CuPy."""
