"""Largest inputs of every linear layer and expert on sample text, one decoder layer in memory at a time.

Every expert sees every token, so that rare ones are calibrated too; what goes on to the next layer is routed as usual.
Between layers the hidden states of all sequences lie in a file, so that a run that was interrupted goes on from there.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp4jax.checkpoint.match import Match, at
from fp4jax.checkpoint.names import Path as ParamPath, module_name
from fp4jax.checkpoint.storage.stored import Leaf
from fp4jax.checkpoint.storage.tensor_file import part_of
from fp4jax.layers import Linear, MoEBlock
from fp4jax.layers.linear import largest

_ROUTERS = ("gate", "shared_expert_gate")

Amax = dict[str, np.ndarray]


def check_ids(config: Any, ids: np.ndarray) -> None:
    """ValueError unless they are sequences [sequences, length] that the model knows."""
    if ids.ndim != 2 or ids.size == 0 or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"calibration needs ids [sequences, length] below {config.vocab_size}, got {ids}")
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"sequences of {ids.shape[1]} tokens exceed {config.max_position_embeddings}")


class HiddenStates:
    """What goes into the decoder layers, [sequences, length, H] in the model's dtype, in files of a folder.

    ids: i32 [sequences, length].
    """

    def __init__(self, match: Match, ids: np.ndarray, folder: Path):
        self._match, self._ids, self._folder = match, ids, folder
        self._dtype = np.dtype(jnp.dtype(match.config.dtype))
        self._raw = np.dtype(f"u{self._dtype.itemsize}")  # numpy's files do not know bf16
        self._shape = (*ids.shape, match.config.hidden_size)

    def embed(self) -> None:
        """Make those of the first layer."""
        (source,) = (source for path, source in self._match.sources.items() if path == ("embed_tokens", "weight"))
        table = self._match.reader.read(source.tensors[0].name)
        self._write(0, lambda sequence: np.asarray(table[self._ids[sequence]]).astype(self._dtype))

    def run_layer(self, index: int, graphdef: Any, state: Any) -> Amax:
        """Make those behind a layer from those before it; {module inside of the layer: largest input}, f32.

        A block of experts is [E + 1] under its own name: the input of GEMM 1, and those of GEMM 2.
        """
        before, amax = self._open(index), {}

        def through_layer(sequence: int) -> np.ndarray:
            after, found = _run_layer(graphdef, state, jax.device_put(before[sequence].view(self._dtype)))
            for name, value in jax.device_get(found).items():
                amax[name] = np.asarray(np.maximum(amax.get(name, np.float32(0)), value))  # keeps NaN
            return np.asarray(after)

        self._write(index + 1, through_layer)
        return amax

    def forget(self, index: int) -> None:
        """Those before a layer that is written."""
        self._file(index).unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self._folder / f"hidden_{index}.npy"

    def _open(self, index: int) -> np.ndarray:
        return np.load(self._file(index), mmap_mode="r")

    def _write(self, index: int, make: Any) -> None:
        part = part_of(self._file(index))
        out = np.lib.format.open_memmap(part, "w+", self._raw, self._shape)
        for sequence in range(self._shape[0]):
            out[sequence] = make(sequence).view(self._raw)
        out.flush()
        part.rename(self._file(index))


def layer_state(match: Match, layer: int) -> tuple[Any, Any]:
    """A decoder layer with its weights, as (graphdef, state); layers of one kind have equal graphdefs."""
    module = match.model.layers[layer]
    if isinstance(module.mlp, MoEBlock):
        module.mlp.path = "mlp"
    graphdef, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        place: Any = ("layers", layer, *path)
        if (source := match.sources.get(place)) is not None:
            flat[path] = variable.replace(jax.device_put(_whole(source.leaves[""])))
    return graphdef, nnx.from_flat_state(flat)


def linear_modules(module: nnx.Module) -> dict[ParamPath, Linear]:
    """Linear layers of a decoder layer that may be quantized: all but routers and gates."""
    found: list[tuple[Any, Any]] = list(nnx.iter_graph(module))
    return {path: node for path, node in found if isinstance(node, Linear) and path[-1] not in _ROUTERS}


class _Watched:
    """A linear layer that remembers the largest input of its one call."""

    def __init__(self, linear: Linear):
        self.linear = linear
        self.amax: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        self.amax = largest(x)
        return self.linear(x)


# A choice of algorithms by timing them would differ from process to process, and a run that goes on from another one.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_gpu_deterministic_ops": True})
def _run_layer(graphdef: Any, state: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """x [length, H]."""
    layer = nnx.merge(graphdef, state)
    watched = {path: _Watched(linear) for path, linear in linear_modules(layer).items()}
    for path, one in watched.items():
        setattr(at(layer, path[:-1]), str(path[-1]), one)
    y, _, experts = layer(x[None], jnp.int32(0), None, partial(MoEBlock.calibrate, all_tokens=True))
    amax: Any = {module_name(path, ""): one.amax for path, one in watched.items()}
    if experts is not None:
        amax["mlp.experts"] = jnp.append(experts.input_1, experts.input_2)
    return y[0], amax


def _whole(leaf: Leaf) -> np.ndarray:
    if leaf.parts[0].expert is None:
        return np.asarray(leaf.parts[0].load()).reshape(leaf.shape)
    out = np.empty(leaf.shape, leaf.dtype)
    for part in leaf.parts:
        out[part.expert, part.start : part.start + part.rows] = part.load()
    return out
