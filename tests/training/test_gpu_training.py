"""Training on the cuda backend: fifty steps beside plain NumPy, and `apr pretrain --device cuda` from start to end."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.bisect.planted.faults import FAULTS
from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.model.config import ModelConfig
from apr.model.hf_config import to_hf
from apr.model.optim import AdamW
from apr.model.presets import PRESETS
from apr.model.schedule import Schedule
from apr.training.loop import Trainer
from checks import CONFIGS, Build, Error, difference, judge, largest_of, on, randomised
from faults import planted
from precision import plain_numpy, rounded

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


# Fifty steps

STEPS, SIZE = 50, (4, 24)


@cache
def text() -> np.ndarray:
    """Windows (STEPS, B, T + 1) of a real text: bytes of the standard library, of which 123 are told apart."""
    source = b"".join(
        p.read_bytes() for p in sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))
    )
    n, t = SIZE
    ids = np.frombuffer(source[: STEPS * n * (t + 1)], np.uint8).astype(np.int32) % 123
    return ids.reshape(STEPS, n, t + 1)


def losses(build: Build, cfg: ModelConfig, dtype: str) -> np.ndarray:
    """Mean loss of each of fifty steps of one seed, one text and one schedule."""
    model = randomised(build(cfg, dtype, batch=SIZE[0], seq=SIZE[1]))
    opt, schedule, be, out = AdamW.of(model), Schedule("cosine", 3e-3, 3e-4, 5, STEPS), model.be, []
    tokens = SIZE[0] * SIZE[1]
    for n, ids in enumerate(text(), 1):
        be.fill(model.total, 0)
        model.micro_step(ids[:, :-1], ids[:, 1:], 1 / tokens)
        opt.step(schedule(n))
        out.append(float(be.to_host(model.total)[0]) / tokens)
    return np.array(out)


@cache
def exact(name: str) -> np.ndarray:
    """Losses of the reference in float64."""
    return losses(on(reference), CONFIGS[name], "float64")


def off_track(build: Build, name: str, dtype: str) -> Error:
    """How far the losses are from float64's."""
    return difference("losses", losses(build, CONFIGS[name], dtype), exact(name))


@cache
def expected(name: str, dtype: str) -> Error:
    """How far those of plain NumPy are, in three orders."""
    return largest_of([[off_track(on(be), name, dtype)] for be in plain_numpy(dtype)[:3]])[0]


@every_dtype
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_fifty_steps_track_the_exact_losses(cuda: Any, name: str, dtype: str) -> None:
    """So do the cpu backend's, in float32: the two track each other."""
    assert exact(name)[-5:].mean() < exact(name)[:5].mean() - 1  # there is something to learn
    assert judge([off_track(on(cuda), name, dtype)], [expected(name, dtype)], dtype) == []
    if dtype == "float32":
        assert judge([off_track(on(backends.get("cpu")), name, dtype)], [expected(name, dtype)], dtype) == []


@pytest.mark.parametrize("fault", ["step_not_counted", "learning_rate_ignored", "embedding_gradient_missing"])
def test_check_of_tracks_can_fail(fault: str) -> None:
    """In plain NumPy that stores bfloat16; and a head that is 2 % off, in float32."""
    build = planted(FAULTS[fault], rounded())
    assert judge([off_track(build, "qwen2", "bfloat16")], [expected("qwen2", "bfloat16")], "bfloat16") != []
    head = planted(FAULTS["one_head_two_percent_off"], backends.get("cpu"))
    assert judge([off_track(head, "qwen2", "float32")], [expected("qwen2", "float32")], "float32") != []


@every_dtype
def test_two_trainings_are_equal_bit_for_bit(cuda: Any, dtype: str) -> None:
    for name in ("qwen2", "qwen3", "mistral"):
        first, second = (losses(on(cuda), CONFIGS[name], dtype) for _ in range(2))
        assert np.array_equal(first, second)


# The command

RECIPE = "--lr 3e-3 --warmup-steps 3 --num-steps 12 --eval-every 4 --batch-size 4 --micro-batch-size 2 --seq-length 16"
SIZES = [*RECIPE.split(), "--val-batches", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cuda: Any) -> Path:
    """A folder with a tokenised corpus of real Python and a model's config.json."""
    folder = tmp_path_factory.mktemp("training")
    corpus, stdlib = folder / "corpus", Path(sysconfig.get_paths()["stdlib"])
    corpus.mkdir()
    for source in [*sorted((stdlib / "json").glob("*.py")), *sorted((stdlib / "email").glob("*.py"))]:
        shutil.copy(source, corpus / source.name)
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=400)
    (folder / "config.json").write_text(json.dumps(to_hf(cfg)))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(folder / "cache"))
        args = ["--corpus", str(corpus), "--model", str(folder / "config.json"), "--val-fraction", "0.3"]
        assert main(["pretrain", *args, *SIZES, "--device", "cpu", "--run-dir", str(folder / "cpu")]) == 0
    (ready,) = (folder / "cache" / "corpora").iterdir()
    ready.rename(folder / "dataset")
    return folder


