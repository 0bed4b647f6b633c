"""Command-line options as fields of a dataclass: flags, types, ranges and help texts are declared once, by `option`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .errors import IOFailure, UsageError
from .files import real
from .hints import near

T = TypeVar("T")
MAX_INTEGER = 2**63 - 1  # that a number of the arrays and files can be


def option(
    help: str,
    default: Any = None,
    *,
    choices: Sequence[str] = (),
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    positional: bool = False,
    needed: bool = False,
    short: str = "",
    metavar: str = "",
    path: bool = False,
    also: str = "",
    names: Sequence[str] = (),
    may_change: bool = False,
    inside: Callable[[str, Callable[[str], str]], str] | None = None,
) -> Any:
    """Declare a dataclass field that is an option.

    choices                 the only values allowed
    above, at_least         range of a number; every float must be finite as well
    below, at_most
    positional, short       an argument without a flag; a second flag of one letter
    needed                  the flag must be given
    also                    an older name, which is taken too
    metavar                 placeholder of the value in --help (default: the last word of the name)
    path, names             the value is a file or folder; values with a meaning of their own
    may_change              a resumed run may set it anew
    inside                  writes a value that has paths in it with other paths: inside(value, path of a path)

    A tuple[str, ...] takes one or more values if positional, otherwise one value each time its flag is given."""
    metadata = dict(locals())
    del metadata["default"]
    return dataclasses.field(default=default, metadata=metadata)


def device_option(help: str = "auto, cpu, cuda or cuda:N", default: str | None = "auto") -> Any:
    """Declare --device."""
    return option(help, default, names=("auto", "cpu", "cuda"), may_change=True)


def dtype_option(more: str = "", choices: Sequence[str] = ("float32", "bfloat16")) -> Any:
    """Declare --dtype; more: a sentence behind its help text."""
    text = "dtype of weights and activations (default: bfloat16 on cuda, float32 on cpu)"
    return option(text + more, choices=choices)


def threads_option() -> Any:
    """Declare --threads."""
    return option("CPU threads (default: all cores)", may_change=True)


def json_option() -> Any:
    """Declare --json."""
    return option("print one JSON document and nothing else", False, may_change=True)


def flag(name: str) -> str:
    """Spell the flag of a field: "--num-steps" for "num_steps"."""
    return "--" + name.replace("_", "-")


def placeholder(f: dataclasses.Field[Any]) -> str:
    """Choose the word that stands for an option's value in --help."""
    meta = f.metadata
    if meta["metavar"] or meta["positional"]:
        return meta["metavar"] or f.name.upper()
    return "PATH" if meta["path"] and not meta["names"] else f.name.split("_")[-1].upper()


def choices_of(cls: type) -> dict[str, Sequence[str]]:
    """Map the flag of every option, without its dashes, to its only values or ()."""
    return {flag(f.name)[2:]: f.metadata["choices"] for f in dataclasses.fields(cls)}


