"""Text to token ids and back: by the tokenizer of a checkpoint's folder, or by bytes for models of bytes."""

import json
from pathlib import Path
from typing import Any

from absl import app


class ByteTokenizer:
    """A tokenizer whose tokens are the UTF-8 bytes of the text."""

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """The tokenizer in a tokenizer.json, made deterministic and without a length limit.

    Such a file may still contain settings from training: how to cut and pad a batch, and BPE dropout (merges that are
    skipped at random). They are switched off here. A token that the file puts at the start of every text stays. If
    tokenizer_config.json asks for such a token (`add_bos_token`) and the file adds none, `encode` adds it.
    The text of a chat contains its special tokens already: `encode(text, special_tokens=False)` adds none.

    Args:
      path: the tokenizer.json.

    Raises:
      app.UsageError: the tokenizers package is missing, or one of the two files cannot be understood.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise app.UsageError(f"{path} needs the tokenizers package: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise app.UsageError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None
        self._begin = self._begin_token(path.with_name("tokenizer_config.json"))

    def _begin_token(self, path: Path) -> int | None:
        """The id of the token that tokenizer_config.json asks for at the start of every text.

        It is None if that file does not exist or asks for no such token.
        """
        if not path.is_file():
            return None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            token = config.get("bos_token") if config.get("add_bos_token") else None
            token = token.get("content") if isinstance(token, dict) else token
        except (ValueError, AttributeError) as error:
            raise app.UsageError(f"{path} is not a JSON object: {error}") from error
        if not isinstance(token, str | None):
            raise app.UsageError(f"{path}: bos_token {token!r} must be text, or an object with its content")
        found = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and found is None:
            raise app.UsageError(f"{path}: bos_token {token!r} is no token of {path.with_name('tokenizer.json')}")
        return found

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        if not special_tokens:
            return ids
        return ids if self._begin is None or ids[:1] == [self._begin] else [self._begin, *ids]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def tokenizer_of(folder: Path, config: Any) -> Any:
    """The tokenizer of a checkpoint's folder.

    A folder without a tokenizer.json gets a `ByteTokenizer` if the model has at most 256 tokens.

    Args:
      folder: the checkpoint.
      config: the model's config, of which `vocab_size` is read.

    Raises:
      app.UsageError: the folder has no tokenizer.json and the model has more than 256 tokens, or the file cannot be
        used.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return FileTokenizer(path)
    if config.vocab_size > 256:
        raise app.UsageError(f"{path} does not exist, and {config.vocab_size} tokens are no bytes")
    return ByteTokenizer()
