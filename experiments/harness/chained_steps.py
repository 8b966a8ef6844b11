"""Time of a step of a multi-device program: many steps per call, one after the other.

Called one at a time, a program on several devices costs up to a millisecond before it runs. Steps are chained: each
gets a number that the step before computed, so that they neither overlap nor vanish, and what they compute is kept.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments.harness import timing

# Milliseconds that a call should take: starting a program on several devices costs about one, whatever is in it.
_CALL_MS = 50


class ChainedSteps:
    """A compiled program of many steps on a mesh. compiled: the program; steps: how many it runs.

    step(state, operands, zero, ranks=devices) -> (next state, results), inside shard_map with everything sharded over
    `axis`. state None: an i32 number, 0 at first. A step must use it, times `zero` (which no compiler knows), and
    make the next one of its results. unrolled: steps in the body of a loop; about_us: a guess of a step's time, which
    says how many rounds the loop takes.
    """

    def __init__(
        self,
        mesh: Mesh,
        step: Callable[..., Any],
        state: Any,
        operands: Any,
        *,
        unrolled: int,
        about_us: float,
        axis: str = "ep",
        compiler_options: dict[str, str] | None = None,
    ):
        loops = max(1, round(1e3 * _CALL_MS / (unrolled * about_us)))
        if jax.process_count() > 1:  # guesses differ, programs must not
            loops = int(multihost_utils.broadcast_one_to_all(np.int32(loops)))
        if not timing.on_gpu():
            unrolled, loops = 2, 1
        self.steps, ranks = unrolled * loops, mesh.shape[axis]
        once = jax.jit(functools.partial(step, ranks=ranks))  # traced once

        def body(state, operands, zero):
            state = jnp.int32(0) if state is None else state

            def several(state):
                results = []
                for _ in range(unrolled):
                    state, result = once(state, operands, zero[0])
                    results.append(result)
                return state, results

            carry = several(state)
            if loops > 1:  # what a step leaves behind is not read by the next round: no copies
                carry = lax.fori_loop(1, loops, lambda _, carry: several(carry[0]), carry)
            return jax.tree.map(lambda a: a[None], carry)

        given = P() if state is None else P(axis)
        specs = (given, P(axis), P(axis))
        program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(axis), check_vma=False))
        sharding = NamedSharding(mesh, P(axis))
        zero = jax.make_array_from_callback((ranks,), sharding, lambda index: np.zeros(ranks, np.int32)[index])
        self._args = (state, operands, zero)
        self.compiled = program.lower(*self._args).compile(compiler_options)

    def run(self) -> Any:
        """Starts the program; -> what it will have computed."""
        return self.compiled(*self._args)

    def us(self, repeats: int) -> float:
        """Microseconds per step: median over `repeats` runs, after one that is not timed."""
        jax.block_until_ready(self.run())
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(self.run())
            times.append(1e6 * (time.perf_counter() - start) / self.steps)
        return statistics.median(times)
