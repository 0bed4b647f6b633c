"""Read a table of settings from a file: TOML, YAML or JSON, by its suffix."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import MalformedFile, UsageError
from .files import parse_value, read_text
from .packages import pip_install

# A number that YAML 1.1 takes for a text, such as 1e-4.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
# Characters of a file of settings.
MAX_CHARACTERS = 1 << 20


def read_table(path: Path) -> dict[str, Any]:
    """Read an object of settings. Raises InputNotFound, IOFailure, MalformedFile; UsageError: a package is missing."""
    text = read_text(path)
    if len(text) > MAX_CHARACTERS:
        raise MalformedFile(f"{path}: more than {MAX_CHARACTERS:,} characters, too many for settings")
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        value = (
            _yaml(text, path) if suffix in (".yaml", ".yml") else parse_value(text, str(path), unique=True)
        )
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise MalformedFile(f"{path}: {e or 'nested too deeply'}") from None
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
        # An alias may stand for an alias, and grow without end.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise MalformedFile(f"{path}: has anchors and aliases; write the values out")
        if twice := next(_twice(yaml.compose(text, yaml.SafeLoader)), ""):
            raise MalformedFile(f"{path}: {twice} stands there twice")
        return _numbers(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as e:
        raise MalformedFile(f"{path}: {' '.join(str(e).split())}") from None


def _twice(node: Any) -> Iterator[str]:
    """Yield the keys that a mapping of a YAML tree, or one below it, has more than once: only the last would count."""
    children = node.value if node is not None and isinstance(node.value, list) else []
    keys = [child[0].value for child in children if isinstance(child, tuple)]
    yield from (str(key) for i, key in enumerate(keys) if key in keys[:i])
    for child in children:
        yield from _twice(child[1] if isinstance(child, tuple) else child)


def _numbers(value: Any) -> Any:
    """Make numbers of the texts that are meant so."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
