"""Measures the largest input (amax) of every linear layer and expert on sample text, for the activation scales.

Only one decoder layer is in memory at a time. Every expert is measured on every token, so that experts which are rarely
chosen are calibrated too; the hidden states for the next layer are computed with the usual routing. The hidden states
of all sequences between two layers are in a file, so that an interrupted run resumes from there.
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

_ROUTERS = ("gate", "shared_expert_gate")  # names of the linear layers that are never quantized

Amax = dict[str, np.ndarray]  # name of a linear layer inside its decoder layer -> largest magnitude of its input, f32


def check_ids(config: Any, ids: np.ndarray) -> None:
    """Checks the token ids of the sample text.

    Args:
      config: the model's config.
      ids: should be [sequences, length], with ids below the vocabulary's size.

    Raises:
      ValueError: the shape is another one, an id is outside of the vocabulary, or a sequence has more tokens than the
        model has positions.
    """
    if ids.ndim != 2 or ids.size == 0 or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"calibration needs ids [sequences, length] below {config.vocab_size}, got {ids}")
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"sequences of {ids.shape[1]} tokens exceed {config.max_position_embeddings}")


class HiddenStates:
    """The inputs of the decoder layers on the sample text, [sequences, length, H] each, kept in files of a folder.

    Args:
      match: the folder that is quantized, and its model.
      ids: the token ids of the sample text, i32 [sequences, length].
      folder: where the files are written, one per layer, with values in the model's dtype.
    """

    def __init__(self, match: Match, ids: np.ndarray, folder: Path):
        self._match, self._ids, self._folder = match, ids, folder
        self._dtype = np.dtype(jnp.dtype(match.config.dtype))
        self._raw = np.dtype(f"u{self._dtype.itemsize}")  # .npy files have no bf16, so that values are stored as bits
        self._shape = (*ids.shape, match.config.hidden_size)

    def embed(self) -> None:
        """Writes the inputs of the first decoder layer: the embeddings of all tokens."""
        (source,) = (source for path, source in self._match.sources.items() if path == ("embed_tokens", "weight"))
        table = self._match.reader.read(source.tensors[0].name)
        self._write(0, lambda sequence: np.asarray(table[self._ids[sequence]]).astype(self._dtype))

    def run_layer(self, index: int, graphdef: Any, state: Any) -> Amax:
        """Runs decoder layer `index`, writes the inputs of the next layer, and returns the largest inputs.

        Args:
          index: the index of the layer, whose inputs must have been written.
          graphdef, state: the layer with its weights, from `layer_state`.

        Returns:
          {name of a linear layer inside the decoder layer: largest magnitude of its input}, f32. The experts are
          "mlp.experts" with values [E + 1]: the largest input of GEMM 1, then that of GEMM 2 of each expert.
        """
        before, amax = self._open(index), {}

        def through_layer(sequence: int) -> np.ndarray:
            after, found = _run_layer(graphdef, state, jax.device_put(before[sequence].view(self._dtype)))
            for name, value in jax.device_get(found).items():
                amax[name] = np.asarray(np.maximum(amax.get(name, np.float32(0)), value))  # a NaN stays NaN
            return np.asarray(after)

        self._write(index + 1, through_layer)
        return amax

    def forget(self, index: int) -> None:
        """Deletes the inputs of decoder layer `index`."""
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
    """Reads the weights of one decoder layer, and returns the layer as (graphdef, state).

    Layers of the same structure have equal graphdefs, so that `run_layer` compiles once for all of them.

    Args:
      match: the folder, whose weights are all plain.
      layer: the index of the layer.
    """
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
    """Returns {path: linear layer} of a decoder layer's linear layers that may be quantized: all but routers and gates.

    Experts are no linear layers in the model, and so are not included.
    """
    found: list[tuple[Any, Any]] = list(nnx.iter_graph(module))
    return {path: node for path, node in found if isinstance(node, Linear) and path[-1] not in _ROUTERS}


class _Watched:
    """Wraps a linear layer that is called once, and keeps the largest magnitude of its input."""

    def __init__(self, linear: Linear):
        self.linear = linear
        self.amax: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        self.amax = largest(x)
        return self.linear(x)


# XLA must not choose algorithms by timing them: the choice can differ between processes, and a resumed run would then
# give other bytes than an uninterrupted one.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_gpu_deterministic_ops": True})
def _run_layer(graphdef: Any, state: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs a decoder layer on one sequence x [length, H], and returns its output and the largest inputs by name."""
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