def whole(text: str) -> int:
    """Read a whole number, also one written as 1e4 or 1_000."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


# argparse names it in its messages.
whole.__name__ = "int"

# Part of the message for an argument that no place is left for.
TOO_MANY = "one argument too many"


class _Parser(argparse.ArgumentParser):
    words: Sequence[str] = ()  # of the command line
    needs_output = False

    def error(self, message: str) -> typing.NoReturn:
        extra = message.removeprefix("unrecognized arguments: ")
        if extra != message and not any(word.startswith("-") for word in extra.split()):
            raise UsageError(f"{extra}: {self._too_many(extra)}")
        flags = {
            o[2:]: [*(a.choices or ())] for o, a in self._option_string_actions.items() if o.startswith("--")
        }
        unknown = [w[2:].split("=")[0].replace("_", "-") for w in extra.split() if w.startswith("--")]
        hints = {w: self._place(w) or near(w, flags) for w in unknown} if extra != message else {}
        several = len(hints) > 1
        hint = "".join(f"; --{w}: {h[2:]}" if several else h for w, h in hints.items() if h)
        raise UsageError(f"{message}{hint or '; --help lists the options'}")

    def _place(self, name: str) -> str:
        """Say where a value stands that has no flag, or ""."""
        places = [str(a.metavar) for a in self._actions if not a.option_strings]
        return (
            f"; {name.upper()} has no flag: {self.prog} {' '.join(places)}" if name.upper() in places else ""
        )

    def _too_many(self, extra: str) -> str:
        """Say what may be meant by words that no place is left for."""
        words = list(self.words)
        before = words[words.index(extra) - 1] if extra in words[1:] else ""
        switch = self._option_string_actions.get(before)
        if switch is not None and switch.nargs == 0:
            return f"{before} takes no value ({switch.help})"
        if self.needs_output and not {"-o", "--output"} & {word.split("=")[0] for word in words}:
            return f"{TOO_MANY}; -o names the output"
        return f"{TOO_MANY}; a text with spaces needs quotes around it"


def _plain(annotation: Any) -> Any:
    """Reduce `int | None` to int."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return typing.get_origin(annotation) or annotation


def field_types(cls: type) -> dict[str, Any]:
    """Map every field to its plain type (int, float, str, bool, tuple)."""
    hints = typing.get_type_hints(cls)
    return {f.name: _plain(hints[f.name]) for f in dataclasses.fields(cls)}


def groups(cls: type) -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """Yield (heading, fields) for each class that declares options of cls.

    The heading of a base class is the first line of its docstring; fields of cls itself have the heading ""."""
    owner = {name: c for c in reversed(cls.__mro__) for name in inspect.get_annotations(c)}
    for c, fields in itertools.groupby(dataclasses.fields(cls), lambda f: owner[f.name]):
        yield "" if c is cls else (c.__doc__ or "").splitlines()[0].rstrip("."), list(fields)


