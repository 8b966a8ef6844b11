"""How every script starts: `--help` with all flags of this project, short usage errors, no noise of the libraries."""

import contextlib
import functools
import itertools
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

_HELP = {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"}
_WIDTH = 100
# What JAX says on a machine without the plugin of its accelerator, where a run on the CPU is meant.
_NOISE = "may be present on this machine"


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the flags and exits with `main(what is left of argv)`; `--help` prints the docstring of main's module.

    A flag that is unknown or has a bad value, and an `app.UsageError` out of `main`, end the process with status 1
    and two lines on stderr: what is wrong, and how to get help.
    """
    argv = list(sys.argv if argv is None else argv)
    _silence_libraries()

    @functools.wraps(main)
    def checked(rest: list[str]) -> Any:
        try:
            return main(rest)
        except app.UsageError as error:
            refuse(argv[0], str(error))

    doc = sys.modules[main.__module__].__doc__ or ""
    app.run(checked, argv, flags_parser=functools.partial(_parse, doc=doc, main_module=main.__module__))


def _parse(argv: list[str], *, doc: str, main_module: str) -> list[str]:
    if _HELP.intersection(itertools.takewhile(lambda argument: argument != "--", argv[1:])):
        print(help_text(doc, main_module))
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        for flag in itertools.chain(*project_flags(main_module).values()):
            hasattr(flag.value, "items")  # a config file that could not be loaded raises when it is first looked at
        return rest
    except flags.Error as error:
        refuse(argv[0], str(error))
    except Exception as error:  # whatever the code of a --config file raises
        refuse(argv[0], f"{type(error).__name__}: {error}")


def refuse(program: str, message: str) -> NoReturn:
    """Ends the process as a usage error does: status 1, and two lines on stderr."""
    print(f"{os.path.basename(program)}: {message}\npython {program} --help explains the flags", file=sys.stderr)
    sys.exit(1)


# --- help ---


def project_flags(main_module: str) -> dict[str, list[Any]]:
    """Flags per module of ours that has any, those of the script itself first; without those of absl and others."""
    by_module = flags.FLAGS.flags_by_module_dict()
    own = sys.argv[0] if main_module == "__main__" else main_module  # how absl calls the script
    others = sorted(name for name in by_module if name.startswith("experiments.") and name != own)
    return {name: by_module[name] for name in (own, *others) if name in by_module}


def help_text(doc: str, main_module: str) -> str:
    """The docstring, then every flag with its meaning and default."""
    described = [_describe(flag) for flag in itertools.chain(*project_flags(main_module).values())]
    return "\n".join([doc.rstrip(), "", "Flags:" if described else "It has no flags.", *described])


def _describe(flag: Any) -> str:
    notes = [flag.parser.syntactic_help] if flag.parser.syntactic_help else []
    if flag.default is not None:
        notes.append(f"default: {flag.default_as_str[1:-1]}")
    text = flag.help + (f" ({'; '.join(notes)})" if notes else "")
    name = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}"
    return "\n".join([name, *textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)])


# --- noise ---


def _silence_libraries() -> None:
    """Hides what libraries tell about themselves and the machine; a level that a user set for them is kept.

    absl prints whatever any library logs as information. TF_CPP_MIN_LOG_LEVEL is for XLA's; 1 is what JAX sets itself.
    """
    for name, level in (("jax", logging.WARNING), ("jaxlib", logging.WARNING), ("matplotlib", logging.ERROR)):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(level)
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_noise)
    if "jax" in sys.modules and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        with contextlib.suppress(ImportError, AttributeError):  # it has no public name
            from jax._src.lib import utils

            utils.absl_set_min_log_level(2)  # errors


def _is_no_noise(record: logging.LogRecord) -> bool:
    return _NOISE not in record.getMessage()
