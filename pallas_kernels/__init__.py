"""GPU kernels, arrays in and arrays out: a leaf that imports JAX and nothing of ours.

Pallas Mosaic GPU, written for Hopper (sm90). Every kernel module has a `check_...` that is the one statement of what
its kernels accept, and a frozen `TuningConfig` where there is something to tune.
"""
