"""How every script starts: `--help` with the flags of this project only, usage errors of two lines, quiet libraries."""

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
# Part of what JAX logs on a machine with an accelerator but without JAX's plugin for it: the user means the CPU there.
_NOISE = "may be present on this machine"


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the flags, call `main` with the arguments that are not flags, and exit with its result.

    `--help` prints the docstring of main's module and all flags. An unknown flag, a bad value, and an `app.UsageError`
    or a MemoryError from `main` end the process with status 1 and two lines on stderr: what is wrong, and how to get
    help.
    """
    argv = list(sys.argv if argv is None else argv)
    _silence_libraries()

    @functools.wraps(main)
    def checked(rest: list[str]) -> Any:
        try:
            return main(rest)
        except (app.UsageError, MemoryError) as error:
            refuse(argv[0], str(error) or "out of memory")

    doc = sys.modules[main.__module__].__doc__ or ""
    app.run(checked, argv, flags_parser=functools.partial(_parse, doc=doc, main_module=main.__module__))


def _parse(argv: list[str], *, doc: str, main_module: str) -> list[str]:
    if _HELP.intersection(itertools.takewhile(lambda argument: argument != "--", argv[1:])):
        print(help_text(doc, main_module))
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        for flag in itertools.chain(*project_flags(main_module).values()):
            hasattr(flag.value, "items")  # a config file that cannot be loaded raises on first use
        return rest
    except flags.Error as error:
        refuse(argv[0], str(error))
    except Exception as error:  # the code of a --config file may raise anything
        refuse(argv[0], f"{type(error).__name__}: {error}")


def refuse(program: str, message: str) -> NoReturn:
    """End the process as a usage error does: status 1, and two lines on stderr."""
    print(f"{os.path.basename(program)}: {message}\npython {program} --help explains the flags", file=sys.stderr)
    sys.exit(1)


# --- help ---


def project_flags(main_module: str) -> dict[str, list[Any]]:
    """The flags that modules of this project define, {module: flags}, without those of absl and other libraries.

    The flags of the script itself come first.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    own = sys.argv[0] if main_module == "__main__" else main_module  # absl's name for the script's module
    others = sorted(name for name in by_module if name.startswith("experiments.") and name != own)
    return {name: by_module[name] for name in (own, *others) if name in by_module}


def help_text(doc: str, main_module: str) -> str:
    """The text of `--help`: the docstring, then every flag with its meaning and default."""
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
    """Hide what libraries log about themselves and the machine. A log level that the user has set is kept.

    Without this, absl prints what any library logs at the level INFO. TF_CPP_MIN_LOG_LEVEL sets the log level of XLA;
    the value 1 comes from JAX and not from the user.
    """
    for name, level in (("jax", logging.WARNING), ("jaxlib", logging.WARNING), ("matplotlib", logging.ERROR)):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(level)
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_noise)
    if "jax" in sys.modules and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        with contextlib.suppress(ImportError, AttributeError):  # the function is private to JAX and may go
            from jax._src.lib import utils

            utils.absl_set_min_log_level(2)  # 2: errors only


def _is_no_noise(record: logging.LogRecord) -> bool:
    return _NOISE not in record.getMessage()
