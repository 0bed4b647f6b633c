"""`apr qa`: a real trained model passes; each planted fault turns its own row red; skipped is never passed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.importing import import_model
from apr.cli.main import main
from apr.common.errors import InputNotFound
from apr.common.finding import FAIL, PASS, SKIPPED, Finding
from apr.evaluation import qa as qa_module
from apr.evaluation.qa import cycle, qa
from apr.evaluation.reading import Passage
from apr.evaluation.texts import TEXTS
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer

ROWS = [
    "validate",
    "loads",
    "tokenizer",
    "tokenizer round trip",
    "logits finite",
    "logits vary",
    "loss on text",
    "writes no repetitions",
    "writes no loop",
    "export and reload",
    "speed",
]


@pytest.fixture(scope="module")
def stories(data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of 260,032 parameters."""
    path = tmp_path_factory.mktemp("qa") / "stories.apr"
    import_model(str(data("stories260K/hf")), path)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a tokenizer that knows the texts."""
    folder = tmp_path_factory.mktemp("untrained")
    tok = train_tokenizer(list(TEXTS.values()), 400, folder)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=400, max_position_embeddings=128)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.init(host, 1)
    meta = config_to_metadata(cfg)
    embed_tokenizer(meta, tok.json, tok.eos_id)
    write_apr(folder / "m.apr", meta, layout.named(host))
    return folder / "m.apr"


def ask(path: Path, **options: Any) -> dict[str, Finding]:
    return {r.name: r for r in qa(str(path), backends.get("cpu"), "float32", **options).findings}


def red(rows: dict[str, Finding]) -> list[str]:
    return [n for n, r in rows.items() if r.verdict == FAIL]


def spoil(path: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy with other weights."""
    apr = read_apr(path)
    tensors = {n: np.array(x) for n, x in apr.tensors.items()}
    change(tensors)
    write_apr(out, apr.metadata, tensors)
    return out


def test_a_trained_model_passes(stories: Path) -> None:
    rows = ask(stories)
    assert list(rows) == ROWS
    assert [n for n, r in rows.items() if r.verdict != PASS] == []
    assert "story 1." in rows["loss on text"].figure  # nats per token: its own kind of text
    assert all(r.figure for r in rows.values())


def test_text_that_it_must_know(stories: Path, data: Callable[[str], Path]) -> None:
    known = data("tinystories-excerpt/tinystories-train-head.txt").read_text()[:20_000]
    assert red(ask(stories, text=known)) == []
    assert red(ask(stories, text=TEXTS["python"])) == ["loss on text"]
    rows = ask(stories, text="Too short.")
    assert {n for n, r in rows.items() if r.verdict == SKIPPED} == {
        "logits finite",
        "logits vary",
        "loss on text",
        "writes no repetitions",
        "writes no loop",
        "export and reload",
        "speed",
    }


def test_untrained_weights_fail_on_text_alone(untrained: Path) -> None:
    rows = ask(untrained)
    assert "loss on text" in red(rows)
    assert set(red(rows)) <= {"loss on text", "logits vary"}
    assert rows["validate"].verdict == PASS  # nothing is wrong with the file


def test_shuffled_embedding_rows_fail_on_text(stories: Path, tmp_path: Path) -> None:
    """The tokenizer of another model: every check of the file passes."""

    def shuffle(t: dict[str, np.ndarray]) -> None:
        x = t["model.embed_tokens.weight"]
        x[...] = x[np.random.default_rng(1).permutation(len(x))]

    rows = ask(spoil(stories, tmp_path / "m.apr", shuffle))
    assert rows["validate"].verdict == PASS
    assert rows["loss on text"].verdict == FAIL


def test_logits_that_do_not_depend_on_the_position(stories: Path, tmp_path: Path) -> None:
    def forget(t: dict[str, np.ndarray]) -> None:
        t["model.norm.weight"][...] = 1e-30

    assert {"logits vary", "loss on text"} <= set(red(ask(spoil(stories, tmp_path / "m.apr", forget))))


def test_logits_that_are_not_finite(stories: Path, tmp_path: Path) -> None:
    def blow_up(t: dict[str, np.ndarray]) -> None:
        t["model.norm.weight"][...] = 3e38

    with np.errstate(all="ignore"):
        rows = ask(spoil(stories, tmp_path / "m.apr", blow_up))
    assert rows["validate"].verdict == PASS
    assert "logits finite" in red(rows)
    assert PASS not in {rows[n].verdict for n in ("loss on text", "writes no loop")}


