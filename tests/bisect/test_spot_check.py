"""Spot checks of `apr pretrain`: when they run, that they change nothing, and that they stop a run that computes wrongly."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import apr.bisect.spot as spot
import apr.training.loop as loop
import apr.training.spot as checks
from apr import backends
from apr.backends import overlay
from apr.bisect.planted.catalogue import weights_of
from apr.bisect.planted.faults import FAULTS
from apr.bisect.report import FORCED
from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from apr.training.loop import Trainer
from apr.training.settings import Settings

cpu = backends.get("cpu")
RECIPE = (
    "--num-steps 6 --eval-every 3 --batch-size 4 --micro-batch-size 2 --seq-length 16 --val-batches 2 "
    "--val-fraction 0.3 --lr 3e-3 --warmup-steps 2 --model qwen2"
)
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of real Python, models' config.json, and the cache of the tokenised corpus."""
    folder = tmp_path_factory.mktemp("spot")
    (folder / "corpus").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted([*stdlib.glob("json/*.py"), *stdlib.glob("email/*.py")]):
        shutil.copy(source, folder / "corpus" / source.name)
    for family in ("qwen2", "qwen3"):
        cfg = dataclasses.replace(PRESETS[f"{family}-tiny"], vocab_size=300)
        (folder / f"{family}.json").write_text(json.dumps(to_hf(cfg)))
    return folder


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that ended: exit code, what it printed, where it wrote."""

    code: int
    out: str
    err: str
    path: Path

    @property
    def metrics(self) -> Lines:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def checks(self) -> Lines:
        return [m for m in self.metrics if "spot_check" in m]

    @property
    def steps(self) -> Lines:
        """What training and evaluation logged, without the time it took."""
        timed = ("wall_ms", "tokens_per_sec")
        return [{k: v for k, v in m.items() if k not in timed} for m in self.metrics if "spot_check" not in m]

    @property
    def said(self) -> list[str]:
        """Lines about spot checks."""
        return [line for line in self.out.splitlines() if "spot check" in line]

    @property
    def weights(self) -> dict[str, bytes]:
        """Weights and moments of the last saved state."""
        file = read_apr(sorted((self.path / "ckpt" / "state").glob("*.apr"))[-1])
        return {name: np.array(x).tobytes() for name, x in file.tensors.items()}


Pretrain = Callable[..., Run]


@pytest.fixture
def pretrain(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pretrain:
    """pretrain("NAME", flags): a run in a folder of that name, one line of flags after the recipe."""
    monkeypatch.setenv("APR_CACHE", str(place / "cache"))

    def call(name: str, flags: str = "", resume: bool = False) -> Run:
        path = tmp_path / name
        args = flags.split()
        if not resume:
            recipe = RECIPE.split()
            if "--model" in args:
                recipe = recipe[: recipe.index("--model")]
            args = ["--corpus", str(place / "corpus"), "--device", "cpu", *recipe, *args]
            at = args.index("--model") + 1
            args[at] = str(place / f"{args[at]}.json")
        code = main(["pretrain", *args, "--run-dir", str(path)] + (["--resume"] if resume else []))
        return Run(code, *capsys.readouterr(), path)

    return call


def plant(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Put a fault of the catalogue into the cpu backend itself."""
    for op, f in FAULTS[name].ops(SimpleNamespace(**vars(cpu))).items():
        monkeypatch.setattr(cpu, op, f)


# When


def test_by_default_it_runs_once_before_the_first_step(pretrain: Pretrain) -> None:
    run = pretrain("a")
    assert run.code == 0
    (check,) = run.checks
    assert check["step"] == 1
    assert check["spot_check"] == "agree"
    assert check["arrays"] > 60  # two layers, forward, loss and backward
    assert 0 < check["worst_of_tolerance"] <= 1
    assert check["wall_ms"] > 0
    order = [("check" if "spot_check" in m else "step", m["step"]) for m in run.metrics]
    assert order[:3] == [("step", 0), ("check", 1), ("step", 1)]  # evaluation, check, step
    (said,) = run.said
    assert f"{check['arrays']} arrays of 2 x 16 tokens of the current batch agree" in said
    assert said.strip().startswith("step     1  spot check: ")


