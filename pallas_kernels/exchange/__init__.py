"""Kernels that store rows into the memory of other GPUs: dispatch and combine."""
