"""A plain folder quantized to NVFP4, layer by layer: each layer becomes a file, and a run that was stopped goes on.

Weights are rounded as the tool whose layout is written rounds them (`nvfp4.quantize`'s dialects), in the type that the
config names. Activation scales come from sample text, see `calibrate`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fp4jax import nvfp4
from fp4jax.checkpoint.match import Match, at, match_folder
from fp4jax.checkpoint.names import Path as ParamPath, expert_modules, module_name, stacked_name
from fp4jax.checkpoint.quantizer.calibrate import Amax, HiddenStates, check_ids, layer_state, linear_modules
from fp4jax.checkpoint.quantizer.unfinished import begin, finish
from fp4jax.checkpoint.storage.layouts import NAMES, SCALE_SHAPES, Layout, Traits, describe, plain_modules
from fp4jax.checkpoint.storage.reader import DTYPES
from fp4jax.checkpoint.storage.stored import FLOATS
from fp4jax.checkpoint.storage.tensor_file import Spec, TensorFile, read_header
from fp4jax.layers.linear import largest
from pallas_kernels.simt.formats import AMAX_DIVISOR, AMAX_DIVISOR_FOUR_OVER_SIX

_MULTIPLIED_AS_ONE = {
    "gate_proj": "gate_up", "up_proj": "gate_up", "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv",
    "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a folder is quantized.

    shared_scales: projections that serving systems multiply as one (gate and up; q, k and v; the first ones of latent
    attention) get one global scale, of the largest amax, as systems that know only one per product expect.
    four_over_six: see `nvfp4.quantize`. quantize_dense: also attention, dense MLPs and shared experts; embeddings,
    routers, norms and the head never are.
    """

    layout: Layout = "modelopt"
    shared_scales: bool = True
    four_over_six: bool = False
    quantize_dense: bool = False


