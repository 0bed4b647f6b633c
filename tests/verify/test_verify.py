"""`apr verify`: a true run passes every check; what was changed afterwards is found, sealed again or not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from apr.backends.cuda import autotune
from apr.backends.cuda.cublaslt import ALGORITHM_BYTES
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.state import sha256
from apr.cli import verify as command
from apr.cli.main import main
from apr.common.atomic import locked
from apr.common.errors import AprError
from apr.evidence import seal as evidence
from apr.evidence.seal import compare, hashes, seal
from apr.evidence.signature import sign, signer
from apr.report import page
from apr.training.rundir import RunDir
from apr.training.settings import Settings
from apr.verify import log, verifier
from apr.verify.record import Options, Record
from apr.verify.replay import _other_figure
from run_cases import (  # noqa: F401
    RECIPE,
    an_unused_weight_becomes_nan,
    cache,
    place,
    pretrain,
    the_learning_rate_is_ignored,
)


@pytest.fixture(scope="module")
def true_run(place, tmp_path_factory):
    """A run as it ended."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(place / "cache"))
        path = tmp_path_factory.mktemp("true") / "run"
        assert pretrain(place, path, "--sample", "import") == 0
    return path


@pytest.fixture
def run(true_run, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(true_run, tmp_path / "run"))


def verify(run, *more):
    return main(["verify", str(run), "--json", *map(str, more)])


def checks(capsys, run, *more):
    """{check: verdict} and exit code."""
    capsys.readouterr()
    code = verify(run, *more)
    rows = json.loads(capsys.readouterr().out)["checks"]
    return {r["check"]: r["verdict"] for r in rows}, {r["check"]: r["measured"] for r in rows}, code


def rewrite(path, change):
    """Change a JSON file and leave everything else as it is."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def change_line(run, step, key, value, kind="train_loss"):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["step"] == step and kind in line:
            line[key] = value(line[key]) if callable(value) else value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_true_run_passes_and_nothing_is_written(true_run, capsys):
    before = hashes(true_run)
    verdicts, measured, code = checks(capsys, true_run, "--replay", 4, "--seed", 1)
    assert code == 0
    assert set(verdicts.values()) == {"PASS"}
    assert "worst 0.0e+00" in measured["replay"]
    assert "on reference" in measured["validation loss"]
    assert hashes(true_run) == before
    assert (true_run / "evidence.json").exists()


def test_what_is_not_asked_is_skipped(true_run, capsys):
    verdicts, _, code = checks(capsys, true_run, "--backend", "none")
    assert code == 0
    assert (verdicts["validation loss"], verdicts["replay"]) == ("SKIPPED", "SKIPPED")


def test_replay_on_another_number_of_threads_is_compared_with_tolerance(true_run, capsys, monkeypatch):
    from apr.verify import replay as module

    monkeypatch.setattr(module, "code_sha256", lambda: "another version")
    verdicts, _, code = checks(capsys, true_run, "--replay", 2, "--backend", "none")
    assert (verdicts["replay"], code) == ("PASS", 0)


def differences(run):
    try:
        return compare(run)
    except AprError as e:  # evidence.json itself cannot be read
        return [str(e)]


@pytest.mark.parametrize("seed", range(3))
def test_any_changed_byte_of_any_file_is_found(run, seed):
    rng = np.random.default_rng(seed)
    assert compare(run) == []
    for name in [*hashes(run), evidence.EVIDENCE]:
        path = run / name
        data = path.read_bytes()
        assert data, name
        for _ in range(40 if name == evidence.EVIDENCE else 2):
            changed = bytearray(data)
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            found = differences(run)
            assert found, name
            assert name in found[0]
        path.write_bytes(data)
    assert compare(run) == []


def test_files_that_come_and_go_are_found(run):
    (run / "extra").write_text("x")
    assert compare(run) == ["extra was added"]
    (run / "extra").unlink()
    (run / "loss.png").unlink()
    assert compare(run) == ["loss.png is gone"]


def test_a_new_page_is_no_tampering_and_hides_none(run):
    before = (run / "report.html").read_bytes()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before  # the same files, the same page
    assert main(["report", str(run), "-o", str(run / "again.html")]) == 0
    assert compare(run) == []
    change_line(run, 2, "lr", 1.0)
    assert main(["report", str(run)]) == 0
    assert "metrics.jsonl was changed" in "".join(compare(run))


def weights_changed(run):
    """The last checkpoint's weights, with CRCs that fit."""
    path = run / "ckpt" / "epoch-002.apr"
    file = read_apr(path)
    tensors = {k: np.array(v) for k, v in file.tensors.items()}
    tensors["model.norm.weight"] *= 1.01
    write_apr(path, file.metadata, tensors)
    return tensors


