"""Runs on preferences: from a file of pairs to a checkpoint, resumed and verified; faults of their own are seen."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import apr.model.preferences as formulas
import apr.training.references as references
from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.common.finding import FAIL, PASS
from apr.data.conversations.packed import PackedShards
from apr.data.conversations.pairs import guard_pairs, open_pairs, pair_of
from apr.data.conversations.pairs_kept import pairs_kept
from apr.data.conversations.prepare import prepare_conversations
from apr.data.source import Unusable
from apr.evaluation import tasks
from apr.evidence.pairs import losses_of, margin, slopes_off
from apr.tokenizer.tokenizer import Tokenizer
from small_checkpoint import write_checkpoint

RECIPE = [
    "--seq-length", "63", "--batch-size", "2", "--micro-batch-size", "1", "--num-steps", "4", "--eval-every", "2",
    "--lr", "1e-3", "--warmup-steps", "1", "--val-fraction", "0.3", "--device", "cpu",
]  # fmt: skip


# Ends of prompts and beginnings of answers that are one token together.
SEAMS = [("x:    ", "    return"), ("se", "lf.x"), ("x retu", "rn x")]


def pair(i, swap=False):
    """A record: the chosen answer is code, the rejected one is not."""
    chosen, rejected = f"    return x + {i}\n", f"def x {i % 7} x:"
    answers = (rejected, chosen) if swap else (chosen, rejected)
    return {"prompt": f"def f{i}(x):\n", "chosen": answers[0], "rejected": answers[1]}


def question(i):
    return {
        "question": f"x + {i}?",
        "choices": {"text": ["x", f"{i}", "def"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random checkpoint, a file of pairs, and a run on them: 4 steps."""
    folder = tmp_path_factory.mktemp("preferences")
    write_checkpoint(folder)
    for name, swap in (("pairs", False), ("swapped", True)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair(i, swap)) + "\n" for i in range(24)))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(folder / "cache"))
        (folder / "arc.jsonl").write_text("".join(json.dumps(question(i)) + "\n" for i in range(6)))
        scored = "--eval-tasks", str(folder / "arc.jsonl"), "--eval-tasks-every", "4"
        assert pretrain(folder, "run", *scored) == 0
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(place / "cache"))


def pretrain(folder, run, *more):
    args = ["--preferences", folder / "pairs.jsonl", "--init", folder / "hf", "--run-dir", folder / run]
    return main(["pretrain", *map(str, args), *RECIPE, *more])


def lines(folder, run="run"):
    return [json.loads(x) for x in (folder / run / "metrics.jsonl").read_text().splitlines()]


def gate(folder, run, name):
    rows = json.loads((folder / run / "verdict.json").read_text())["gates"]
    return next(g for g in rows if g["id"] == name)


def test_a_run_learns_to_tell_the_answers_apart(place):
    found = lines(place)
    first, *_, last = [x for x in found if "val_loss" in x]
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the model itself
    assert (first["val_margin"], first["val_accuracy"]) == (0, 0)
    assert last["val_loss"] < first["val_loss"]
    assert last["val_margin"] > 0
    assert "val_bits_per_byte" not in last
    step = next(x for x in found if x.get("step") == 4 and "train_loss" in x)
    rewards = step["chosen_reward"] - step["rejected_reward"]
    assert step["margin"] == pytest.approx(rewards)
    config = json.loads((place / "run/config.json").read_text())
    pairs = config["data"]["packed"]["pairs"] + config["data"]["packed_val"]["pairs"]
    assert config["reference"]["answers"] == 2 * pairs == 48
    assert (place / "run/reference.bin").stat().st_size == 8 * 48
    for name in (
        "start.preferences",
        "start.slope",
        "start.averages",
        "start.validation",
        "run.margin",
        "end.reload",
    ):
        assert gate(place, "run", name)["verdict"] == PASS, name
    assert "accuracy" in (place / "run/report.html").read_text()


def test_it_is_verified_and_resumed_to_the_same_bits(place, tmp_path):
    # By its shards: the file of pairs may be gone, or another one by now.
    (place / "pairs.jsonl").rename(place / "away.jsonl")
    try:
        assert main(["verify", str(place / "run"), "--replay", "1"]) == 0
    finally:
        (place / "away.jsonl").rename(place / "pairs.jsonl")
    again = tmp_path / "run"
    shutil.copytree(place / "run", again)
    states = sorted((again / "ckpt/state").glob("*.apr"))
    want = read_apr(states[-1]).metadata["state_sha256"]
    states[-1].unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(again)]) == 0
    assert read_apr(sorted((again / "ckpt/state").glob("*.apr"))[-1]).metadata["state_sha256"] == want
    (again / "reference.bin").write_bytes(b"\0" * 8 * 48)
    assert main(["verify", str(again)]) == 9
    states = sorted((again / "ckpt/state").glob("*.apr"))
    states[-1].unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(again)]) == 4  # no other reference is taken