def given(cls: type, args: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """Parse a command line into {name: value} of the options that it names.

    Booleans take --name and --no-name. Raises UsageError for an unknown flag or a bad value."""
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.words = args
    parser.needs_output = any(f.name == "output" and f.metadata["needed"] for f in dataclasses.fields(cls))
    plain = field_types(cls)
    for heading, fields in groups(cls):
        title, _, text = heading.partition(": ")
        group = parser.add_argument_group(title.lower(), text) if heading else parser
        for f in fields:
            _add(group, f, plain[f.name])
    # Intermixed: options may stand between MODEL and PROMPT.
    values = at_home(cls, vars(parser.parse_intermixed_args(list(args))))
    check_ranges(cls, values)
    return values


def _add(parser: Any, f: dataclasses.Field[Any], kind: type) -> None:
    """Add one option to an argparse parser or group."""
    meta = f.metadata
    text = meta["help"].replace("%", "%%")
    if f.default not in (None, "", False, ()) and not meta["positional"]:
        text += f" (default {f.default})"
    if kind is bool:
        parser.add_argument(flag(f.name), help=text, action=argparse.BooleanOptionalAction)
        return
    names = [f.name] if meta["positional"] else [flag(f.name)]
    names += [flag(meta["also"])] if meta["also"] else []
    names += ["-" + meta["short"]] if meta["short"] else []
    how: dict[str, Any] = {"help": text, "metavar": placeholder(f)}
    if kind is tuple:
        # Not several values to one flag: the flag would swallow the arguments that follow.
        how |= {"nargs": "+"} if meta["positional"] else {"action": "append"}
    elif meta["positional"]:
        how |= {"nargs": None if f.default is None else "?"}
    else:
        how |= {"type": whole if kind is int else kind}
        if meta["choices"]:
            how |= {"choices": meta["choices"], "metavar": None}
    parser.add_argument(*names, **how)


def parse(cls: type[T], args: Sequence[str], prog: str, description: str) -> T:
    """Make an instance of a dataclass of options from a command line. Raises UsageError."""
    values = given(cls, args, prog, description)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.metadata["needed"] and not values.get(f.name):
            names = " or ".join([flag(f.name), *("-" + letter for letter in f.metadata["short"])])
            raise UsageError(f"{names} is needed: {f.metadata['help']}; --help has an example")
    return cls(**values)


def check_ranges(cls: type, values: Mapping[str, Any]) -> None:
    """Raise UsageError for a number that is outside the range of its option, or not finite."""
    for f in dataclasses.fields(cls):
        value = values.get(f.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if bound := _violated(f.metadata, value):
            raise UsageError(f"{flag(f.name)} = {value}: must be {bound}")


def check_names(cls: type, values: Mapping[str, Any]) -> None:
    """Raise IOFailure for a path, or a working folder, that could not be written into a record, which is UTF-8."""
    paths = {
        flag(f.name): values.get(f.name)
        for f in dataclasses.fields(cls)
        if f.metadata["path"] or f.metadata["inside"]
    }
    for name, value in {"working folder": os.getcwd(), **paths}.items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise IOFailure(
                f"{name} {value}: its name is not UTF-8 and cannot be recorded; rename it"
            ) from None


def _violated(meta: Mapping[str, Any], value: float) -> str:
    """Put the range that a number leaves into words; "" for a number within its range."""
    # Negated comparisons, so that NaN violates every range.
    violates = {
        "above": lambda bound: not value > bound,
        "at least": lambda bound: not value >= bound,
        "below": lambda bound: not value < bound,
        "at most": lambda bound: not value <= bound,
    }
    bounds = {words: bound for words in violates if (bound := meta[words.replace(" ", "_")]) is not None}
    if any(violates[words](bound) for words, bound in bounds.items()):
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items())
    if isinstance(value, int):
        return "" if abs(value) <= MAX_INTEGER else f"at most {MAX_INTEGER}"
    return "" if math.isfinite(value) else "a finite number"


def exactly_one(options: Any, names: Sequence[str], purpose: str) -> None:
    """Raise UsageError unless exactly one of the named options is given."""
    flags = [flag(name) for name in names if getattr(options, name) is not None]
    if len(flags) != 1:
        both = f"; {' and '.join(flags)} were given" if flags else ""
        raise UsageError(f"say {purpose}: give {' or '.join(map(flag, names))}, one of them{both}")


def absolute_paths(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Make the paths of files and folders that exist absolute, among the options that a resumed run keeps."""
    return _with_paths(cls, values, _absolute, lambda meta: not meta["may_change"])


def at_home(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Expand ~ at the beginning of paths, as a shell does of a word, but not behind --name= and in a file of settings."""
    return (
        _with_paths(cls, values, os.path.expanduser, lambda meta: True)
        if "~" in str(values)
        else dict(values)
    )


def _with_paths(
    cls: type,
    values: Mapping[str, Any],
    change: Callable[[str], str],
    of: Callable[[Mapping[str, Any]], bool],
) -> dict[str, Any]:
    """Change the paths among values, of the options that `of` takes by their metadata."""
    options = {f.name: f.metadata for f in dataclasses.fields(cls) if of(f.metadata)}
    out = dict(values)
    for name in options.keys() & values.keys():
        value, meta = values[name], options[name]
        if meta["path"] and value not in (None, "", *meta["names"]):
            out[name] = change(value) if isinstance(value, str) else type(value)(map(change, value))
        elif meta["inside"] and value:
            out[name] = meta["inside"](value, change)
    return out


def _absolute(path: str) -> str:
    return str(real(path)) if os.path.exists(path) else path


def numbers(text: str | None, flag: str, names: Sequence[str]) -> dict[str, float]:
    """Parse "speed=2,first_epoch=1.5": numbers of at least 0, each with one of `names`. Raises UsageError."""
    values: dict[str, float] = {}
    for part in (text or "").replace(",", " ").split():
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in names or not 0 <= value < math.inf:
            raise UsageError(f"{flag} {part!r}: write NAME=NUMBER with a name of {', '.join(names)}")
        values[name] = value
    return values
