"""Files that are written as a whole, and errors that say which file they are about."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Puts `place` into an OSError that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise _named(error, place) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a temporary file, which replaces the file at `path` at the end.

    After an error `path` holds what it held before.

    Raises:
      OSError: the file cannot be written; the message names `path`.
    """
    # Several processes may write the same file of a cache.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file as a whole; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def _named(error: OSError, place: Path | str) -> OSError:
    return OSError(error.errno, error.strerror or str(error), str(place))