@pytest.mark.parametrize(
    ("every", "steps"), [("2", [1, 3, 5]), ("4", [1, 5]), ("1", [1, 2, 3, 4, 5, 6]), ("-1", []), ("0", [1])]
)
def test_it_runs_every_so_many_steps(pretrain: Pretrain, every: str, steps: list[int]) -> None:
    run = pretrain("a", f"--spot-check {every}")
    assert run.code == 0
    assert [c["step"] for c in run.checks] == steps
    assert {c["spot_check"] for c in run.checks} <= {"agree"}
    assert len(run.said) == len(steps)
    assert [m["step"] for m in run.steps if "train_loss" in m] == [1, 2, 3, 4, 5, 6]


def test_it_may_not_be_less_than_never(pretrain: Pretrain) -> None:
    run = pretrain("a", "--spot-check -2")
    assert run.code == 2
    assert "--spot-check = -2: must be at least -1" in run.err
    assert not run.path.exists()
    assert Settings().spot_check == 0


# It changes nothing


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--recompute",
        "--micro-batch-size 4",
        "--micro-batch-size 1 --no-graph",
        "--micro-batch-size 3 --z-loss 0.001",
        "--recompute --micro-batch-size 4 --seq-length 48",
        "--model qwen3 --recompute",
    ],
)
def test_losses_and_weights_are_those_of_a_run_without_it(pretrain: Pretrain, flags: str) -> None:
    """Bit for bit, with a check before every step, where passes are recorded and replayed too."""
    checked, plain = pretrain("a", f"--spot-check 1 {flags}"), pretrain("b", f"--spot-check -1 {flags}")
    assert (checked.code, plain.code) == (0, 0)
    assert [c["spot_check"] for c in checked.checks] == ["agree"] * 6
    assert checked.steps == plain.steps
    assert checked.weights == plain.weights
    assert len(plain.weights) > 60


