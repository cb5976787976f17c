"""Configurations to JSON and back; an unknown key is an error that names it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from anomem.errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of plain values as nested dictionaries and lists."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from nested dictionaries; keys left out keep their defaults.

    Args:
        kind: the dataclass.
        values: what JSON gave.
        where: dotted path so far, for messages.

    Raises:
        UserError: a key the dataclass does not have, or a value of the wrong type; both named.
    """
    if not isinstance(values, dict):
        raise UserError(f"`{where or 'config'}`: expected an object of settings, received {json.dumps(values)}")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(typing.cast("Any", kind))]
    for key in values:
        if key not in known:
            raise UserError(f"`{where}{key}`: no such setting; expected one of {', '.join(known)}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def load_config(kind: type[T], path: Path) -> T:
    """A dataclass from a JSON file.

    Args:
        kind: the dataclass.
        path: the file.

    Raises:
        UserError: no such file, no JSON, an unknown key or a wrong value.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the configuration {path} is not JSON: {error}") from error
    try:
        return from_dict(kind, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as JSON gave it, as the annotated type."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(option, value, where)
                except UserError:
                    continue
        raise _wrong(hint, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"`{where}`: expected one of {', '.join(map(repr, arguments))}, received {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(hint, value, where)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise _wrong(hint, value, where)
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is not bool and value is True)):
        raise _wrong(hint, value, where)
    return value


def _wrong(hint: Any, value: Any, where: str) -> UserError:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return UserError(f"`{where}`: expected {name}, received {json.dumps(value)}")
