"""The flag --config: a Python file of settings, such as configs/tiny_lm.py, found from any current folder."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.harness import script

ROOT = Path(__file__).resolve().parents[2]


def find_config(name: str) -> str:
    """The file that a value of --config names: relative to the current folder, else relative to the project's root.

    Text after a colon is an argument of the file's `get_config`; it stays in the result.

    Raises:
      ValueError: neither file exists.
    """
    path, colon, argument = name.partition(":")
    found = [place for place in (Path(path), ROOT / path) if place.is_file()]
    if not found:
        raise ValueError(f"there is no file {path} in {Path.cwd()} or in {ROOT}")
    return f"{found[0]}{colon}{argument}"


def define_config(default: str, description: str) -> flags.FlagHolder:
    """Define --config, and a flag --config.part.name=value for every setting in the file.

    Args:
      default: the default file, relative to the project's root.
      description: the help text of --config.
    """
    try:
        holder = config_flags.DEFINE_config_file("config", str(ROOT / default), description)
    except AttributeError as error:  # DEFINE_config_file reads the command line, and raises this for unknown settings
        reason = error.args[0]
        reason = reason.args[0] if isinstance(reason, Exception) else reason  # a KeyError shows its text in quotes
        script.refuse(sys.argv[0], f"--config: no setting {reason}")
    parser = flags.FLAGS[holder.name].parser
    parse = parser.parse
    parser.parse = lambda argument: parse(find_config(argument))
    return holder
