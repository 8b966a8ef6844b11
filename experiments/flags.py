"""Flags that several experiments share, and the environment switches they mirror: flag over environment over config.

    FD_DISPATCH_USE_FP4=1    tokens cross the network in NVFP4 (0: in bf16); --wire_format wins over it

The names are those of the serving system whose deployments this library is compared with.
"""

import os
import warnings

import jax
from absl import app, flags

from fp4jax.wire_formats import WIRE_FORMATS

_USE_FP4, _STALE = "FD_DISPATCH_USE_FP4", "FD_USE_NVFP4_COMM_QUANT"
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}

_WIRE_FORMAT = flags.DEFINE_enum(
    "wire_format", None, WIRE_FORMATS, f"How tokens cross the network; default: {_USE_FP4}, else the script's own."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, the same for all: several processes or hosts become one."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which one this is.", lower_bound=0)


def wire_format(config_value: str) -> str:
    """The wire format: of the flag, else of the environment, else of the script or its config.

    Raises:
      app.UsageError: the variable has a value that is no boolean.
    """
    if _STALE in os.environ:
        warnings.warn(f"{_STALE} is not read any more; set {_USE_FP4}", stacklevel=2)
    if _WIRE_FORMAT.value is not None:
        return _WIRE_FORMAT.value
    value = os.environ.get(_USE_FP4)
    if value is None:
        return config_value
    if value.strip().lower() not in _BOOLEANS:
        raise app.UsageError(f"{_USE_FP4}={value!r} is not one of {sorted(_BOOLEANS)}")
    return "nvfp4" if _BOOLEANS[value.strip().lower()] else "bf16"


def join_processes() -> None:
    """Before the first use of a device: joins the processes that the coordinator flags name, if they are set.

    Raises:
      app.UsageError: some of the three flags are missing.
    """
    given = [f.value is not None for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)]
    if not any(given):
        return
    if not all(given):
        raise app.UsageError("--coordinator_address, --num_processes and --process_id go together")
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
