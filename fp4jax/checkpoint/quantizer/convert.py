"""An NVFP4 folder in the other layout: names and configs change, codes and block scales are copied byte for byte.

Global scales become their reciprocals, and 1 / (1 / x) is not always x: where it is not, the file's metadata keep the
bytes of x, so that converting back gives every tensor as it was. Likewise what the config said, where it would not
come back by itself. What was changed since is not taken from there.
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

_COPY_BYTES = 1 << 24


def convert_folder(source: str | os.PathLike, output: str | os.PathLike, layout: Layout) -> None:
    """An NVFP4 folder in `layout`, which is the other one than it has; files keep their names and the order of tensors.

    Files are streamed. The same call again goes on where one was stopped.

    Raises:
      FileNotFoundError, ValueError: a source that is not NVFP4, has this layout already, both, or layers in another
        format; scales without a finite reciprocal; an output folder with anything else in it. With file and tensor.
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
    """What the output's configs say, and what of the source's to keep for converting back."""
    folder = reader.folder
    file = folder / QUANT_CONFIG_NAME
    section = own_config(read_json(folder / CONFIG_NAME))  # wherever it stands, as for loading
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
    """The data stay where they are in the file; only scales are written anew, each in its own four bytes."""
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
    """Of a little-endian f32."""
    scale = np.frombuffer(value, "<f4")
    found = reciprocal(scale)
    if not (np.isfinite(scale) & (scale > 0) & np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"{file}: tensor {name} has {scale[0]}; it must be positive, with a finite reciprocal")
    return found.astype("<f4").tobytes()