def test_one_token_repeated(stories: Path, tmp_path: Path) -> None:
    """Each token predicts itself: an embedding of large rows, and blocks that add nothing."""

    def echo(t: dict[str, np.ndarray]) -> None:
        for n, x in t.items():
            if n.endswith(("o_proj.weight", "down_proj.weight")):
                x *= 1e-6
        t["model.norm.weight"][...] = 20

    rows = ask(spoil(stories, tmp_path / "m.apr", echo))
    assert {"writes no repetitions", "writes no loop", "loss on text"} <= set(red(rows))


def test_tokenizer_missing(stories: Path, tmp_path: Path) -> None:
    rows = ask(_without_tokenizer(stories, tmp_path / "m.apr"))
    assert red(rows) == ["tokenizer"]
    assert {n for n, r in rows.items() if r.verdict == PASS} == {"validate", "loads"}


def _without_tokenizer(path: Path, out: Path) -> Path:
    apr = read_apr(path)
    meta = {k: v for k, v in apr.metadata.items() if not k.startswith("tokenizer")}
    write_apr(out, meta, dict(apr.tensors))
    return out


def test_a_damaged_file(stories: Path, tmp_path: Path) -> None:
    raw = bytearray(stories.read_bytes())
    raw[-900] ^= 1
    (tmp_path / "m.apr").write_bytes(raw)
    rows = ask(tmp_path / "m.apr")
    assert red(rows) == ["validate", "loads"]
    assert "footer checksum" in rows["validate"].figure
    assert {r.verdict for n, r in rows.items() if n not in ("validate", "loads")} == {SKIPPED}


def test_an_export_that_changes_a_weight(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = qa_module.open_any

    def other(source: str) -> Any:
        loaded = real(source)
        if source == str(stories):
            return loaded
        tensors = {n: np.array(x) for n, x in loaded.tensors.items()}
        tensors["model.layers.4.mlp.up_proj.weight"][0, 0] += 1e-3
        return dataclasses.replace(loaded, tensors=tensors)

    monkeypatch.setattr(qa_module, "open_any", other)
    rows = ask(stories)
    assert red(rows) == ["export and reload"]
    assert "other logits" in rows["export and reload"].figure


def test_speed_is_judged_only_with_a_bound(stories: Path) -> None:
    assert red(ask(stories, min_tokens_per_sec=1e8)) == ["speed"]
    rows = ask(stories, min_tokens_per_sec=0)
    assert rows["speed"].verdict == SKIPPED
    assert "tokens/s" in rows["speed"].figure


def test_cycle() -> None:
    assert cycle([5] * 60) == 1
    assert cycle(list(range(100, 130)) + [1, 2, 3] * 16) == 3
    assert cycle(list(range(16)) * 4) == 16
    assert cycle(list(range(17)) * 4) is None
    assert cycle([1] * 47) is None
    assert cycle([1] * 47 + [2]) is None


def test_entropy_of_a_passage() -> None:
    assert Passage("x", np.array([1, 2, 3, 4])).entropy == pytest.approx(np.log(4))
    assert Passage("x", np.array([7, 7, 7])).entropy == 0


def test_command(
    stories: Path,
    untrained: Path,
    data: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call(*args: object) -> tuple[int, str, str]:
        code = main(["qa", *map(str, args), "--device", "cpu"])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, _ = call(stories)
    assert code == 0
    assert out.rstrip().endswith("PASS: 11 passed")
    code, out, _ = call(untrained, "--json")
    assert code == 9
    said = json.loads(out)
    assert said["verdict"] == FAIL
    assert [r["check"] for r in said["checks"]] == ROWS
    code, _, err = call(tmp_path / "none.apr")
    assert code == 3
    assert "none.apr" in err
    code, _, err = call(stories, "--text", tmp_path / "none.txt")
    assert code == 3
    code, _, err = call(stories, "--min-tokens-per-sec", "-1")
    assert code == 2
    assert call(data("stories260K/hf"))[0] == 0
    with pytest.raises(InputNotFound):
        qa(str(tmp_path / "none"), backends.get("cpu"), "float32")
