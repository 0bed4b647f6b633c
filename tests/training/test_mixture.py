"""Mixtures: sources drawn in the shares that were asked for, each with its own losses, to the same bits after a stop."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.hf import write_hf
from apr.cli.main import main
from apr.common.errors import Refused, UsageError
from apr.common.events import by_source
from apr.data import mix_text, mixture
from apr.data.batches import Batches, Windows
from apr.data.mixed import MixedShards
from apr.data.settings import DataSettings
from apr.data.shards import Shards
from apr.data.turns import Turns
from apr.evidence.stream import asked_shares
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.training import by_source as losses
from apr.training.settings import from_command_line, resolve
from finetune_cases import OWN_TEMPLATE, own_tokenizer
from run_cases import cache, place  # noqa: F401  fixtures

RECIPE = [
    "--lr", "3e-3", "--warmup-steps", "2", "--num-steps", "6", "--eval-every", "3", "--batch-size", "5",
    "--micro-batch-size", "2", "--seq-length", "16", "--val-batches", "4", "--val-fraction", "0.3",
    "--keep-states", "6", "--save-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def other(place):
    """A second corpus."""
    (place / "other").mkdir()
    for source in sorted((Path(sysconfig.get_paths()["stdlib"]) / "asyncio").glob("s*.py")):
        shutil.copy(source, place / "other" / source.name)
    return place / "other"


def pretrain(place, run, *more, weights=(0.8, 0.2)):
    mix = f"corpus={place}/corpus weight={weights[0]} name=mail; corpus={place}/other weight={weights[1]}"
    args = [*RECIPE, "--mix", mix, "--model", str(place / "config.json"), "--run-dir", str(run)]
    return main(["pretrain", *args, *map(str, more)])


@pytest.fixture(scope="module")
def run(place, other, tmp_path_factory):
    """An undisturbed run of a mixture."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        path = tmp_path_factory.mktemp("mixture") / "run"
        assert pretrain(place, path) == 0
    return path


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def row(run, gate):
    return next(g for g in json.loads((run / "verdict.json").read_text())["gates"] if g["id"] == gate)


# Turns


@pytest.mark.parametrize("counts", [(1,), (1, 1), (7, 3), (63000, 27000), (1, 89999), (5, 1, 2, 9)])
def test_turns_are_spread_evenly(counts):
    turns, period = Turns(counts), sum(counts)
    places = np.arange(min(3 * period, 200_000))
    sources, positions = turns(places)
    for k, n in enumerate(counts):
        mine = sources == k
        assert np.array_equal(positions[mine], np.arange(mine.sum()))
        drawn = np.cumsum(mine)
        assert np.abs(drawn - (places + 1) * n / period).max() < len(counts)
        for some in (0, 1, period, places.size - 1):
            assert turns.count(k, some) == mine[:some].sum()
        for position in {0, int(mine.sum()) - 1}:
            at = turns.place(k, position)
            assert (sources[at], positions[at]) == (k, position)
    # Far away too, without what comes before.
    far = turns(np.array([10**12 * period + 1]))
    assert far[0][0] == sources[1 % places.size]
    assert far[1][0] == 10**12 * counts[sources[1 % places.size]] + positions[1 % places.size]


