"""Read a table of settings from a file: TOML, YAML or JSON, by its suffix."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from .errors import MalformedFile, UsageError
from .files import MAX_DEPTH, parse_value, read_text
from .packages import pip_install

# Plain scalars of the core schema of YAML 1.2: their pattern, the characters that they begin with, and what they stand for.
_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": ("~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", lambda text: _whole(text)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
}
# Characters of a file of settings.
MAX_CHARACTERS = 1 << 20
# A string in a line of TOML, and a key of more than MAX_DEPTH parts: tomllib takes the square of their number to read it.
_QUOTED = re.compile(r'"(?:[^"\\\n]++|\\.)*+"?|\'[^\'\n]*+\'?')
_DEEP_KEY = re.compile(rf"(?<![\w-])[\w-]++(?:[ \t]*+\.[ \t]*+[\w-]++){{{MAX_DEPTH}}}")
TOO_DEEP = f"nested too deeply, more than {MAX_DEPTH} tables and lists inside each other"


def read_table(path: Path) -> dict[str, Any]:
    """Read an object of settings. Raises InputNotFound, IOFailure, MalformedFile; UsageError: a package is missing."""
    text = read_text(path)
    if len(text) > MAX_CHARACTERS:
        raise MalformedFile(f"{path}: more than {MAX_CHARACTERS:,} characters, too many for settings")
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            if _DEEP_KEY.search(_QUOTED.sub("x", text)):
                raise MalformedFile(f"{path}: {TOO_DEEP}")
            value: Any = tomllib.loads(text)
        elif suffix in (".yaml", ".yml"):
            value = _yaml(text, path)
        else:
            value = parse_value(text, str(path), unique=True)
        # Of a hexadecimal number more digits are read than Python prints.
        repr(value)
    except (ValueError, RecursionError) as e:  # also an integer of more digits than Python reads
        raise MalformedFile(f"{path}: {TOO_DEEP if isinstance(e, RecursionError) else e}") from None
    if not isinstance(value, dict):
        raise MalformedFile(f"{path}: expected an object of settings, a name and a value each")
    return value


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError as e:
        raise UsageError(
            f"{path}: reading YAML needs PyYAML ({e}): {pip_install('PyYAML')}; TOML needs nothing"
        ) from None
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            # An alias may stand for an alias, and grow without end.
            if isinstance(event, yaml.AliasEvent):
                raise MalformedFile(f"{path}: has anchors and aliases; write the values out")
            # PyYAML looks at every open bracket at each token: a megabyte of them would take it hours.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise MalformedFile(f"{path}: {TOO_DEEP}")
        if twice := next(_twice(yaml.compose(text, yaml.SafeLoader)), ""):
            raise MalformedFile(f"{path}: {twice} stands there twice")
        return yaml.load(text, _core(yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as e:
        raise MalformedFile(f"{path}: {' '.join(str(e).split())}") from None


def _twice(node: Any) -> Iterator[str]:
    """Yield the keys that a mapping of a YAML tree, or one below it, has more than once: only the last would count."""
    children = node.value if node is not None and isinstance(node.value, list) else []
    keys = [child[0].value for child in children if isinstance(child, tuple)]
    yield from (key for key, n in Counter(key for key in keys if isinstance(key, str)).items() if n > 1)
    for child in children:
        yield from _twice(child[1] if isinstance(child, tuple) else child)


def _whole(text: str) -> int:
    """Read 0o17, 0x1f or 017, which is 17."""
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _core(safe: Any) -> Any:
    """Make a loader that reads plain scalars as YAML 1.2 does: yes, no, on and off are text, as are dates and 12:30:00, and 1e4
    is a number. safe: PyYAML's loader, which reads YAML 1.1."""

    class Core(safe):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    for kind, (pattern, first, make) in _SCALARS.items():
        tag = f"tag:yaml.org,2002:{kind}"
        Core.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), [*first, ""])
        Core.add_constructor(tag, lambda loader, node, make=make: make(loader.construct_scalar(node)))
    return Core
