"""The quantization plan of a model: for each module, how its weights are stored and in which format it runs.

A module is named as in the checkpoint, for example model.layers.3.self_attn.q_proj.
"""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_NAMES_SHOWN = 3  # a printed plan names so many of the modules that share a method


class Method(NamedTuple):
    """How the weights of one module are stored in the checkpoint, and in which format the module runs.

    format: the format of the weights at run time: "bf16" (any plain floats), "block_wise_fp8" or "nvfp4".
    stored: the format of the weights in the checkpoint: "bf16" (any plain floats), "block_wise_fp8", or for NVFP4 the
      layout of the tool that wrote them, "modelopt" or "compressed_tensors".
    activations: the format of the module's inputs. For "nvfp4" weights it is "nvfp4" (W4A4) or "bf16" (W4A16); for
      "block_wise_fp8" weights it is "fp8", or "fp8_ue8m0" if the scales are powers of two; else it is "bf16".
    input_scales: where the scales of NVFP4 activations come from: "stored" reads them from the checkpoint, "per_token"
      computes one for each token at run time. The field has no meaning for other activations.
    """

    format: str
    stored: str
    activations: str
    input_scales: str = "stored"

    @property
    def online(self) -> bool:
        """Whether the weights are plain in the checkpoint and are quantized while they are loaded."""
        return self.stored == "bf16" != self.format

    def __str__(self) -> str:
        if self.format == "bf16":
            return "bf16" if self.stored == "bf16" else f"bf16, stored as {self.stored}"
        how = "quantized while loading" if self.online else f"stored as {self.stored}"
        per_token = " with a scale per token" if self.input_scales == "per_token" else ""
        return f"{self.format}, {how}, activations {self.activations}{per_token}"


class Refusal(NamedTuple):
    """The reason why a module cannot be loaded; it stands in a plan in the place of a Method.

    A config may also name modules that the model does not have. So reading the config does not raise:
    `QuantizationPlan.method` raises the reason when it is asked for such a module.
    """

    reason: str

    def __str__(self) -> str:
        return f"not supported ({self.reason})"


BF16 = Method("bf16", "bf16", "bf16")
FP8_STORED = Method("block_wise_fp8", "block_wise_fp8", "fp8")
FP8_STORED_UE8M0 = Method("block_wise_fp8", "block_wise_fp8", "fp8_ue8m0")
FP8_EXPERTS = Method("bf16", "block_wise_fp8", "bf16")  # decoded while loading: experts have no FP8 kernels
FP8_ONLINE = Method("block_wise_fp8", "bf16", "fp8")
NVFP4_ONLINE = Method("nvfp4", "bf16", "nvfp4", "per_token")


class Patterns:
    """A list of patterns of module names, which finds the pattern that matches a given module.

    A pattern is a plain name, a name with wildcards as in `fnmatch`, or "re:" followed by a regular expression, which
    must match from the start of the module's name. A name, with or without wildcards, matches its module and
    everything inside that module. Plain names are kept in a dict, so that a lookup stays fast in a config that lists
    tens of thousands of modules.

    Raises:
      re.error: a pattern after "re:" is no regular expression.
    """

    def __init__(self, patterns: Iterable[str]):
        self._names: dict[str, int] = {}
        self._inside: dict[str, int] = {}  # a module -> the index of the first plain name of a module inside it
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
        """Returns the index of the plain name that equals `module`, or else of the first one inside the module.

        Returns None if there is neither. Patterns with wildcards and regular expressions are not considered.
        """
        return self._names.get(module, self._inside.get(module))

    def first(self, module: str) -> int | None:
        """Returns the smallest index of a pattern that matches `module` or a module that contains it, else None."""
        found = [self._names[name] for name in (module, *_containers(module)) if name in self._names]
        found += [index for index, wild in self._wild if wild.match(module)]
        return min(found, default=None)


def _containers(module: str) -> Iterable[str]:
    while (dot := module.rfind(".")) > 0:
        module = module[:dot]
        yield module


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """How every module of a model is stored and runs; `method` answers for one module, `str` prints the plan.

    dense: the method of all linear layers that are not experts, unless `ignore` or `layers` says otherwise.
    experts: the method of all linear layers of experts, unless `ignore` or `layers` says otherwise.
    source: a name for the config that decided, such as "the checkpoint (fp8)" or "--quantization".
    ignore: patterns of modules that are not quantized.
    layers: (pattern, method) of single modules, for checkpoints in mixed precision. An entry that is the plain name of
      the module, or of a module inside it, takes precedence over `ignore`; `ignore` takes precedence over all others.
    fp8_cache: whether keys and values are cached in FP8, as the checkpoint asks.
    notes: remarks for the user, one sentence each.
    """

    dense: Method = BF16
    experts: Method = BF16
    source: str = "none"
    ignore: tuple[str, ...] = ()
    layers: tuple[tuple[str, Method | Refusal], ...] = ()
    fp8_cache: bool = False
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def _layer_patterns(self) -> Patterns:
        return Patterns(name for name, _ in self.layers)

    @functools.cached_property
    def _ignore_patterns(self) -> Patterns:
        return Patterns(self.ignore)

    def method(self, module: str) -> Method:
        """Returns the method of a module, given by its name in the checkpoint: model.layers.3.self_attn.q_proj, say.

        While dense layers are quantized during loading, the head, embeddings, routers and the gates of shared experts
        stay bf16.

        Raises:
          ValueError: the config stores the module in a way that is not supported; the message gives the reason.
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
        """Returns the first pattern of `ignore` that matches `module` or a module that contains it, else None."""
        index = self._ignore_patterns.first(module)
        return None if index is None else self.ignore[index]

    def __str__(self) -> str:
        lines = [
            f"quantization by: {self.source}",
            f"linear layers:   {self.dense}",
            f"experts:         {self.experts}",
        ]
        lines += ["cache:           keys and values in FP8 (e4m3)"] if self.fp8_cache else []
        alike: dict[Method | Refusal, list[str]] = {}
        for name, method in self.layers:
            alike.setdefault(method, []).append(name)
        lines += [f"{shortened(names)}: {method}" for method, names in alike.items()]
        lines += [f"as they are:     {shortened(self.ignore)}"] if self.ignore else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def shortened(names: Iterable[str]) -> str:
    """Returns the first names of a list as text, and how many more there are: "a, b, c and 5 more"."""
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _stays_plain(module: str) -> bool:
    """Whether a module is one that loading never quantizes: head, embedding, router, or gate of shared experts."""
    return module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens", "gate", "shared_expert_gate", "correction_bias")


def disagreements(plan: QuantizationPlan, stored: Mapping[str, str]) -> Iterable[str]:
    """Compares a plan with the tensors of a checkpoint, and yields one line of text for each module that differs.

    Args:
      plan: what the config says.
      stored: {module: how its tensors are stored}, in the words of `Method.stored`.

    Raises:
      ValueError: the plan refuses one of the modules.
    """
    for module, found in stored.items():
        expected = plan.method(module).stored
        if found != expected:
            pattern = plan.ignored_by(module)
            why = f" (ignored as {pattern!r})" if pattern is not None else ""
            yield f"{module}: the config says {expected}{why}, the tensors are {found}"
