"""Kernels of expert parallelism, which read and write the memory of other GPUs: dispatch and combine."""
