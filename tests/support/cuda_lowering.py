"""Lowering for an H100 on any machine: catches what Mosaic GPU does not accept, not what ptxas does not."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
H100_MESH = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=H100)


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_text(fn, *structs):
    """StableHLO of `fn` for an H100."""
    with use_abstract_mesh(H100_MESH):
        return jax.jit(fn).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(fn, *structs):
    """Number of Mosaic GPU kernels in `fn` lowered for an H100."""
    return lowered_text(fn, *structs).count("@mosaic_gpu_v2")