def with_loss(m, loss):
    m.setitem(formulas.LOSSES, "dpo", formulas.LOSSES["dpo"]._replace(loss=loss))


def test_tasks_are_scored_while_it_trains(place, capsys):
    """At the evaluations that are due; the last figure is that of `apr eval` on the last checkpoint."""
    found = [x for x in lines(place) if "tasks" in x]
    assert [x["step"] for x in found] == [0, 4]
    assert "Tasks at step 4: arc accuracy" in (place / "run/report.html").read_text()
    last = str(place / "run/ckpt/epoch-002.apr")
    capsys.readouterr()
    assert main(["eval", last, "--tasks", str(place / "arc.jsonl"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == found[-1]["tasks"]
    assert main(["eval", last, "--choices", str(place / "arc.jsonl"), "--device", "cpu", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert found[-1]["tasks"]["arc"]["by_rule"] == {rule: f["value"] for rule, f in accuracy.items()}
    assert main(["eval", last, "--tasks", "missing.jsonl"]) == 3
    for wrong in (
        ["--eval-tasks-every", "4"],
        ["--eval-tasks", str(place / "arc.jsonl"), "--eval-tasks-every", "3"],
    ):
        assert pretrain(place, "never", *wrong) == 2


def test_a_task_of_the_harness_needs_it(place, monkeypatch, capsys):
    """Without it one error with the command that installs it, before anything is trained; with it the model in training."""
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert pretrain(place, "never", "--eval-tasks", "arc_easy") == 2
    assert not (place / "never").exists()
    assert "pip install" in capsys.readouterr().err
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: object())
    asked = {}

    def evaluate(model, tasks, limit):
        asked.update(model=model, tasks=tasks, limit=limit)
        return {
            "results": {
                "arc_easy": {
                    "alias": "arc_easy",
                    "acc,none": 0.5,
                    "acc_stderr,none": 0.1,
                    "acc_norm,none": 0.4,
                }
            }
        }

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=evaluate))
    monkeypatch.setitem(
        sys.modules, "apr.evaluation.lm_eval", SimpleNamespace(AprLM=lambda opened, batch_size: opened)
    )
    found = tasks.score("a model", tasks.parse_tasks("arc_easy", "--tasks"), 64, limit=7)
    assert asked == {"model": "a model", "tasks": ["arc_easy"], "limit": 7}
    want = {"metric": "acc", "value": 0.5, "stderr": 0.1, "by_rule": {"acc": 0.5, "acc_norm": 0.4}}
    assert found == {"arc_easy": want}
    assert tasks.in_words("arc_easy", want) == "arc_easy acc 0.500 +- 0.100"


def beta_forgotten(m):
    with_loss(m, lambda c, r, k: formulas.dpo(c, r, k._replace(beta=1.0)))


def mean_for_sum(m):
    m.setattr(formulas.Answer, "gain", property(lambda a: (a.logp - a.reference) / a.tokens))


def answers_swapped(m):
    right = formulas.Preferences.pairs
    m.setattr(
        formulas.Preferences, "pairs", lambda *a: (formulas.Pair(p.rejected, p.chosen) for p in right(*a))
    )


def ties_count_as_right(m):
    right = formulas.Tally.add

    def add(self, beta, loss, c, r):
        right(self, beta, loss, c, r)
        self.right += loss.chosen == loss.rejected

    m.setattr(formulas.Tally, "add", add)


def margin_without_beta(m):
    right = formulas.Tally.figures
    m.setattr(
        formulas.Tally,
        "figures",
        lambda self, *args: {k: x / 0.1 if k == "margin" else x for k, x in right(self, *args).items()},
    )


def reference_not_frozen(m):
    right = formulas.Preferences.answers

    def answers(self, ids, targets, losses):
        for place, c, r in right(self, ids, targets, losses):
            yield place, c._replace(reference=c.logp), r._replace(reference=r.logp)

    m.setattr(formulas.Preferences, "answers", answers)


def reference_of_another_model(m):
    right = references.row_losses
    m.setattr(references, "row_losses", lambda *a: right(*a) * 1.01)


def gradient_of_one_answer(m):
    with_loss(m, lambda c, r, k: formulas.dpo(c, r, k)._replace(rejected_slope=0.0))


RUN_FAULTS = {
    beta_forgotten: "start.preferences",
    mean_for_sum: "start.preferences",
    answers_swapped: "start.preferences",
    ties_count_as_right: "start.preferences",
    margin_without_beta: "start.preferences",
    reference_not_frozen: "start.preferences",
    reference_of_another_model: "start.preferences",
    gradient_of_one_answer: "start.preferences",
}


@pytest.mark.parametrize("fault", RUN_FAULTS, ids=lambda f: f.__name__)
def test_a_fault_ends_the_run(place, monkeypatch, capsys, fault):
    """At the first step, or at the evaluation before it."""
    fault(monkeypatch)
    assert pretrain(place, fault.__name__, "--spot-check", "-1") in (5, 6)
    assert gate(place, fault.__name__, RUN_FAULTS[fault])["verdict"] == FAIL or "start.validation" in (
        capsys.readouterr().err
    )
    shutil.rmtree(place / fault.__name__)


def test_a_loss_of_0_in_float32_is_that_of_the_formula(place, capsys):
    """So strong a comparison leaves nothing to learn, and the error says so."""
    assert pretrain(place, "strong", "--preference-loss", "simpo", "--beta", "1e6", "--simpo-gamma", "0") in (
        0,
        6,
    )
    assert gate(place, "strong", "start.preferences")["verdict"] == PASS
    shutil.rmtree(place / "strong")


def test_the_odds_of_a_certain_answer_are_finite():
    for sums in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):
        answers = [formulas.Answer(x, 1, math.nan) for x in sums]
        want = formulas.orpo(*answers, formulas.Constants(0.1, 0.0, 0.0)).loss
        c, r = (np.array([x]) for x in sums)
        found = losses_of(formulas.PreferenceSettings(preference_loss="orpo"), c, 1, r, 1, c, r)
        assert found == pytest.approx(want, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", formulas.LOSSES)
def test_slopes_of_likely_answers_are_those_of_the_formula(monkeypatch, name):
    """Where all tokens are unlikely, the odds have the slope of log-probabilities."""
    for beta in (None, 1e-4, 0.3, 20.0, 1e4):
        s = formulas.PreferenceSettings(preference_loss=name, beta=beta)
        assert slopes_off(s, formulas.Preferences(s, 0)) < 1e-4
    s = formulas.PreferenceSettings(preference_loss=name)
    right = formulas.log_odds
    monkeypatch.setattr(formulas, "log_odds", lambda mean: (right(mean)[0], 1.0))
    assert (slopes_off(s, formulas.Preferences(s, 0)) > 1e-3) is (name == "orpo")
    kind = formulas.LOSSES[name]
    p = formulas.Preferences(s, 0)
    p.kind = kind._replace(
        loss=lambda c, r, k: (x := kind.loss(c, r, k))._replace(rejected_slope=1.01 * x.rejected_slope)
    )
    assert slopes_off(s, p) > 1e-3


def test_labels_are_compared_with_the_files(place):
    folder = next((place / "cache/instruct").glob("*/train"))
    tokenizer = Tokenizer.from_file(place)
    sides = {"train": PackedShards(folder, tokenizer)}
    assert guard_pairs(sides["train"]).passed
    assert pairs_kept(open_pairs(str(place / "pairs.jsonl")), sides, tokenizer, None).passed
    assert not pairs_kept(open_pairs(str(place / "swapped.jsonl")), sides, tokenizer, None).passed
    shards = PackedShards(folder, tokenizer, verify=False)
    trained = np.array(shards.trained)
    shards.masks = [np.where(trained == 1, 2, np.where(trained == 2, 1, 0)).astype(np.uint8).reshape(-1)]
    assert not guard_pairs(shards).passed
    shards.masks, ids = [trained.reshape(-1)], np.array(shards.ids)
    ids[0, 0] += 1
    shards.arrays = [ids.reshape(-1)]
    assert "prompts" in guard_pairs(shards).measured


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_verified(place, cuda):
    assert pretrain(place, "gpu", "--device", "cuda") == 0
    first = next(x for x in lines(place, "gpu") if "val_loss" in x)
    assert first["val_loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert main(["verify", str(place / "gpu"), "--replay", "1"]) == 0


def test_shapes_of_pairs():
    """Texts, lists of messages with and without a prompt, whole conversations beside a repeated prompt."""
    turns = [{"role": "user", "content": "q"}]
    good, bad = ([{"role": "assistant", "content": x}] for x in ("yes", "no"))
    shapes = [
        {"prompt": turns, "chosen": good, "rejected": bad},
        {"prompt": "q", "chosen": good, "rejected": bad},
        {"prompt": "q", "chosen": turns + good, "rejected": turns + bad},
        {"chosen": turns + good, "rejected": turns + bad},
        {"prompt": turns, "chosen": "yes", "rejected": "no"},
        {"prompt": turns, "chosen": turns + good, "rejected": turns + bad},
        {
            "prompt": "q",
            "chosen": [{"from": "gpt", "value": "yes"}],
            "rejected": [{"from": "gpt", "value": "no"}],
        },
    ]
    for record in shapes:
        found = pair_of("f:1", record)
        assert found.chosen.messages[-1]["content"] == "yes"
        assert found.rejected.messages[-1]["content"] == "no"
        assert len(found.chosen.messages) == 2
    assert len({pair_of("f:1", s).prompt for s in shapes}) == 1
    assert pair_of("f:1", {"prompt": "q", "chosen": "yes", "rejected": "no"}).rejected.response == "no"
    for wrong in (
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "q"},
        [],
    ):
        with pytest.raises(Unusable):
            pair_of("f:1", wrong)


def test_what_stands_beside_a_pair_is_not_dropped():
    """The system prompt, earlier turns, tools; answers of earlier turns are context, whatever their role is called."""
    said = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    found = pair_of(
        "f:1", {**said, "system": "Be brief.", "history": [["a", "b"]], "tools": [{"name": "add"}]}
    )
    for side, answer in ((found.chosen, "yes"), (found.rejected, "no")):
        assert [m["content"] for m in side.messages] == ["Be brief.", "a", "b", "q", answer]
        assert side.untrained == {2}
        assert side.tools == ({"name": "add"},)
    assert found.prompt != pair_of("f:1", {**said, "system": "Be long."}).prompt
    talk = [
        {"role": "human", "content": "a"},
        {"role": "gpt", "content": "b"},
        {"role": "human", "content": "c"},
    ]
    sides = {key: [*talk, {"role": "gpt", "content": key}] for key in ("chosen", "rejected")}
    assert pair_of("f:1", sides).chosen.untrained == {1}


def test_a_token_may_hold_the_end_of_a_prompt_and_the_beginning_of_an_answer(place, monkeypatch, tmp_path):
    """Both answers begin at the first token that differs; a pair without a token before that is left out."""
    monkeypatch.setenv("APR_CACHE", str(tmp_path))
    tokenizer, records = Tokenizer.from_file(place), [pair(i) for i in range(12)]
    ends = {
        tokenizer.encode(a + b).size - tokenizer.encode(a).size - tokenizer.encode(b).size for a, b in SEAMS
    }
    assert min(ends) < 0
    for i, (prompt, answer) in enumerate(SEAMS):
        records.append({"prompt": f"{i} {prompt}", "chosen": answer, "rejected": f"7 {i}"})
    records.append({"prompt": "", "chosen": "self", "rejected": "def"})
    (tmp_path / "seams.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    made = prepare_conversations(
        str(tmp_path / "seams.jsonl"), tmp_path, tokenizer, None, 63, 0.3, pairs=True
    )
    sides = {side: PackedShards(folder, tokenizer) for side, folder in made.sides.items()}
    assert all(guard_pairs(s).passed for s in sides.values())
    assert pairs_kept(open_pairs(str(tmp_path / "seams.jsonl")), sides, tokenizer, None).passed
    assert sum(s.manifest.pairs for s in sides.values()) == 12 + len(SEAMS)
    assert sides["train"].manifest.skipped == {"no prompt in common": 1}


def test_the_second_formula_is_that_of_trl():
    """Both formulas are compared with TRL's numbers, so that neither leans on the other."""
    trl = json.loads((Path(__file__).parents[1] / "golden/preferences.json").read_text())
    c, r = np.array(trl["logps"]).T
    c0, r0 = np.array(trl["reference"]).T
    nc, nr = (np.array([len(p[k]) for p in trl["pairs"]], float) for k in (1, 2))
    for name, case in trl["losses"].items():
        found = losses_of(formulas.PreferenceSettings(**case["settings"]), c, nc, r, nr, c0, r0)
        assert found.mean() == pytest.approx(case["loss"], rel=1e-9), name


def test_a_margin_that_costs_the_chosen_answers_is_suspect():
    line = {"step": 9, "val_margin": 3.0, "val_chosen_gain": -0.05, "val_rejected_gain": -1.0}
    mild = margin(line, 0.693)
    assert (mild.verdict, mild.why) == (PASS, "")
    noted = margin(line | {"val_chosen_gain": -0.25}, 0.693)
    assert noted.verdict == PASS
    assert "less likely" in noted.why
    assert margin(line | {"val_chosen_gain": -0.8}, 0.693).verdict == FAIL
    assert margin({"step": 9, "val_loss": 3.0}, 0.693) is None
