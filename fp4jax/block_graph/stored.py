"""Compiled programs in a folder, where a later process finds them without tracing them again.

JAX's compilation cache finds a program by the code that it was lowered to. So every process traces and lowers all of
its programs first, which is Python code: 25 s for a model of 48 layers. A `ProgramStore` finds a program by what it was
made from: the function and its static arguments, the shapes, dtypes and places of the arrays, XLA's options, JAX's
settings, environment variables that JAX, XLA and NCCL read, the devices, and every file of this library and the
versions of those below it. If any of this changes, the program is compiled again.

A program that JAX read from its own cache is not saved (`programs.make_program` says why): use one or the other.

That covers a program as long as its Python code belongs to this library, JAX, Flax or NumPy. A program that something
else is part of, such as a layer of the caller's, is compiled in every process.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import io
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

_PACKAGES = ("fp4jax", "pallas_kernels")
# Packages whose versions stand for their code.
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
_STANDARD = ("builtins", "collections", "functools", "copyreg")
_PREFIXES = ("JAX_", "XLA_", "NCCL_", "CUDA_", "MOSAIC_")


class ProgramStore:
    """Programs in a folder.

    Whoever can write into the folder can run code in the processes that read it, as with JAX's compilation cache. So it
    must belong to the user, and nobody else may write into it.

    Args:
      folder: is made if it does not exist.

    Raises:
      ValueError: the folder belongs to another user, or others may write into it.
      OSError: it cannot be made, or is a file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            raise ValueError(
                f"{self.folder}: programs are only read from a folder that belongs to you and that nobody else can "
                "write into; take another one, or chmod go-w"
            )

    def path(self, name: str, made_from: Any, structs: Any) -> Path | None:
        """Returns the file of a program; None for one that cannot be found by what it was made from.

        Args:
          name: is part of the file's name.
          made_from: functions, static arguments and options: whatever makes the program, but for `structs`.
          structs: a tree of ShapeDtypeStructs or arrays, the program's arguments.
        """
        leaves, tree = jax.tree.flatten(structs)
        kinds = [
            (leaf.shape, str(leaf.dtype), bool(getattr(leaf, "weak_type", False)), _place(leaf.sharding))
            for leaf in leaves
        ]
        devices = _devices(leaves)
        if jax.process_count() > 1:  # a program would have to be found by all processes, or by none
            return None
        try:
            made = _pickled((made_from, kinds, tree, _surroundings(devices)))
        except (pickle.PicklingError, AttributeError, TypeError, _ForeignCode):
            return None
        digest = hashlib.sha256(made).hexdigest()[:32]
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}.program"

    def load(self, path: Path, structs: Any) -> jax.stages.Compiled | None:
        """Returns the program in a file of `path`; None if there is none, or if it cannot be read: then it warns."""
        if not path.exists():
            return None
        devices = _devices(jax.tree.leaves(structs))
        try:
            return serialize_executable.deserialize_and_load(
                *pickle.loads(path.read_bytes()), backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:  # whatever a damaged file leads to
            warnings.warn(f"{path} cannot be read, so its program is compiled again: {error!r}", stacklevel=2)
            return None

    def save(self, path: Path, program: jax.stages.Compiled) -> None:
        """Writes a program into a file of `path`, as a whole or not at all; warns of one that JAX cannot save."""
        try:
            content = pickle.dumps(serialize_executable.serialize(program))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            warnings.warn(f"{path.name}: {error}; the next process compiles it again", stacklevel=2)
            return
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=path.name, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)


class _ForeignCode(Exception):
    """Something in what a program was made from is code that neither a version nor the library's files stand for."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) or (callable(obj) and hasattr(obj, "__qualname__")):
            package = str(obj.__module__).partition(".")[0]
            if package not in (*_PACKAGES, *_LIBRARIES, *_STANDARD):
                raise _ForeignCode(f"{obj.__module__}.{obj.__qualname__}")
        return NotImplemented


def _pickled(value: Any) -> bytes:
    with io.BytesIO() as file:
        pickler = _Pickler(file, protocol=5)
        pickler.fast = True  # equal values have equal bytes, whichever of their parts are one object
        pickler.dump(value)
        return file.getvalue()


def _place(sharding: Any) -> Any:
    if sharding is None:
        return None
    ids = [device.id for device in _in_order(sharding)]
    if isinstance(sharding, NamedSharding):
        return str(sharding.mesh.axis_types), dict(sharding.mesh.shape), ids, str(sharding.spec), sharding.memory_kind
    return type(sharding).__name__, ids, sharding.memory_kind


def _in_order(sharding: Any) -> list[Any]:
    if isinstance(sharding, NamedSharding):
        return list(sharding.mesh.devices.flat)
    return sorted(sharding.device_set, key=lambda device: device.id)


def _devices(leaves: Sequence[Any]) -> list[Any]:
    """The devices of a program, in the order of its mesh: those of most arguments, else JAX's default device."""
    found = [_in_order(leaf.sharding) for leaf in leaves if leaf.sharding is not None]
    default = jax.config.jax_default_device or jax.local_devices()[0]
    return max(found, key=len, default=[default])


def _surroundings(devices: Sequence[Any]) -> Any:
    client = devices[0].client
    settings = {name: repr(value) for name, value in sorted(jax.config.values.items())}
    settings["mesh"] = repr(jax.sharding.get_abstract_mesh())
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)}
    kinds = [(device.id, device.device_kind) for device in devices]
    return settings, variables, client.platform, client.platform_version, len(client.devices()), kinds, _code()


@functools.cache
def _code() -> tuple[Any, ...]:
    """The versions of the libraries, and a hash of all files of the library."""
    found = hashlib.sha256()
    for package in _PACKAGES:
        root = Path(importlib.import_module(package).__file__ or "").parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".json"):
                found.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return tuple(importlib.metadata.version(name) for name in _LIBRARIES), found.hexdigest()
