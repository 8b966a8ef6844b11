"""The end of a kernel that reaches into other devices' memory: nobody leaves before everybody has arrived."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes


class Meeting:
    """Where the blocks of the same index of all devices wait for each other: a semaphore and a barrier of the block."""

    def __init__(self, semaphore: Any, barrier: Any = None):
        self.semaphore, self.barrier = semaphore, barrier

    @staticmethod
    def scratch(warpgroups: int) -> list[Any]:
        """What a kernel that meets needs."""
        return [plgpu.SemaphoreType.REGULAR, *([plgpu.Barrier(num_arrivals=warpgroups)] if warpgroups > 1 else [])]

    def meet(self, devices: int, warpgroups: int) -> None:
        """Waits until everybody's block is here; what was stored before is visible to all of them after it."""

        def signal_and_wait():
            lanes.sync()  # one thread signals for all
            for d in range(devices):
                pl.semaphore_signal(self.semaphore, device_id=jnp.int32(d))
            pl.semaphore_wait(self.semaphore, devices, decrement=False)

        if warpgroups == 1:
            signal_and_wait()
            return
        lanes.sync()
        plgpu.barrier_arrive(self.barrier)

        @pl.when(lanes.warpgroup_index() == 0)
        def _():  # signals are expensive: one block, one signal
            plgpu.barrier_wait(self.barrier)
            signal_and_wait()