def weights_and_their_hash_changed(run):
    from apr.checkpoints.registry import open_any
    from apr.model.params import Layout

    tensors = weights_changed(run)
    layout = Layout(open_any(str(run / "ckpt" / "epoch-002.apr")).cfg)
    sha = sha256(tensors[s.hf] for s in layout.in_order())
    rewrite(run / "ckpt" / "epoch-002.metadata.json", lambda d: d.update(weights_sha=sha))


def moments_changed(run):
    path = run / "ckpt" / "state" / "step-000006.apr"
    file = read_apr(path)
    tensors = {k: np.array(v) for k, v in file.tensors.items()}
    tensors["optimizer.v.model.norm.weight"] *= 2
    write_apr(path, file.metadata, tensors)


def one_loss_changed_throughout(run):
    """A loss, and the epoch's means that follow from it: only computing it again can tell."""
    change_line(run, 2, "train_loss", lambda x: x - 0.03)

    def change(d):
        d["train_loss"] -= 0.01
        d["train_loss_last"] -= 0.01
        d["train_ppl"] = float(np.exp(d["train_loss"]))

    rewrite(run / "ckpt" / "epoch-001.metadata.json", change)


def twice_as_fast(run):
    for step in range(1, 7):
        change_line(run, step, "wall_ms", lambda x: x / 2)
        change_line(run, step, "tokens_per_sec", lambda x: 2 * x)


def twice_as_fast_throughout(run):
    twice_as_fast(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for epoch in (1, 2):
        took = [
            x["wall_ms"] for x in lines if x["step"] <= 3 * epoch and ("train_loss" in x or "val_loss" in x)
        ]
        path = run / "ckpt" / f"epoch-00{epoch}.metadata.json"
        rewrite(path, lambda d, took=took: d.update(wall_seconds=sum(took) / 1e3))


def loss_before_training(run):
    change_line(run, 0, "val_bits_per_byte", lambda x: x * 1.001, "val_loss")
    change_line(run, 0, "val_loss", lambda x: x * 1.001, "val_loss")


def earlier_weights_changed(run):
    """The first epoch's weights doubled, with hashes that fit; its state is gone by then."""
    from apr.checkpoints.registry import open_any
    from apr.model.params import Layout

    path = run / "ckpt" / "epoch-001.apr"
    file = read_apr(path)
    tensors = {k: np.array(v) for k, v in file.tensors.items()}
    tensors["model.norm.weight"] *= 2
    write_apr(path, file.metadata, tensors)
    sha = sha256(tensors[s.hf] for s in Layout(open_any(str(path)).cfg).in_order())
    rewrite(path.with_suffix(".metadata.json"), lambda d: d.update(weights_sha=sha))


def a_gate_says_pass(run):
    rewrite(run / "verdict.json", lambda d: d.update(verdict="PASS"))
    rewrite(run / "verdict.json", lambda d: d["gates"][-1].update(verdict="PASS"))


def two_lines_in_one(run):
    """The last evaluation stands in the line of its step: some readers take it for a step, others for an evaluation."""
    path = run / "metrics.jsonl"
    *lines, step, last = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**last, **step}]))


def no_standard_errors(run):
    change_line(run, 6, "val_loss_stderr", 0.0, "val_loss")
    rewrite(run / "ckpt" / "epoch-002.metadata.json", lambda d: d.update(val_loss_stderr=0.0))


def another_tokenizer_in_an_earlier_checkpoint(run):
    path = run / "ckpt" / "epoch-001.apr"
    file = read_apr(path)
    text = file.metadata["tokenizer.json"].replace('"add_prefix_space": false', '"add_prefix_space": true')
    assert text != file.metadata["tokenizer.json"]
    write_apr(
        path, {**file.metadata, "tokenizer.json": text}, {k: np.array(v) for k, v in file.tensors.items()}
    )


