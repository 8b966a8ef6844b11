"""A folder that is written in several runs: which run began it, and how it is finished."""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fp4jax.checkpoint.folder_config import CONFIG_NAME, QUANT_CONFIG_NAME, read_json
from fp4jax.checkpoint.storage.layouts import Described
from fp4jax.checkpoint.storage.reader import INDEX_NAME, WEIGHTS_NAME
from fp4jax.checkpoint.storage.tensor_file import write_text
from fp4jax.quant_config.schemas import SECTIONS

_WORK = ".unfinished"
_SETTINGS = "settings.json"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".part")


def begin(source: Path, output: Path, settings: Mapping[str, Any]) -> Path:
    """A hidden folder in `output` for what a later run needs; ValueError where it cannot go on with what is there."""
    if source.resolve() == output.resolve():
        raise ValueError(f"{output} is the folder that is read; write to another one")
    wanted = {**settings, **{f"source file {name}": kind for name, kind in _fingerprint(source).items()}}
    work, file = output / _WORK, output / _WORK / _SETTINGS
    if file.is_file():
        found = json.loads(file.read_text())
        for key in [*wanted, *found]:
            if (old := found.get(key)) != (new := wanted.get(key)):
                raise ValueError(
                    f"{output} was begun with {key} = {old!r}, which now is {new!r}; delete the folder, choose another "
                    "one, or go on as it was begun"
                )
        return work
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output is a folder")
    if output.exists() and {path.name for path in output.iterdir()} - {_WORK}:
        raise ValueError(f"{output} is not empty, and no unfinished run; delete it or choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(wanted, indent=1) + "\n")
    return work


def finish(
    source: Path,
    output: Path,
    described: Described,
    index: Mapping[str, Any] | None,
) -> None:
    """Files that are no weights, then the index and config.json, without which nobody takes the folder for a model."""
    for path in sorted(source.iterdir()):
        apart = path.name in (CONFIG_NAME, QUANT_CONFIG_NAME, INDEX_NAME) or path.suffix in _WEIGHT_FILES
        if path.is_file() and not apart and not path.name.startswith("."):
            shutil.copyfile(path, output / path.name)
    if described.file is not None:
        write_text(output / QUANT_CONFIG_NAME, as_json(described.file))
    if index is not None:
        write_text(output / INDEX_NAME, as_json(index))
    config = read_json(source / CONFIG_NAME)
    inner = config.get("text_config")
    for place, key in itertools.product((config, inner if isinstance(inner, dict) else {}), SECTIONS):
        if place is not config or key != "quantization_config":
            place.pop(key, None)  # what it says is of the source
    config["quantization_config"] = described.section
    if described.section is None:
        del config["quantization_config"]
    write_text(output / CONFIG_NAME, as_json(config))
    shutil.rmtree(output / _WORK)


def as_json(values: Any) -> str:
    """As other tools write it."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a folder."""
    index = folder / INDEX_NAME
    return sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS_NAME]


def _fingerprint(source: Path) -> dict[str, Any]:
    names: Iterable[str] = [CONFIG_NAME, *weight_files(source)]
    stats = {name: (source / name).stat() for name in names}
    return {name: f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}" for name, stat in stats.items()}
