"""Output folders that may be written in several runs: starting or resuming one, and finishing it.

An unfinished folder has a hidden folder inside with the settings that it was begun with. A later run resumes it only
with the same settings and an unchanged source.
"""

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
    """Starts an output folder, or resumes an unfinished one, and returns the hidden folder inside for working files.

    Args:
      source: the folder that is read.
      output: the folder that is written, created if it does not exist.
      settings: everything that the written bytes depend on, by name; the values can be written as JSON.

    Raises:
      ValueError: `output` is the source, is a file, holds something else than an unfinished run, or was begun with
        other settings or another source; the message names the setting.
    """
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
    """Finishes an output folder whose weight files are written: adds all other files and removes the hidden folder.

    It copies the source's other files, such as the tokenizer's, and writes hf_quant_config.json (if the layout has it),
    the index and config.json. config.json comes last: no loader takes a folder without it for a model.

    Args:
      source: the folder that was read.
      output: the folder that is written.
      described: the quantization configs of the output.
      index: the contents of model.safetensors.index.json; None: the output has a single weight file.
    """
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
            place.pop(key, None)  # it describes the quantization of the source
    config["quantization_config"] = described.section
    if described.section is None:
        del config["quantization_config"]
    write_text(output / CONFIG_NAME, as_json(config))
    shutil.rmtree(output / _WORK)


def as_json(values: Any) -> str:
    """Returns JSON text in the form that Hugging Face tools write: indented by two, with a newline at the end."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the safetensors files of a folder: those in its index, or model.safetensors."""
    index = folder / INDEX_NAME
    return sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS_NAME]


def _fingerprint(source: Path) -> dict[str, Any]:
    names: Iterable[str] = [CONFIG_NAME, *weight_files(source)]
    stats = {name: (source / name).stat() for name in names}
    return {name: f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}" for name, stat in stats.items()}
