"""Read the keys of a config.json, each checked, and collect what its user should know."""

from __future__ import annotations

from typing import Any

from ..common.errors import MalformedFile, Refused
from ..common.units import plural


class HfKeys:
    """Hold the dict of a config.json and the name of its file, which every message begins with.

    defaults  value of a key that is missing, as transformers publishes it for the class; none for sizes
    taken     the defaults that were read, by key
    """

    def __init__(self, d: dict[str, Any], source: str, defaults: dict[str, Any] | None = None) -> None:
        self.d, self.source, self.defaults = d, source, defaults or {}
        self.taken: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """Give the value as it stands; for a missing key its default, or None without one."""
        if key not in self.d and key in self.defaults:
            self.taken[key] = self.defaults[key]
            return self.defaults[key]
        return self.d.get(key)

    def number(self, key: str, kind: type = int, zero: bool = False) -> Any:
        """A number above zero, or zero where that is allowed. Raises MalformedFile."""
        value = self.get(key)
        if value is None:
            raise MalformedFile(f"{self.source}: missing key {key!r}; apr invents no sizes, add it")
        good = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not good or not 0 <= value < 2**40 or (value == 0 and not zero):
            raise MalformedFile(f"{self.source}: {key} = {value!r} is not a positive {kind.__name__}")
        return kind(value)

    def flag(self, key: str) -> bool:
        """A switch, false where it is missing. Raises MalformedFile."""
        value = self.d.get(key)
        if value is not None and not isinstance(value, bool):
            raise MalformedFile(f"{self.source}: {key} = {value!r} is neither true nor false")
        return bool(value)

    def per_layer(self, key: str, layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """A list with one of the `allowed` values for each layer; None where it is missing. Raises MalformedFile, Refused."""
        values = self.d.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            raise MalformedFile(f"{self.source}: {key} = {values!r} is not a list")
        strange = [v for v in values if not any(v is a or (type(v) is type(a) and v == a) for a in allowed)]
        if strange or len(values) != layers:
            what = " or ".join(map(repr, allowed))
            raise Refused(
                f"{self.source}: {key} = {values!r}; apr computes {what}, one for each of {plural(layers, 'layer')}"
            )
        return values
