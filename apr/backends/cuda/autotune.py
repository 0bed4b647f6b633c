"""Choose cuBLASLt algorithms for products by time, check their results, and remember them on disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.atomic import write_json
from ...common.errors import AprError
from ...common.host import cache_dir
from ...common.rounding import ceil_div
from .cublaslt import ALGORITHM_BYTES

FORMAT = 1  # of the cache file; a higher number when the meaning of a key or of an entry changes
MAX_FILE_BYTES = 1 << 24
MARGIN = 0.99  # an algorithm takes the place of the first only if it needs less than this share of its time

SAMPLE = 1 << 19  # elements of a result that are compared, in whole rows and again in whole columns
ROUND_MS = 0.2  # short products are timed in groups of this length

Array = Any  # cupy.ndarray
Warn = Callable[[str], None]


def to_stderr(message: str) -> None:
    """Print one warning line to standard error."""
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Algorithm:
    """One configured kernel of cuBLASLt: its 64 opaque bytes, workspace in bytes, measured ms or None."""

    data: bytes
    workspace: int
    ms: float | None = None


def time_all(
    runs: list[Callable[[], Any]], milliseconds: Callable[[Callable[[], Any], int], float]
) -> list[float]:
    """ms of a call of each: one look, then for those within 30 % of the best the median of five rounds, in
    turns, so that a drifting clock meets all of them; short ones are called several times a round."""
    ms = [milliseconds(run, 1) for run in runs]
    best = min(ms)
    calls = max(1, min(20, int(ROUND_MS / max(best, 1e-3))))
    close = [i for i, t in enumerate(ms) if t <= 1.3 * best]
    rounds = [[milliseconds(runs[i], calls) for i in close] for _ in range(5)]
    for i, samples in zip(close, zip(*rounds, strict=True), strict=True):
        ms[i] = statistics.median(samples)
    return ms


def fastest(ms: list[float], right: Callable[[int], bool]) -> int:
    """Index of the fastest algorithm whose result is right; 0, the heuristic's choice, unless another one
    is faster by more than 1 %, so that noise does not choose. Only those in question are checked."""
    for i in sorted(range(len(ms)), key=ms.__getitem__):
        if i == 0 or not ms[i] < MARGIN * ms[0]:
            break
        if right(i):
            return i
    return 0


def same(result: np.ndarray, first: np.ndarray, rounding: float) -> bool:
    """Tell whether two results of one product differ by rounding alone; never if one is not finite.

    |result - first| <= rounding |first| + 2^-10 max|first|. The second term is for sums that cancel: two
    orders of summation in float32 differ by far less than 2^-10 of the largest result.
    """
    if not (np.isfinite(first).all() and np.isfinite(result).all()):
        return False
    most = float(np.abs(first).max(initial=0.0))
    return bool((np.abs(result - first) <= rounding * np.abs(first) + most * 2.0**-10).all())


def digest(algorithms: dict[str, Algorithm]) -> str:
    """sha256 over keys and algorithms, in the order of the keys; times do not count."""
    lines = (f"{key} {algorithms[key].data.hex()}\n" for key in sorted(algorithms))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cache_file(gpu: str, version: str) -> Path:
    """Path of the algorithms found on such a GPU with such a cuBLASLt."""
    return cache_dir() / "cublaslt" / f"{re.sub('[^A-Za-z0-9]+', '-', gpu).strip('-')}-{version}.json"


class Cache:
    """Algorithms by key, read from a JSON file and written back whole.

    A file that is damaged or made for another GPU or version costs a warning and is not used; so does a
    folder that cannot be written.
    """

    def __init__(self, path: Path, gpu: str, version: str, warn: Warn = to_stderr) -> None:
        self.path = path
        self._made_for = {"format": FORMAT, "gpu": gpu, "cublaslt": version}
        self._warn = warn
        self._found: dict[str, Algorithm] = {}
        self._known = self._read()

    def get(self, key: str) -> Algorithm | None:
        """The algorithm remembered for `key`."""
        return self._known.get(key)

    def look_again(self) -> None:
        """Read what other processes have written since: a rank that tunes first saves the others the search."""
        self._known = {**self._read(), **self._found}

    def put(self, key: str, algorithm: Algorithm) -> None:
        """Remember an algorithm that was measured; save() writes it to disk."""
        self._known[key] = self._found[key] = algorithm

    def save(self) -> None:
        """Write what was found since the last save, together with what other processes wrote meanwhile.

        Of two processes that save at the same moment one loses its entries, and no file is damaged.
        """
        if not self._found:
            return
        entries = {**self._read(), **self._found}
        packed = {
            key: {"algorithm": a.data.hex(), "workspace": a.workspace, "ms": a.ms}
            for key, a in sorted(entries.items())
        }
        try:
            with suppress(OSError):  # write_json names what is wrong with the folder
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self._made_for, "algorithms": packed})
        except AprError as e:
            self._warn(f"{e}; the algorithms found are used now and searched again next time")
            return
        self._found = {}

    def _read(self) -> dict[str, Algorithm]:
        try:
            if self.path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
            held = json.loads(self.path.read_text("utf-8"))
            if not isinstance(held, dict) or not isinstance(held.get("algorithms"), dict):
                raise ValueError("no algorithms in it")
            for name, value in self._made_for.items():
                if held.get(name) != value:
                    raise ValueError(f"{name} is {held.get(name)!r} and not {value!r}")
            return {key: _unpack(key, entry) for key, entry in held["algorithms"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as e:
            self._warn(f"{self.path}: not used: {e}; it is written anew by the next search")
            return {}


def _unpack(key: str, entry: Any) -> Algorithm:
    """An entry of the file. Raises ValueError naming the key."""
    try:
        data, workspace, ms = bytes.fromhex(entry["algorithm"]), entry["workspace"], entry["ms"]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{key}: bad entry") from e
    good = len(data) == ALGORITHM_BYTES and type(workspace) is int and workspace >= 0
    if not (good and type(ms) in (int, float) and math.isfinite(ms) and ms > 0):
        raise ValueError(f"{key}: bad entry")
    return Algorithm(data, workspace, float(ms))


class SearchGpu:
    """CuPy's arrays and events for a search, on the stream of the products."""

    def __init__(self, device: int, stream: int) -> None:
        import cupy

        self._cupy, self._stream = cupy, cupy.cuda.get_current_stream()
        if self._stream.ptr != stream:
            raise ValueError(f"stream {stream:#x} is not the current one, {self._stream.ptr:#x}")
        self.name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()

    def capturing(self) -> bool:
        """Tell whether the stream records a graph."""
        return bool(self._cupy.cuda.runtime.streamIsCapturing(self._stream.ptr))

    def zero(self, d: Array) -> None:
        """d = 0"""
        d.fill(0)

    def sample(self, d: Array) -> np.ndarray:
        """Whole rows and whole columns of d, evenly spread, in one float32 array on the host."""
        steps = [
            ceil_div(d.shape[0] * d.shape[1], SAMPLE) | 1
        ] * 2  # odd, to fall on every place within a tile
        parts = d[:: steps[0]].get(), d[:, :: steps[1]].get()
        return np.concatenate([p.astype(np.float32).ravel() for p in parts])

    def milliseconds(self, run: Callable[[], None], calls: int) -> float:
        """GPU time of one of `calls` calls in a row."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self._stream)
        for _ in range(calls):
            run()
        end.record(self._stream)
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / calls
