"""The flag --config: a file of settings of this project, found from any folder."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parent.parent


def find_config(name: str) -> str:
    """A path as it was given, or below the project where the current folder has no such file.

    What follows a colon is an argument of the file's `get_config`. Raises ValueError where neither file exists.
    """
    path, colon, argument = name.partition(":")
    found = [place for place in (Path(path), ROOT / path) if place.is_file()]
    if not found:
        raise ValueError(f"there is no file {path} in {Path.cwd()} or in {ROOT}")
    return f"{found[0]}{colon}{argument}"


def define_config(default: str, description: str) -> flags.FlagHolder:
    """--config with a file below the project as its default, and --config.part.name=value for every setting in it."""
    holder = config_flags.DEFINE_config_file("config", str(ROOT / default), description)
    parser = flags.FLAGS[holder.name].parser
    parse = parser.parse
    parser.parse = lambda argument: parse(find_config(argument))
    return holder
