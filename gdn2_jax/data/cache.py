"""A directory of prepared corpora: whole entries only, made once by whoever comes first."""

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gdn2_jax.files import naming, write_text

_LOG = logging.getLogger(__name__)

_SEAL = "digests.json"
_TRUSTED = "trusted.json"
_UNFINISHED = "unfinished-"

# Seconds that a file must have been at rest before its times tell whether it was written again.
_AT_REST = 2.0


@contextlib.contextmanager
def exclusive(cache: Path, request: str) -> Iterator[None]:
    """Lets one process at a time do what `request` names; the others wait.

    The lock ends with its process, however that ends. Unfinished files of processes that have ended
    are deleted. Where no lock is possible, as in a read-only directory, nobody waits.

    Args:
      cache: the directory; created if missing.
      request: hexadecimal digits.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / ".lock").open("a")
    except OSError:
        yield
        return
    with file:
        try:
            _lock(file, request, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.warning("waiting for another process that prepares the same corpus")
            _lock(file, request, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield
            return
        for path in cache.glob(f"{_UNFINISHED}*-*"):
            owner = path.name.removeprefix(_UNFINISHED).partition("-")[0]
            if owner == request:
                shutil.rmtree(path, ignore_errors=True)
                continue
            with contextlib.suppress(BlockingIOError, ValueError):
                _lock(file, owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                _lock(file, owner, fcntl.LOCK_UN)
        yield


@contextlib.contextmanager
def new_entry(entry: Path, request: str) -> Iterator[Path]:
    """Gives a directory that becomes `entry` when the block ends without an error.

    Args:
      entry: the place in the cache; a damaged entry there is replaced.
      request: as in `exclusive`.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{request}-", dir=entry.parent))
    try:
        with naming(directory):
            yield directory
        digests = {path.name: file_digest(path) for path in directory.iterdir()}
        write_text(directory / _SEAL, json.dumps({"digests": digests, "states": None}))
        # Others may read the cache, with the permissions that mkdir gives.
        directory.chmod(entry.parent.stat().st_mode & 0o777)
        if entry.exists() and not is_intact(entry, verify=True):
            _LOG.warning("%s was damaged and is replaced", entry)
            shutil.rmtree(entry)
        try:
            directory.rename(entry)
        except OSError:
            # Where there are no locks, another process may have been first.
            if not is_intact(entry, verify=True):
                raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def is_intact(entry: Path, verify: bool = False) -> bool:
    """Whether nobody changed the files of an entry since `new_entry` made them.

    They are compared byte for byte, or, once that was done, by size, times and inode.

    Args:
      entry: the directory.
      verify: compare byte for byte in any case.
    """
    try:
        seal = json.loads((entry / _SEAL).read_text())
        files = sorted(path for path in entry.iterdir() if path.name != _SEAL)
        states = file_states(files)
        if not verify and seal["states"] == states:
            return [path.name for path in files] == sorted(seal["digests"])
        if seal["digests"] != {path.name: file_digest(path) for path in files}:
            return False
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if are_at_rest(states):
        with contextlib.suppress(OSError):
            write_text(entry / _SEAL, json.dumps({**seal, "states": states}))
    return True


def find_trusted(cache: Path, request: str) -> str | None:
    """Returns the name of the entry that `trust` noted for a request."""
    return _read_trusted(cache).get(request)


def trust(cache: Path, request: str, name: str) -> None:
    """Notes which entry serves a request, so that its files need not be hashed again."""
    trusted = _read_trusted(cache)
    kept = {key: value for key, value in trusted.items() if (cache / value).is_dir()}
    if trusted.get(request) != name:
        with contextlib.suppress(OSError):
            write_text(cache / _TRUSTED, json.dumps({**kept, request: name}))


def file_states(files: Iterable[Path]) -> list[list[int]]:
    """Returns what changes when a file is written: size, both times and inode, for each file."""
    states = (path.stat() for path in files)
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in states]


def are_at_rest(states: list[list[int]]) -> bool:
    """Whether all files are older than a tick of a coarse file system's clock."""
    latest = max((max(mtime, ctime) for _, mtime, ctime, _ in states), default=0)
    return latest < (time.time() - _AT_REST) * 1e9


def file_digest(path: Path) -> str:
    """Returns the BLAKE2b digest of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _lock(file, request: str, operation: int) -> None:
    # Each request locks a byte of its own, so that one file serves them all.
    fcntl.lockf(file, operation, 1, int(request[:8], 16))


def _read_trusted(cache: Path) -> dict[str, str]:
    try:
        return dict(json.loads((cache / _TRUSTED).read_text()))
    except (OSError, ValueError):
        return {}
