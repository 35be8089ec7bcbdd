"""Checks of a configuration's fields, with one message for all: what was expected, what came."""

import types
from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(name: str, fulfilled: bool, expected: str, value: Any) -> None:
    """Raises a ValueError that names the field unless the condition is fulfilled."""
    if not fulfilled:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def require_text(name: str, text: str) -> None:
    """Raises a ValueError unless UTF-8 has the text: what the shell passes need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected UTF-8 text, got {text!r}") from None


def check_choices(config: Any, prefix: str = "") -> None:
    """Checks that each field with a `Literal` type has one of its values.

    Args:
      config: a dataclass.
      prefix: of the fields' names in the message, such as "optimizer.".

    Raises:
      ValueError: a field has another value.
    """
    for name, hint in get_type_hints(type(config)).items():
        literals = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        choices = tuple(choice for kind in literals for choice in get_args(kind))
        if types.NoneType in get_args(hint):
            choices = (None, *choices)
        if literals:
            value = getattr(config, name)
            require(f"{prefix}{name}", value in choices, f"one of {choices}", value)