def test_a_check_that_leaves_something_behind_is_seen_by_that(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faults planted: gradients of the check stay, which the step overwrites; a weight is another."""
    plain = pretrain("a", "--spot-check -1")
    real = spot.spot_check

    def leaving(change: Callable[[Model], None]) -> Any:
        def dirty(model: Model, *args: Any) -> Any:
            report = real(model, *args)
            change(model)
            return report

        return dirty

    def gradients(model: Model) -> None:
        model.g[0] += 1

    def weights(model: Model) -> None:
        model.w[0] += 1

    monkeypatch.setattr("apr.training.spot.spot_check", leaving(gradients))
    assert pretrain("b", "--spot-check 4").steps == plain.steps
    monkeypatch.setattr("apr.training.spot.spot_check", leaving(weights))
    assert pretrain("c", "--spot-check 4").steps != plain.steps


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"act_again": True}, {"loss_rows": 7}], ids=str)
@pytest.mark.parametrize("name", ["qwen3-tiny", "mistral-tiny"])
def test_weights_stay_and_gradients_are_zero_afterwards(name: str, options: dict[str, Any]) -> None:
    cfg = PRESETS[name]
    model = Model(cfg, cpu, 3, 40, **options)
    cpu.from_host(model.w, weights_of(cfg))
    ids, targets = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 3, 40), dtype=np.int32)
    model.micro_step(ids, targets, 1 / ids.size)
    before = cpu.to_host(model.w).tobytes()
    report = spot.spot_check(model, ids, targets, "x")
    assert report.agree, report.guilty[:3]
    assert report.batch == "2 x 32 tokens of the current batch"
    assert {r.mode for r in report.rows} == {FORCED}
    assert {r.stage for r in report.rows} == {"forward", "loss", "backward"}
    assert cpu.to_host(model.w).tobytes() == before
    assert not cpu.to_host(model.g).any()
    assert not cpu.to_host(model.total).any()


def test_a_small_batch_is_looked_at_whole() -> None:
    cfg = PRESETS["llama-tiny"]
    model = Model(cfg, cpu, 1, 5)
    cpu.from_host(model.w, weights_of(cfg))
    ids = np.arange(5, dtype=np.int32)[None]
    report = spot.spot_check(model, ids, ids + 1, "x")
    assert report.batch == "1 x 5 tokens of the current batch"
    assert report.agree


# It stops a run


STOPS = {  # fault -> the place that is named
    "rope_off_by_a_thousandth": "layer 0 rope -> 0.rope",
    "one_head_two_percent_off": "layer 0 attention_fwd -> 0.att",
    "bias_gradient_missing": "layer 1 linear_bwd -> grad.1.bqkv",
    "tied_gradient_counted_once": "embedding_bwd -> grad.embed",
}


@pytest.mark.parametrize("fault", STOPS)
def test_a_backend_with_a_fault_stops_the_run(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant(monkeypatch, fault)
    run = pretrain("a")
    assert run.code == 6
    assert f"step 1: spot check: {STOPS[fault]} is " in run.err
    assert "times its tolerance away from the float64 reference" in run.err
    assert "apr bisect" in run.err
    assert run.err.rstrip().endswith("ABORTED")
    assert "Traceback" not in run.err
    words = " ".join(run.out.split())
    assert "the model before step 1: cpu float32 compared with reference float64" in words
    assert "First fault" in words
    assert STOPS[fault].split(" ->")[0].split()[-1] in words
    assert run.metrics[-1]["spot_check"] == "differ"
    assert run.metrics[-1]["worst_of_tolerance"] > 1
    assert not [m for m in run.steps if "train_loss" in m]


def test_without_the_check_another_gate_sees_the_fault(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "rope_off_by_a_thousandth")
    run = pretrain("a", "--spot-check -1")
    assert run.code == 6
    assert "start.formulas" in run.err


def test_nothing_but_json_on_stdout(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = pretrain("a", "--json")
    assert json.loads(sound.out)["status"] == "DONE"
    plant(monkeypatch, "rope_off_by_a_thousandth")
    run = pretrain("b", "--json")
    assert run.code == 6
    assert json.loads(run.out)["exit_code"] == 6
    assert "layer 0 rope -> 0.rope" in run.err


def test_a_fault_that_comes_later_is_found_by_a_later_check(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a device that begins to fail: a check before every second step finds it, the one before step 1 does not."""
    step, broken, swiglu = Trainer.train_step, [False], cpu.swiglu_fwd

    def breaking(self: Trainer) -> dict[str, Any]:
        line = step(self)
        broken[0] = broken[0] or line["step"] == 2
        return line

    def swiglu_fwd(y: Any, gu: Any) -> None:
        swiglu(y, gu)
        if broken[0]:
            y *= np.float32(1.001)

    monkeypatch.setattr(Trainer, "train_step", breaking)
    monkeypatch.setattr(cpu, "swiglu_fwd", swiglu_fwd)
    run = pretrain("a", "--spot-check 2")
    assert run.code == 6
    assert "step 3: spot check: layer 0 swiglu_fwd -> 0.act" in run.err
    assert [(c["step"], c["spot_check"]) for c in run.checks] == [(1, "agree"), (3, "differ")]
    assert [m["step"] for m in run.steps if "train_loss" in m] == [1, 2]
    broken[0] = False
    run = pretrain(
        "b"
    )  # no check after step 2: the fresh process at the end computes another loss than this one
    assert run.code == 9
    assert "FAIL     end.reload" in run.out


def test_a_nan_is_a_difference() -> None:
    def swiglu_fwd(y: Any, gu: Any) -> None:
        cpu.swiglu_fwd(y, gu)
        y[0, 0] = np.nan

    cfg = PRESETS["llama-tiny"]
    model = Model(cfg, overlay(cpu, swiglu_fwd=swiglu_fwd), 2, 8)
    cpu.from_host(model.w, weights_of(cfg))
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    with np.errstate(all="ignore"):
        report = spot.spot_check(model, ids, ids, "x")
    assert report.first is not None
    assert (report.first.tap, report.first.index) == ("0.act", (0, 0))
    assert np.isnan(report.first.err)


def test_biases_that_are_dropped_show_while_they_are_still_zero(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training from scratch begins with biases of zero: constant vectors are shaken for the check."""
    plant(monkeypatch, "bias_dropped")
    run = pretrain("a")
    assert run.code == 6
    assert "step 1: spot check: layer 0 linear_fwd -> 0.qkv" in run.err
    assert "bias missing" in run.err
    assert [(c["step"], c["spot_check"]) for c in run.checks] == [(1, "differ")]


# Memory


def test_with_too_little_memory_it_is_skipped_and_training_goes_on(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain("a", "--spot-check -1")
    monkeypatch.setattr(spot, "available_memory", lambda: 1000)
    run = pretrain("b", "--spot-check 3")
    assert run.code == 0
    assert [(c["step"], c["spot_check"], c["arrays"]) for c in run.checks] == [
        (1, "skipped", 0),
        (4, "skipped", 0),
    ]
    assert len(run.said) == 2
    assert "skipped: the reference in float64 needs 0.0 GiB of main memory, 0.0 GiB are free" in run.said[0]
    assert run.steps == plain.steps
    assert run.weights == plain.weights


@pytest.mark.parametrize("have", [None, 1 << 50])
def test_it_runs_where_memory_suffices_or_is_not_known(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, have: int | None
) -> None:
    monkeypatch.setattr(spot, "available_memory", lambda: have)
    assert [c["spot_check"] for c in pretrain("a").checks] == ["agree"]


# Resume


def test_a_resumed_run_checks_again(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends with the bits of an undisturbed one."""
    plain, step = pretrain("plain", "--spot-check -1"), Trainer.train_step

    def stopping(self: Trainer) -> dict[str, Any]:
        line = step(self)
        self.stop.is_asked = line["step"] == 3
        return line

    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        assert pretrain("a").code == 130
        assert pretrain("b").code == 130
    run = pretrain("a", resume=True)
    assert run.code == 0
    assert [(c["step"], c["spot_check"]) for c in run.checks] == [(1, "agree"), (4, "agree")]
    assert len(run.said) == 1
    assert run.steps == plain.steps
    assert run.weights == plain.weights
    changed = pretrain("b", "--spot-check 2", resume=True)  # how often may change
    assert changed.code == 0
    assert [c["step"] for c in changed.checks] == [1, 4, 5]
    assert changed.weights == plain.weights


def test_a_resumed_run_with_a_fault_is_stopped(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine than the one it began on."""
    step = Trainer.train_step

    def stopping(self: Trainer) -> dict[str, Any]:
        line = step(self)
        self.stop.is_asked = line["step"] == 3
        return line

    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        assert pretrain("a").code == 130
    plant(monkeypatch, "bias_dropped")
    run = pretrain("a", resume=True)
    assert run.code == 6
    assert "step 4: spot check: layer 0 linear_fwd -> 0.qkv" in run.err


def test_a_check_is_no_part_of_the_time_of_a_step(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Throughput is that of training: a clock that jumps an hour in every check shows in its own line alone."""
    late = [0.0]
    clock, sound = time.perf_counter, checks.spot_check

    def slow(*args: Any) -> Any:
        report = sound(*args)
        late[0] += 3600
        return report

    monkeypatch.setattr(checks, "spot_check", slow)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock() + late[0])
    run = pretrain("a", "--spot-check 1")
    assert run.code == 0
    assert len(run.checks) > 1
    assert all(0 < m["wall_ms"] < 3_000_000 for m in run.metrics if "train_loss" in m)
