"""What every module of a checkpoint runs as and how its weights are stored: the plan, and patterns of module names."""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_NAMES_SHOWN = 3  # modules of one method in a printed plan


class Method(NamedTuple):
    """What a module runs as, and how its weights are stored.

    format: "bf16", "block_wise_fp8" or "nvfp4". stored: "bf16", "block_wise_fp8", "modelopt" or "compressed_tensors".
    activations: of nvfp4 "nvfp4" (W4A4) or "bf16" (W4A16); of block_wise_fp8 "fp8", or "fp8_ue8m0" where their scales
    are powers of two; else "bf16". input_scales: "stored" where NVFP4 activations have a scale in the checkpoint,
    "per_token" where each token gets its own when it comes.
    """

    format: str
    stored: str
    activations: str
    input_scales: str = "stored"

    @property
    def online(self) -> bool:
        """Whether weights are quantized while they are loaded."""
        return self.stored == "bf16" != self.format

    def __str__(self) -> str:
        if self.format == "bf16":
            return "bf16" if self.stored == "bf16" else f"bf16, stored as {self.stored}"
        how = "quantized while loading" if self.online else f"stored as {self.stored}"
        per_token = " with a scale per token" if self.input_scales == "per_token" else ""
        return f"{self.format}, {how}, activations {self.activations}{per_token}"


class Refusal(NamedTuple):
    """Why a module cannot be loaded. Configs also name modules that nobody reads, so it is raised on asking for one."""

    reason: str

    def __str__(self) -> str:
        return f"not supported ({self.reason})"


BF16 = Method("bf16", "bf16", "bf16")
FP8_STORED = Method("block_wise_fp8", "block_wise_fp8", "fp8")
FP8_STORED_UE8M0 = Method("block_wise_fp8", "block_wise_fp8", "fp8_ue8m0")
FP8_EXPERTS = Method("bf16", "block_wise_fp8", "bf16")
FP8_ONLINE = Method("block_wise_fp8", "bf16", "fp8")
NVFP4_ONLINE = Method("nvfp4", "bf16", "nvfp4", "per_token")


class Patterns:
    """Module names, names with wildcards (fnmatch) and regular expressions ("re:.."): which of them is a module's?

    A name, with wildcards or without, also stands for everything inside the module. Plain names are looked up, so that
    a config with an entry for each of ten thousands of modules costs no more than one entry per module.
    """

    def __init__(self, patterns: Iterable[str]):
        self._names: dict[str, int] = {}
        self._inside: dict[str, int] = {}  # a module -> the first name of something inside it
        self._wild: list[tuple[int, re.Pattern[str]]] = []
        for index, pattern in enumerate(patterns):
            if pattern.startswith("re:"):
                self._wild.append((index, re.compile(pattern[3:])))
            elif any(character in pattern for character in "*?["):
                itself_or_inside = map(fnmatch.translate, (pattern, f"{pattern}.*"))
                self._wild.append((index, re.compile("|".join(itself_or_inside))))
            else:
                self._names.setdefault(pattern, index)
                for container in _containers(pattern):
                    self._inside.setdefault(container, index)

    def named(self, module: str) -> int | None:
        """The index of the plain name that is the module's own, or else of the first one inside the module."""
        return self._names.get(module, self._inside.get(module))

    def first(self, module: str) -> int | None:
        """The smallest index of a pattern for the module or for one that contains it."""
        found = [self._names[name] for name in (module, *_containers(module)) if name in self._names]
        found += [index for index, wild in self._wild if wild.match(module)]
        return min(found, default=None)


def _containers(module: str) -> Iterable[str]:
    while (dot := module.rfind(".")) > 0:
        module = module[:dot]
        yield module


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """A method for every linear layer (`dense`) and every expert layer (`experts`) of a model.

    source: which config decided. ignore: patterns of modules that stay as they are. layers: methods of single modules
    (mixed precision), by name or pattern; those that name a module go before `ignore`, which goes before the others.
    notes: what a user should know about the decision.
    """

    dense: Method = BF16
    experts: Method = BF16
    source: str = "none"
    ignore: tuple[str, ...] = ()
    layers: tuple[tuple[str, Method | Refusal], ...] = ()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def _layer_patterns(self) -> Patterns:
        return Patterns(name for name, _ in self.layers)

    @functools.cached_property
    def _ignore_patterns(self) -> Patterns:
        return Patterns(self.ignore)

    def method(self, module: str) -> Method:
        """The method of a module by its name in the checkpoint, such as model.layers.3.self_attn.q_proj.

        Raises:
          ValueError: with the reason, for a module that the config stores in a way that is not supported.
        """
        expert = module.endswith(".experts") or ".experts." in module
        index = self._layer_patterns.named(module)
        if index is None:
            if self.ignored_by(module) is not None:
                return BF16
            index = self._layer_patterns.first(module)
        if index is not None:
            found = self.layers[index][1]
            if isinstance(found, Refusal):
                raise ValueError(found.reason)
            return found
        if self.dense.online and not expert and _stays_plain(module):
            return BF16
        return self.experts if expert else self.dense

    def ignored_by(self, module: str) -> str | None:
        """The first pattern that excludes a module or one that contains it."""
        index = self._ignore_patterns.first(module)
        return None if index is None else self.ignore[index]

    def __str__(self) -> str:
        lines = [
            f"quantization by: {self.source}",
            f"linear layers:   {self.dense}",
            f"experts:         {self.experts}",
        ]
        alike: dict[Method | Refusal, list[str]] = {}
        for name, method in self.layers:
            alike.setdefault(method, []).append(name)
        lines += [f"{shortened(names)}: {method}" for method, names in alike.items()]
        lines += [f"as they are:     {shortened(self.ignore)}"] if self.ignore else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def shortened(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _stays_plain(module: str) -> bool:
    """Modules that are never quantized on the way: heads, embeddings, routers and the gates of shared experts."""
    return module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens", "gate", "shared_expert_gate", "correction_bias")


def disagreements(plan: QuantizationPlan, stored: Mapping[str, str]) -> Iterable[str]:
    """Lines about modules whose tensors ({module: how it is stored}) are not what the checkpoint's config says."""
    for module, found in stored.items():
        expected = plan.method(module).stored
        if found != expected:
            pattern = plan.ignored_by(module)
            why = f" (ignored as {pattern!r})" if pattern is not None else ""
            yield f"{module}: the config says {expected}{why}, the tensors are {found}"