def another_window_in_a_checkpoint(run):
    path = run / "ckpt" / "epoch-002.apr"
    file = read_apr(path)
    evaluation = {**file.metadata["evaluation"], "seq_length": 8}
    write_apr(
        path, {**file.metadata, "evaluation": evaluation}, {k: np.array(v) for k, v in file.tensors.items()}
    )


CHANGES = {
    "a loss in the log": (lambda r: change_line(r, 2, "train_loss", 1.5), "epochs"),
    "a loss in the log, and what follows from it": (one_loss_changed_throughout, "replay"),
    "a learning rate": (lambda r: change_line(r, 4, "lr", 1e-3), "learning rate"),
    "a step that is gone": (lambda r: change_line(r, 5, "step", 4), "metrics"),
    "a speed": (lambda r: change_line(r, 5, "tokens_per_sec", 1e6), "metrics"),
    "a number that is none": (lambda r: change_line(r, 5, "grad_norm", float("nan")), "metrics"),
    "tokens": (lambda r: change_line(r, 5, "tokens_seen", 99), "metrics"),
    "a validation loss in the log": (lambda r: change_line(r, 6, "val_loss", 4.0, "val_loss"), "verdict"),
    "a validation loss in the verdict": (lambda r: rewrite(r / "verdict.json", lambda d: d.update(val_loss=4.0)), "verdict"),
    "an epoch's figures": (
        lambda r: rewrite(r / "ckpt" / "epoch-001.metadata.json", lambda d: d.update(grad_norm_max=0.1)), "epochs"),
    "weights": (weights_changed, "checkpoints"),
    "weights and their hash": (weights_and_their_hash_changed, "validation loss"),
    "moments": (moments_changed, "states"),
    "a checkpoint that is gone": (lambda r: (r / "ckpt" / "epoch-001.apr").unlink(), "checkpoints"),
    "states that are gone": (lambda r: [p.unlink() for p in (r / "ckpt" / "state").iterdir()], "states"),
    "a setting": (lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(lr=1e-3)), "learning rate"),
    "a hash of the data": (lambda r: rewrite(r / "config.json", lambda d: d["data"].update(val_sha256="0" * 64)), "data"),
    "a gate that is gone": (lambda r: rewrite(r / "verdict.json", lambda d: d["gates"].pop()), "verdict"),
    "a seed": (lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(seed=43)), "start"),
    "the order of the data": (lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(shuffle=False)), "start"),
    "the spread of the first weights": (
        lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(initializer_range=0.03)), "start"),
    "the hash of the first batch": (
        lambda r: rewrite(r / "config.json", lambda d: d["start"].update(batch_sha256="0" * 64)), "start"),
    "a model that is not the checkpoint's": (
        lambda r: rewrite(r / "config.json", lambda d: d["model"].update(rope_theta=5e5)), "config"),
    "a number of parameters": (lambda r: rewrite(r / "config.json", lambda d: d.update(num_parameters=7)), "config"),
    "a setting out of its range": (
        lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(beta2=-1.0)), "config"),
    "adapters that there were none of": (
        lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(lora_rank=8, init="base")), "config"),
    "a record of adapters without settings": (
        lambda r: rewrite(r / "config.json", lambda d: d["data"].update(lora={"rank": 8})), "config"),
    "settings that contradict each other": (
        lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(checkpoint_every=d["settings"]["eval_every"] + 1)),
        "config"),
    "guards that are gone": (lambda r: rewrite(r / "config.json", lambda d: d.update(data_guards=[])), "config"),
    "a guard's figure": (
        lambda r: rewrite(r / "config.json", lambda d: d["data_guards"]["val"][1].update(figure="0")), "data"),
    "a count of the data": (lambda r: rewrite(r / "config.json", lambda d: d["data"].update(train_tokens=9)), "data"),
    "bounds that were changed": (lambda r: rewrite(r / "config.json", lambda d: d["settings"].update(bounds="speed=2")), "gates"),
    "gates that were not asked": (
        lambda r: rewrite(r / "verdict.json", lambda d: [
            g.update(verdict="PASS", measured="1", why="", evaluations=1) for g in d["gates"] if g["verdict"] == "SKIPPED"
        ]), "gates"),
    "a gate that was not judged": (
        lambda r: rewrite(r / "verdict.json", lambda d: [
            g.update(evaluations=0) for g in d["gates"] if g["id"] == "end.speed"]), "gates"),
    "norms of weights": (lambda r: [change_line(r, i, "weight_norm", lambda x: 3 * x) for i in range(1, 7)], "states"),
    "one norm of weights": (lambda r: change_line(r, 2, "weight_norm", lambda x: 1.01 * x), "replay"),
    "all speeds": (twice_as_fast, "epochs"),
    "all speeds, and the times of the epochs": (twice_as_fast_throughout, "gates"),
    "the loss before training": (loss_before_training, "replay"),
    "an earlier checkpoint, its hash and its moments'": (earlier_weights_changed, "evaluations"),
    "a checkpoint beside its state": (weights_and_their_hash_changed, "states"),
    "a sample": (lambda r: (r / "samples.jsonl").write_text('{"step": 3, "prompt": "", "text": "To be"}\n'), "samples"),
    "the page": (lambda r: (r / "report.html").write_text("<html>val loss 0.001 PASS</html>"), "page"),
    "a guard that is gone": (
        lambda r: rewrite(r / "config.json", lambda d: [
            rows.pop(next(i for i, g in enumerate(rows) if g["guard"] == "documents on both sides"))
            for side, rows in d["data_guards"].items() if side == "train"]), "data"),
    "two lines in one": (two_lines_in_one, "metrics"),
    "an accuracy that there was none of": (lambda r: [
        (r / "metrics.jsonl").write_text((r / "metrics.jsonl").read_text().replace(
            '"val_tokens"', '"val_accuracy": 0.99, "val_tokens"'))], "metrics"),
    "standard errors": (no_standard_errors, "validation loss"),
    "standard errors again": (no_standard_errors, "replay"),
    "how the run ended": (lambda r: rewrite(r / "verdict.json", lambda d: d.update(status="TARGET_REACHED")), "verdict"),
    "a tokenizer": (another_tokenizer_in_an_earlier_checkpoint, "checkpoints"),
    "the conditions of a loss": (another_window_in_a_checkpoint, "checkpoints"),
    "a start that is gone": (lambda r: rewrite(r / "config.json", lambda d: d.pop("start")), "start"),
    "shards that are said to be gone": (
        lambda r: rewrite(r / "config.json", lambda d: d.update(data_folders={"train": "/gone", "val": "/gone"})), "replay"),
    "an entry that is gone": (lambda r: rewrite(r / "config.json", lambda d: d["data"].pop("val_sha256")), "data"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_found_even_when_all_is_sealed_again(run, capsys, what):
    change, check = CHANGES[what]
    change(run)
    seal(run)
    more = ["--replay", 6] if check in ("replay", "evaluations") else []
    more += [] if check == "validation loss" else ["--backend", "none"]
    verdicts, measured, code = checks(capsys, run, *more)
    assert verdicts["files"] == "PASS"
    assert verdicts[check] == "FAIL", (verdicts, measured)
    assert code == 9


def test_figures_of_an_epoch_are_computed_a_second_time(run, capsys, monkeypatch):
    """The code that sums up an epoch, or renders a page, is that which they are compared with."""
    with monkeypatch.context() as m:
        right = log.epoch_facts
        m.setattr(
            log,
            "epoch_facts",
            lambda line, losses, *a: {**right(line, losses, *a), "train_loss_last": losses[0]},
        )
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        first = next(line["train_loss"] for line in lines if "train_loss" in line)
        rewrite(run / "ckpt" / "epoch-001.metadata.json", lambda d: d.update(train_loss_last=first))
        seal(run)
        verdicts, measured, _ = checks(capsys, run, "--backend", "none")
        assert verdicts["epochs"] == "FAIL"
        assert "train_loss_last" in measured["epochs"]


@pytest.mark.parametrize("wrong", ["train", "side"])
def test_a_page_with_a_wrong_figure_is_found_though_it_is_rendered_so(run, capsys, monkeypatch, wrong):
    if wrong == "train":
        right = page.evaluation_rows
        monkeypatch.setattr(page, "evaluation_rows", lambda r: [x | {"train": "1.2345"} for x in right(r)])
    else:
        right = page.tiles
        monkeypatch.setattr(
            page,
            "tiles",
            lambda r: [
                t | {"label": t["label"].replace("Above", "B").replace("Below", "Above")} for t in right(r)
            ],
        )
    (run / "report.html").write_text(page.render(run, Settings))
    seal(run)
    verdicts, measured, _ = checks(capsys, run, "--backend", "none")
    assert verdicts["page"] == "FAIL", measured


def test_a_bad_verdict_cannot_be_turned_into_a_good_one(place, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(place, run, "--target-val-loss", 0.1) == 9
    assert checks(capsys, run, "--backend", "none")[0]["verdict"] == "PASS"  # it says FAIL, and that is true
    a_gate_says_pass(run)
    seal(run)
    verdicts, measured, _ = checks(capsys, run, "--backend", "none")
    assert verdicts["verdict"] == "FAIL"
    assert "end.target is PASS in verdict.json, FAIL by the log" in measured["verdict"]


def test_a_run_that_was_aborted_is_true_too(place, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        an_unused_weight_becomes_nan(m, place, tmp_path)
        assert pretrain(place, tmp_path / "run") == 6
    verdicts, measured, _ = checks(capsys, tmp_path / "run", "--backend", "none")
    assert verdicts["metrics"] == "PASS", measured
    assert verdicts["verdict"] == "PASS", measured
    assert verdicts["files"] == "PASS"


@pytest.fixture
def key(tmp_path):
    """An SSH key and the file of allowed signers that names it."""
    if not shutil.which("ssh-keygen"):
        pytest.skip("no ssh-keygen")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    (tmp_path / "signers").write_text("me@example.org " + (tmp_path / "key.pub").read_text())
    return tmp_path / "key", tmp_path / "signers"


def test_a_signature_is_what_a_new_seal_cannot_get_past(run, key, tmp_path, capsys):
    private, signers = key
    assert verify(run, "--backend", "none", "--signers", signers) == 9  # nobody has signed
    assert verify(run, "--backend", "none", "--sign", private) == 0
    assert compare(run) == []  # a signature is no change
    verdicts, measured, code = checks(capsys, run, "--backend", "none", "--signers", signers)
    assert (verdicts["signature"], code) == ("PASS", 0)
    assert measured["signature"] == "by me@example.org"
    signature = (run / "evidence.json.sig").read_bytes()
    (run / "tb").write_text("x")
    seal(run)
    assert not (run / "evidence.json.sig").exists()  # it was of the evidence before
    (run / "evidence.json.sig").write_bytes(signature)
    verdicts, measured, code = checks(capsys, run, "--backend", "none", "--signers", signers)
    assert (verdicts["files"], verdicts["signature"], code) == ("PASS", "FAIL", 9)
    (tmp_path / "others").write_text(
        "you@example.org ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA" + "A" * 42 + "\n"
    )
    assert (
        checks(capsys, run, "--backend", "none", "--signers", tmp_path / "others")[0]["signature"] == "FAIL"
    )


def test_what_could_not_be_checked_is_not_signed(run, key, capsys):
    rewrite(run / "config.json", lambda d: d.update(data_folders={"train": "/gone", "val": "/gone"}))
    seal(run)
    assert verify(run, "--sign", key[0]) not in (0, 9)
    assert "not signed, for it was checked without data, validation loss" in capsys.readouterr().err
    assert not (run / "evidence.json.sig").exists()


def test_what_was_checked_is_signed_and_not_what_lies_there_by_then(run, key, tmp_path, monkeypatch, capsys):
    """A file that is exchanged after one check and put back before another; and evidence that is exchanged at the very end."""
    private, signers = key
    path, others = run / "metrics.jsonl", run.parent / "others"
    right = verifier.CHECKS["verdict"]

    def exchanged(r):
        path.rename(others)
        path.write_text(others.read_text())
        found = right(r)
        others.replace(path)
        return found

    with monkeypatch.context() as m:
        m.setitem(verifier.CHECKS, "verdict", exchanged)
        verdicts, measured, code = checks(capsys, run, "--backend", "none", "--sign", private)
    assert (verdicts["files"], verdicts["unchanged"], code) == ("PASS", "FAIL", 9), measured
    assert not (run / "evidence.json.sig").exists()

    def swapped_at_the_end(*args):
        (run / "verdict.json").write_text("{}")
        seal(run)
        return sign(*args)

    monkeypatch.setattr(command, "sign", swapped_at_the_end)
    good = (run / "evidence.json").read_bytes()
    assert verify(run, "--backend", "none", "--sign", private) == 0
    with pytest.raises(AprError):
        signer(run, signers, (run / "evidence.json").read_bytes())
    assert signer(run, signers, good) == "me@example.org"


@pytest.mark.parametrize("status", sorted({"ABORTED", "INTERRUPTED", "FAILED", "REFUSED", "RANK_LOST"}))
def test_every_word_that_a_run_can_end_with_is_known(run, capsys, status):
    rewrite(run / "verdict.json", lambda v: v.update(status=status))
    seal(run)
    verdicts, measured, _ = checks(capsys, run, "--backend", "none")
    assert verdicts["verdict"] == "PASS", measured
    assert Record(run, Options(), print).is_cut


def test_what_a_link_leads_to_is_evidence_too(run, tmp_path):
    (run / "ckpt").rename(tmp_path / "on another disk")
    (run / "ckpt").symlink_to(tmp_path / "on another disk")
    (run / "ckpt" / "state" / "round").symlink_to(run)  # leads back: every file once
    assert compare(run) == []
    (run / "ckpt" / "epoch-002.metadata.json").write_text("{}")
    assert any("epoch-002.metadata.json was changed" in x for x in compare(run))


def test_a_link_to_what_the_run_lies_in_leads_nowhere(run, tmp_path):
    (run / "up").symlink_to("..")
    (run / "ckpt" / "state" / "self").symlink_to(run)
    (tmp_path / "beside").write_text("not of the run")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "round").symlink_to(tmp_path)
    (run / "apart").symlink_to(tmp_path / "apart")
    seal(run)
    assert compare(run) == []
    names = json.loads((run / "evidence.json").read_text())["files"]
    assert not [name for name in names if name.startswith(("up", "apart")) or "self" in name]


def test_evidence_of_an_older_version_has_no_files_behind_links(run, tmp_path, capsys):
    (run / "ckpt").rename(tmp_path / "on another disk")
    inside = hashes(run)
    (run / "evidence.json").write_text(evidence._text(inside, evidence.OLD_FORMAT))
    (run / "ckpt").symlink_to(tmp_path / "on another disk")
    assert compare(run) == []
    verdicts, measured, code = checks(capsys, run, "--backend", "none")
    assert (verdicts["files"], code) == ("PASS", 0), measured
    assert "behind links, which an older version did not list" in measured["files"]
    evidence.resealed(run, run / "report.html", "another page")  # vouches for no more than before
    assert json.loads((run / "evidence.json").read_text())["files"].keys() == inside.keys()
    assert compare(run) == []
    (run / "extra").write_text("")
    assert compare(run) == ["extra was added"]


def test_a_pair_of_a_few_may_change_sides():
    def line(accuracy, margin=0.5, pairs=20):
        return {"val_loss": 0.6, "val_tokens": pairs, "val_accuracy": accuracy, "val_margin": margin}

    assert not _other_figure(line(0.55), line(0.60), 1e-4)
    assert "val_accuracy" in _other_figure(line(0.50), line(0.60), 1e-4)
    assert "val_accuracy" in _other_figure(line(0.55, pairs=400), line(0.60, pairs=400), 1e-4)
    assert not _other_figure(line(0.0, 2e-5), line(0.6, 1e-5), 1e-4)  # no pair is decided
    assert "val_accuracy" in _other_figure(line(0.55), line(0.60), 0)


def test_a_link_to_everything_is_named_in_time(run, monkeypatch):
    monkeypatch.setattr(evidence, "MAX_FILES", 20)
    (run / "x").symlink_to("/usr")
    with pytest.raises(AprError, match="more than 20 files"):
        compare(run)


def test_a_run_that_fails_is_not_signed(run, key):
    change_line(run, 2, "lr", 1.0)
    assert verify(run, "--backend", "none", "--sign", key[0]) == 9
    assert not (run / "evidence.json.sig").exists()


def test_a_hash_of_other_code_does_not_loosen_the_bound(run, capsys):
    """Code or device that is said to be another one makes room for rounding, which never comes back to the same bits."""
    rewrite(run / "config.json", lambda d: d.update(code_sha256="0" * 64))
    seal(run)
    assert checks(capsys, run, "--replay", 1, "--backend", "none")[2] == 0
    change_line(run, 2, "grad_norm", lambda x: x * (1 + 1e-5))
    seal(run)
    verdicts, measured, code = checks(capsys, run, "--replay", 1, "--backend", "none")
    assert (verdicts["replay"], code) == ("FAIL", 9), measured
    assert "has the recorded bits" in measured["replay"]


def test_epochs_are_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "ckpt").mkdir()
    for number in (1000, 999, 2):
        (tmp_path / "ckpt" / f"epoch-{number:03d}.apr").touch()
    assert [p.stem for p in RunDir(tmp_path).checkpoints()] == ["epoch-002", "epoch-999", "epoch-1000"]


def test_a_run_that_saved_nothing_has_nothing_to_check(place, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        the_learning_rate_is_ignored(m, place, tmp_path)
        assert pretrain(place, tmp_path / "run") == 6
    verdicts, measured, code = checks(capsys, tmp_path / "run")
    assert {k for k, v in verdicts.items() if v == "FAIL"} == set(), measured
    assert all(
        verdicts[k] == "SKIPPED" for k in ("checkpoints", "states", "data", "validation loss", "replay")
    )
    assert code == 0


def test_shards_that_changed_or_went_away(run, place, tmp_path, capsys):
    folders = json.loads((run / "config.json").read_text())["data_folders"]
    data = tmp_path / "moved"
    for side, folder in folders.items():
        shutil.copytree(folder, data / side)
    assert checks(capsys, run, "--dataset", data, "--replay", 1)[2] == 0
    shard = data / "val" / "shard-00000.bin"
    ids = np.fromfile(shard, "<u4")
    ids[5] = ids[6]
    ids.tofile(shard)
    assert checks(capsys, run, "--dataset", data, "--backend", "none")[0]["data"] == "FAIL"
    shutil.rmtree(data / "val")
    rewrite(
        run / "config.json",
        lambda d: d.update(data_folders={"train": str(data / "train"), "val": str(data / "val")}),
    )
    seal(run)
    verdicts, _, code = checks(capsys, run)
    assert [verdicts[k] for k in ("data", "validation loss", "replay")] == ["SKIPPED"] * 3
    assert code == 0
    verdicts, measured, code = checks(capsys, run, "--replay", 1)
    assert (verdicts["replay"], code) == ("FAIL", 9), measured  # what was asked for was not made
    verify_in_words = main(["verify", str(run)])
    said = capsys.readouterr().out
    assert verify_in_words == 0
    assert "PASS, without data, validation loss: " in said


def test_replay_writes_nowhere_though_the_corpus_has_grown(run, tmp_path, monkeypatch, capsys):
    config = json.loads((run / "config.json").read_text())
    data = Path(config["data_folders"]["train"]).parent
    was = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in data.parent.rglob("*")}
    monkeypatch.setenv("APR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    new = Path(config["settings"]["corpus"]) / "new.py"
    new.write_text("# One more document.\n" * 40)
    try:
        assert checks(capsys, run, "--replay", 1, "--backend", "none")[0]["replay"] == "PASS"
    finally:
        new.unlink()
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in data.parent.rglob("*")} == was
    assert not (tmp_path / "cache").exists()
    assert compare(run) == []


def test_algorithms_that_a_gpu_finds_are_not_kept(true_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("APR_CACHE", str(tmp_path / "cache"))
    sound = command.verify

    def searching(record):
        cache = autotune.Cache(autotune.cache_file("GPU", "13.0"), "GPU", "13.0")
        cache.put("a", autotune.Algorithm(bytes(ALGORITHM_BYTES), 0, 1.0))
        cache.save()
        assert cache.path.is_file()
        return sound(record)

    monkeypatch.setattr(command, "verify", searching)
    assert verify(true_run, "--backend", "none") == 0
    assert not (tmp_path / "cache").exists()


def test_what_is_no_run(tmp_path, run, capsys):
    assert main(["verify", str(tmp_path / "nothing")]) == 3
    assert "no run" in capsys.readouterr().err
    with locked(run, "training in it"):
        assert main(["verify", str(run)]) == 5
    (run / "evidence.json").unlink()
    verdicts, measured, code = checks(capsys, run, "--backend", "none")
    assert (verdicts["files"], code) == ("FAIL", 9)
    assert "has not ended" in measured["files"]


def test_the_table_in_a_terminal(true_run, capsys):
    assert main(["verify", str(true_run), "--backend", "none"]) == 0
    out = capsys.readouterr().out
    assert "DONE after 6 steps, verdict PASS" in out
    assert "not asked for; --replay K" in out
    assert out.rstrip().endswith("PASS")
