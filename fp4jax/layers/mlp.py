"""The dense SwiGLU layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp4jax.layers.fused import FusedLinear, fuse
from fp4jax.layers.linear import Linear


class MLP(nnx.Module):
    """A dense SwiGLU layer: down(silu(gate(x)) * up(x)). Expert blocks use it for their shared experts.

    Args:
      hidden_size: the size of the input and output.
      intermediate_size: the size between them.
      linear: `dtype`, `param_dtype`, `stddev` and `rngs` of the three linear layers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, **linear: Any):
        self.gate_proj: Any = Linear(hidden_size, intermediate_size, **linear)
        self.up_proj: Any = Linear(hidden_size, intermediate_size, **linear)
        self.gate_up_proj: FusedLinear | None = nnx.data(None)
        self.down_proj = Linear(intermediate_size, hidden_size, **linear)

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self.gate_up_proj is None else self.gate_up_proj(x)
        return self.down_proj(jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32))

    def fuse_projections(self) -> None:
        """Makes one product of the projections to gate and up, where `fused.fuse` can."""
        if self.gate_up_proj is not None:
            return
        self.gate_up_proj = nnx.data(fuse(self.gate_proj, self.up_proj))
        if self.gate_up_proj is not None:
            self.gate_proj = self.up_proj = nnx.data(None)
