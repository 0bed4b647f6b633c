"""What people expect of a trainer: passes over the data, files of settings, flags that are nearly right, grids of runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apr.cli import sweep
from apr.cli.main import COMMANDS, main
from apr.common.errors import MalformedFile, Refused, UsageError
from apr.common.hints import ELSEWHERE, OTHER_COMMANDS, near
from apr.common.options import given
from apr.common.version import __version__
from apr.training import inputs
from apr.training import settings as all_settings
from apr.training.settings import Settings, check, read_config, resolve, steps_of
from crashing import Job, failed_checks, go_on, quicken

EPOCHS = 0.02


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("habits") / "job", 8, 4).make()


@pytest.fixture(autouse=True)
def quick(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch, job.folder / "cache")


def settings_of(job: Job) -> dict[str, Any]:
    args = job.arguments(job.folder / "x", False)
    made = given(Settings, args, "apr pretrain", "")
    return {
        k: v
        for k, v in made.items()
        if k not in ("run_dir", "num_steps", "warmup_steps", "sample", "patience")
    }


def in_process(args: list[str], log: Path, running: list[Any]) -> int:
    """Train in this process, in the place of sweep.launch."""
    return main(["pretrain", *args])


@pytest.fixture(scope="module")
def swept(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], int]:
    """A grid of two runs that train and one that is refused: its folder, its command, its exit code."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = {
        "base": settings_of(job) | {"epochs": EPOCHS, "schedule": "constant"},
        "grid": {"lr": [1e-3, 3e-3, 1.0]},
    }
    grid["base"] |= {"lr": 1e-3}
    (folder / "grid.json").write_text(json.dumps(grid))
    args = ["sweep", str(folder / "grid.json"), "-o", str(folder / "out")]
    with pytest.MonkeyPatch.context() as m:
        quicken(m, job.folder / "cache")
        m.setattr(sweep, "launch", lambda a, log, r: 5 if "lr=1.0" in a[-1] else in_process(a, log, r))
        log = folder / "out" / "logs" / "lr=1.0.txt"
        log.parent.mkdir(parents=True)
        log.write_text("apr pretrain: no such thing\nREFUSED\n")
        code = main(args)
    return folder / "out", args, code


