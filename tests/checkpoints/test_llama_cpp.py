"""apr computes the logits and ids that llama.cpp gave for the files that apr writes (tools/golden/by_llama_cpp.py)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import llama_cpp_cases as cases
from apr import backends
from apr.checkpoints.gguf_reader import read_gguf
from apr.checkpoints.gguf_vocab import tokenizer_json
from apr.model.config import ModelConfig
from apr.model.params import Layout
from apr.model.taps import Record
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/llama-cpp.json").read_text())
AGAIN = (
    "the file is not the one that llama.cpp opened: make the record again with tools/golden/by_llama_cpp.py"
)


def logits_of(cfg: ModelConfig, tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Compute logits of the positions that are recorded, float32 (3, V)."""
    be, layout = backends.get("cpu"), Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    for hf, view in layout.named(host).items():
        view[...] = tensors[hf]
    w = be.empty(host.size, "float32")
    be.from_host(w, host)
    model, seen = Model(cfg, be, 1, ids.size, train=False, loss_rows=ids.size, w=w), Record(be)
    model.forward(ids[None].astype(np.int32), seen)
    model.loss(np.zeros((1, ids.size), np.int32), tap=seen)
    return seen.seen["logits"][list(cases.KEPT)]


@pytest.mark.parametrize("name", cases.MODELS)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    row = GOLDEN["models"][name]
    cases.write_model(name, tmp_path / "m.gguf")
    assert cases.fingerprint(tmp_path / "m.gguf") == row["file"], AGAIN
    want = np.array([r.split() for r in row["logits"]], np.float64)
    file, bound = read_gguf(tmp_path / "m.gguf"), cases.CLOSE * np.abs(want).max()
    assert file.cfg == cases.MODELS[name]
    tensors = {hf: file.tensors[hf] for hf in cases.weights(name)}
    off = np.abs(logits_of(file.cfg, tensors, cases.ids_of(name)) - want).max()
    assert off <= bound
    other = dataclasses.replace(file.cfg, rope_theta=1.01 * file.cfg.rope_theta)
    assert np.abs(logits_of(other, tensors, cases.ids_of(name)) - want).max() > 5 * bound


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return cases.tokenizers(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", GOLDEN["tokenizers"])
def test_ids_are_those_of_llama_cpp(name: str, tokenizers: dict[str, str], tmp_path: Path) -> None:
    """Of the tokenizer, and of what is read back from the keys."""
    row, text = GOLDEN["tokenizers"][name], tokenizers[name]
    ours = Tokenizer.from_json(text, "t")
    keys = cases.vocabulary(name, text)
    cases.write_vocabulary(keys, tmp_path / "m.gguf")
    assert cases.fingerprint(tmp_path / "m.gguf") == row["file"], AGAIN
    read = Tokenizer.from_json(tokenizer_json(keys, "k") or "", "k", ours.eos_id)
    for t in [read] if name == cases.PUBLISHED else [ours, read]:
        for source, (plain, marked) in zip(cases.TEXTS, row["ids"], strict=True):
            assert t.encode(source).tolist() == [int(i) for i in plain.split()], source
            assert t.encode_marked(source).tolist() == [int(i) for i in marked.split()], source


def test_the_rules_give_a_text_different_ids() -> None:
    """A file with the name of another rule would show."""
    found = [tuple(ids[0] for ids in row["ids"]) for row in GOLDEN["tokenizers"].values()]
    assert (
        len(set(found)) == len(found) - 1
    )  # dbrx is llama-bpe but for whole words, which this vocabulary makes by merges too
