"""Text to token ids and back: the tokenizer of a checkpoint's folder, or bytes for models of bytes."""

from pathlib import Path
from typing import Any

from absl import app


class ByteTokenizer:
    """Text as its UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise app.UsageError(f"{path} needs the tokenizers package: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise app.UsageError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def tokenizer_of(folder: Path, config: Any) -> Any:
    """Of the folder, else bytes."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return FileTokenizer(path)
    if config.vocab_size > 256:
        raise app.UsageError(f"{path} does not exist, and {config.vocab_size} tokens are no bytes")
    return ByteTokenizer()
