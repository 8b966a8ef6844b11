"""Flags that join several processes, on one host or several, to one program.

They are --coordinator_address, --num_processes and --process_id; every process is started with all three.
"""

import jax
from absl import app, flags

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, given to all processes that run together."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --coordinator_address: the number of processes.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator_address: the number of this process, from 0.", lower_bound=0
)


def join_processes() -> None:
    """Join the processes that the three flags name; do nothing if none of the flags is set.

    A script calls this before it uses a device for the first time.

    Raises:
      app.UsageError: only some of the flags are set, the address has no port, or the process id is not below the number
        of processes.
    """
    address, count, number = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if address is None and count is None and number is None:
        return
    if address is None or count is None or number is None:
        raise app.UsageError("--coordinator_address, --num_processes and --process_id go together")
    if number >= count:
        raise app.UsageError(f"--process_id={number} must be below --num_processes={count}")
    if not address.rpartition(":")[2].isdigit():
        raise app.UsageError(f"--coordinator_address={address!r} is not host:port")
    jax.distributed.initialize(address, count, number)
