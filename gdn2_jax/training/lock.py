"""One process at a time may write a run's directory."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

import jax

from gdn2_jax.files import naming
from gdn2_jax.parallel import greatest_of_processes


def lock_directory(directory: Path) -> TextIO | None:
    """Locks a directory, which is created if missing, until the file is closed or the process ends.

    Of the processes of a job only the first locks, and all must call this.

    Returns:
      The file "lock" of the directory; None on the other processes of the job.

    Raises:
      BlockingIOError: another process holds the lock; the message names it.
      OSError: the directory cannot be written.
    """
    file, error = None, None
    if jax.process_index() == 0:
        try:
            file = _lock(directory)
        except OSError as caught:
            error = caught
    if greatest_of_processes(error is not None):
        raise error or BlockingIOError(f"{directory}: the first process of the job cannot lock it")
    return file


def _lock(directory: Path) -> TextIO:
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("a+")
    try:
        # Not lockf: closing any other handle of the file would end that lock.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(
            f"run_dir: expected a directory that no other process trains in, got {directory}, "
            f"which is in use by {holder}"
        ) from None
    except OSError as error:
        message = "%s: this file system has no locks (%s); let no two processes train in it"
        logging.getLogger(__name__).warning(message, directory, error)
    with naming(file.name):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
