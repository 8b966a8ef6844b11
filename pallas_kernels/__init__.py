"""GPU kernels, arrays in and arrays out: a leaf that imports JAX and nothing of ours.

The kernels arrive in later releases; until then every op of fp4jax runs its `"xla"` implementation.
"""
