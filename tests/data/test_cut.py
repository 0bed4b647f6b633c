"""Long texts are cut where their ids are cut anyway: pieces give the ids of the whole, or there is no cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from apr.data import cut
from apr.data.cut import CannotCut, Cutter
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from data_cases import CODE, corpus


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "PIECE_CHARACTERS", 600)
    monkeypatch.setattr(cut, "MAX_PIECE_CHARACTERS", 4000)


def gpt2(texts: list[str], folder: Path) -> Tokenizer:
    """Byte-level with the pre-tokenizer of GPT-2, which splits runs of spaces by what follows them."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    engine.train_from_iterator(texts, trainer)
    return Tokenizer.from_json(engine.to_str(), "gpt2-like")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tok")
    texts = [d.text for d in corpus()] + ["  \n\n" * 50, "    x\n" * 50, "=" * 400 + "\n" + "-" * 99]
    return {"gpt4": train_tokenizer(texts, 600, folder / "gpt4"), "gpt2": gpt2(texts, folder)}


def prose(rng: random.Random) -> str:
    return " ".join("".join(rng.choices("abcdefgh\u00e9\u4e2d", k=rng.randint(1, 9))) for _ in range(2000))


def code(rng: random.Random) -> str:
    return "".join(
        " " * (4 * rng.randint(0, 5)) + rng.choice(CODE.splitlines()).strip() + "\n" * rng.randint(1, 4)
        for _ in range(900)
    )


def spaces(rng: random.Random) -> str:
    return "".join(
        rng.choice([" ", "  ", "\n", "\n\n", "\t", "x", "1", "=", "\r\n", "e\u0301"]) for _ in range(9000)
    )


def rules(rng: random.Random) -> str:
    return "".join(
        rng.choice("=-*#") * rng.randint(1, 700) + rng.choice(["\n", "\n\n", " ", ""]) for _ in range(60)
    )


@pytest.mark.parametrize("name", ["gpt4", "gpt2"])
@pytest.mark.parametrize("text", [prose, code, spaces, rules])
def test_pieces_give_the_ids_of_the_whole(
    tokenizers: dict[str, Tokenizer], name: str, text: Callable[[random.Random], str]
) -> None:
    tok = tokenizers[name]
    for seed in range(3):
        whole = text(random.Random(seed))
        chunks = [whole[i : i + 777] for i in range(0, len(whole), 777)]
        pieces = list(Cutter(tok).pieces(chunks))
        assert "".join(pieces) == whole
        assert len(pieces) > 4
        np.testing.assert_array_equal(np.concatenate(tok.encode_batch(pieces)), tok.encode(whole))


def test_qwen_pieces_of_real_text(data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "PIECE_CHARACTERS", 5000)
    monkeypatch.setattr(cut, "MAX_PIECE_CHARACTERS", 20_000)
    tok = Tokenizer.from_file(data("qwen2-tokenizer"))
    for name in ("tinyshakespeare/input.txt", "tinystories-excerpt/tinystories-train-head.txt"):
        whole = data(name).read_text()[:200_000]
        pieces = list(Cutter(tok).pieces([whole]))
        assert len(pieces) > 20
        np.testing.assert_array_equal(np.concatenate(tok.encode_batch(pieces)), tok.encode(whole))


def test_a_cut_anywhere_would_change_the_ids(tokenizers: dict[str, Tokenizer]) -> None:
    """What the judgement is for: cuts of equal length, without it, give other ids."""
    whole = prose(random.Random(1))
    tok = tokenizers["gpt4"]
    blind = [whole[i : i + 600] for i in range(0, len(whole), 600)]
    assert not np.array_equal(np.concatenate(tok.encode_batch(blind)), tok.encode(whole))


def test_a_run_without_a_place_is_named(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(CannotCut, match="beginning 'aaaa"):
        list(Cutter(tokenizers["gpt4"]).pieces(["a b\n" * 200, "a" * 9000, "a b\n" * 200]))
    assert list(Cutter(tokenizers["gpt4"]).pieces(["a" * 3000])) == ["a" * 3000]  # short enough to be one


def test_a_tokenizer_that_cannot_be_cut_is_not(data: Callable[[str], Path]) -> None:
    """A sentencepiece-like one puts a space before every text: no place gives the ids of the whole."""
    tok = Tokenizer.from_file(data("stories260K/hf"))
    short = "Once upon a time, there was a cat. " * 40
    assert list(Cutter(tok).pieces([short])) == [short]
    with pytest.raises(CannotCut):
        list(Cutter(tok).pieces([short * 10]))


def test_short_texts_stay_whole(tokenizers: dict[str, Tokenizer]) -> None:
    assert list(Cutter(tokenizers["gpt4"]).pieces(["abc\n", "def"])) == ["abc\ndef"]
    assert list(Cutter(tokenizers["gpt4"]).pieces([])) == []
