"""Headers of GGUF files that would become more objects, or more work, than a vocabulary in use."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from apr.checkpoints.gguf_reader import MAX_ITEMS, read_gguf
from apr.checkpoints.gguf_vocab import tokenizer_json
from apr.common.errors import MalformedFile


def test_values_are_counted_over_all_arrays(tmp_path: Path) -> None:
    each = MAX_ITEMS // 8
    keys = b"".join(struct.pack("<Q1sIIQ", 1, b"%d" % i, 9, 0, each) + bytes(each) for i in range(9))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + keys)
    with pytest.raises(MalformedFile, match=r"m\.gguf: .*'8': an array"):
        read_gguf(tmp_path / "m.gguf")


def test_a_token_is_not_split_at_a_million_places() -> None:
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a", "b" * 50_000],
        "tokenizer.ggml.token_type": [1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0],
    }
    with pytest.raises(MalformedFile, match="here: tokens too long to split: 2,500,000,001 characters"):
        tokenizer_json(keys, "here")
