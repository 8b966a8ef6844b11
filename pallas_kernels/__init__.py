"""GPU kernels in Pallas Mosaic GPU, written for Hopper (sm90). They take arrays and return arrays.

The package imports JAX and nothing else of this repository. Every kernel module has a function `check_...`, the only
place that says which operands its kernels accept. Where something can be tuned it has a frozen `TuningConfig`.
"""
