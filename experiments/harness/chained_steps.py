"""The time of one step of a program on several devices, measured in programs that run many steps.

To start a program on several devices costs up to a millisecond, which would hide a step of some microseconds. So one
program runs many steps. Every step gets a number that the previous step computed: without it XLA could run the steps
at the same time, or drop those whose results nobody reads. All results are kept for the same reason.
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

# Milliseconds that one run should take, so that starting it, which costs about one millisecond, adds only 2%.
_CALL_MS = 50


class ChainedSteps:
    """A compiled program of many steps on a mesh.

    Attributes:
      compiled: the program.
      steps: the number of steps that one run of it takes.

    Args:
      mesh: the devices.
      step: the function `step(state, operands, zero, ranks=number of devices) -> (next state, results)`. It runs inside
        shard_map. It must make its work depend on the state times `zero`, which is 0 at run time but not known to the
        compiler, and make the next state from its results.
      state: the state of the first step; None: the i32 number 0. Given arrays are sharded over `axis`.
      operands: arrays that are the same in every step, sharded over `axis`.
      unrolled: the number of steps in the body of the program's loop.
      about_us: a guess of a step's microseconds, from which the number of loop rounds follows.
      axis: the mesh axis.
      compiler_options: options of XLA for the program.
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
        if jax.process_count() > 1:  # all processes must run the same program, but their guesses differ
            loops = int(multihost_utils.broadcast_one_to_all(np.int32(loops)))
        if not timing.on_gpu():
            unrolled, loops = 2, 1
        self.steps, ranks = unrolled * loops, mesh.shape[axis]
        once = jax.jit(functools.partial(step, ranks=ranks))  # a jit of its own, so that JAX traces the step once

        def body(state, operands, zero):
            state = jnp.int32(0) if state is None else state

            def several(state):
                results = []
                for _ in range(unrolled):
                    state, result = once(state, operands, zero[0])
                    results.append(result)
                return state, results

            carry = several(state)
            if loops > 1:  # a round reads the state alone, so no results are copied into it
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
        """Start the program and return its results, which may not be computed yet."""
        return self.compiled(*self._args)

    def us(self, repeats: int) -> float:
        """Microseconds per step: the median over `repeats` runs of the program, after one run that is not timed."""
        jax.block_until_ready(self.run())
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(self.run())
            times.append(1e6 * (time.perf_counter() - start) / self.steps)
        return statistics.median(times)
