"""Says how to install what the HTTP server imports beside the base install."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def serve_extra() -> Iterator[None]:
    """Around imports of the extra `serve`.

    Raises:
      ImportError: one of its packages is missing; the message says how to install all of them.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"the HTTP server needs more packages: pip install 'fp4jax[serve]' ({error})") from error
