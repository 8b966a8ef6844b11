"""The dense GEMM with block-wise FP8 scales, and the quantization of its activations."""