def test_shares_of_weights_and_budgets():
    def turns(text, **more):
        return mixture.turns_of(DataSettings(mix=text, **{"seq_length": 10, "batch_size": 4, **more}))

    assert turns("corpus=a weight=0.7; corpus=b weight=0.3") == [63000, 27000]
    assert turns("corpus=a weight=1; corpus=b weight=2") == [30000, 60000]
    assert sum(turns("corpus=a weight=1; corpus=b weight=1e3; corpus=c weight=3")) == mixture.PERIOD
    # Of budgets the windows themselves.
    assert turns("corpus=a tokens=95; corpus=b tokens=1e3") == [10, 100]
    budgets = DataSettings(mix="corpus=a tokens=95; corpus=b tokens=1e3", seq_length=10, batch_size=4)
    assert mixture.steps_of_budgets(budgets) == 28
    assert mixture.turns_of(DataSettings(corpus="a")) == [1]
    assert asked_shares("corpus=a weight=1; corpus=b weight=3", 8) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("corpus=a weight=0; corpus=b weight=1", "a: weight=0 is not a number above 0"),
        ("corpus=a weight=-1; corpus=b weight=2", "is not a number above 0"),
        ("corpus=a weight=nan; corpus=b weight=2", "is not a number above 0"),
        ("corpus=a weight=0.7; corpus=b weight=0.2", "sum to 0.9"),
        ("corpus=a weight=1", "names 1 source"),
        ("corpus=a weight=0.5; corpus=./a weight=0.5 name=c", "stands there twice"),
        ("corpus=x/a weight=0.5; corpus=y/a.txt weight=0.5", "two sources are called a"),
        ("corpus=a weight=0.5; corpus=b tokens=100", "b by tokens"),
        ("corpus=a weight=1 tokens=5; corpus=b weight=1", "give it a weight"),
        ("corpus=a; corpus=b weight=1", "give it a weight"),
        ("corpus=a tokens=1.5; corpus=b tokens=100", "no whole number"),
        ("corpus=a weight=1e-9; corpus=b weight=1", "at least"),
        ("preferences=a weight=1; corpus=b weight=1", "pairs of preferences are not mixed"),
        ("shards=a weight=1; corpus=b weight=1", "write KEY=VALUE"),
        ("corpus=a dataset=c weight=1; corpus=b weight=1", "a source is one of"),
        ("weight=1; corpus=b weight=1", "a source is one of"),
        ("corpus=a weight=1 weight=2; corpus=b weight=1", "has a weight already"),
        ("corpus='a weight=1; corpus=b weight=1", "No closing quotation"),
        ("corpus=a weight=1 map=x=y; corpus=b weight=1", "map goes with instruct"),
        ("corpus=a weight=1 name=a/b; corpus=b weight=1", "is no name"),
    ],
)
def test_bad_mixtures_are_refused(text, said):
    with pytest.raises(UsageError, match=said):
        mixture.sources_of(DataSettings(mix=text))


def test_tables_of_a_settings_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text").mkdir()
    tables = [{"corpus": "my text", "weight": 0.7}, {"corpus": "b;c", "weight": 0.3, "content-field": "x"}]
    of_each = ["[[mix]]", "corpus = 'my text'", "weight = 0.7", "[[mix]]", "corpus = 'b;c'", "weight = 0.3"]
    (tmp_path / "s.toml").write_text("\n".join(["model = 'llama-demo'", *of_each, "content-field = 'x'"]))
    (tmp_path / "s.yaml").write_text(json.dumps({"model": "llama-demo", "mix": tables}))
    for file in ("s.toml", "s.yaml"):
        _, explicit = from_command_line(["--config", file])
        assert explicit["mix"] == "corpus='my text' weight=0.7; corpus='b;c' weight=0.3 content_field=x"
    assert mix_text.with_paths(explicit["mix"], lambda p: f"/d/{p}").startswith("corpus='/d/my text'")
    # A link is resolved to what it stands for, and its source keeps its name.
    assert mix_text.with_paths("corpus=web weight=1", lambda p: "/d/v2") == "corpus=/d/v2 weight=1 name=web"
    with pytest.raises(UsageError, match="no list of tables"):
        mix_text.as_text({"a": 1}, "s.toml")
    with pytest.raises(UsageError, match="neither text nor a number"):
        mix_text.as_text([{"corpus": ["a", "b"]}], "s.toml")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--corpus", "a", "--corpus=b"], "--corpus is given twice"),
        (["--mix", "corpus=a weight=1; corpus=b weight=1", "--corpus", "c"], "one of them"),
        (["--mix", "corpus=a weight=1; corpus=b weight=1", "--epochs", "2"], "--epochs of a mixture"),
        (["--mix", "corpus=a tokens=1e3; corpus=b tokens=1e3", "--num-steps", "2"], "both say how long"),
        (["--mix", "corpus=a weight=1; corpus=b weight=1", "--val-dataset", "c"], "its own validation side"),
        (["--mix", "instruct=a weight=1; instruct=b weight=1"], "give it with --init"),
    ],
)
def test_settings_that_contradict_a_mixture(args, said):
    with pytest.raises(UsageError, match=said):
        resolve(*from_command_line([*args, "--model", "llama-demo"]))


# A run


