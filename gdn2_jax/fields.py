"""Checks of a configuration's fields, with one message for all: what was expected, what came."""

import numbers
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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


def check_types(config: Any, prefix: str = "") -> None:
    """Checks the fields that hold numbers, texts, booleans or one of the values of a `Literal`.

    Raises:
      ValueError: a field has a value of another type, or not one of its literals; the message names
        the field after `prefix`, such as "optimizer.".
    """
    for name, hint in get_type_hints(type(config)).items():
        union = get_origin(hint) in (types.UnionType, Union)
        kinds, value = get_args(hint) if union else (hint,), getattr(config, name)
        literals = [kind for kind in kinds if get_origin(kind) is Literal]
        choices = tuple(choice for kind in literals for choice in get_args(kind))
        optional = types.NoneType in kinds
        if literals:
            choices = (None, *choices) if optional else choices
            require(f"{prefix}{name}", value in choices, f"one of {choices}", value)
        for kind in _SCALARS.keys() & {*kinds}:
            type_, words = _SCALARS[kind]
            # A boolean is an integer for Python.
            fits = isinstance(value, type_) and isinstance(value, bool) == (kind is bool)
            words += " or None" if optional else ""
            require(f"{prefix}{name}", fits or (optional and value is None), words, value)


# NumPy's numbers are numbers, too.
_SCALARS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
}
