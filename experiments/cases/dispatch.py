"""What bench_dispatch.py measures: cells, routings, and steps for `chained_steps.ChainedSteps`.

Letters of the shapes: T tokens per device, H hidden size, k experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp4jax.expert_parallel import Dispatched, combine, dispatch
from fp4jax.expert_parallel.all_to_all import combine_all_to_all, dispatch_all_to_all
from fp4jax.expert_parallel.wire_formats import kernel_encode
from fp4jax.implementations import has_hopper_gpu
from pallas_kernels.exchange.dispatch import check_pack
from pallas_kernels.exchange.plan import Routes


class Cell(NamedTuple):
    """One combination of sizes that all implementations are measured with.

    Attributes:
      ranks: the number of devices.
      tokens: tokens per device, T.
      routing: "random" or "even", see `make_routing`.
      hidden: the hidden size, H.
      form: "per_peer" or "per_slot", see `fp4jax.expert_parallel.dispatch`.
      experts: the number of experts on all devices together.
      top_k: experts per token, k.
    """

    ranks: int
    tokens: int
    routing: str
    hidden: int
    form: str
    experts: int
    top_k: int

    @property
    def capacity(self) -> int:
        """The pair_capacity: rows that one device can send to another.

        With even routing it is exactly what is sent, with random routing the worst case.
        """
        if self.routing == "even":
            return -(-self.tokens // self.ranks)
        return self.tokens if self.form == "per_peer" else self.tokens * self.top_k

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks


def make_routing(cell: Cell) -> tuple[jax.Array, jax.Array]:
    """Expert ids i32 [ranks * T, k] and weights f32 [ranks * T, k].

    With random routing each token goes to k distinct experts, drawn uniformly. With even routing k is 1, and the tokens
    of a device go to all devices in turn.
    """
    rng = np.random.default_rng(0)
    shape = (cell.ranks, cell.tokens)
    if cell.routing == "even":
        ids = np.arange(cell.tokens) % cell.ranks * cell.local_experts + rng.integers(0, cell.local_experts, shape)
        ids = ids[..., None]
    else:
        ids = np.argsort(rng.random((*shape, cell.experts)), axis=-1)[..., : cell.top_k]
    ids = jnp.asarray(ids.reshape(-1, cell.top_k), jnp.int32)
    return ids, jnp.asarray(rng.random(ids.shape), jnp.float32)


def rows_sent(cell: Cell, ids: np.ndarray) -> np.ndarray:
    """The number of rows that each token becomes: one per device (per_peer) or one per slot (per_slot)."""
    if cell.form == "per_slot":
        return np.full(len(ids), cell.top_k)
    owner = ids // cell.local_experts
    return (owner[:, :, None] == np.arange(cell.ranks)).any(axis=1).sum(axis=1)


# --- steps: (state, operands, zero) -> (next state, results that must be computed) ---


def exchange(state, operands, zero, *, ranks):
    """One all_to_all of bf16 rows in buffers of the worst case, without data about which token is where."""
    del operands, zero
    state = lax.all_to_all(state.reshape(ranks, -1, state.shape[-1]), "ep", 0, 0).reshape(state.shape)
    return state, ()


def exchange_and_sum(state, operands, zero, *, ranks):
    """`exchange`, and the sum of the rows from all devices, as a combine needs it."""
    state, _ = exchange(state, operands, zero, ranks=ranks)
    wide = state.reshape(ranks, -1, state.shape[-1]).astype(jnp.float32)
    return state, jnp.sum(wide, axis=0).astype(state.dtype)


def dispatch_step(state, operands, zero, *, ranks, cell, wire, implementation):
    """One dispatch.

    With the implementation "low_latency" the state is a number and the receive buffers that the program keeps; with the
    others it is a number.
    """
    buffers = None
    if implementation == "low_latency":
        implementation, (state, buffers) = None, state
    (x, ids, weights), state = lax.optimization_barrier((operands, state))
    ids = ids + zero * state
    scale = jnp.float32(0.01) if wire == "nvfp4" else None
    if implementation == "nccl":
        routes = Routes(cell.tokens, cell.top_k, ranks, cell.local_experts, cell.capacity, cell.form)
        encode = None if wire == "bf16" else wire
        packed = has_hopper_gpu() and check_pack([x], routes, encode=kernel_encode(encode, scale)) is None
        received = dispatch_all_to_all(
            [x], scale, ids, weights, routes=routes, axis_name="ep", encode=encode, packed=packed
        )
        return received[1][0, 0], received
    d = dispatch(
        x, ids, weights, num_experts=cell.experts, form=cell.form, wire_format=wire, global_scale=scale,
        pair_capacity=cell.capacity, buffers=buffers, implementation=implementation,
    )  # fmt: skip
    if buffers is not None:  # the rows stay in the buffers, so they need not be results
        return (d.local_ids[:1, 0], d.buffers), (d.send_map,)
    return d.local_ids[0, 0], (jax.tree.leaves(d.x), d.local_ids, d.local_weights, d.send_map)


def combine_step(state, operands, zero, *, ranks, cell, implementation):
    """One combine of rows that the experts are assumed to have computed already."""
    (y, send_map, weights), state = lax.optimization_barrier((operands, state))
    send_map = send_map + zero * state
    home = weights if cell.form == "per_slot" else None
    if implementation == "nccl":
        home = jnp.ones(send_map.shape, jnp.float32) if home is None else home
        out = combine_all_to_all(y, send_map, home, devices=ranks, axis_name="ep", implementation=None)
    else:
        width = 1 if cell.form == "per_slot" else cell.top_k
        ids, ones = jnp.zeros((y.shape[0], width), jnp.int32), jnp.ones((y.shape[0], width))
        d = Dispatched(y, ids, ones, send_map, jnp.int32(0))  # combine reads no tokens of it
        out = combine(y, d, topk_weights=home, implementation=implementation)
    return out[0, 0].astype(jnp.int32), out
