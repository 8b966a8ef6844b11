"""Memory-bound kernels on rows of tokens: quantize, SwiGLU, permute, and the rows that routes go to."""
