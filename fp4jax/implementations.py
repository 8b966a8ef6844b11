"""The implementations of an op, and the one rule for choosing between them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax import lax

from pallas_kernels.simt.hardware import H100_SMS

Implementation = Literal["xla", "mosaic_gpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
_HOPPER_NAMES = ("H100", "H200", "H800", "H20")  # device kinds of compute capability 9.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with its static options.

    A `Call` is hashable, and equal ones share one compiled program. A closure made anew for every call would not.
    """

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any], **options: Any) -> "Call":
        """Returns a Call that runs `function(*operands, **options)`; the options must be hashable."""
        return cls(function, tuple(options.items()))

    def __call__(self, *operands: Any) -> Any:
        return self.function(*operands, **dict(self.options))


def resolve_implementation(op: str, implementation: str | None, available: tuple[str, ...] = ("xla",)) -> str:
    """Returns the implementation that an op runs: for None the first available one, else the one that was named.

    Args:
      op: the name of the op, for errors.
      implementation: what the user asked for.
      available: the implementations that the op has, best first.

    Raises:
      ValueError: the name is not one of `IMPLEMENTATIONS`.
      NotImplementedError: the name is known but the op does not have it. A named implementation never falls back.
    """
    if implementation is None:
        return available[0]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; choose None or one of {IMPLEMENTATIONS}")
    if implementation not in available:
        raise NotImplementedError(f"{op}: implementation={implementation!r} does not exist yet; it has {available}")
    return implementation


def run_implementation(
    op: str,
    implementation: str | None,
    operands: tuple[Any, ...],
    *,
    xla: Call,
    mosaic_gpu: Call,
    problem: str | None,
    differentiable: bool = True,
) -> Any:
    """Calls `xla(*operands)` or `mosaic_gpu(*operands)`.

    Implementation None calls `mosaic_gpu` if JAX sees a Hopper GPU and the program is lowered for CUDA. (A program on
    CPU arrays is not, on a machine with GPUs either.) Otherwise it calls `xla`, and also if there is a `problem` or if
    arrays outside shard_map are seen to lie on several devices, where XLA partitions better; inside jit that is seen on
    Explicit meshes only. Derivatives are those of `xla`.

    Args:
      op: the name of the op, for errors.
      implementation: "xla", "mosaic_gpu" or None.
      operands: pytrees of arrays.
      xla: the op in plain JAX.
      mosaic_gpu: the op as a kernel.
      problem: why the kernel cannot serve this call, or None if it can.
      differentiable: False for a kernel that writes arrays in place, which has no derivatives.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: "mosaic_gpu" was named and cannot serve the call; the message says why.
    """
    chosen = None if implementation is None else resolve_implementation(op, implementation, ("xla", "mosaic_gpu"))
    if chosen == "xla" or (chosen is None and (problem is not None or not has_hopper_gpu() or _is_spread(operands))):
        return xla(*operands)
    if chosen is None:
        return _run_by_platform(xla, mosaic_gpu, differentiable, operands)
    if problem is None and not has_hopper_gpu():
        problem = f"needs a GPU of compute capability 9.0; JAX sees {jax.devices()}"
    if problem is None and _is_spread(operands):
        problem = "the arrays are spread over several devices; call it inside shard_map"
    if problem is not None:
        raise NotImplementedError(f"{op}: implementation='mosaic_gpu': {problem}")
    return _run_kernel(xla, mosaic_gpu, differentiable, operands)


def run_by_platform(operands: tuple[Any, ...], *, xla: Call, mosaic_gpu: Call) -> Any:
    """Calls `mosaic_gpu(*operands)` if the program is lowered for CUDA, else `xla(*operands)`."""
    return _run_by_platform(xla, mosaic_gpu, True, operands)


def run_kernel(operands: tuple[Any, ...], *, xla: Call, mosaic_gpu: Call) -> Any:
    """Calls `mosaic_gpu(*operands)`. Its derivatives are those of `xla`."""
    return _run_kernel(xla, mosaic_gpu, True, operands)


# Both functions are jitted: an eager call then finds its program in the cache, and its arrays decide the platform.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_kernel(xla, mosaic_gpu, differentiable, operands):
    return _differentiated_as(xla, mosaic_gpu, differentiable)(*operands)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_by_platform(xla, mosaic_gpu, differentiable, operands):
    cuda = _differentiated_as(xla, mosaic_gpu, differentiable)
    return lax.platform_dependent(*_vary_alike(operands), cuda=cuda, default=xla)


def _differentiated_as(xla, mosaic_gpu, differentiable):
    if not differentiable:
        return mosaic_gpu
    kernel = jax.custom_jvp(mosaic_gpu)
    kernel.defjvp(lambda primals, tangents: jax.jvp(xla, primals, tangents))
    return kernel


def _vary_alike(operands):
    """Makes all operands vary over the same mesh axes of a shard_map, so that the results of both branches do too."""
    leaves, structure = jax.tree.flatten(operands)
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    every = frozenset().union(*varying)
    missing = [tuple(every - v) for v in varying]
    leaves = [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(leaves, missing, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def _is_spread(operands) -> bool:
    """Whether an array lies on several devices, or has an axis that is sharded over an Explicit mesh axis."""
    for leaf in jax.tree.leaves(operands):
        if any(axis is not None for axis in jax.typeof(leaf).sharding.spec):
            return True
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and len(leaf.devices()) > 1:
            return True
    return False


def peers_problem(axis_name: str) -> str | None:
    """Returns None if kernels may store into the memory of the other devices of a mesh axis, else the reason why not.

    They may if the mesh has this one axis only, one process drives all its devices, and the GPUs are of a kind that is
    built onto boards with NVLink between all of them (SXM). The kind decides because JAX does not tell which links
    there are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != (axis_name,):
        return f"needs a mesh with the one axis {axis_name!r}, got {mesh.axis_names}"
    if jax.process_count() > 1:
        return f"needs one process that drives all devices, there are {jax.process_count()}"
    if mesh.abstract_device is not None:
        kinds = {mesh.abstract_device.device_kind}
    else:
        gpus = _gpus()
        if len(gpus) < mesh.size:
            return f"needs {mesh.size} GPUs, JAX sees {len(gpus)}"
        kinds = {gpu.device_kind for gpu in gpus}
    without = [kind for kind in kinds if "PCIe" in kind or "NVL" in kind]
    return f"needs NVLink between all GPUs, which {without} do not have" if without else None


def multiprocessors() -> int:
    """Returns the number of multiprocessors of the smallest GPU that JAX sees or traces for; without a GPU, an H100's.

    That many blocks of threads run at once, so that they may wait for each other.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.num_cores:
        return target.num_cores
    return min((getattr(gpu, "core_count", None) or H100_SMS for gpu in _gpus()), default=H100_SMS)


def has_hopper_gpu() -> bool:
    """Whether JAX sees a GPU of compute capability 9.0, or traces for one (with an abstract mesh of H100, say)."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None:
        return any(name in target.device_kind for name in _HOPPER_NAMES)
    return _sees_hopper_gpu()


@functools.cache
def _sees_hopper_gpu():
    return any(getattr(device, "compute_capability", "") == "9.0" for device in _gpus())


def _gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:  # no GPU backend
        return []
