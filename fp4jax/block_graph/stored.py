"""Compiled programs in a folder, where a later process finds them without tracing them again.

JAX's compilation cache finds a program by the code that it was lowered to. So every process traces and lowers all of
its programs first, which is Python code: 25 s for a model of 48 layers. A `ProgramStore` finds a program by what it was
made from: the function and its static arguments, the shapes, dtypes and places of the arrays, XLA's options, JAX's
settings and contexts, the environment variables that JAX, XLA and NCCL read, the devices, every file of this library,
and the versions of those below it. If any of this changes, the program is compiled again.

That covers a program as long as its Python code belongs to this library, JAX, Flax or NumPy, as it is in their files.
A program that something else is part of, such as a layer of the caller's, is compiled in every process. Nobody looks
for functions that were replaced in a running process (monkeypatching): do not use a store there.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import io
import os
import pickle
import platform
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import config as jax_config
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

_PACKAGES = ("fp4jax", "pallas_kernels")
# Packages whose versions stand for their code.
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
_STANDARD = ("builtins", "collections", "functools", "copyreg", "abc", "enum", "types", "typing", "dataclasses")
_VERSIONED = re.compile("jax|flax|numpy|ml.dtypes|nvidia|opt.einsum", re.IGNORECASE)
_VARIABLES = ("JAX_", "XLA_", "NCCL_", "CUDA_", "NVIDIA_", "NVSHMEM_")
_FLAGS_AT_IMPORT = os.environ.get("XLA_FLAGS")  # XLA reads them once


class ProgramStore:
    """Programs in a folder.

    Whoever can write into the folder can run code in the processes that read it, as with JAX's compilation cache. So it
    must belong to the user, and nobody else may write into it.

    Args:
      folder: is made if it does not exist.

    Raises:
      ValueError: the folder belongs to another user, or others may write into it; or JAX's compilation cache is on. XLA
        cannot write a program that it has read from there: on a CPU some of its functions are missing afterwards.
      OSError: it cannot be made, or is a file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
            raise ValueError(
                "JAX's compilation cache is on (JAX_COMPILATION_CACHE_DIR), and programs that it has cannot be kept in "
                "a store: use one or the other"
            )
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(self.folder):
            raise ValueError(
                f"{self.folder}: programs are only read from a folder that belongs to you and that nobody else can "
                "write into; take another one, or chmod go-w"
            )

    def path(self, name: str, made_from: Any, structs: Any) -> Path | None:
        """Returns the file of a program; None, with a warning, for one that cannot be found by what it was made from.

        Args:
          name: is part of the file's name.
          made_from: functions, static arguments and options: whatever makes the program, but for `structs`.
          structs: a tree of ShapeDtypeStructs or arrays, the program's arguments.
        """
        try:
            if jax.process_count() > 1:
                raise ValueError("of several processes all would have to find it, or none")
            if os.environ.get("XLA_FLAGS") != _FLAGS_AT_IMPORT:
                raise ValueError("XLA_FLAGS have changed since this process began, and XLA may not have read them")
            leaves, tree = jax.tree.flatten(structs)
            kinds = [(leaf.shape, str(leaf.dtype), bool(leaf.weak_type), _place(leaf.sharding)) for leaf in leaves]
            made = _pickled((made_from, kinds, tree, _surroundings(_devices_of(structs))))
        except Exception as error:  # there are many ways in which an object can refuse to be described
            warnings.warn(f"{name} is not kept in {self.folder}: {error!r}", stacklevel=2)
            return None
        digest = hashlib.sha256(made).hexdigest()[:32]
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}.program"

    def load(self, path: Path, structs: Any) -> jax.stages.Compiled | None:
        """Returns the program in a file of `path`; None if there is none, or if it cannot be read: then it warns."""
        if not path.exists():
            return None
        devices = _devices_of(structs)
        try:
            if not _is_private(path):
                raise PermissionError("the file is not yours, or others can write into it")
            content = path.read_bytes()
            digest, content = content[:32], content[32:]
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("the file is damaged")
            return serialize_executable.deserialize_and_load(
                *pickle.loads(content), backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:  # whatever a damaged file leads to
            warnings.warn(f"{path} cannot be read, so its program is compiled again: {error!r}", stacklevel=2)
            return None

    def save(self, path: Path, program: jax.stages.Compiled, structs: Any) -> None:
        """Writes a program into a file of `path`, as a whole or not at all. It warns of one that cannot be written."""
        temporary = None
        try:
            placed = jax.tree.leaves((program.input_shardings, program.output_shardings))
            if {d for sharding in placed for d in sharding.device_set} - set(_devices_of(structs)):
                raise ValueError("it runs on devices that its arguments do not tell")
            if _code.__wrapped__() != _CODE:
                raise ValueError("files of the library have changed since this process began")
            content = pickle.dumps(serialize_executable.serialize(program))
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=path.name, delete=False) as file:
                temporary = file.name
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        except Exception as error:  # the program is good, so the caller goes on
            warnings.warn(f"{path.name} is not kept, the next process compiles it again: {error!r}", stacklevel=2)
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)


