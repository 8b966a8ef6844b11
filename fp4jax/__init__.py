"""NVFP4 Mixture-of-Experts layers in JAX: 4-bit tokens on the wire, 4-bit expert weights in memory."""

__version__ = "0.1.0"
