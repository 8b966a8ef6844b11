"""Kernels over rows of tokens: quantize, permute, SwiGLU, metadata of routes."""
