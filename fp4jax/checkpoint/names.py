"""Which tensor of a Hugging Face checkpoint fills which part of which parameter.

Parameter paths are tensor names already, but for the experts: a checkpoint stores every expert's projections apart
(older files) or stacked (newer ones); the model stacks them as w13 [E, 2I, H], gate rows first, and w2 [E, H, I].
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

PREFIX = "model."
_HEAD = "lm_head"  # the only module that checkpoints keep outside of the prefix
_EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}

Path = tuple[str | int, ...]


class Slot(NamedTuple):
    """The place of one tensor: rows `start:start + shape[-2]` of expert `expert` of a parameter, or all of it."""

    path: Path
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0


def tensor_slots(shapes: Mapping[Path, tuple[int, ...]], renamed: Mapping[str, str] | None = None) -> dict[str, Slot]:
    """Tensor name -> slot, for parameters given as path -> shape; experts one by one. renamed: see `tensor_name`."""
    return dict(slot for path, shape in shapes.items() for slot in _slots_of(path, shape, renamed or {}))


def stacked_name(path: Path, prefix: str = PREFIX) -> str | None:
    """Name under which newer checkpoints stack all experts of a w13 or w2 parameter; None for other parameters."""
    if path[-1] not in _STACKED:
        return None
    return f"{module_name(path[:-1], prefix)}.experts.{_STACKED[str(path[-1])]}"


def projections_of(path: Path) -> tuple[str, ...]:
    """The projections that a w13 or w2 parameter stacks."""
    return _EXPERTS[str(path[-1])]


def expert_modules(path: Path, shape: tuple[int, ...], prefix: str = PREFIX) -> Iterable[tuple[str, int, int, int]]:
    """(module, expert, first row, rows) of every expert's projections in a w13 or w2 parameter of that shape."""
    projections = projections_of(path)
    experts, rows, _ = shape
    rows //= len(projections)
    for expert in range(experts):
        for index, projection in enumerate(projections):
            yield f"{module_name(path[:-1], prefix)}.experts.{expert}.{projection}", expert, index * rows, rows


def find_prefix(names: Iterable[str]) -> str:
    """What a folder puts before the modules of the text model: "model.", or more where it also holds another model."""
    embeddings = sorted(name for name in names if name.endswith("embed_tokens.weight"))
    return embeddings[0].removesuffix("embed_tokens.weight") if embeddings else PREFIX


def module_name(path: Path, prefix: str = PREFIX) -> str:
    """Of a module or parameter; the head stands beside "model.", or beside the inner one of "language_model.model."."""
    name = ".".join(map(str, path))
    if path[0] != _HEAD:
        return prefix + name
    return prefix.removesuffix(PREFIX) + name if prefix.endswith("." + PREFIX) else name


def tensor_name(path: Path, renamed: Mapping[str, str], prefix: str = PREFIX) -> str:
    """Of a parameter that is one tensor; renamed: what a model's checkpoints call the last part of some paths."""
    return ".".join((module_name(path[:-1], prefix), renamed.get(str(path[-1]), str(path[-1]))))


def _slots_of(path: Path, shape: tuple[int, ...], renamed: Mapping[str, str]) -> Iterable[tuple[str, Slot]]:
    if path[-1] not in _EXPERTS:
        yield tensor_name(path, renamed), Slot(path, shape)
        return
    for module, expert, start, rows in expert_modules(path, shape):
        yield f"{module}.weight", Slot(path, (rows, shape[-1]), expert, start)
