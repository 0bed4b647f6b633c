"""Compare what stands on the disk with what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..common.errors import IOFailure
from ..common.units import plural
from .tensors import CHUNK, EMBED, HEAD, INV_FREQ, encode, saved_dtype


def compare_written(
    got: Mapping[str, np.ndarray],
    want: Mapping[str, np.ndarray],
    tied: bool,
    path: Path,
    dtype: str | None = None,
) -> int:
    """Compare every tensor of `want`, as `dtype` would hold it, with `got` bit for bit; returns the elements compared.

    tied: the head is looked for under the name of the embedding. Raises IOFailure, naming the first that differs."""
    count = 0
    for name, source in want.items():
        there = got.get(name)
        if there is None and tied and name == HEAD:
            there = got[EMBED]
        if there is None:
            if name.endswith(INV_FREQ):
                continue
            raise IOFailure(
                f"{path}: tensor {name} was not written; the disk or memory is faulty: write it again"
            )
        flat, at = there.reshape(-1), 0
        for piece in encode(str(path), source, saved_dtype(source, dtype)):
            bits = np.frombuffer(piece, np.uint8)
            part = flat[at : at + min(CHUNK, flat.size - at)]
            if not np.array_equal(np.ascontiguousarray(part).view(np.uint8), bits):
                raise IOFailure(
                    f"{path}: tensor {name}, elements from {at} on, differ from the source after writing; the disk or "
                    "memory is faulty: write it again"
                )
            at += part.size
        if at != flat.size:
            raise IOFailure(
                f"{path}: tensor {name} has {plural(flat.size, 'element')}, the source {at}; write it again"
            )
        count += at
    return count
