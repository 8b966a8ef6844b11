"""Flags that make several processes or hosts one: --coordinator_address, --num_processes, --process_id."""

import jax
from absl import app, flags

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, the same for all: several processes or hosts become one."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which one this is.", lower_bound=0)


def join_processes() -> None:
    """Before the first use of a device: joins the processes that the coordinator flags name, if they are set.

    Raises:
      app.UsageError: some of the three flags are missing, the address has no port, or there is no such process.
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
