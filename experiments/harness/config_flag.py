"""The flag --config: a file of settings of this project, found from any folder."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.harness import script

ROOT = Path(__file__).resolve().parents[2]


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
    try:
        holder = config_flags.DEFINE_config_file("config", str(ROOT / default), description)
    except AttributeError as error:  # it looks at the command line already, and stumbles over unknown settings
        reason = error.args[0]
        reason = reason.args[0] if isinstance(reason, Exception) else reason  # a KeyError shows its text in quotes
        script.refuse(sys.argv[0], f"--config: no setting {reason}")
    parser = flags.FLAGS[holder.name].parser
    parse = parser.parse
    parser.parse = lambda argument: parse(find_config(argument))
    return holder
