"""Which tensor of a Hugging Face checkpoint fills which part of which parameter.

Parameter paths are tensor names already, but for the experts: a checkpoint stores every expert's projections apart
(older files) or stacked (newer ones); the model stacks them as w13 [E, 2I, H], gate rows first, and w2 [E, H, I].
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

_PREFIX = "model."
_TOP_LEVEL = ("lm_head",)  # the only module that checkpoints keep outside `model.`
_EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}

Path = tuple[str | int, ...]


class Slot(NamedTuple):
    """The place of one tensor: rows `start:start + shape[-2]` of expert `expert` of a parameter, or all of it."""

    path: Path
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0


def tensor_slots(shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, Slot]:
    """Tensor name -> slot, for parameters given as path -> shape; experts one by one."""
    return dict(slot for path, shape in shapes.items() for slot in _slots_of(path, shape))


def stacked_name(path: Path) -> str | None:
    """Name under which newer checkpoints stack all experts of a w13 or w2 parameter; None for other parameters."""
    if path[-1] not in _STACKED:
        return None
    return f"{_module_name(path[:-1])}.experts.{_STACKED[str(path[-1])]}"


def _module_name(path: Path) -> str:
    name = ".".join(map(str, path))
    return name if path[0] in _TOP_LEVEL else _PREFIX + name


def _slots_of(path: Path, shape: tuple[int, ...]) -> Iterable[tuple[str, Slot]]:
    if path[-1] not in _EXPERTS:
        yield _module_name(path), Slot(path, shape)
        return
    projections = _EXPERTS[str(path[-1])]
    experts, rows, columns = shape
    rows //= len(projections)
    for expert in range(experts):
        for index, projection in enumerate(projections):
            name = f"{_module_name(path[:-1])}.experts.{expert}.{projection}.weight"
            yield name, Slot(path, (rows, columns), expert, index * rows)
