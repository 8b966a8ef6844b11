"""Converts an NVFP4 folder to the other layout: ModelOpt's to compressed-tensors', or back.

Tensor names and configs change; codes and block scales are copied byte for byte. Global scales and input scales become
their reciprocals. Since 1 / (1 / x) is not always x in f32, the metadata of the file keeps the bytes of x where it
differs, so that converting back restores every tensor exactly. The metadata of the first file also keeps the source's
config where converting back would not reproduce it. If a tensor or the config was changed in between, the kept value
is not used.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fp4jax.checkpoint.folder_config import CONFIG_NAME, QUANT_CONFIG_NAME, read_json
from fp4jax.checkpoint.quantizer.unfinished import begin, finish, weight_files
from fp4jax.checkpoint.storage.kept_scales import KEY, kept_in, reciprocal
from fp4jax.checkpoint.storage.layouts import (
    NAMES,
    SCALE_SHAPES,
    Described,
    Layout,
    describe,
    layout_of,
    plain_modules,
    traits_of,
)
from fp4jax.checkpoint.storage.reader import INDEX_NAME, Reader
from fp4jax.checkpoint.storage.tensor_file import header_bytes, part_of, publish, read_header
from fp4jax.quant_config.schemas import own_config

_COPY_BYTES = 1 << 24  # 16 MiB per read: little memory, and few system calls for files of gigabytes


def convert_folder(source: str | os.PathLike, output: str | os.PathLike, layout: Layout) -> None:
    """Writes an NVFP4 folder in the other layout to a new folder.

    The files keep their names and their order of tensors. They are copied in pieces of 16 MiB, so that little memory is
    needed. If a call is stopped, the same call resumes it and skips the files that are complete.

    Args:
      source: the folder to convert.
      output: the folder to write.
      layout: the layout to write; the source must have the other one.

    Raises:
      FileNotFoundError: a file of the source is missing.
      ValueError: the source has no NVFP4 layers, has this layout already, has both layouts, has layers in another
        quantized format, or has a scale without a finite reciprocal; or `begin` refuses the output folder. The message
        names the file and the tensor.
    """
    source, output = Path(source), Path(output)
    reader = Reader(source)
    old = layout_of(reader)
    if old is None or old == layout:
        raise ValueError(f"{source} has {'no NVFP4 layers' if old is None else f'the layout {layout} already'}")
    modules = _nvfp4_modules(reader, old)
    renamed = {
        f"{module}.{before}": f"{module}.{after}"
        for module in modules
        for before, after in zip(NAMES[old], NAMES[layout], strict=True)
    }
    if taken := sorted(new for name, new in renamed.items() if new != name and new in reader and name in reader):
        raise ValueError(f"{reader.file_of(taken[0])}: tensor {taken[0]} stands beside the NVFP4 layer of its name")
    scales = {f"{module}.{end}" for module in modules for end in NAMES[old][2:]}
    described, kept = _configs(reader, old, layout, modules)
    begin(source, output, {"layout": layout})
    files = weight_files(source)
    for file in tqdm(files, unit="file", desc="converting", disable=None):
        if not (output / file).exists():
            _convert_file(source / file, output / file, renamed, scales, layout, kept if file == files[0] else None)
    index = None
    if (source / INDEX_NAME).is_file():
        index = json.loads((source / INDEX_NAME).read_text())
        index["weight_map"] = {renamed.get(name, name): file for name, file in index["weight_map"].items()}
    finish(source, output, described, index)


def _nvfp4_modules(reader: Reader, layout: Layout) -> list[str]:
    names = NAMES[layout]
    ends = f".{names.global_scale}"
    modules = sorted(name.removesuffix(ends) for name in reader.names() if name.endswith(ends))
    for module in modules:
        for end, dtype in zip(names[:2], ("U8", "F8_E4M3"), strict=True):
            name = f"{module}.{end}"
            if name not in reader:
                raise ValueError(f"{reader.folder}: {name} is missing")
            reader.check(name, reader.shape(name), (dtype,))
        for end in names[2:]:
            if (name := f"{module}.{end}") in reader:
                reader.check(name, (1,) if reader.shape(name) == (1,) else (), ("F32",))
    known = {f"{module}.{end}" for module in modules for end in names}
    for name in sorted(reader.names() - known):
        if reader.dtype(name) in ("U8", "F8_E4M3", "I8"):
            raise ValueError(f"{reader.file_of(name)}: tensor {name} is {reader.dtype(name)} and not of an NVFP4 layer")
    return modules


# --- configs ---


def _configs(reader: Reader, old: Layout, new: Layout, modules: list[str]) -> tuple[Described, dict[str, Any] | None]:
    """Returns (the configs of the output, the configs of the source to keep in metadata).

    The second value is None if converting the output back reproduces the configs of the source.
    """
    folder = reader.folder
    file = folder / QUANT_CONFIG_NAME
    section = own_config(read_json(folder / CONFIG_NAME))  # finds the section where the loader finds it
    found = Described(
        None if section is None else dict(section),
        json.loads(file.read_text()) if old == "modelopt" and file.is_file() else None,
    )
    plain = plain_modules({name: reader.shape(name) for name in reader.names()}, modules)

    def in_layout(layout: Layout, described: Described) -> Described:
        return describe(layout, plain, traits_of(described))

    made = in_layout(new, found)
    before = kept_in(read_header(folder / weight_files(folder)[0])[1]).get("config")
    if before is not None and in_layout(old, Described(**before)) == found:
        made = Described(**before)
    return made, None if in_layout(old, made) == found else found._asdict()


# --- files ---


def _convert_file(
    source: Path,
    output: Path,
    renamed: Mapping[str, str],
    scales: set[str],
    layout: Layout,
    config: dict[str, Any] | None,
) -> None:
    """Copies one safetensors file with renamed tensors and converted scales.

    The data of every tensor keeps its place after the header, since a scale and its reciprocal both have four bytes.

    Args:
      source: the file to read.
      output: the file to write.
      renamed: {name in the source: name in the output}; other tensors keep their names.
      scales: names in the source of the tensors that become reciprocals.
      layout: the layout of the output.
      config: the source's configs to keep in the metadata of this file, or None.
    """
    entries, metadata, start = read_header(source)
    before = kept_in(metadata).get("scales", {})
    converted, changed, kept = {}, {}, {}
    with source.open("rb") as content:
        for name, entry in entries.items():
            new, shape = renamed.get(name, name), entry["shape"]
            if name in scales:
                place = entry["data_offsets"][0]
                content.seek(start + place)
                old_bytes = content.read(4)
                new_bytes, shape = _reciprocal(source, name, old_bytes), list(SCALE_SHAPES[layout])
                if name in before and _reciprocal(source, name, bytes.fromhex(before[name][0])) == old_bytes:
                    new_bytes, shape = bytes.fromhex(before[name][0]), before[name][1]
                changed[place] = new_bytes
                usual = list(SCALE_SHAPES["modelopt" if layout == "compressed_tensors" else "compressed_tensors"])
                if _reciprocal(source, name, new_bytes) != old_bytes or entry["shape"] != usual:
                    kept[new] = [old_bytes.hex(), entry["shape"]]
            converted[new] = {**entry, "shape": shape}
        metadata = {key: value for key, value in (metadata or {}).items() if key != KEY}
        parts = {"scales": kept, "config": config}
        if parts := {key: value for key, value in parts.items() if value}:
            metadata[KEY] = json.dumps(parts)
        header = header_bytes(converted, metadata)
        content.seek(start)
        with part_of(output).open("wb") as out:
            out.write(header)
            shutil.copyfileobj(content, out, _COPY_BYTES)
            for place, value in changed.items():
                out.seek(len(header) + place)
                out.write(value)
            publish(out, part_of(output), output)


def _reciprocal(file: Path, name: str, value: bytes) -> bytes:
    """Returns the reciprocal of a little-endian f32, both as four bytes.

    Raises:
      ValueError: the value or its reciprocal is not positive and finite.
    """
    scale = np.frombuffer(value, "<f4")
    found = reciprocal(scale)
    if not (np.isfinite(scale) & (scale > 0) & np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"{file}: tensor {name} has {scale[0]}; it must be positive, with a finite reciprocal")
    return found.astype("<f4").tobytes()