def test_a_run_draws_what_was_asked_and_logs_each_source(run):
    log, verdict = lines(run), json.loads((run / "verdict.json").read_text())
    assert verdict["verdict"] == "PASS"
    last = [x for x in log if "train_loss" in x][-1]
    assert by_source(last, "tokens_seen") == {"mail": 24 * 16, "other": 6 * 16}
    for x in log:
        if "val_loss" in x:
            each, counts = by_source(x, "val_loss"), by_source(x, "val_tokens")
            assert sum(each[k] * counts[k] for k in each) == pytest.approx(
                x["val_loss"] * x["val_tokens"], rel=1e-7
            )
            assert abs(each["mail"] - each["other"]) > 1e-4
    assert row(run, "run.mixture")["verdict"] == "PASS"
    assert "mail" in row(run, "start.validation")["measured"]
    data = json.loads((run / "config.json").read_text())["data"]
    assert {k: v["share"] for k, v in data["mixture"].items()} == {"mail": 0.8, "other": 0.2}
    assert sum(v["train_windows"] for v in data["mixture"].values()) == data["train_windows"]


def test_a_run_goes_on_to_the_same_bits(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for state in sorted((again / "ckpt" / "state").glob("*.apr"))[2:]:
        state.unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(again)]) == 0
    clock = ("wall_ms", "tokens_per_sec")
    a, b = (
        [{k: v for k, v in x.items() if k not in clock} for x in lines(r) if "spot_check" not in x]
        for r in (run, again)
    )
    assert a == b
    hashes = [read_apr(r / "ckpt/state/step-000006.apr").metadata["state_sha256"] for r in (run, again)]
    assert hashes[0] == hashes[1]
    assert row(again, "before.resumed")["verdict"] == "PASS"
    with pytest.raises(Refused, match="turns"):
        Batches.restore(_stream([3, 1]), _stream([1, 1]).state())


def _stream(turns):
    class Some:
        sources, seq_length, first, count = [("a", 0, 6), ("b", 6, 4)], 4, 0, 10
        shards = type("S", (), {"sha256": "x", "folder": Path("x")})()

    return Batches(Some(), 2, 1, turns=turns)


def test_verify_computes_a_mixture_again_and_finds_what_was_changed(run, tmp_path, capsys):
    assert main(["verify", str(run), "--replay", "2"]) == 0
    from apr.evidence.seal import seal

    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    text = (changed / "metrics.jsonl").read_text()
    (changed / "metrics.jsonl").write_text(text.replace('"tokens_seen/mail": 64,', '"tokens_seen/mail": 48,'))
    seal(changed)
    capsys.readouterr()
    assert main(["verify", str(changed), "--backend", "none"]) == 9
    assert "tokens_seen" in capsys.readouterr().out


# Other kinds of sources


@pytest.fixture(scope="module")
def tuned(place, other, tmp_path_factory):
    """A checkpoint with a template, conversations, and a run on both, by budgets."""
    folder = tmp_path_factory.mktemp("tuned")
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=320, max_position_embeddings=128)
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).init(host, 1, 0.05)
    write_hf(folder / "hf", cfg, Layout(cfg).named(host), "float32")
    (folder / "hf/tokenizer.json").write_text(own_tokenizer())
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>", "chat_template": OWN_TEMPLATE}
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))
    talk = [
        ({"role": "user", "content": f"the {n} in"}, {"role": "assistant", "content": f"{n} then"})
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in talk))
    mix = f"instruct={folder}/chats.jsonl tokens=1.2e3; corpus={other} tokens=600"
    args = [
        "--init",
        str(folder / "hf"),
        "--mix",
        mix,
        "--run-dir",
        str(folder / "run"),
        "--seq-length",
        "64",
    ]
    args += [
        "--batch-size",
        "5",
        "--micro-batch-size",
        "2",
        "--val-batches",
        "3",
        "--val-fraction",
        "0.3",
        "--lr",
        "1e-3",
    ]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        assert main(["pretrain", *args, "--bounds", "pretrained_share=9"]) == 0
    return folder


def test_conversations_beside_text_by_budgets(tuned, capsys):
    log, verdict = lines(tuned / "run"), json.loads((tuned / "run/verdict.json").read_text())
    # 19 and 10 windows of 64 tokens.
    assert (verdict["verdict"], verdict["steps"]) == ("PASS", 6)
    last = log[-2]
    assert last["tokens_seen/other"] == 64 * round(30 * 10 / 29)
    assert 0 < last["tokens_seen/chats"] < 20 * 64
    assert last["tokens_seen"] == last["tokens_seen/other"] + last["tokens_seen/chats"]
    assert [x["source"] for x in log if "passes" in x] == ["chats"] * sum("passes" in x for x in log)
    assert row(tuned / "run", "start.borders")["verdict"] == "PASS"
    assert main(["verify", str(tuned / "run"), "--replay", "1"]) == 0