class _Module(NamedTuple):
    """A linear layer to quantize: `rows` from `start` on of a parameter, of expert `expert` where it has experts."""

    name: str
    path: ParamPath
    expert: int | None
    start: int
    rows: int
    k: int

    def specs(self, layout: Layout) -> dict[str, Spec]:
        """Its tensors in the folder."""
        scalar = Spec("F32", SCALE_SHAPES[layout])
        made = (
            Spec("U8", (self.rows, self.k // 2)),
            Spec("F8_E4M3", (self.rows, self.k // nvfp4.BLOCK_SIZE)),
            scalar,
            scalar,
        )
        return {f"{self.name}.{end}": spec for end, spec in zip(NAMES[layout], made, strict=True)}


def quantize_folder(
    source: str | os.PathLike, output: str | os.PathLike, ids: np.ndarray, recipe: Recipe = Recipe()
) -> None:
    """NVFP4 in `output` of a plain folder; ids i32 [sequences, length] are the sample text for activation scales.

    The output has one file per decoder layer and one for the rest, an index, the config and every file of the source
    that is no weight. The same call again goes on where one was stopped, to the same bytes. Memory: one layer, and a
    sequence; the hidden states of all sequences are in a file of the output folder until it is finished.

    Raises:
      FileNotFoundError, ValueError: a source that `load_model` would refuse or that is not plain, ids that the model
        does not know, an output folder with anything else in it or begun otherwise, K no multiple of 16, weights or
        activations that are not finite; naming file, tensor or setting.
    """
    source, output = Path(source), Path(output)
    match = match_folder(source)
    _check_plain(match)
    targets = {path: _targets(match, path, recipe) for path in match.sources}
    layers = match.config.num_hidden_layers
    ids = np.asarray(ids, np.int32)
    check_ids(match.config, ids)
    digest = f"{ids.shape} ids, sha256 {hashlib.sha256(ids.tobytes()).hexdigest()}"
    # Other machines and versions round activations otherwise: the bytes would be those of neither.
    place = f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
    work = begin(source, output, {**dataclasses.asdict(recipe), "calibration": digest, "computed by": place})

    files = [output / f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors" for i in range(layers + 1)]
    hidden = HiddenStates(match, ids, work)
    if not files[0].exists():
        hidden.embed()
        _copy(match, _rest(match, {n for ms in targets.values() for m in ms for n in m.specs(recipe.layout)}), files[0])
    for layer in tqdm(range(layers), unit="layer", desc="quantizing", disable=None):
        if not files[layer + 1].exists():
            _quantize_layer(match, layer, targets, hidden, recipe, files[layer + 1])
        hidden.forget(layer)
    quantized = [module.name for modules in targets.values() for module in modules]
    headers = {file.name: read_header(file)[0] for file in files}
    weight_map = {name: file for file, header in headers.items() for name in header}
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for h in headers.values() for entry in h.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    shapes = {name: tuple(entry["shape"]) for header in headers.values() for name, entry in header.items()}
    described = describe(recipe.layout, plain_modules(shapes, quantized), Traits("nvfp4", fp8_cache=False))
    finish(source, output, described, index)


# --- what is quantized ---


def _check_plain(match: Match) -> None:
    for source in match.sources.values():
        if source.stored != "bf16":
            name = source.tensors[0].name
            raise ValueError(f"{match.reader.file_of(name)}: {name} is quantized already ({source.stored})")
    for name in sorted(match.reader.names()):  # tensors that the model does not know are copied too
        if (dtype := match.reader.dtype(name)) not in DTYPES:
            raise ValueError(f"{match.reader.file_of(name)}: tensor {name} has type {dtype}, which is not supported")


def _targets(match: Match, path: ParamPath, recipe: Recipe) -> list[_Module]:
    """The linear layers of a parameter that become NVFP4."""
    shape = at(match.model, path).get_value().shape
    if stacked_name(path) is not None:
        modules = [
            _Module(name, path, expert, start, rows, shape[-1])
            for name, expert, start, rows in expert_modules(path, shape, match.prefix)
        ]
    elif recipe.quantize_dense and path[0] == "layers" and path[2:-1] in linear_modules(match.model.layers[path[1]]):
        modules = [_Module(module_name(path[:-1], match.prefix), path, None, 0, *shape)]
    else:
        modules = []
    for module in modules:
        if module.k % nvfp4.BLOCK_SIZE:
            raise ValueError(f"{module.name}.weight: K = {module.k} is no multiple of {nvfp4.BLOCK_SIZE}")
    return modules


def _groups(modules: list[_Module], shared: bool) -> Iterator[list[_Module]]:
    """Modules with one global scale for all."""
    groups: dict[str, list[_Module]] = {}
    for module in modules:
        parent, _, last = module.name.rpartition(".")
        together = _MULTIPLIED_AS_ONE.get(last, last) if shared else last
        groups.setdefault(f"{parent}.{together}", []).append(module)
    yield from groups.values()


# --- files ---


def _of_layer(match: Match, layer: int) -> list[ParamPath]:
    return [path for path in match.sources if path[:2] == ("layers", layer)]


def _rest(match: Match, made: set[str]) -> list[str]:
    """Tensors of no decoder layer: embeddings, norm, head, and what the model does not know, unless it is made anew."""
    in_layers = {t.name for path, source in match.sources.items() if path[0] == "layers" for t in source.tensors}
    return sorted(match.reader.names() - in_layers - made)


def _spec(match: Match, name: str) -> Spec:
    return Spec(match.reader.dtype(name), match.reader.shape(name))


def _copy(match: Match, names: list[str], file: Path) -> None:
    with TensorFile(file, {name: _spec(match, name) for name in names}) as out:
        for name in names:
            out.write(name, _finite(match, name))


def _quantize_layer(
    match: Match,
    layer: int,
    targets: dict[ParamPath, list[_Module]],
    hidden: HiddenStates,
    recipe: Recipe,
    file: Path,
) -> None:
    paths = _of_layer(match, layer)
    modules = [module for path in paths for module in targets[path]]
    copied = [t.name for path in paths if not targets[path] for t in match.sources[path].tensors]
    specs = {name: _spec(match, name) for name in copied}
    for module in modules:
        specs |= module.specs(recipe.layout)
    graphdef, state = layer_state(match, layer)
    with TensorFile(file, specs) as out:
        for name in copied:
            out.write(name, _finite(match, name))
        for group in _groups(modules, recipe.shared_scales):
            _write_weights(out, group, [at(state, module.path[2:]).get_value() for module in group], recipe)
        amax = hidden.run_layer(layer, graphdef, state)
        for module in modules:
            scale = _scale(f"the input of {module.name}", _input_amax(module, amax), AMAX_DIVISOR, recipe.layout)
            out.write(f"{module.name}.{NAMES[recipe.layout].input_scale}", scale)


def _write_weights(out: TensorFile, group: list[_Module], weights: list[jax.Array], recipe: Recipe) -> None:
    names = NAMES[recipe.layout]
    divisor = AMAX_DIVISOR_FOUR_OVER_SIX if recipe.four_over_six else AMAX_DIVISOR
    found = _quantize(
        tuple(weights),
        tuple(np.int32(m.expert or 0) for m in group),
        places=tuple((m.start, m.rows) for m in group),
        dialect="exact" if recipe.four_over_six else recipe.layout,
        four_over_six=recipe.four_over_six,
    )
    qdata, block_scale, amax = jax.device_get(found)
    scale = _scale(f"{' or '.join(module.name for module in group)}.weight", amax, divisor, recipe.layout)
    row = 0
    for module in group:
        rows = slice(row, row := row + module.rows)
        for end, value in zip(names, (qdata[rows], block_scale[rows], scale), strict=False):
            out.write(f"{module.name}.{end}", value)


@partial(jax.jit, static_argnames=("places", "dialect", "four_over_six"))
def _quantize(weights, experts, *, places, dialect, four_over_six) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of one or several weights [N, K] or [E, N, K] with one global scale -> codes, block scales and amax."""
    parts = []
    for weight, expert, (start, rows) in zip(weights, experts, places, strict=True):
        whole = weight if weight.ndim == 2 else jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)
        parts.append(whole[start : start + rows])
    w = jnp.concatenate(parts)
    quantized = nvfp4.quantize(w, dialect=dialect, four_over_six=four_over_six)
    return quantized.qdata, quantized.block_scale, largest(w)


# --- numbers ---


def _input_amax(module: _Module, amax: Amax) -> Any:
    if module.expert is None:
        return amax[module_name(module.path[2:-1], "")]
    of_experts = amax["mlp.experts"]
    return of_experts[0] if module.path[-1] == "w13" else of_experts[1 + module.expert]


def _scale(what: str, amax: Any, divisor: float, layout: Layout) -> np.ndarray:
    """amax (f32) / divisor or its reciprocal, as `nvfp4.quantize` computes them: 1 for zeros, within its range."""
    if not np.isfinite(amax):
        raise ValueError(f"{what} has {amax}: only finite numbers can be quantized")
    scale = np.float32(1)
    if amax >= np.finfo(np.float32).tiny:
        scale = amax / np.float32(divisor) if layout == "modelopt" else np.float32(divisor) / amax
    low, high = nvfp4.GLOBAL_SCALE_RANGE
    return np.full(SCALE_SHAPES[layout], np.clip(scale, np.float32(low), np.float32(high)), np.float32)


def _finite(match: Match, name: str) -> np.ndarray:
    values = match.reader.read(name)
    if match.reader.dtype(name) in FLOATS and not np.isfinite(values).all():
        raise ValueError(f"{match.reader.file_of(name)}: tensor {name} has numbers that are not finite")
    return values
