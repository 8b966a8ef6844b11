"""The targets of rows in dispatch.py: arrays of the peers, or a payload of bytes on this device for an all_to_all."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes


class Peers:
    """Arrays on the receivers, one for each part of a row.

    kernel: a `dispatch.Kernel`. refs: references to this device's own arrays of this kind.
    """

    def __init__(self, kernel: Any, refs: list[Any]):
        self.kernel, self.me = kernel, lax.axis_index(kernel.axis_name)
        self.big, self.small = refs[: len(kernel.big)], refs[len(kernel.big) :]

    def id_of(self, expert: jax.Array, device: jax.Array) -> jax.Array:
        """Id of a global expert id on the receiver, -1 if the expert is on another device."""
        r = self.kernel.routes
        expert = expert - device * r.local_experts
        return jnp.where((expert >= 0) & (expert < r.local_experts), expert, -1)

    def copy(self, buffers: list[Any], device: jax.Array, place: jax.Array, where: jax.Array) -> None:
        """Starts the copies of a row's large parts from `buffers` in shared memory to row `place` of `device`."""
        for buffer, ref in zip(buffers, self.big, strict=True):
            there = plgpu.remote_ref(ref, device).at[self.me, place]
            plgpu.copy_smem_to_gmem(buffer, there, predicate=where, commit_group=False)

    def store(self, i: int, device: Any, place: Any, slot: Any, word: jax.Array, where: jax.Array) -> None:
        """Each lane stores `word` as word `slot` of small part `i` (single value, ids or weights) of one row."""
        r = self.kernel.routes
        peers = [plgpu.remote_ref(self.small[i], jnp.int32(d)) for d in range(r.devices)]
        at = (self.me * r.capacity + place) * self.kernel.widths[i] + slot
        lanes.scatter(peers, at, [word], where=where, which=device)


class Payload:
    """Buffers on this device: packed rows of bytes, and before them the array of the first part if it is apart."""

    def __init__(self, kernel: Any, refs: list[Any]):
        self.kernel, (*self.apart, self.ref) = kernel, refs

    def id_of(self, expert: jax.Array, device: jax.Array) -> jax.Array:
        """The global expert id itself: the receiver computes local ids after the all_to_all."""
        del device
        return expert

    def copy(self, buffers: list[Any], device: jax.Array, place: jax.Array, where: jax.Array) -> None:
        """Starts the copies of a row's large parts from `buffers` in shared memory to row `place` of `device`."""
        there = [ref.at[device, place] for ref in self.apart]
        offset = 0
        for size in self.kernel.big_bytes[self.kernel.apart :]:
            there.append(self.ref.at[device, place, pl.ds(offset, size)])
            offset += size
        for buffer, at in zip(buffers, there, strict=True):
            plgpu.copy_smem_to_gmem(buffer, at, predicate=where, commit_group=False)

    def store(self, i: int, device: Any, place: Any, slot: Any, word: jax.Array, where: jax.Array) -> None:
        """Each lane stores `word` as word `slot` of small part `i` (single value, ids or weights) of one row."""
        k = self.kernel
        offset = sum(k.big_bytes[k.apart :]) // 4 + sum(k.widths[:i])
        row = device * k.routes.capacity + place
        lanes.scatter(self.ref, row * (k.row_bytes // 4) + offset + slot, [word], where=where)
