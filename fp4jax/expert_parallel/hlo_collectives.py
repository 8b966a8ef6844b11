"""Counts the bytes that a compiled program exchanges between devices, from the text of its optimized HLO."""

import math
import re
from typing import NamedTuple

import jax

_ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
}  # fmt: skip
_COLLECTIVE = re.compile(
    r"all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast|send|recv"
)
_COMPUTATION = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_MAX_SCALARS = 64  # an all-reduce of up to this many numbers counts as combined scalars
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class AllToAll(NamedTuple):
    """One all-to-all of a program.

    Attributes:
      dtype: the element type, as HLO writes it.
      bytes: the bytes that one device puts in, the block for itself included.
      devices: the number of devices that exchange with each other.
    """

    dtype: str
    bytes: int
    devices: int


class WireBytes(NamedTuple):
    """Bytes that one device exchanges in one execution of a program.

    Attributes:
      total: the bytes of the operands of all all-to-alls.
      crossing: the part of `total` that leaves the device, total * (R - 1) / R.
      scalar_bytes: the bytes of all-reduces of single numbers, such as agreed scales and counts, in neither sum. XLA
        may put those of several layers into one short vector.
      all_to_alls: every all-to-all; one inside a loop is listed once per iteration.
    """

    total: int
    crossing: int
    scalar_bytes: int
    all_to_alls: tuple[AllToAll, ...]


def wire_bytes(compiled: jax.stages.Compiled | str) -> WireBytes:
    """Returns the bytes that a compiled program exchanges. On one device they are 0, as XLA leaves no collective.

    Args:
      compiled: a compiled program, or the text of its HLO. All-to-alls may be in plain, tuple or async form.

    Raises:
      ValueError: the program has a collective other than an all-to-all or a scalar all-reduce, or one that runs an
        unknown number of times; or the text is no HLO module.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    computations, entry = _computations(text)
    all_to_alls, scalar_bytes = _collect(computations, entry)
    total = sum(a.bytes for a in all_to_alls)
    crossing = sum(a.bytes * (a.devices - 1) // a.devices for a in all_to_alls)
    return WireBytes(total, crossing, scalar_bytes, tuple(all_to_alls))


def _computations(text):
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line.split("(", 1)[0]:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append((instruction.group(1), instruction.group(2), instruction.group(3)))
    if entry is None:
        raise ValueError("wire_bytes: the text holds no HLO module with an ENTRY computation")
    return computations, entry


def _collect(computations, name):
    """Returns the all-to-alls, and the bytes of scalar all-reduces, of one execution of the computation `name`."""
    all_to_alls, scalar_bytes = [], 0
    for result, op, rest in computations.get(name, ()):
        if _COLLECTIVE.search(op):
            found, scalars = _collective(result, op, rest, computations)
            all_to_alls += found
            scalar_bytes += scalars
            continue
        for branch in (b.strip(" %") for pair in _BRANCHES.findall(rest) for b in ",".join(pair).split(",")):
            if any(_collect(computations, branch)):
                raise ValueError(f"wire_bytes: a collective inside a conditional ({branch}) may or may not run")
        for called in _CALLED.findall(rest):
            inner, scalars = _collect(computations, called)
            repeats = 1
            if op == "while" and (inner or scalars):
                trip_count = _TRIP_COUNT.search(rest)
                if trip_count is None:
                    raise ValueError(f"wire_bytes: a collective inside a loop of unknown length ({called})")
                repeats = int(trip_count.group(1))
            all_to_alls += inner * repeats
            scalar_bytes += scalars * repeats
    return all_to_alls, scalar_bytes


def _collective(result, op, rest, computations):
    kind = re.sub(r"-(start|done|update)$", "", op)
    if op.endswith(("-done", "-update")):  # counted at its -start
        return [], 0
    if kind == "all-reduce":
        shapes = _SHAPE.findall(result)
        if any("," in dims or int(dims or 1) > _MAX_SCALARS for _, dims in shapes):
            raise ValueError(f"wire_bytes: unknown collective: an all-reduce that is not scalar: {result} {op}")
        return [], sum(_bits(*s) for s in shapes) // 8 if _group_size(rest) > 1 else 0
    if kind != "all-to-all":
        raise ValueError(f"wire_bytes: unknown collective {op}: {result}")
    # The -start form has the type ((operands), results, contexts). The plain form has the type of its results, which
    # are as large as the operands.
    if op.endswith("-start"):
        result = _first_element(result)
    shapes = _SHAPE.findall(result)
    wrapped = _CALLED.search(rest)
    attributes = rest
    if "replica_groups=" not in rest and wrapped is not None:
        attributes = next(r for _, o, r in computations[wrapped.group(1)] if o == "all-to-all")
    devices = _group_size(attributes)
    return [AllToAll(shapes[0][0], sum(_bits(*s) for s in shapes) // 8, devices)], 0


def _first_element(tuple_type):
    depth = 0
    for i, c in enumerate(tuple_type):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or depth == 0:
            return tuple_type[1:i]
    return tuple_type


def _group_size(attributes):
    """Reads the number of devices per group from the replica_groups of an instruction.

    The text is {{0,1},{2,3}}, [groups,size]<=[...], or mesh['a'=2,'b'=4] {'b'}.
    """
    if m := re.search(r"replica_groups=\{\{([0-9, ]*)\}", attributes):
        return len(m.group(1).split(","))
    if m := re.search(r"replica_groups=\[([0-9,]+)\]<=", attributes):
        return int(m.group(1).split(",")[-1])
    if m := re.search(r"replica_groups=[@\w.]*mesh[\w.]*\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", m.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", m.group(2)))
    raise ValueError(f"wire_bytes: cannot read the devices of an all-to-all from: {attributes[:200]}")


def _bits(dtype, dims):
    if dtype not in _ITEM_BITS:
        raise ValueError(f"wire_bytes: unknown element type {dtype}")
    return _ITEM_BITS[dtype] * math.prod(int(d) for d in dims.split(",") if d)
