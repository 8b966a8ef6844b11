"""Reports on a folder before it is loaded: whether it loads, its formats, its scales, and the memory that it needs.

Whether a folder loads is decided by the code that the loader uses: `match.examine_folder`, and the checks of the
tensors of scales (`stored.Source.problems`). This module itself only counts.
"""

import collections
import os
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fp4jax import nvfp4
from fp4jax.block_fp8 import quantize_blocks
from fp4jax.checkpoint.match import Match, examine_folder
from fp4jax.checkpoint.names import Path, stacked_name
from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.checkpoint.storage.stored import Source
from fp4jax.experts import runs_on_kernel
from fp4jax.grouped_gemm.packed_weights import arrange_experts
from fp4jax.nvfp4 import NVFP4Tensor
from pallas_kernels.simt.formats import FOUR_OVER_SIX_SCALE

# Suffix of a global scale's name -> suffix of the input scale's name. The character before the suffix is a dot, or "_"
# if experts are stacked in one parameter.
_SCALES = {"weight_scale_2": "input_scale", "weight_global_scale": "input_global_scale"}
_GLOBAL_SCALE = re.compile(rf"(.+[._])({'|'.join(_SCALES)})$")
# With four-over-six, block scales reach 256 in blocks whose largest code is 6, and 256 * 6 / 4 where it is 4. Without
# it, the largest block scale is near 448.
_FOUR_OVER_SIX_MAX = FOUR_OVER_SIX_SCALE * 6 / 4
RATIOS = (1.0, 1.001, 1.1, 2.0, 10.0)  # lower edges of the bins that count gate-to-up ratios; the last bin is open
_PROGRESS_FROM = 1000  # steps; a shorter loop ends before a user can read the progress bar
# Limits of `as_text`: columns of a line, texts of one kind, entries of a list. The report itself is complete.
_COLUMNS, _MOST_TEXTS, _MOST_ENTRIES = 100, 10, 10
_LONG_LIST = re.compile(rf"(?:\S+, ){{{_MOST_ENTRIES},}}\S+")


def inspect_folder(
    folder: str | os.PathLike,
    *,
    quantization: Mapping[str, Any] | str | None = None,
    ep: int = 1,
    dtype: Any = None,
    input_scales: str = "stored",
) -> dict[str, Any]:
    """Reports what `load_model` would make of a folder; it reads headers and scales, but not the weights.

    The only weights that it reads are the embedding and the head of a folder that stores both although they are tied.

    Args:
      folder, quantization, dtype, input_scales: as in `load_model`.
      ep: the number of devices that the experts are split over.

    Returns:
      A dict that can be written as JSON:
        folder: the path.
        loads: whether `load_model` accepts the folder; problems: the reasons why it does not.
        model_type: the type of the model, as in config.json.
        plan: the quantization plan as text.
        formats: {how weights are stored: number of parameters}.
        runs_as: {in which format weights run: number of parameters}.
        disagreements: lines about modules that are not stored as the config says.
        bytes_per_device: bytes of weights and activation scales on each of `ep` devices: `experts`, which are split
          over the devices, and `other`, which every device holds.
        scales: statistics of NVFP4 scales. layers: number of NVFP4 layers. zero_block_scales: the fraction of block
          scales that are 0. largest_block_scale: the largest one. four_over_six: whether all block scales are in the
          range of four-over-six. gate_up_ratios: a histogram of max(gate, up) / min(gate, up) of the global scales of
          gate and up. input_scales_missing: number of layers without an input scale.
      The keys from model_type to bytes_per_device are missing if `match.examine_folder` raises or finds problems.

    Raises:
      FileNotFoundError, ValueError: there is nothing to report on, since the folder cannot be read or `ep` is below 1.
    """
    if ep < 1:
        raise ValueError(f"ep must be at least 1, got {ep}")
    folder = pathlib.Path(folder)
    report: dict[str, Any] = {"folder": str(folder), "loads": False, "problems": []}
    reader = Reader(folder)
    try:
        match = examine_folder(folder, quantization, dtype, input_scales, ep)
    except (ValueError, FileNotFoundError) as error:
        return report | {"problems": [str(error)], "scales": _scales(reader, reader.names())}
    sources = tqdm(
        match.sources.values(), unit="parameter", desc="scales", disable=len(reader.names()) < _PROGRESS_FROM
    )
    report["problems"] = match.problems + [problem for source in sources for problem in source.problems()]
    report["loads"] = not report["problems"]
    if not match.problems:  # otherwise some parameters have no method
        report |= _match_report(match, ep)
    read = {tensor.name for source in match.sources.values() for tensor in source.tensors}
    return report | {"scales": _scales(reader, read)}


