"""A run in bfloat16 on the cpu backend: stories260K trains beside float32, its gates pass, and its bits come again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends.contract import BF16
from apr.backends.cpu import tiles
from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.registry import open_host
from apr.cli.main import main
from apr.common.finding import FAIL
from apr.evidence.resumed import computes_the_same
from apr.evidence.slope import Job, Slope, agreed, slope_finding
from apr.model.optim import AdamW
from apr.model.transformer import Model

STEPS = 50


def trained(folder: Path, text: Path, stories: Path, dtype: str, name: str = "") -> Path:
    path = folder / (name or dtype)
    args = ["--corpus", text, "--init", stories, "--num-steps", STEPS, "--eval-every", STEPS // 2]
    args += ["--batch-size", 4, "--micro-batch-size", 2, "--seq-length", 64, "--lr", 1e-3]
    assert main(["pretrain", *map(str, args), "--dtype", dtype, "--run-dir", str(path)]) == 0
    return path


def losses(run: Path) -> np.ndarray:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return np.array([line["train_loss"] for line in lines if "train_loss" in line])


@pytest.fixture(scope="module")
def stories(data: Any) -> Path:
    return Path(data("stories260K")) / "hf"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, data: Any) -> Path:
    folder = tmp_path_factory.mktemp("text")
    story = (Path(data("tinystories-excerpt")) / "tinystories-train-head.txt").read_text()
    for n in range(4):
        (folder / f"{n}.txt").write_text(story[n * 20_000 : (n + 1) * 20_000])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path, stories: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), text, stories, "bfloat16")


def test_fifty_steps_beside_float32(run: Path, text: Path, stories: Path, tmp_path: Path) -> None:
    """Every gate passes, the spot check among them, and no loss is further from float32's than roundings take it."""
    verdict = json.loads((run / "verdict.json").read_text())
    assert verdict["verdict"] == "PASS"
    assert [g["id"] for g in verdict["gates"] if g["verdict"] == FAIL] == []
    wide, low = losses(trained(tmp_path, text, stories, "float32")), losses(run)
    assert len(low) == len(wide) == STEPS
    assert np.abs(low / wide - 1).max() < 0.01
    assert not np.array_equal(low, wide)


def test_the_bits_come_again(run: Path) -> None:
    """Recorded steps, computed again by `apr verify`; weights are stored in bfloat16, the rest of a state in float32."""
    for pattern, kind in (("*.apr", BF16), ("state/*.apr", np.dtype(np.float32))):
        file = read_apr(sorted((run / "ckpt").glob(pattern))[-1])
        assert {np.array(x).dtype for x in file.tensors.values()} == {kind}
    assert main(["verify", str(run), "--replay", "2"]) == 0


def test_a_resume_with_other_products_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((path / "config.json").read_text())
    assert config["device"]["products"] == tiles.path()
    config["device"]["products"] = "other"
    (path / "config.json").write_text(json.dumps(config))
    assert main(["pretrain", "--resume", "--run-dir", str(path)]) == 5
    assert "products was computed by other, and by" in capsys.readouterr().err
    assert main(["pretrain", "--resume", "--run-dir", str(path), "--other-kernels"]) == 0


def test_products_of_bfloat16_decide_nothing_in_float32() -> None:
    """A process that has computed in both names them; a run in float32 has the same bits whatever they are."""
    config = {"settings": {"dtype": "float32"}, "device": {"backend": "cpu"}, "code_sha256": "a"}
    now = {"backend": "cpu", "products": "avx512_bf16"}
    assert computes_the_same(config, now, "a")
    assert not computes_the_same({**config, "settings": {"dtype": "bfloat16"}}, now, "a")


@pytest.mark.parametrize("fault", [None, "k", "v"])
def test_slopes_of_a_trained_model(fault: str | None, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roundings move the loss of a trained model by much; a lost gradient of keys or of values is seen all the same."""
    cpu = backends.get("cpu")
    right = cpu.attention_bwd
    if fault:

        def lost(dq: Any, dk: Any, dv: Any, *rest: Any) -> None:
            right(dq, dk, dv, *rest)
            cpu.fill(dk if fault == "k" else dv, 0)

        monkeypatch.setattr(cpu, "attention_bwd", lost)
    source = open_host(str(stories), "float32")
    readme = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
    ids = np.array(source.tokenizer.encode(readme)[: 4 * 129], np.int32).reshape(4, 129)
    model = Model(source.cfg, cpu, 4, 128, "bfloat16")
    opt = AdamW.of(model)
    opt.set_weights(np.asarray(source.on(cpu, "float32")))
    found = slope_finding(Job(model, opt, None, (ids[:, :-1], ids[:, 1:]), 1 / 1024, False))
    assert found.passed is (fault is None), found


def test_a_direction_that_is_off_alone_accuses_nobody() -> None:
    """Of the five directions that are taken in doubt half must be off; of fewer each counts."""

    def of(*ratios: float) -> list[Slope]:
        return [Slope("wq", 1.0, 1.0 + ratio, 1.0, 1.0) for ratio in ratios]

    for ratios, red in (
        ((0.5, 1.2, 0.3, 0.9, 1.1), 0),
        ((1.5, 1.2, 0.3, 0.9, 1.1), 3),
        ((np.nan, 1.2, 0.3, np.nan, 0.1), 3),
        ((0.5, 1.2), 1),
    ):
        assert sum(not s.ratio <= 1 for s in agreed(of(*ratios))) == red
