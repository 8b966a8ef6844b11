"""The flag --program_store: a folder that keeps compiled programs, so that the next start need not compile them."""

from absl import app, flags

from fp4jax.block_graph import ProgramStore

_PROGRAM_STORE = flags.DEFINE_string(
    "program_store", None, "Folder that keeps compiled programs for the next start; default: they are not kept."
)


def program_store() -> ProgramStore | None:
    """The store in the folder of the flag; None: the flag is not given.

    Raises:
      app.UsageError: the folder cannot be made, or others may write into it.
    """
    if _PROGRAM_STORE.value is None:
        return None
    try:
        return ProgramStore(_PROGRAM_STORE.value)
    except (ValueError, OSError) as error:
        raise app.UsageError(f"--program_store: {error}") from error