def test_examples_that_end_otherwise_than_text_are_refused():
    def side(masks, border):
        x = Shards()
        x.folder, x.masks, x.border_id, x.row_tokens = Path("x"), masks, border, 9 if masks else None
        return x

    with pytest.raises(Refused, match="a by 7, b by 8"):
        MixedShards([("a", side([np.ones(9)], 7)), ("b", side([], 8))], [None, None])


def shards_of(place, folder, *names, fraction="0.3"):
    """Encode corpora with the tokenizer of the run."""
    tokenizer = next((place / "cache" / "tokenizers").glob("*/tokenizer"))
    more = ["--tokenizer", str(tokenizer), "--val-fraction", fraction, "-o", str(folder)]
    assert main(["tokenize", "encode-corpus", *(str(place / name) for name in names), *more]) == 0
    return folder


def test_sources_that_cannot_be_mixed(run, place, tmp_path, capsys):
    one, bare = (
        shards_of(place, tmp_path / "one", "other"),
        shards_of(place, tmp_path / "bare", "corpus", fraction="0"),
    )
    # What one source holds out is trained on in the other.
    other_way = tmp_path / "other-way"
    shutil.copytree(one, other_way)
    (other_way / "train").rename(other_way / "x")
    (other_way / "val").rename(other_way / "train")
    (other_way / "x").rename(other_way / "val")
    (tmp_path / "nothing.txt").write_text("")
    for mix, code, said in (
        (f"dataset={one} weight=1; dataset={bare} weight=1", 5, "each has its own"),
        (f"dataset={one} weight=1; dataset={other_way} weight=1", 5, "documents on both sides"),
        (f"dataset={one} weight=1; corpus={tmp_path}/nothing.txt weight=1", 5, "nothing.txt"),
        (f"dataset={one} weight=1; corpus={tmp_path}/nowhere weight=1", 3, "nowhere"),
    ):
        args = [
            *RECIPE,
            "--mix",
            mix,
            "--model",
            str(place / "config.json"),
            "--run-dir",
            str(tmp_path / "r"),
        ]
        capsys.readouterr()
        assert main(["pretrain", *args]) == code, said
        assert said in " ".join(capsys.readouterr().err.split())


# Faults


def turns_without_weights(m):
    right = Turns.__init__
    m.setattr(Turns, "__init__", lambda self, counts: right(self, [1] * len(counts)))


def turns_of_one_source(m):
    right = Turns.__call__

    def wrong(self, places):
        sources, positions = right(self, places)
        return np.where(places % 2, 1, sources), positions

    m.setattr(Turns, "__call__", wrong)


def rows_of_another_source(m):
    right = Batches._draw
    m.setattr(Batches, "_draw", lambda self, read: right(self, read + 1))


def losses_of_steps_are_mixed_up(m):
    m.setattr(losses, "_runs", lambda rows: [(0, len(rows))])


def a_source_is_not_logged(m):
    right = losses.StepsBySource.read_later

    def read_later(self, targets):
        line = right(self, targets)
        return lambda: {
            k: v for k, v in line().items() if k != "train_loss/other" or self.batches.windows_read < 9
        }

    m.setattr(losses.StepsBySource, "read_later", read_later)


def errors_of_sources_are_of_tokens(m):
    right = losses.EvaluationBySource.line

    def line(self):
        found = right(self)
        for key in [k for k in found if k.startswith("val_loss_stderr/")]:
            found[key] /= found[key.replace("loss_stderr", "tokens")] ** 0.5
        return found

    m.setattr(losses.EvaluationBySource, "line", line)


def losses_of_evaluations_are_mixed_up(m):
    right = Windows.source_of
    m.setattr(Windows, "source_of", lambda self, windows: 1 - right(self, windows))


@pytest.mark.parametrize(
    ("fault", "gate", "code"),
    [
        (turns_without_weights, "before.settings", 5),
        (turns_of_one_source, "run.mixture", 6),
        (rows_of_another_source, "run.mixture", 6),
        (losses_of_steps_are_mixed_up, "start.averages", 6),
        (a_source_is_not_logged, "run.log", 6),
        (losses_of_evaluations_are_mixed_up, "start.validation", 6),
        (errors_of_sources_are_of_tokens, "start.validation", 6),
    ],
)
def test_a_fault_of_a_mixture_is_named(place, other, tmp_path, monkeypatch, capsys, fault, gate, code):
    fault(monkeypatch)
    assert pretrain(place, tmp_path / "run", "--no-background-saves", weights=(0.8, 0.2)) == code
    assert gate in capsys.readouterr().err
    assert row(tmp_path / "run", gate)["verdict"] == "FAIL"
