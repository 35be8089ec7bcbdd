"""How the scripts in experiments/ start and end: a mistake is one line, not a traceback.

Imported before other packages, it names the extra that one belongs to if it is not installed.
"""

import dataclasses
import hashlib
import logging
import os
import platform
import re
import signal
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Packages by their extra; all others of the scripts are in "train".
_EXTRAS = {
    "flatbuffers": "train,interop",
    "safetensors": "train,interop",
    "fla": "train,interop,peers",
    "torch": "train,interop,peers",
    "lm_eval": "train,eval",
    "wonderwords": "train,eval",
    "resiliparse": "train,corpus",
}


def _show(kind, error, traceback) -> None:
    """Shows an error, a missing package or Ctrl-C during imports as one line; a `sys.excepthook`."""
    script = Path(sys.argv[0]).name
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{script}: stopped by SIGINT", file=sys.stderr)
        return
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if issubclass(kind, ModuleNotFoundError) and package not in ("", "gdn2_jax", "pallas"):
        extra = _EXTRAS.get(package, "train")
        print(f'{script}: {package} is not installed: pip install ".[{extra}]"', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _show


class _Terminated(BaseException):
    """SIGTERM has arrived."""


def read_options(options: Callable, arguments: list[str] | None = None, **settings: Any) -> Any:
    """Reads a command line. Every option takes a value, as in "--check True".

    `options` is a dataclass or a function, whose result is returned. The arguments are those of the
    process if None. Settings are for `tyro.cli`.
    """
    import tyro

    # Flags would need a second way for options that may also be None.
    style = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(options, args=arguments, config=style, **settings)


def run_command(
    name: str,
    main: Callable[..., int | str | None],
    options: Callable | None = None,
    description: str | None = None,
    *,
    keep_programs: bool = False,
    gpu_memory: float | None = None,
) -> int | str | None:
    """Runs a script. Text that the terminal cannot show is escaped.

    Args:
      name: of the script.
      main: does the work.
      options: what `main` takes, for `read_options`; None if it takes nothing.
      description: for --help.
      keep_programs: keep what is compiled in ~/.cache/gdn2_jax, unless JAX_COMPILATION_CACHE_DIR
        names another directory; not for scripts that time compilation.
      gpu_memory: share of a GPU's memory for JAX, unless XLA_PYTHON_CLIENT_MEM_FRACTION names
        another; by itself JAX leaves a quarter unused.

    Returns:
      The exit status or a message, for `sys.exit`: what `main` returned, or one line if it raised
      an error that a user can mend. JAX_TRACEBACK_FILTERING=off shows where.
    """
    streams: Any = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    # Orbax and its libraries log each error, with a traceback, before they raise it.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    if keep_programs and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", _compilation_cache())
    if gpu_memory is not None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(gpu_memory))
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _show_unraisable
    try:
        return main() if options is None else main(read_options(options, description=description))
    except (KeyboardInterrupt, _Terminated) as stop:
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        sys.stdout.flush()
        print(f"\n{name}: stopped by {number.name}", file=sys.stderr, flush=True)
        # An orderly exit would wait for threads that compile.
        os._exit(128 + number)
    except (ValueError, OSError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        line = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            line = out_of_memory(error)
        if line is None or os.environ.get("JAX_TRACEBACK_FILTERING") == "off":
            raise
        return f"{name}: {line}"


def read_study[S](kind: type[S], folder: Path, name: str, **changes: Any) -> S:
    """Reads FOLDER/NAME.toml, which says what an experiment compares.

    Args:
      kind: a dataclass with the fields that the file may have.
      folder: of all such files.
      name: of the file.
      **changes: fields to replace.

    Raises:
      ValueError: there is no such file, or it has a field that `kind` lacks.
    """
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise ValueError(f"study: expected one of {known}, got {name!r}")
    values = tomllib.loads(path.read_text(encoding="utf-8")) | changes
    study: Any = kind
    if unknown := values.keys() - {field.name for field in dataclasses.fields(study)}:
        raise ValueError(f"{path.name}: expected fields of a study, got {', '.join(unknown)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def require_positive(options: Any, **least: int) -> None:
    """Checks the numbers in a dataclass, also those in its tuples.

    Raises:
      ValueError: one is less than 1, or than its field's value in `least`; the message names the
        field.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        minimum = least.get(field.name, 1)
        # NaN is not at least anything.
        if not all(x >= minimum for x in numbers if type(x) in (int, float)):
            raise ValueError(f"{field.name}: expected at least {minimum}, got {value}")


def out_of_memory(error: jax.errors.JaxRuntimeError) -> str | None:
    """Returns one line about an error if it is that a device has too little memory, else None."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    asked = re.search(r"allocat\w+ (?:of |request for )?([\d.]+ ?[KMGT]?i?B|\d+ bytes)", text)
    return f"out of device memory, allocating {asked[1]}" if asked else textwrap.shorten(text, 200)


def _show_unraisable(unraisable) -> None:
    # Threads of tensorstore say that after a failed write. Orbax reports the failure.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _terminate(number, frame) -> None:
    raise _Terminated


def _compilation_cache() -> str | None:
    """A directory for this kind of CPU: other machines of this home may not run its programs.

    None for a user without a home, as in some containers.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return None
    try:
        facts = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        facts = []
    flags = sorted({line for line in facts if line.startswith(("flags", "Features", "model name"))})
    digest = hashlib.blake2b("".join(flags).encode(), digest_size=4).hexdigest()
    return str(home / ".cache" / "gdn2_jax" / f"compiled-{platform.machine()}-{digest}")