def test_a_grid_ends_in_one_table(swept: tuple[Path, list[str], int]) -> None:
    folder, _, code = swept
    rows = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [r["verdict"] for r in rows] == ["PASS", "PASS", "NONE"]
    assert code == 9
    assert rows[0]["val_loss"] <= rows[1]["val_loss"]
    assert rows[2]["said"] == "apr pretrain: no such thing"
    for row in rows[:2]:
        config = json.loads((Path(row["run_dir"]) / "config.json").read_text())
        assert config["settings"]["lr"] == row["lr"]
        want = math.ceil(EPOCHS * config["data"]["train_windows"] / 4)
        assert row["steps"] == config["settings"]["num_steps"] == want > 4
        assert config["settings"]["warmup_steps"] == want // 10
        losses = [json.loads(x) for x in (Path(row["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
        assert row["best_val_loss"] == min(x["val_loss"] for x in losses if "val_loss" in x)


def test_a_run_that_did_not_pass_is_not_the_best_of_a_table() -> None:
    """Nor is a loss that is no number."""
    rows = [("FAIL", 0.0), ("PASS", 2.0), ("NONE", None), ("PASS", math.nan), ("PASS", 1.0), ("SUSPECT", 0.5)]
    placed = sorted(({"verdict": v, "val_loss": x} for v, x in rows), key=sweep._place)
    assert [(r["verdict"], r["val_loss"]) for r in placed][:2] == [("PASS", 1.0), ("PASS", 2.0)]
    assert [r["verdict"] for r in placed[2:]] == ["PASS", "FAIL", "SUSPECT", "NONE"]


def test_the_same_grid_again_keeps_what_has_ended(
    swept: tuple[Path, list[str], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, args, _ = swept
    asked: list[list[str]] = []
    monkeypatch.setattr(sweep, "launch", lambda a, log, r: asked.append(a) or 0)
    assert main(args) == 9
    assert [Path(a[-1]).name for a in asked] == ["lr=1.0"]
    assert "lr=0.001: has ended before, kept" in capsys.readouterr().out
    verdict = folder / "lr=0.003" / "verdict.json"
    whole = verdict.read_text()
    verdict.write_text(whole.replace('"DONE"', '"INTERRUPTED"'))
    assert main(args) == 9
    verdict.write_text(whole)
    assert asked[1] == ["--resume", "--run-dir", str(folder / "lr=0.003")]
    assert main([*args, "--devices", "cpu,cpu", "--json"]) == 9
    assert asked[-1][-2:] == ["--device", "cpu"]
    grid = Path(args[1])
    was = grid.read_text()
    grid.write_text(was.replace('"seq_length": 16', '"seq_length": 8'))
    assert main(args) == 5
    grid.write_text(was)


def test_a_run_of_passes_is_made_longer_by_passes(
    swept: tuple[Path, list[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = swept[0] / "lr=0.003"
    windows = json.loads((run / "config.json").read_text())["data"]["train_windows"]
    assert go_on(run, "--epochs", 1.5 * EPOCHS) == 0
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["num_steps"] == math.ceil(1.5 * EPOCHS * windows / 4)
    assert settings["epochs"] is None
    assert failed_checks(capsys, run) == {}


def test_a_wrong_number_of_steps_of_the_passes_is_seen(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: one step too few. The gate before.settings counts anew."""
    right = all_settings.with_steps

    def one_less(s: Settings, windows: int) -> Settings:
        s = right(s, windows)
        return all_settings.dataclasses.replace(s, num_steps=s.num_steps - 1)

    monkeypatch.setattr(inputs, "with_steps", one_less)
    (tmp_path / "c.json").write_text(json.dumps(settings_of(job) | {"epochs": EPOCHS}))
    assert main(["pretrain", "--config", str(tmp_path / "c.json"), "--run-dir", str(tmp_path / "run")]) == 5
    assert "steps of the passes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("epochs", "windows", "batch", "steps"),
    [(1, 10, 4, 3), (2, 10, 5, 4), (0.5, 10, 5, 1), (0.1, 30, 3, 1), (1e-9, 5, 5, 1)],
)
def test_steps_of_passes(epochs: float, windows: int, batch: int, steps: int) -> None:
    assert steps_of(epochs, windows, batch) == steps


def test_two_lengths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--epochs", "1", "--num-steps", "5"]) == 2
    assert "--epochs and --num-steps" in capsys.readouterr().err


# Files of settings

TOML = 'corpus = "x"\nnum_steps = 1e4\n[optimizer]\nlr = 1e-4\nbatch-size = 8\nshuffle = false\n'
YAML = "corpus: x\nnum_steps: 1e4\noptimizer:\n  lr: 1e-4\n  batch-size: 8\n  shuffle: false\n"


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_files_of_settings(tmp_path: Path, name: str, text: str) -> None:
    if name != "a.toml":
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    got = read_config(tmp_path / name)
    assert got == {"corpus": "x", "num_steps": 10000, "lr": 1e-4, "batch_size": 8, "shuffle": False}
    assert isinstance(got["num_steps"], int)


@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("a.toml", "lr = ", MalformedFile, "a.toml: Invalid value"),
        ("a.toml", "lr = 1\n[b]\nlr = 2\n", UsageError, "lr stands there twice"),
        ("a.toml", "learning_rate = 1.0\n", UsageError, "unknown setting 'learning_rate' = 1.0; did you mean lr?"),
        ("a.yaml", "base_model: x\nlearning_rate: 1.0\nsample_packing: true\nflash_attn: true\n", UsageError,
         "4 unknown settings. Here they are base_model: init; learning_rate: lr; sample_packing: examples share windows always. "
         "No such setting: flash_attn."),
        ("a.yaml", "gradient_accumulation_steps: 4\n", UsageError, "--batch-size counts the sequences of a whole step"),
        ("a.toml", "num_step = 1\n", UsageError, "did you mean num_steps?"),
        ("a.toml", "num_steps = 1.5\n", UsageError, "not of type int"),
        ("a.yaml", "lr: [", MalformedFile, "a.yaml: "),
        ("a.yaml", "lr: " + "[" * 101, MalformedFile, "a.yaml: nested too deeply"),
        ("a.toml", "a." * 100 + "a = 1", MalformedFile, "a.toml: nested too deeply"),
        ("a.toml", "lr = 1\n['x' ." + ' "a\\"." .' * 99 + " y]\n", MalformedFile, "a.toml: nested too deeply"),
        ("a.toml", "num_steps = " + "1" * 5000, MalformedFile, "a.toml: Exceeds the limit"),
        ("a.toml", "model = 0x" + "1" * 5000, MalformedFile, "a.toml: Exceeds the limit"),
        ("a.yaml", "model: 0x" + "1" * 5000, MalformedFile, "a.yaml: Exceeds the limit"),
        ("a.yaml", "- lr", MalformedFile, "expected an object"),
        ("a.yaml", "a: &x [1]\nb: *x\n", MalformedFile, "anchors"),
        ("a.yaml", "lr: 1\nseed: 3\nlr: 2\n", MalformedFile, "lr stands there twice"),
        ("a.yaml", "b:\n  lr: 1\n  lr: 2\n", MalformedFile, "lr stands there twice"),
        ("a.yaml", "b:\n  lr: 1\nlr: 2\n", UsageError, "lr stands there twice"),
        ("a.yaml", "shuffle: no\n", UsageError, "shuffle = 'no' is not of type bool; write true or false"),
        ("a.yaml", "num_steps: 1:30\n", UsageError, "num_steps = '1:30' is not of type int"),
        ("a.yaml", "num_steps: 1_000\n", UsageError, "num_steps = '1_000' is not of type int"),
        ("a.json", '{"lr": 1, "lr": 2}', MalformedFile, "'lr' is there twice"),
        ("a.toml", "num-steps = 1\nnum_steps = 2\n", UsageError, "num_steps stands there twice"),
        ("a.toml", "eval_every = 1\nsteps_per_epoch = 2\n", UsageError, "eval_every stands there twice"),
        ("a.json", "[1]", MalformedFile, "expected an object"),
    ],
)  # fmt: skip
def test_wrong_files_of_settings(
    tmp_path: Path, name: str, text: str, error: type[Exception], words: str
) -> None:
    if name == "a.yaml":
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(error) as e:
        read_config(tmp_path / name)
    assert words in str(e.value)


def test_a_text_in_toml_may_have_many_dots(tmp_path: Path) -> None:
    text = "a." * 200
    (tmp_path / "a.toml").write_text(f"sample = '{text}'\ncorpus = \"{text}\"\n")
    assert read_config(tmp_path / "a.toml") == {"sample": text, "corpus": text}


@pytest.mark.parametrize(
    "given", [{"eval_every": 0}, {"eval_every": -0}, {"lora_rank": 10**400}, {"num_steps": 2**63}]
)
def test_numbers_are_in_range_before_they_are_computed_with(given: dict[str, int]) -> None:
    name = next(iter(given)).replace("_", "-")
    with pytest.raises(UsageError, match=f"^--{name} = .*: must be (above|at) "):
        resolve(Settings(dataset="d", tokenizer="t", init="m.apr", **given))  # type: ignore[arg-type]


def test_a_text_in_yaml_may_look_like_an_alias(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text("sample: '*p = &x; R &D'\n")
    assert read_config(tmp_path / "a.yaml") == {"sample": "*p = &x; R &D"}


def test_yaml_is_that_of_version_1_2(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text = "sample: on\nseed: 017\nnum_steps: 0x10\nlr: 1e-4\ntarget_val_loss:\ncorpus: 2024-01-01\n"
    (tmp_path / "a.yaml").write_text(text + "tokenizer: '1e5'\nshuffle: TRUE\n")
    assert read_config(tmp_path / "a.yaml") == {
        "sample": "on", "seed": 17, "num_steps": 16, "lr": 1e-4, "target_val_loss": None, "corpus": "2024-01-01",
        "tokenizer": "1e5", "shuffle": True,
    }  # fmt: skip


def test_the_older_name_of_the_interval_of_evaluations() -> None:
    assert check({"steps_per_epoch": 7}, "config.json") == {"eval_every": 7}
    assert given(Settings, ["--steps-per-epoch", "7"], "apr pretrain", "") == {"eval_every": 7}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--num-step", "3"], "did you mean --num-steps?"),
        (["--learning-rate", "3"], "did you mean --lr?"),
        (["--learning_rate=3"], "did you mean --lr?"),
        (["--num-train-epochs", "3"], "did you mean --epochs?"),
        (["--zzz", "3"], "--help lists the options"),
        (["--num-steps", "1.5"], "invalid int value: '1.5'"),
        (["--num-steps", "ten"], "invalid int value: 'ten'"),
    ],
)
def test_flags_that_are_nearly_right(args: list[str], words: str) -> None:
    with pytest.raises(UsageError) as e:
        given(Settings, args, "apr pretrain", "")
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pretrain --load-in-8bit", "--lora-base int8 keeps frozen matrices in 8 bits"),
        ("run m x --load-in-8bit", "--dtype int8 rounds matrices to 8 bits"),
        ("eval m --load-in-8bit", "--help lists the options"),
        ("eval m --adapter y", "--help lists the options"),
        ("pretrain --adapter y", "--lora-rank trains adapters"),
        ("import m --packing", "--help lists the options"),
        ("pretrain --packing", "examples share windows always"),
        ("export m --fp16", "--dtype float16"),
        ("export m --bf16", "--dtype bfloat16"),
        ("pretrain --fp16", "--dtype bfloat16"),
        ("run m x --max-new-tokens 3", "did you mean --max-tokens?"),
        ("pretrain --max-new-tokens 3", "--max-tokens of apr run"),
        ("pretrain --block_size 64", "did you mean --seq-length?"),
        ("pretrain --steps 3", "did you mean --num-steps?"),
        ("pretrain --bs 3", "did you mean --batch-size?"),
        ("pretrain --resume_from_checkpoint x", "--resume goes on with the run in --run-dir"),
        ("pretrain --n_layer 2", "--model takes a config.json with the sizes of a model"),
        (
            "pretrain --max_iters 3 --lrr 1",
            "--max-iters: did you mean --num-steps?; --lrr: did you mean --lr?",
        ),
        ("run --model m --max-tokens 3", "MODEL has no flag: apr run MODEL PROMPT"),
        ("eval m --prompt x", "--help lists the options"),
    ],
)
def test_advice_is_of_the_command_that_was_called(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().err.endswith(f"; {words}\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "pretrain --resume runs/x",
            "--resume takes no value (go on with the run in --run-dir from its last saved state)",
        ),
        ("export m --format gguf x.gguf", "one argument too many; -o names the output"),
        ("export m -o y x", "one argument too many; a text with spaces needs quotes around it"),
        ("inspect m x", "one argument too many; a text with spaces needs quotes around it"),
    ],
)
def test_a_word_too_many_is_explained(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().err.endswith(f": {words}\n")


def test_commands_of_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    for word, name in (("train", "pretrain"), ("chat", "run"), ("verfy", "verify")):
        assert main([word, "x"]) == 2
        assert f"unknown command '{word}'; did you mean apr {name}?" in capsys.readouterr().err
    assert set(OTHER_COMMANDS.values()) <= set(COMMANDS)
    with pytest.raises(SystemExit):
        main(["help", "merge"])
    assert capsys.readouterr().out.startswith("usage: apr merge ")


def test_python_runs_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apr", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"apr {__version__}\n"


def test_a_run_does_not_make_a_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at = str(tmp_path / "home" / "r")
    (tmp_path / "a.toml").write_text('run_dir = "~/r"\nmix = [{corpus = "~/r", weight = 1}]\n')
    read = all_settings.read_config(tmp_path / "a.toml")
    assert read["run_dir"] == at
    assert at in read["mix"]
    assert check({"run_dir": "~/r"}, "apr.train") == {"run_dir": at}
    assert given(Settings, ["--run-dir=~/r"], "apr pretrain", "") == {"run_dir": at}


def test_a_whole_number_is_written_in_any_way() -> None:
    for text in ("10000", "1e4", "1_0000", "10000.0"):
        assert given(Settings, ["--num-steps", text], "apr pretrain", "") == {"num_steps": 10000}


def test_a_flag_of_elsewhere_is_one_of_ours() -> None:
    names = set(all_settings.field_types(Settings))
    assert {v.replace("-", "_") for v in ELSEWHERE.values()} <= names
    assert near("learning-rate", {"beta1": ()}) == ""


# Grids that make no sense


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"lr": 1.0}, "no table 'grid'"),
        ({"grid": {}}, "no table 'grid'"),
        ({"grid": {"lr": 1.0}}, "no table 'grid'"),
        ({"grid": {"lr": [1.0, 1.0]}}, "two runs are called 'lr=1.0'"),
        ({"grid": {"lrr": [1.0]}}, "unknown setting 'lrr'"),
        ({"grid": {"seed": ["a"]}}, "seed = 'a' is not of type int"),
        ({"run_dir": "x", "grid": {"lr": [1.0]}}, "run_dir is given by the sweep"),
        ({"epochs": 1, "num_steps": 2, "grid": {"lr": [1.0]}}, "--epochs and --num-steps"),
        ({"grid": {"seed": list(range(1001))}}, "1,001 combinations"),
    ],
)
def test_grids_that_make_no_sense(tmp_path: Path, grid: Any, words: str) -> None:
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    with pytest.raises((UsageError, Refused)) as e:
        sweep.read_grid(tmp_path / "grid.json")
    assert words in str(e.value)
