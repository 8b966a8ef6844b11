"""Quantizes a folder of plain weights to NVFP4, layer by layer, and writes the result as a new folder.

Each decoder layer becomes one file, so that a run that was stopped can be resumed. Weights are first cast to the type
that the config names, then rounded like the tool whose layout is written does (`dialect` of `nvfp4.quantize`).
Activation scales are calibrated on sample text; see the module `calibrate`.
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

# Serving systems concatenate these projections and multiply them in one GEMM: projection -> name of the GEMM.
_MULTIPLIED_AS_ONE = {
    "gate_proj": "gate_up", "up_proj": "gate_up", "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv",
    "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of `quantize_folder`.

    layout: the layout to write, "modelopt" or "compressed_tensors".
    shared_scales: whether projections that serving systems multiply in one GEMM (gate and up; q, k and v; the first
      projections of latent attention) share one global scale, from their largest amax. Systems that support only one
      global scale per GEMM need this.
    four_over_six: as in `nvfp4.quantize`; weights are then rounded in the dialect "exact".
    quantize_dense: whether attention, dense MLPs and shared experts are quantized too, not only the routed experts.
      Embeddings, routers, norms and the head are never quantized.
    """

    layout: Layout = "modelopt"
    shared_scales: bool = True
    four_over_six: bool = False
    quantize_dense: bool = False


class _Module(NamedTuple):
    """A linear layer to quantize, [rows, k], and its place in a parameter of the model.

    name: the layer's name in the folder. path: the parameter. expert: the index of the expert, None if the parameter
    has no experts. start: the first of the layer's rows in the parameter (of that expert).
    """

    name: str
    path: ParamPath
    expert: int | None
    start: int
    rows: int
    k: int

    def specs(self, layout: Layout) -> dict[str, Spec]:
        """Returns {name: spec} of the layer's tensors in the output folder."""
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
    """Quantizes a folder of plain weights to NVFP4.

    The output has one file per decoder layer, one file for all other weights, an index, the configs, and every file of
    the source that is no weight. If a call is stopped, the same call resumes it, and the result has the same bytes as
    that of an uninterrupted call. It needs memory for one decoder layer and the hidden states of one sequence; the
    hidden states of all sequences are in files of the output folder until it is finished.

    Args:
      source: the folder of plain weights.
      output: the folder to write.
      ids: the token ids of the sample text that calibrates activation scales, integers [sequences, length].
      recipe: the choices of how to quantize.

    Raises:
      FileNotFoundError: a file of the source is missing.
      ValueError: `load_model` would refuse the source, or it is quantized already; the sample text does not fit the
        model; the output folder holds something else, or was begun with other settings; K of a layer is no multiple of
        16; or weights or activations are not finite. The message names the file, the tensor or the setting.
    """
    source, output = Path(source), Path(output)
    match = match_folder(source)
    _check_plain(match)
    targets = {path: _targets(match, path, recipe) for path in match.sources}
    layers = match.config.num_hidden_layers
    ids = np.asarray(ids, np.int32)
    check_ids(match.config, ids)
    digest = f"{ids.shape} ids, sha256 {hashlib.sha256(ids.tobytes()).hexdigest()}"
    # Other devices and JAX versions round activations differently. A run that they resumed would mix both results, so
    # that they are part of the settings, which `begin` compares.
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
    for name in sorted(match.reader.names()):  # also tensors that the model does not use, since they are copied
        if (dtype := match.reader.dtype(name)) not in DTYPES:
            raise ValueError(f"{match.reader.file_of(name)}: tensor {name} has type {dtype}, which is not supported")


def _targets(match: Match, path: ParamPath, recipe: Recipe) -> list[_Module]:
    """Returns the linear layers of a parameter that become NVFP4; an empty list if it stays plain.

    Raises:
      ValueError: K of a layer is no multiple of 16.
    """
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
    """Yields groups of modules whose weights share a global scale; shared: see `Recipe.shared_scales`."""
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
    """Returns the names of all tensors that belong to no decoder layer and are not among those made by quantizing.

    These are embeddings, norm, head, and the tensors of the source that the model does not use.
    """
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
    """Quantizes rows of one or several weights with one common global scale.

    Args:
      weights: arrays [N, K] or [E, N, K].
      experts: for each weight, the index of the expert to take, i32 []; it has no effect for [N, K].
      places: for each weight, (first row, number of rows) to take.
      dialect, four_over_six: as in `nvfp4.quantize`.

    Returns:
      (codes, block scales, amax) of the rows of all weights, concatenated.
    """
    parts = []
    for weight, expert, (start, rows) in zip(weights, experts, places, strict=True):
        whole = weight if weight.ndim == 2 else jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)
        parts.append(whole[start : start + rows])
    w = jnp.concatenate(parts)
    quantized = nvfp4.quantize(w, dialect=dialect, four_over_six=four_over_six)
    return quantized.qdata, quantized.block_scale, largest(w)


# --- scales ---


def _input_amax(module: _Module, amax: Amax) -> Any:
    if module.expert is None:
        return amax[module_name(module.path[2:-1], "")]
    of_experts = amax["mlp.experts"]
    return of_experts[0] if module.path[-1] == "w13" else of_experts[1 + module.expert]


def _scale(what: str, amax: Any, divisor: float, layout: Layout) -> np.ndarray:
    """Returns the global scale of an amax as `layout` stores it, in the same arithmetic as `nvfp4.quantize`.

    It is amax / divisor for ModelOpt, and divisor / amax for compressed-tensors, clipped to the range of global scales.
    It is 1 if the amax is 0 or subnormal.

    Args:
      what: the name of the values in messages.
      amax: the largest magnitude of the values, f32.
      divisor: the amax that a global scale of 1 stands for.
      layout: the layout that is written.

    Raises:
      ValueError: the amax is NaN or infinite.
    """
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
