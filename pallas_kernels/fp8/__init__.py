"""The block-wise FP8 GEMM and the quantization of its activations."""
