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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file as a whole: if that fails, the path holds what it held before.

    Raises:
      OSError: it cannot be written; the message names it.
    """
    # Several processes may write the same file of a cache.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _named(error: OSError, place: Path | str) -> OSError:
    return OSError(error.errno, error.strerror or str(error), str(place))