def command(place: Path, run_dir: Path, *more: str) -> list[str]:
    """`apr pretrain` on the GPU."""
    data = ["--dataset", str(place / "dataset"), "--model", str(place / "config.json")]
    return ["pretrain", *data, *SIZES, "--device", "cuda", "--run-dir", str(run_dir), *more]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(
    request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """(dtype, folder) of an undisturbed run."""
    path = tmp_path_factory.mktemp("run") / "a"
    assert main(command(place, path, "--dtype", request.param)) == 0
    return request.param, path


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on time."""
    read = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    timed = ("wall_ms", "tokens_per_sec")
    return [{k: v for k, v in m.items() if k not in timed} for m in read if "spot_check" not in m]


def unequal(a: Path, b: Path) -> list[str]:
    """What differs between two runs: lines of metrics, tensors of the last state."""
    out = [] if lines(a) == lines(b) else ["metrics"]
    last = [sorted((p / "ckpt" / "state").glob("*.apr"))[-1] for p in (a, b)]
    first, second = (read_apr(p).tensors for p in last)
    if last[0].name != last[1].name or first.keys() != second.keys():
        return [*out, "state"]
    return out + [name for name in first if first[name].tobytes() != second[name].tobytes()]


def test_a_run_learns_and_says_what_computed(cuda: Any, run: tuple[str, Path], place: Path) -> None:
    dtype, path = run
    config = json.loads((path / "config.json").read_text())
    assert config["settings"]["dtype"] == dtype
    facts = config["device"]
    later = (
        "memory_bytes",
        "matmul_algorithms",
    )  # what the closing gates multiply is chosen after that was written
    assert facts == {**cuda.describe(), **{key: facts[key] for key in later}}
    assert facts["matmul_algorithms"]
    assert int(facts["memory_bytes"]) > 0
    assert facts["backend"] == "cuda"
    assert facts["gpu"].startswith("NVIDIA")
    assert facts["uuid"].startswith("GPU-")
    assert facts["driver"]
    losses = [m["val_loss"] for m in lines(path) if "val_loss" in m]
    assert abs(losses[0] - np.log(400)) < 0.1
    assert losses[-1] < losses[0] - 0.1
    on_cpu = [m["val_loss"] for m in lines(place / "cpu") if "val_loss" in m]
    assert np.allclose(losses, on_cpu, rtol=1e-4 if dtype == "float32" else 2.0**-7)


@pytest.mark.parametrize("base", [[], ["--lora-base", "int8"]], ids=["", "int8"])
def test_gates_pass_on_a_run_of_adapters(
    run: tuple[str, Path], place: Path, tmp_path: Path, base: list[str]
) -> None:
    """Adapters on the last checkpoint of a run: every gate is judged, and none fails."""
    # Twelve steps are no pretraining, which only a base as it was saved need not show: its loss is on record.
    learnt = ["--bounds", "pretrained_share=1.5"]
    line = command(place, tmp_path / "b", "--dtype", run[0], "--lora-rank", "4", *base, *learnt)
    at = line.index("--model")
    line[at : at + 2] = ["--init", str(sorted((run[1] / "ckpt").glob("*.apr"))[-1])]
    assert main(line) == 0
    verdict = json.loads((tmp_path / "b" / "verdict.json").read_text())
    assert verdict["verdict"] == "PASS", [g for g in verdict["gates"] if g["verdict"] != "PASS"]
    assert {"end.base", "end.reload"} <= {g["id"] for g in verdict["gates"]}


def test_the_gpu_that_is_named_is_the_one_nvidia_smi_knows(run: tuple[str, Path]) -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no nvidia-smi")
    query = ["nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader"]
    known = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    facts = json.loads((run[1] / "config.json").read_text())["device"]
    assert f"{facts['gpu']}, {facts['uuid']}" in known


@pytest.mark.parametrize(
    "options", [[], ["--recompute"], ["--no-graph"]], ids=lambda o: "".join(o) or "again"
)
def test_runs_are_equal_bit_for_bit(
    run: tuple[str, Path], place: Path, tmp_path: Path, options: list[str]
) -> None:
    """Whether or not blocks are computed again and passes are recorded."""
    assert main(command(place, tmp_path / "b", "--dtype", run[0], *options)) == 0
    assert unequal(run[1], tmp_path / "b") == []


def test_another_seed_is_another_run(run: tuple[str, Path], place: Path, tmp_path: Path) -> None:
    assert main(command(place, tmp_path / "b", "--dtype", run[0], "--seed", "43")) == 0
    assert "metrics" in unequal(run[1], tmp_path / "b")


@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_stopped_run_goes_on_bit_for_bit(
    run: tuple[str, Path], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    train_step, path = Trainer.train_step, tmp_path / "b"

    def stopping(self: Trainer) -> dict[str, Any]:
        line = train_step(self)
        self.stop.is_asked = line["step"] == stop_after
        return line

    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        assert main(command(place, path, "--dtype", run[0])) == 130
    assert main(["pretrain", "--resume", "--run-dir", str(path)]) == 0
    assert unequal(run[1], path) == []


def test_a_run_in_another_process_is_equal_bit_for_bit(
    run: tuple[str, Path], place: Path, tmp_path: Path
) -> None:
    """It finds the algorithms of its matrix products on disk."""
    pytest.importorskip("cupy")
    if run[0] == "float32":
        pytest.skip("one other process is enough")
    line = [sys.executable, "-m", "apr.cli.main", *command(place, tmp_path / "b", "--dtype", run[0])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert unequal(run[1], tmp_path / "b") == []


def test_a_sample_is_drawn_on_the_gpu(
    run: tuple[str, Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for name in ("b", "c"):
        line = command(
            place, tmp_path / name, "--dtype", run[0], "--sample", "def ", "--json", "--num-steps", "4"
        )
        assert main(line) == 0
        texts.append(json.loads(capsys.readouterr().out)["sample"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")
    assert len(texts[0]) > 10