def _match_report(match: Match, ep: int) -> dict[str, Any]:
    formats, runs = collections.Counter(), collections.Counter()
    sizes = collections.Counter(dict.fromkeys(("experts", "other"), 0))
    experts: dict[Path, list[Any]] = {}  # w13 and w2 of every block
    for path, source in match.sources.items():
        method = match.methods[path]
        formats[source.stored] += 1
        arrays = _arrays(source, method.format if method.online else None, path)
        if stacked_name(path) is not None:
            experts.setdefault(path[:-1], []).append(arrays)
        else:
            sizes["other"] += _size(arrays)
        kind = f"{method.format}, from bf16" if method.online else "bf16" if "" in source.leaves else source.stored
        runs[f"{kind}, activations {method.activations}" if method.format == "nvfp4" else kind] += 1
        if (scale := match.scales.get(path)) is not None:
            sizes["experts" if path[-1] == "w2" else "other"] += 4 * np.size(scale)
    packed = runs_on_kernel(np.dtype(match.config.dtype))
    for w13, w2 in experts.values():
        arrange = partial(arrange_experts, size=match.config.moe_intermediate_size, packed=packed)
        sizes["experts"] += _size(jax.eval_shape(arrange, w13, w2))
    return {
        "model_type": match.config.to_hf()["model_type"],
        "plan": str(match.plan),
        "formats": dict(formats),
        "runs_as": dict(runs),
        "disagreements": match.disagreements,
        "bytes_per_device": {"experts": -(-sizes["experts"] // ep), "other": sizes["other"], "ep": ep},
    }


def _arrays(source: Source, online: str | None, path: Path) -> Any:
    """Returns the arrays that a parameter will have in the model, as ShapeDtypeStructs.

    online: the format that plain weights are quantized to while they are loaded; None: they are not quantized.
    """
    structs = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in source.leaves.items()}
    if "global_scale" in structs:
        return NVFP4Tensor(**structs)
    if online == "block_wise_fp8":
        return jax.eval_shape(quantize_blocks, structs[""])
    if online == "nvfp4":
        *lead, n, _ = structs[""].shape
        scale = jax.ShapeDtypeStruct((*lead, n if path[-1] == "w13" else 1, 1) if lead else (), np.float32)
        return jax.eval_shape(lambda w, g: nvfp4.quantize(w, global_scale=g), structs[""], scale)
    return structs.get("", structs)


def _size(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _scales(reader: Reader, read: set[str]) -> dict[str, Any]:
    """Counts the scales of NVFP4 layers; `inspect_folder` lists the keys of the result.

    read: names of the tensors that the loader would read; layers are found by their global scales among these.
    """
    modules = sorted(m.groups() for name in read if (m := _GLOBAL_SCALE.match(name)) and name in reader)
    zeros = total = missing = 0
    largest, ratios = 0.0, []
    globals_: dict[str, np.ndarray] = {}
    for module, suffix in tqdm(modules, unit="layer", desc="counting", disable=len(modules) < _PROGRESS_FROM):
        blocks = f"{module}weight_scale"
        if blocks in reader and reader.dtype(blocks) == "F8_E4M3":
            values = reader.read(blocks)
            codes = values.view(np.uint8) & 0x7F
            zeros, total = zeros + int((codes == 0).sum()), total + codes.size
            largest = max(largest, float(np.where(codes == 0x7F, 0, values.astype(np.float32)).max(initial=0)))
        missing += module + _SCALES[suffix] not in reader
        scale = reader.read(module + suffix).astype(np.float64)
        if (np.isfinite(scale) & (scale > 0)).all():
            globals_[module] = scale
    for module, scale in globals_.items():
        up = globals_.get(module.replace(".gate_proj.", ".up_proj.")) if ".gate_proj." in module else None
        if up is not None and scale.size == up.size == 1:
            ratios.append(_ratio(scale.item(), up.item()))
        elif scale.shape[1:2] == (2,):  # experts are stacked: the scales of gate and up are in one tensor [E, 2]
            ratios += [_ratio(gate, up) for gate, up in scale.reshape(-1, 2).tolist()]
    counts = np.histogram(ratios, [*RATIOS, np.inf])[0].tolist() if ratios else []
    return {
        "layers": len(modules),
        "zero_block_scales": zeros / total if total else 0.0,
        "largest_block_scale": largest,
        "four_over_six": bool(modules) and 0 < largest <= _FOUR_OVER_SIX_MAX,
        "gate_up_ratios": {"edges": list(RATIOS), "counts": counts, "largest": max(ratios, default=1.0)},
        "input_scales_missing": missing,
    }


def _ratio(gate: float, up: float) -> float:
    return max(gate, up) / min(gate, up)


def as_text(report: Mapping[str, Any]) -> str:
    """Formats a report of `inspect_folder` for people, in lines of about 100 columns; long lists are shortened."""
    lines = [f"{report['folder']}: {'loads' if report['loads'] else 'DOES NOT LOAD'}"]
    lines += _some([f"problem: {problem}" for problem in report["problems"]], "  ")
    if "plan" in report:
        plan = report["plan"].splitlines()
        last = [line for line in plan if line.startswith(("as they are:", "note:"))]  # shown even if layers are cut
        lines += [f"model: {report['model_type']}", *_some([line for line in plan if line not in last]), *_some(last)]
        for title, key in (("parameters stored as", "formats"), ("parameters that run as", "runs_as")):
            lines += _wrapped(f"{title}: " + ", ".join(f"{kind}: {count}" for kind, count in report[key].items()))
        size = report["bytes_per_device"]
        whole = _size_text(size["experts"] + size["other"])
        lines.append(f"memory per device with ep={size['ep']}: {whole}, of which experts {_size_text(size['experts'])}")
        lines += _some([f"config and tensors differ: {line}" for line in report["disagreements"]])
    scales = report["scales"]
    if scales["layers"]:
        lines += _wrapped(
            f"NVFP4 layers: {scales['layers']}; block scales: {scales['zero_block_scales']:.2%} zero, largest "
            f"{scales['largest_block_scale']:g}{' (four-over-six)' if scales['four_over_six'] else ''}; "
            f"{scales['input_scales_missing']} input scales missing"
        )
        ratios = scales["gate_up_ratios"]
        if ratios["counts"]:
            bins = [f"{count} from {edge:g}" for edge, count in zip(ratios["edges"], ratios["counts"], strict=True)]
            lines += _wrapped(
                f"gate and up scales differ by a factor: {', '.join(bins)}; largest {ratios['largest']:.3g}"
            )
    return "\n".join(lines)


def _size_text(num_bytes: int) -> str:
    """Returns a size in GiB, or in MiB if it is below 0.01 GiB."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.01 else f"{num_bytes / 2**20:.2f} MiB"


def _some(texts: Sequence[str], indent: str = "") -> list[str]:
    """Returns the first texts in wrapped lines, and a line that says how many more there are."""
    lines = [line for text in texts[:_MOST_TEXTS] for line in _wrapped(text, indent)]
    return lines + ([f"{indent}... and {len(texts) - _MOST_TEXTS} more"] if len(texts) > _MOST_TEXTS else [])


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Wraps a text into lines; long lists in it are shortened, and names longer than a line are not broken."""
    text = _LONG_LIST.sub(_shortened, text)
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=indent, subsequent_indent=indent + "    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _shortened(found: re.Match[str]) -> str:
    entries = found[0].split(", ")
    return f"{', '.join(entries[:_MOST_ENTRIES])} and {len(entries) - _MOST_ENTRIES} more"
