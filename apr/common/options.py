"""Command-line flags from a dataclass: --field-name for every field, typed, with its help text."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from .errors import UsageError

T = TypeVar("T")


def option(
    help: str, default: Any = None, choices: Sequence[str] = (), positional: bool = False, short: str = ""
) -> Any:
    """A dataclass field with a help text. choices limits the values; positional takes no flag; short is a second,
    one-letter flag. A field of type tuple[str, ...] takes one value or more when it is positional, and else a value each
    time its flag is given."""
    meta = {"help": help, "choices": tuple(choices), "positional": positional, "short": short}
    return dataclasses.field(default=default, metadata=meta)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message}; --help lists the options")


def _plain(annotation: Any) -> Any:
    """int for `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return typing.get_origin(annotation) or annotation


def field_types(cls: type) -> dict[str, Any]:
    """The plain type (int, float, str, bool) of every field."""
    hints = typing.get_type_hints(cls)
    return {f.name: _plain(hints[f.name]) for f in dataclasses.fields(cls)}


def given(cls: type, args: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """Only those fields of cls that the command line names, converted to their types.

    Booleans take --name and --no-name. Raises UsageError for an unknown flag or a bad value.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plain = field_types(cls)
    for f in dataclasses.fields(cls):
        kind, meta = plain[f.name], f.metadata
        text = meta["help"].replace("%", "%%")
        if f.default not in (None, "", False, ()) and not meta["positional"]:
            text += f" (default {f.default})"
        name = f.name if meta["positional"] else "--" + f.name.replace("_", "-")
        names = [name, "-" + meta["short"]] if meta["short"] else [name]
        if kind is tuple and meta["positional"]:
            parser.add_argument(*names, help=text, metavar=f.name.upper(), nargs="+")
        elif kind is tuple:  # not several values to one flag: it would swallow what follows
            parser.add_argument(*names, help=text, metavar=f.name.split("_")[-1].upper(), action="append")
        elif kind is bool:
            parser.add_argument(name, help=text, action=argparse.BooleanOptionalAction)
        elif meta["positional"]:
            parser.add_argument(
                name, help=text, metavar=f.name.upper(), nargs="?" if f.default is not None else None
            )
        else:
            parser.add_argument(
                *names,
                help=text,
                type=kind,
                choices=meta["choices"] or None,
                metavar=None if meta["choices"] else f.name.split("_")[-1].upper(),
            )
    return vars(parser.parse_intermixed_args(list(args)))  # options may stand between MODEL and PROMPT


def parse(cls: type[T], args: Sequence[str], prog: str, description: str) -> T:
    """An instance of a dataclass from a command line."""
    return cls(**given(cls, args, prog, description))


def numbers(text: str | None, flag: str, names: Sequence[str]) -> dict[str, float]:
    """From "speed=2,first_epoch=1.5": numbers of at least 0 by name, each of `names`. Raises UsageError."""
    found: dict[str, float] = {}
    for part in (text or "").replace(",", " ").split():
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in names or not 0 <= value < math.inf:
            raise UsageError(f"{flag} {part!r}: write NAME=NUMBER with a name of {', '.join(names)}")
        found[name] = value
    return found
