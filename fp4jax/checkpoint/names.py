"""Translates the paths of a model's parameters to the names of tensors in a Hugging Face checkpoint.

The path of a parameter, joined by dots, is the name of its tensor, apart from the names in `Decoder.TENSOR_NAMES` and
from the experts. The model stacks the weights of experts as w13 [E, 2I, H] (gate rows first) and w2 [E, H, I]. Older
checkpoints store every projection of every expert in a tensor of its own, newer ones stack the experts.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

PREFIX = "model."
_HEAD = "lm_head"  # the only module whose name in a checkpoint does not start with the prefix
_EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}

Path = tuple[str | int, ...]


class Slot(NamedTuple):
    """The place of one tensor in a parameter.

    path: the parameter. shape: the shape of the tensor. expert: the expert whose rows `start` to `start + shape[0]` the
    tensor holds; None: the tensor is the whole parameter.
    """

    path: Path
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0


def tensor_slots(shapes: Mapping[Path, tuple[int, ...]], renamed: Mapping[str, str] | None = None) -> dict[str, Slot]:
    """Returns {tensor name: its slot} for all parameters of a model, with a tensor per projection of each expert.

    Args:
      shapes: {path: shape} of the parameters.
      renamed: as in `tensor_name`.
    """
    return dict(slot for path, shape in shapes.items() for slot in _slots_of(path, shape, renamed or {}))


def stacked_name(path: Path, prefix: str = PREFIX) -> str | None:
    """Returns the name under which newer checkpoints stack the experts of a w13 or w2, or None for other parameters."""
    if path[-1] not in _STACKED:
        return None
    return f"{module_name(path[:-1], prefix)}.experts.{_STACKED[str(path[-1])]}"


def projections_of(path: Path) -> tuple[str, ...]:
    """Returns the names of the projections that a w13 or w2 parameter holds: gate_proj and up_proj, or down_proj."""
    return _EXPERTS[str(path[-1])]


def expert_modules(path: Path, shape: tuple[int, ...], prefix: str = PREFIX) -> Iterable[tuple[str, int, int, int]]:
    """Yields (module name, expert, first row, number of rows) of each projection of each expert in a w13 or w2.

    Args:
      path: the path of the w13 or w2 parameter.
      shape: its shape, [E, N, K].
      prefix: as in `find_prefix`.
    """
    projections = projections_of(path)
    experts, rows, _ = shape
    rows //= len(projections)
    for expert in range(experts):
        for index, projection in enumerate(projections):
            yield f"{module_name(path[:-1], prefix)}.experts.{expert}.{projection}", expert, index * rows, rows


def find_prefix(names: Iterable[str]) -> str:
    """Returns what the checkpoint puts before the names of the text model's modules, given the names of its tensors.

    This is "model." in most checkpoints. It is longer in those that also hold another model, such as an image encoder:
    "model.language_model.", for example.
    """
    embeddings = sorted(name for name in names if name.endswith("embed_tokens.weight"))
    return embeddings[0].removesuffix("embed_tokens.weight") if embeddings else PREFIX


def module_name(path: Path, prefix: str = PREFIX) -> str:
    """Returns the checkpoint's name for the module or parameter at a path.

    The name is the prefix and the path. Only the head's name does not include the "model." at the end of a prefix:
    "lm_head" for the prefix "model.", "language_model.lm_head" for "language_model.model.".
    """
    name = ".".join(map(str, path))
    if path[0] != _HEAD:
        return prefix + name
    return prefix.removesuffix(PREFIX) + name if prefix.endswith("." + PREFIX) else name


def tensor_name(path: Path, renamed: Mapping[str, str], prefix: str = PREFIX) -> str:
    """Returns the name of the tensor of a parameter that is one tensor in the checkpoint.

    Args:
      path: the path of the parameter.
      renamed: {last element of a path: the end of the tensor's name}, for parameters that the model's checkpoints name
        differently; see `Decoder.TENSOR_NAMES`.
      prefix: as in `find_prefix`.
    """
    return ".".join((module_name(path[:-1], prefix), renamed.get(str(path[-1]), str(path[-1]))))


def _slots_of(path: Path, shape: tuple[int, ...], renamed: Mapping[str, str]) -> Iterable[tuple[str, Slot]]:
    if path[-1] not in _EXPERTS:
        yield tensor_name(path, renamed), Slot(path, shape)
        return
    for module, expert, start, rows in expert_modules(path, shape):
        yield f"{module}.weight", Slot(path, (rows, shape[-1]), expert, start)