def _devices_of(structs: Any) -> list[Any]:
    """The devices of a program, in the order of its mesh: those of most arguments, else JAX's default device."""
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(structs)]
    default = jax.config.jax_default_device or jax.local_devices()[0]
    return max((_in_order(place) for place in places if place is not None), key=len, default=[default])


def _is_private(path: Path) -> bool:
    found = path.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


class _ForeignCode(Exception):
    """Something that a program was made from is code that neither a version nor the library's files stand for."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Mesh):  # its devices cannot be pickled
            return tuple, (_mesh(obj),)
        # A class stands for itself, a function for itself and its kind, another object for its class.
        named = [obj] if hasattr(obj, "__qualname__") else []
        for kind in named if isinstance(obj, type) else (*named, type(obj)):
            if str(kind.__module__).partition(".")[0] not in (*_PACKAGES, *_LIBRARIES, *_STANDARD):
                raise _ForeignCode(f"{kind.__module__}.{kind.__qualname__} is not the library's own")
        return NotImplemented


def _pickled(value: Any) -> bytes:
    with io.BytesIO() as file:
        pickler = _Pickler(file, protocol=5)
        pickler.fast = True  # equal values have equal bytes, whichever of their parts are one object
        pickler.dump(value)
        return file.getvalue()


def _mesh(mesh: Mesh) -> tuple[Any, ...]:
    return mesh.axis_names, mesh.devices.shape, str(mesh.axis_types), tuple(d.id for d in mesh.devices.flat)


def _place(sharding: Any) -> Any:
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return _mesh(sharding.mesh), str(sharding.spec), sharding.memory_kind
    if isinstance(sharding, SingleDeviceSharding):
        return _in_order(sharding)[0].id, sharding.memory_kind
    raise TypeError(f"a program with arguments in {sharding} is not kept")


def _in_order(sharding: Any) -> list[Any]:
    return list(sharding.mesh.devices.flat if isinstance(sharding, NamedSharding) else sharding.device_set)


def _surroundings(devices: Sequence[Any]) -> Any:
    client = devices[0].client
    settings = {name: repr(value) for name, value in sorted(jax.config.values.items())}
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    every = [(device.id, device.device_kind) for device in client.devices()]
    where = client.platform, client.platform_version, every, [device.id for device in devices], _cpu_features()
    contexts = re.sub(" at 0x[0-9a-f]+", "", repr(jax_config.trace_context()))  # without addresses of objects
    return settings, contexts, variables, where, _CODE


@functools.cache
def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@functools.cache
def _code() -> tuple[Any, ...]:
    """The versions of the libraries, and a hash of all files of this one."""
    found = hashlib.sha256()
    for package in _PACKAGES:
        root = Path(importlib.import_module(package).__file__ or "").parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".json"):
                found.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    versions = {d.name: d.version for d in importlib.metadata.distributions() if _VERSIONED.match(d.name or "")}
    return tuple(sorted(versions.items())), found.hexdigest()


_CODE = _code()  # of the files that this process imports, not of what they are later
