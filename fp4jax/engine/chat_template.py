"""The chat template of a checkpoint: a Jinja program in its folder that turns messages into the text of a prompt."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fp4jax.checkpoint.folder_config import read_json

TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A chat template. It comes with a checkpoint and is not trusted, so it runs in Jinja's sandbox.

    Args:
      source: the text of the template.
      variables: what it can read besides the messages, such as `bos_token`.

    Raises:
      ImportError: Jinja is not installed.
      ValueError: the source is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError("chat templates need Jinja: pip install 'fp4jax[serve]'") from error

        def raise_exception(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        functions = {"raise_exception": raise_exception, "strftime_now": _now}
        try:
            self._template = environment.from_string(source, globals=functions)
        except jinja2.TemplateError as error:
            raise ValueError(f"not a chat template: {error}") from error
        # Templates compare with none what is not given.
        self._variables = {"tools": None, "documents": None, **(variables or {})}

    @classmethod
    def of_folder(cls, folder: Path) -> "ChatTemplate | None":
        """Returns the chat template of a checkpoint's folder; None if it has none.

        It is chat_template.jinja, else `chat_template` of tokenizer_config.json: the text of one, or a list of
        templates with names, of which the one called "default" counts. The special tokens are those of that file.

        Raises:
          ImportError: Jinja is not installed.
          ValueError: a file cannot be understood; the message names it.
        """
        config_file, file = folder / TOKENIZER_CONFIG_NAME, folder / TEMPLATE_NAME
        config = read_json(config_file) if config_file.is_file() else {}
        if file.is_file():
            try:
                source: Any = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text") from error
        else:
            file, source = config_file, config.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{file}: chat_template must be text or a list of templates, got {source!r}")
        try:
            return cls(source, _special_tokens(config))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = True, **variables: Any) -> str:
        """Returns the text of a chat. It contains its special tokens, so a tokenizer must not add them again.

        Args:
          messages: the messages, oldest first: dicts, each with a `role` and what the template reads of it: `content`.
          add_generation_prompt: whether the text ends with the beginning of an answer.
          variables: further variables of the template, such as `tools`.

        Raises:
          ValueError: there are no messages, one has no role, or the template refuses them or does what the sandbox
            does not allow.
        """
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise ValueError(f"messages must be a list of at least one message with a role, got {messages!r}")
        given = {**self._variables, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=[dict(m) for m in messages], **given)
        except Exception as error:  # a template is a program, which can fail in any way
            raise ValueError(f"the chat template fails on these messages: {error}") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, as text or as an object with its content."""
    found = {}
    for name in _TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter of this name makes text for HTML; models were trained on plain JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
