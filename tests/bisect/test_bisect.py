"""`apr bisect` as a user calls it, and its parts: lockstep, what watches an op, the stages, what they must not miss.

The fault catalogue is in test_faults.py.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import apr.cli.bisect as command
from apr import backends
from apr.backends import contract, overlay
from apr.backends.cuda import ops as cuda_ops
from apr.bisect import batch as batches
from apr.bisect import makers, optimizer_steps, passes, rule, stages, state, upload, watch
from apr.bisect.lockstep import Call, Differing, Lockstep, Twin, join, join_optimizers, run_both
from apr.bisect.planted import catalogue
from apr.bisect.planted.faults import FAULTS
from apr.bisect.report import EXACT, FORCED, FREE, STAGES, ArrayComparison, Report
from apr.bisect.side import Batch, Side
from apr.bisect.stages import Plan
from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.cli.main import main
from apr.model.config import ModelConfig
from apr.model.cost import memory
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.rope import rope_tables
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
reference, cpu = backends.get("reference"), backends.get("cpu")
QWEN2 = PRESETS["qwen2-tiny"]
SHAPE = (2, 17)
OPS = Plan(free=False, state=False)  # each op alone


# The command


@dataclass(frozen=True)
class Done:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """stdout in one line: a table breaks lines where it likes."""
        return " ".join(self.out.split())

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Of --json; raises for what is not strict JSON."""
        found = self.document["reports"]
        assert isinstance(found, list)
        return found

    @property
    def document(self) -> dict[str, Any]:
        """All of --json."""

        def refuse(constant: str) -> Any:
            raise ValueError(constant)

        found = json.loads(self.out, parse_constant=refuse)
        assert isinstance(found, dict)
        return found


Apr = Callable[..., Done]


@pytest.fixture
def apr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """apr("bisect", ...), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*args: Any) -> Done:
        code = main([str(a) for a in args])
        return Done(code, *capsys.readouterr())

    return call


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def plant(monkeypatch: pytest.MonkeyPatch, name: str, cfg: ModelConfig = QWEN2) -> None:
    """Give the command a cpu backend with a fault of the catalogue."""
    be = FAULTS[name].backend(cpu, cfg)
    monkeypatch.setattr(command, "choose", lambda device, dtype, threads: SimpleNamespace(backend=be))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an .apr file of a random llama with a tokenizer, the folder of token shards that the tokenizer made)."""
    folder = tmp_path_factory.mktemp("text")
    shards = catalogue.tiny_dataset(folder / "data")
    tokenizer = Tokenizer.from_file(shards / "tokenizer")
    cfg = replace(PRESETS["llama-tiny"], vocab_size=tokenizer.vocab_size)
    meta = config_to_metadata(cfg)
    embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
    write_apr(folder / "m.apr", meta, Layout(cfg).named(catalogue.weights_of(cfg)), "float32")
    return folder / "m.apr", shards


def test_a_sound_side_agrees_and_a_picture_is_written(apr: Apr, tmp_path: Path) -> None:
    done = apr("bisect", "qwen2-tiny", "--sides", "cpu")
    assert (done.code, done.err) == (0, "")
    assert "qwen2-tiny: cpu float32 compared with reference float64" in done.words
    assert "arrays agree; the largest error is" in done.words
    assert "DIFFER" not in done.words
    assert "skipped" not in done.words
    assert done.words.endswith("picture: bisect.png")
    assert is_png(tmp_path / "bisect.png")


def test_json_is_one_document_with_every_row(apr: Apr) -> None:
    done = apr("bisect", "qwen2-tiny", "--sides", "cpu", "--json", "--picture", "p.png")
    assert (done.code, done.err) == (0, "")
    (report,) = done.reports
    assert done.document["pictures"] == ["p.png"]
    assert report["agree"] is True
    assert report["first"] is None
    assert report["sides"] == ["reference float64", "cpu float32"]
    assert report["stages"] == dict.fromkeys(STAGES, "agree")
    assert {r["mode"] for r in report["rows"]} == {FREE, FORCED, EXACT}
    assert all(r["ok"] and r["err"] <= r["tol"] for r in report["rows"])
    measured = [r for r in report["rows"] if r["mode"] != EXACT]
    assert sum(r["err"] > 0 for r in measured) > len(measured) // 2  # float32 is not float64


def test_two_sides_give_two_reports_and_two_pictures(apr: Apr, tmp_path: Path) -> None:
    sides = "cpu,reference/float32,reference"
    done = apr("bisect", "qwen3-tiny", "--sides", sides, "--json", "--picture", "p.png")
    assert done.code == 0
    names = [r["sides"][1] for r in done.reports]
    assert names == ["cpu float32", "reference float32", "reference float64"]
    assert done.document["pictures"] == [
        "p-cpu-float32.png",
        "p-reference-float32.png",
        "p-reference-float64.png",
    ]
    assert all(is_png(tmp_path / p) for p in done.document["pictures"])
    assert not (tmp_path / "p.png").exists()
    cpu_, plain, same = (
        {(x["op"], x["tap"], x["mode"]): x["err"] for x in r["rows"] if x["stage"] in ("forward", "loss")}
        for r in done.reports
    )
    assert cpu_.keys() == plain.keys() == same.keys()
    assert cpu_ != plain  # each was judged by its own arrays
    assert max(same.values()) < 1e-12 < 1e-7 < max(plain.values())  # the reference beside itself


SIDE = ("--sides", "cpu", "--json", "--picture", "")


def test_no_free_and_no_picture(apr: Apr, tmp_path: Path) -> None:
    done = apr("bisect", "qwen2-tiny", *SIDE, "--no-free")
    (alone,) = done.reports
    assert done.code == 0
    assert done.document["pictures"] == [""]
    assert {r["mode"] for r in alone["rows"]} == {FORCED, EXACT}
    assert alone["stages"] == dict.fromkeys(STAGES, "agree")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [(), ("--no-free",)])
def test_no_backward(apr: Apr, more: tuple[str, ...]) -> None:
    done = apr("bisect", "qwen2-tiny", *SIDE, "--no-backward", *more)
    (forward,) = done.reports
    assert done.code == 0
    assert [s for s, v in forward["stages"].items() if v == "skipped"] == ["backward", "optimizer", "state"]
    assert not [
        r["tap"]
        for r in forward["rows"]
        if r["stage"] != "formulas" and ("grad" in r["tap"] or r["tap"].startswith("d_"))
    ]
    assert {r["tap"] for r in forward["rows"]} >= {"hidden.0", "1.mlp_out", "logits", "loss_rows"}


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("bias_dropped", "layer 0 linear_fwd -> 0.qkv"),
        ("bias_gradient_missing", "layer 1 linear_bwd -> grad.1.bqkv"),
        ("clip_skipped", "clip_factor -> factor"),
    ],
)
def test_a_planted_fault_is_named(
    apr: Apr, monkeypatch: pytest.MonkeyPatch, fault: str, place: str, tmp_path: Path
) -> None:
    plant(monkeypatch, fault)
    done = apr("bisect", "qwen2-tiny", "--sides", "cpu", "--rows", "2")
    assert done.code == 9
    assert "First fault" in done.words
    assert "arrays agree" not in done.words
    assert is_png(tmp_path / "bisect.png")
    found = apr("bisect", "qwen2-tiny", "--sides", "cpu", "--json", "--picture", "")
    assert found.code == 9
    (report,) = found.reports
    first = report["first"]
    row = ArrayComparison(first["stage"], first["op"], first["tap"], first["mode"], 1, 0, first["layer"])
    assert row.place == place
    assert first["op"] in done.words
    assert first["cause"] in done.words
    assert report["agree"] is False


def test_one_wrong_side_of_two_is_a_difference(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "bias_dropped")
    asked = ("--sides", "cpu,reference", "--json", "--picture", "", "--no-free")
    done = apr("bisect", "qwen2-tiny", *asked)
    assert done.code == 9
    assert [r["agree"] for r in done.reports] == [False, True]


def test_first_stops_at_the_first_stage_with_a_fault(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "key_bias_never_loaded")
    always = ("bisect", "qwen2-tiny", "--sides", "cpu", "--json", "--picture", "")
    (whole,), done = apr(*always).reports, apr(*always, "--first")
    (short,) = done.reports
    assert done.code == 9
    assert short["first"]["tap"] == whole["first"]["tap"] == "0.bk"
    assert short["stages"]["upload"] == "DIFFER"
    assert short["stages"]["forward"] == "skipped"
    assert whole["stages"]["forward"] == "DIFFER"


def test_nan_is_no_agreement_and_json_stays_json(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    def linear_fwd(y: Any, *rest: Any) -> None:
        cpu.linear_fwd(y, *rest)
        y[-1, -1] = np.nan

    be = overlay(cpu, linear_fwd=linear_fwd)
    monkeypatch.setattr(command, "choose", lambda *a: SimpleNamespace(backend=be))
    with np.errstate(all="ignore"):
        done = apr("bisect", "llama-tiny", *SIDE, "--no-free")
    (report,) = done.reports
    assert done.code == 9
    assert report["first"]["tap"] == "0.qkv"
    assert (report["first"]["err"], report["first"]["got"]) == ("nan", "nan")
    assert report["first"]["index"] == [63, 79]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("", 2, "say which model"),
        ("no/such/model", 3, "no/such/model"),
        ("qwen2-tiny --sides tpu", 2, "--sides tpu: expected DEVICE or DEVICE/DTYPE"),
        ("qwen2-tiny --sides cpu,", 2, "--sides cpu,: expected DEVICE"),
        ("qwen2-tiny --sides cpu/float64", 5, "the cpu backend computes in float32"),
        ("qwen2-tiny --sides reference/bfloat16", 5, "the reference backend computes in float64, float32"),
        ("qwen2-tiny --tokens 1,2,3 --dataset x", 2, "--tokens, --text and --dataset"),
        ("qwen2-tiny --text x --dataset x", 2, "--tokens, --text and --dataset"),
        ("qwen2-tiny --targets x.json", 2, "--targets goes with --tokens"),
        ("qwen2-tiny --tokens 1,2,123", 5, "id 123 is outside the model's vocabulary of 123"),
        ("qwen2-tiny --tokens 1,2,-1", 5, "id -1 is outside"),
        ("qwen2-tiny --tokens 1,2,x", 2, "1,2,x"),
        ("qwen2-tiny --tokens 7", 2, "give at least 2"),
        ("qwen2-tiny --tokens none.npy", 3, "none.npy"),
        ("qwen2-tiny --tokens 1,2,3 --targets 2,3", 2, "--targets has shape (1, 2), --tokens (1, 3)"),
        ("qwen2-tiny --tokens 1,2,3 --targets 2,3,-101", 5, "id -101"),
        ("qwen2-tiny --text x", 5, "no tokenizer in it, so --text cannot be read"),
        ("TEXT_MODEL --text none.txt", 3, "none.txt: no such file"),
        ("TEXT_MODEL --text SHORT", 5, "2 sequences of 32 and one more are 65; give a longer text"),
        ("qwen2-tiny --seq-length 65", 5, "max_position_embeddings = 64"),
        ("qwen2-tiny --dataset no/such", 3, "no/such"),
        ("TEXT_MODEL --dataset DATASET --batch-size 4096", 5, "lower --batch-size"),
        ("qwen2-tiny --batch-size 0", 2, "--batch-size"),
        ("qwen2-tiny --rows -1", 2, "--rows"),
        ("qwen2-tiny --seed -1", 2, "--seed"),
        ("qwen2-tiny --frobnicate", 2, "--frobnicate"),
        ("qwen2-tiny --against x --dataset y", 2, "does not go with --against"),
        ("qwen2-tiny --against x --first", 2, "does not go with --against"),
        ("qwen2-tiny --against x --mask-documents", 2, "does not go with --against"),
        ("NO_TOKENIZER --mask-documents", 5, "nothing says which id ends a document"),
        ("qwen2-tiny --against no.safetensors", 3, "no.safetensors"),
    ],
)
def test_bad_input_is_one_clear_line(
    apr: Apr, text_model: tuple[Path, Path], tmp_path: Path, args: str, code: int, words: str
) -> None:
    (tmp_path / "short.txt").write_text("a short text")
    cfg = PRESETS["llama-tiny"]
    write_apr(
        tmp_path / "bare.apr",
        config_to_metadata(cfg),
        Layout(cfg).named(catalogue.weights_of(cfg)),
        "float32",
    )
    names = {
        "TEXT_MODEL": text_model[0],
        "DATASET": text_model[1],
        "SHORT": "short.txt",
        "NO_TOKENIZER": tmp_path / "bare.apr",
    }
    asked = [names.get(a, a) for a in args.split(" ") if a]
    done = apr("bisect", *([] if "--sides" in args else ["--sides", "cpu"]), *asked)
    assert done.code == code, done
    assert words in done.err
    assert done.err.startswith("apr bisect: ")
    assert "Traceback" not in done.err
    assert done.out == ""


def test_documents_are_masked_on_request(
    apr: Apr, text_model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a preset, a passage, given ids and a dataset; then a fault of the masks is found, and not without them."""
    model, dataset = map(str, text_model)
    asked = ("--mask-documents", "--sides", "cpu", "--json", "--picture", "", "--no-free")
    given = [
        (["qwen2-tiny"], "in documents of 6 tokens"),
        (["qwen2-tiny", "--tokens", "7,8,0,9,3,0,0,4"], "documents masked that end with id 0"),
        ([model], "in documents of 6 tokens"),
        ([model, "--dataset", dataset, "--batch-size", "12"], "documents masked that end with id"),
    ]
    for args, words in given:
        done = apr("bisect", *args, *asked)
        (report,) = done.reports
        assert (done.code, done.err) == (0, "")
        assert words in report["batch"]
        assert "doc_start" in {r["tap"] for r in report["rows"] if r["stage"] == "upload"}
    plant(monkeypatch, "documents_see_each_other")
    for args, _ in given:
        done = apr("bisect", *args, *asked)
        assert done.code == 9, args
        assert done.reports[0]["first"]["op"] == "attention_fwd"
    assert apr("bisect", "qwen2-tiny", *asked[1:]).code == 0
    (report,) = apr("bisect", "qwen2-tiny", "--tokens", "7,8,9,3,0", *asked).reports
    assert report["notes"] == [
        "no document ends before the last token, so no border is masked; give ids with some"
    ]


def test_a_repeated_token_is_noted(apr: Apr) -> None:
    note = "so few show little of RoPE, mask and grouped heads"
    asked = ("bisect", "qwen2-tiny", "--sides", "cpu", "--picture", "", "--tokens")
    assert f"note: only 1 different id in 1 x 6 positions: {note}" in apr(*asked, "5,5,5,5,5,5").words
    assert note not in apr(*asked, "5,6,7,8,9,10").words


def test_targets_that_are_the_ids_are_seen(apr: Apr, tmp_path: Path) -> None:
    ids = np.arange(20).reshape(2, 10)
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "next.npy", ids + 1)
    asked = ("bisect", "llama-tiny", *SIDE, "--no-free", "--tokens", "ids.npy", "--targets")
    assert apr(*asked, "next.npy").code == 0
    done = apr(*asked, "ids.npy")
    (report,) = done.reports
    assert done.code == 9
    assert report["first"]["stage"] == "data"
    assert "off by one" in report["first"]["cause"]


def test_text_goes_through_the_tokenizer_of_a_real_model(
    apr: Apr, data: Callable[[str], Path], tmp_path: Path
) -> None:
    model = data("stories260K") / "hf"
    (passage,) = apr("bisect", model, *SIDE, "--no-free").reports
    assert passage["agree"] is True
    assert passage["batch"] == "2 x 32 tokens of a passage of prose and code"
    assert next(r["op"] for r in passage["rows"] if r["stage"] == "data") == "decode(encode)"
    (tmp_path / "t.txt").write_text("Once upon a time, there was a little dog. " * 9, encoding="utf-8")
    asked = ("--text", "t.txt", "--batch-size", 3, "--seq-length", 7)
    (text,) = apr("bisect", model, *SIDE, *asked).reports
    assert text["agree"] is True
    assert text["batch"] == "3 x 7 tokens of t.txt"
    (rows,) = (r["shape"] for r in text["rows"] if r["tap"] == "0.qkv" and r["mode"] == FORCED)
    assert rows[0] == 21


def test_a_tokenizer_that_loses_characters_is_seen(text_model: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.from_file(text_model[1] / "tokenizer")

    class Lossy:
        encode = staticmethod(tokenizer.encode)

        @staticmethod
        def decode(ids: Any) -> str:
            return tokenizer.decode(ids).replace("clockmaker", "clockmake")

    for used, ok in ((tokenizer, True), (Lossy(), False)):
        given, (row,) = batches.from_text(batches.PASSAGE, used, SHAPE, "x")  # type: ignore[arg-type]
        assert row.ok is ok
        assert given.shape == SHAPE
    assert "the ids are not the text: from character" in row.cause
    flat = np.asarray(tokenizer.encode(batches.PASSAGE))[: 2 * 17 + 1]
    assert np.array_equal(given.ids.reshape(-1), flat[:-1])
    kept = given.targets.reshape(-1) >= 0
    assert np.array_equal(given.targets.reshape(-1)[kept], flat[1:][kept])
    assert 0 < (~kept).sum() < 10


def test_a_dataset_of_token_shards(apr: Apr, text_model: tuple[Path, Path]) -> None:
    model, shards = text_model
    asked = ("bisect", model, *SIDE, "--no-free", "--seq-length", 16, "--dataset", shards)
    done = apr(*asked)
    (report,) = done.reports
    assert done.code == 0
    ops = [(r["op"], r["tap"]) for r in report["rows"] if r["stage"] == "data"]
    assert ops[:3] == [("Windows.read", "ids"), ("Windows.read", "targets"), ("Batches.next", "one_pass")]
    assert "that training draws of" in report["batch"]
    with FAULTS["targets_are_the_ids"].patch():
        done = apr(*asked, "--first")
    assert done.code == 9
    assert done.reports[0]["first"]["op"] == "Windows.read"
    assert done.reports[0]["first"]["tap"] == "targets"


@pytest.mark.parametrize("have", [None, 1 << 50])
def test_enough_memory_or_none_known_goes_on(
    apr: Apr, monkeypatch: pytest.MonkeyPatch, have: int | None
) -> None:
    monkeypatch.setattr(command, "available_memory", lambda: have)
    assert apr("bisect", "llama-tiny", *SIDE, "--no-free").code == 0


def test_too_little_memory_is_refused_with_figures(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "available_memory", lambda: 3 << 28)
    done = apr("bisect", "llama-tiny", *SIDE)
    assert done.code == 5
    assert "needs 1.0 GiB of main memory and 0.8 GiB are free" in done.err
    assert "--no-free" in done.err
    assert done.document["exit_code"] == 5


def test_host_bytes_are_those_of_the_models() -> None:
    side, cfg = Side(cpu, PRESETS["qwen2.5-0.5b"], "float32"), PRESETS["qwen2.5-0.5b"]

    def need(**options: Any) -> int:
        return stages.host_bytes(side, (2, 32), Plan(**options))

    assert need() > need(free=False) > need(free=False, backward=False) > 8 * Layout(cfg).num_parameters
    alone = memory(cfg, reference, 2, 32, dtype="float64").total
    assert need(free=False) == alone + (1 << 30)


# Against a trace


def trace(apr: Apr, path: Path, *more: Any, backend: str = "reference") -> Path:
    tokens = ",".join(str(i * 37 % 123) for i in range(24))
    done = apr("trace", "qwen2-tiny", "--tokens", tokens, "-o", path, "--backend", backend, *more)
    assert done.code == 0, done
    return path


def test_against_a_trace_of_another_backend(
    apr: Apr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trace(apr, tmp_path / "t.safetensors", "--backward")
    asked = ("bisect", "qwen2-tiny", "--against", path, "--sides")
    done = apr(*asked, "cpu")
    assert done.code == 0, done.out
    assert "arrays agree" in done.words
    assert "(reference float64)" in done.words
    (report,) = apr(*asked, "cpu", "--json", "--picture", "").reports
    verdicts = {s: report["stages"][s] for s in ("upload", "forward", "loss", "backward")}
    assert verdicts == dict.fromkeys(verdicts, "agree")
    assert set(report["skipped"]) == {"data", "optimizer", "state", "formulas"}
    assert report["stages"]["configuration"] == "agree"
    refused = apr(*asked, "cpu", "--seed", 7)
    assert refused.code == 5
    assert "random weights of seed 42" in refused.err
    plant(monkeypatch, "rope_off_by_a_thousandth")
    done = apr(*asked, "cpu", "--json", "--picture", "")
    assert done.code == 9
    assert (done.reports[0]["first"]["op"], done.reports[0]["first"]["tap"]) == ("rope", "0.q_rope")


def test_a_trace_of_the_cpu_backend_judges_the_reference(
    apr: Apr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("bisect", "qwen2-tiny", "--sides", "reference,reference/float32", "--json", "--picture", "")
    sound = trace(apr, tmp_path / "sound", backend="cpu")
    done = apr(*asked, "--against", sound)
    assert done.code == 0
    assert [r["stages"]["backward"] for r in done.reports] == ["skipped"] * 2
    with monkeypatch.context() as m:
        (name, f), *_ = FAULTS["bias_dropped"].ops(SimpleNamespace(**vars(cpu))).items()
        m.setattr(cpu, name, f)
        faulty = trace(apr, tmp_path / "faulty", backend="cpu")
    done = apr(*asked, "--against", faulty)
    assert done.code == 9
    assert [r["first"]["tap"] for r in done.reports] == ["0.qkv"] * 2


def test_against_transformers_says_what_to_install(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = apr("bisect", "qwen2-tiny", "--against", "hf", "--sides", "cpu")
    assert done.code == 8
    assert "pip install torch transformers" in done.err


@pytest.mark.filterwarnings("ignore")
def test_against_transformers(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs pip install torch transformers")
    asked = ("bisect", "qwen2-tiny", "--against", "hf", *SIDE)
    assert apr(*asked).code == 0
    plant(monkeypatch, "bias_dropped")
    done = apr(*asked)
    assert done.code == 9
    assert done.reports[0]["first"]["op"] == "linear_fwd"


# tools/which_op.py


def test_the_tool_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "tools/which_op.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--sides" in done.stdout
    none = subprocess.run([sys.executable, "tools/which_op.py"], cwd=ROOT, capture_output=True, text=True)
    assert none.returncode == 2
    assert "say which model" in none.stderr


def test_no_script_hides_a_module_of_python() -> None:
    """A script's folder comes first on its path: a script called bisect.py would be what `import bisect` gives there."""
    scripts = [p.stem for p in (ROOT / "tools").rglob("*.py")]
    assert len(scripts) > 10
    assert not set(scripts) & sys.stdlib_module_names


# Lockstep


def test_a_twin_is_cut_and_shaped_like_its_sides() -> None:
    flat = np.arange(24.0)
    x = Twin("w", [flat, flat.astype(np.float32)])
    part = x[6:18]
    assert (part.name, part.start, part.shape) == ("w", 6, (12,))
    assert part[2:4].start == 8
    assert part[:4].start == 6
    square = part.reshape(3, 4)
    assert (square.shape, square.start) == ((3, 4), 6)
    assert (square[1:].shape, square[1:].start) == ((2, 4), 6)  # rows of a matrix are not counted
    for side, whole in zip(square[:, 1:3].sides, x.sides, strict=True):
        assert np.array_equal(side, whole[6:18].reshape(3, 4)[:, 1:3])
        assert np.shares_memory(side, whole)
    square[0].sides[1][...] = -1
    assert x.sides[1].tolist()[5:11] == [5, -1, -1, -1, -1, 10]
    assert flat[6] == 6


def test_a_call_knows_its_layer_and_the_arguments_of_a_side() -> None:
    a, w, d = (Twin(n, [n + "0", n + "1"]) for n in ("3.qkv", "1.wo", "grad.12.wq"))
    assert Call("op", {"y": a, "w": w}).layer == 1
    assert Call("op", {"y": a, "x": w}).layer == 3
    assert Call("op", {"dw": d}).layer == 12
    assert Call("op", {"y": a, "w": Twin("embed", [0, 0])}).layer is None
    assert Call("op", {"n": 3}).layer is None
    assert Call("op", {"y": a, "eps": Differing((1e-5, 1e-6)), "n": 3}).on(1) == ["3.qkv1", 1e-6, 3]


def one_step(model: Model, opt: AdamW, given: Batch) -> None:
    for _ in range(2):
        model.forward(given.ids)
        model.loss(given.targets, 1 / given.count)
        model.backward()
        opt.step(0.01)


def all_bits(model: Model, opt: AdamW) -> dict[str, bytes]:
    out = {"total": model.total, "w": model.w, "sum_sq": opt.sum_sq, **opt.state}
    names = ("logits", "final_norm", "dres")
    return {n: model.be.to_host(x).tobytes() for n, x in out.items()} | {
        n: model.be.to_host(model.buffers[n]).tobytes() for n in names
    }


JOINED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # preset, options, what side 1 believes
    "biases": ("qwen2-tiny", {}, {}),
    "head norms, recompute": ("qwen3-tiny", {"recompute": True}, {}),
    "act again": ("qwen2-tiny", {"act_again": True}, {}),
    "pieces of the loss, z_loss": ("llama3-tiny", {"loss_rows": 7, "z_loss": 0.01}, {}),
    "eps": ("llama-tiny", {}, {"rms_norm_eps": 0.1}),
    "eps, recompute": ("qwen3-tiny", {"recompute": True}, {"rms_norm_eps": 0.1}),
    "window": ("mistral-tiny", {}, {"sliding_window": 3}),
}


@pytest.mark.parametrize("name", JOINED)
def test_models_in_lockstep_compute_what_they_compute_alone(name: str) -> None:
    """Bit for bit, each with its own configuration: loss, gradients, weights after two steps of AdamW."""
    preset, options, believed = JOINED[name]
    cfg = PRESETS[preset]
    given = batches.at_random(cfg, SHAPE, seed=3)
    kinds = [(reference, cfg, "float64"), (cpu, replace(cfg, **believed), "float32")]

    def make() -> list[tuple[Model, AdamW]]:
        models = [Model(c, be, *SHAPE, dtype, **options) for be, c, dtype in kinds]
        for m in models:
            m.be.from_host(m.w, catalogue.weights_of(cfg))
        return [(m, AdamW.of(m, grad_clip=0.1)) for m in models]

    alone = make()
    for model, opt in alone:
        one_step(model, opt, given)
    pairs = make()
    models, opts = [m for m, _ in pairs], [o for _, o in pairs]
    both = join(models, run_both)
    one_step(both, join_optimizers(both, opts), given)
    for one, beside in zip(alone, pairs, strict=True):
        assert all_bits(*one) == all_bits(*beside)
    loss = [float(m.total[0]) for m, _ in alone]
    if believed:
        assert abs(loss[0] - loss[1]) > 1e-3 * loss[0]
    else:
        assert 0 < abs(loss[0] - loss[1]) < 1e-4 * loss[0]


def test_a_watch_is_given_every_op_once_and_decides_whether_it_runs() -> None:
    """And what a watch does to the numbers is seen by the test above: here an op is left out."""
    cfg = PRESETS["llama-tiny"]
    given = batches.at_random(cfg, SHAPE, seed=3)
    counted: list[str] = []

    def count(op: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            counted.append(op)
            getattr(cpu, op)(*args)

        return call

    def step(leave_out: str) -> tuple[list[str], dict[str, bytes]]:
        be = overlay(cpu, **{op: count(op) for op in contract.OPS})
        models = [Model(cfg, b, *SHAPE, d) for b, d in ((reference, "float64"), (be, "float32"))]
        for m in models:
            m.be.from_host(m.w, catalogue.weights_of(cfg))
        seen: list[str] = []

        def look(call: Call, run: Callable[[], None]) -> None:
            seen.append(call.op)
            if call.op != leave_out:
                run()

        both = join(models, look)
        opts = [AdamW.of(m) for m in models]
        one_step(both, join_optimizers(both, opts), given)
        return seen, all_bits(models[1], opts[1])

    seen, bits = step("")
    assert seen == counted
    assert set(seen) == set(contract.OPS) - {
        *("head_rmsnorm_fwd", "head_rmsnorm_bwd", "add", "gemm", "adapted", "adapted_int8", "swiglu_again"),
        "dropout",
        *("adapted_bwd_a", "adapted_bwd_b"),
    }
    counted.clear()
    assert step("swiglu_fwd")[1]["w"] != bits["w"]
    assert "swiglu_fwd" not in counted


def test_a_lockstep_gives_what_the_last_side_gives() -> None:
    both = Lockstep([reference, cpu], run_both)
    x = Twin("x", [np.zeros(3), np.ones(3, np.float32)])
    assert both.to_host(x).tolist() == [1, 1, 1]  # type: ignore[attr-defined]
    both.fill(x, 2)  # type: ignore[attr-defined]
    assert [s.tolist() for s in x.sides] == [[2, 2, 2]] * 2


# What it keeps


class Hoards(watch.Forced):
    """Forced with the fault that is looked for: it keeps a copy of every output."""

    kept: list[np.ndarray]

    def __call__(self, call: Call, run: Callable[[], None]) -> None:
        super().__call__(call, run)
        kept = self.__dict__.setdefault("kept", [])
        kept += [np.array(x.sides[0]) for x in call.args.values() if isinstance(x, Twin)]


def growth(kind: type[watch.Forced], layers: int) -> tuple[float, int]:
    """(bytes that remain after an op, on average; most bytes that an op took beside what was there)."""
    cfg = replace(QWEN2, num_layers=layers)
    given = batches.at_random(cfg, SHAPE, seed=0)
    side = Side(reference, cfg, "float32")  # no threads, nothing to compile
    models = [
        Model(cfg, reference, *SHAPE, "float64", loss_rows=34),
        side.model(catalogue.weights_of(cfg), SHAPE),
    ]
    looked = kind([reference, reference], "float32", models[0].layout)
    steps: list[tuple[int, int]] = []

    def measured(call: Call, run: Callable[[], None]) -> None:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        looked(call, run)
        steps.append((before, tracemalloc.get_traced_memory()[1] - before))

    both = join(models, measured)
    looked.begin(both)
    gc.collect()
    tracemalloc.start()
    try:
        for stage, run in (
            ("forward", lambda: both.forward(given.ids)),
            ("loss", lambda: both.loss(given.targets, 1 / given.count)),
            ("backward", lambda: both.backward()),
        ):
            looked.stage = stage
            run()
        gc.collect()
        remain = tracemalloc.get_traced_memory()[0] - steps[0][0]
    finally:
        tracemalloc.stop()
    assert len(looked.rows) > 20 * layers
    return remain / len(steps), max(more for _, more in steps)


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    """Of an op nothing remains but its rows: an activation is 15 KB here."""
    few, many = growth(watch.Forced, 2), growth(watch.Forced, 9)
    assert few[0] < 4000
    assert many[0] < 4000
    assert many[1] < 1.5 * few[1]
    assert growth(Hoards, 2)[0] > 10_000


# What looks at an op


def judged(be: Any, name: str, dtype: str, plan: Plan = OPS) -> Report:
    cfg = PRESETS[name]
    report = Report(name, ("reference float64", f"{be.name} {dtype}"), "")
    given = batches.at_random(cfg, SHAPE, seed=0)
    with np.errstate(all="ignore"):
        return stages.run(cfg, Side(be, cfg, dtype), catalogue.weights_of(cfg), given, report, plan)


def first_forced(report: Report) -> ArrayComparison:
    return next(r for r in report.rows if r.mode == FORCED and not r.ok)


def after(be: Any, op: str, change: Callable[[Any], None], calls: tuple[int, ...] = (0,)) -> Any:
    """A backend that changes the first output of an op, of the calls with these numbers."""
    count = [0]

    def call(*args: Any) -> None:
        getattr(be, op)(*args)
        if count[0] in calls:
            change(args[0])
        count[0] += 1

    return overlay(be, **{op: call})


@pytest.mark.parametrize("op", ["linear_fwd", "swiglu_fwd", "attention_bwd", "linear_bwd", "swiglu_bwd"])
def test_a_nan_is_seen(op: str) -> None:
    def spoil(x: Any) -> None:
        x[(-1,) * x.ndim] = np.nan

    # What adds to gradients runs before, to find their size.
    calls = (1,) if op == "linear_bwd" else (0,)
    row = first_forced(judged(after(cpu, op, spoil, calls), "qwen2-tiny", "float32"))
    assert row.op == op
    assert np.isnan(row.err)
    assert row.ratio == np.inf
    assert row.index == tuple(n - 1 for n in row.shape)


def test_an_op_that_leaves_its_output_unwritten_is_seen() -> None:
    """In one layer, and although the buffer holds the right values of the pass before, on the same input."""
    done = [0]

    def swiglu_fwd(y: Any, gu: Any) -> None:
        done[0] += 1
        if done[0] != 4:  # two calls of the free pass, two of the forced one
            cpu.swiglu_fwd(y, gu)

    report = judged(overlay(cpu, swiglu_fwd=swiglu_fwd), "llama-tiny", "float32", Plan(state=False))
    # The golden steps come last.
    assert done[0] > 4
    row = first_forced(report)
    assert (row.op, row.tap) == ("swiglu_fwd", "1.act")
    assert np.isnan(row.err)


def test_an_op_that_reads_its_output_is_seen() -> None:
    """The result is right for any number that is there, so that only NaN shows it."""

    def swiglu_fwd(y: Any, gu: Any) -> None:
        before = y.copy()
        cpu.swiglu_fwd(y, gu)
        y += 0 * before

    be = overlay(cpu, swiglu_fwd=swiglu_fwd)
    report = judged(be, "llama-tiny", "float32", Plan())
    assert [r.ok for r in report.of("forward", FREE)] == [True] * len(report.of("forward", FREE))
    assert (first_forced(report).op, first_forced(report).tap) == ("swiglu_fwd", "0.act")
    assert not next(r for r in report.rows if r.op == "scratch_starts_as_nan").ok


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["qwen2-tiny", "mistral-tiny"])
def test_a_padded_vocabulary_is_compared_right(name: str, dtype: str) -> None:
    """As the cuda backend has it; the columns and rows that the reference lacks are left out, and stay zero."""
    be = overlay(reference, pad_vocab=True)
    report = judged(be, name, dtype, Plan())
    assert report.agree, report.guilty[:3]
    shapes = {r.shape for r in report.of("loss", FORCED) if r.tap in ("logits", "d_logits")}
    assert shapes == {(34, 123)}
    last = after(be, "linear_fwd", lambda y: y.__setitem__((3, 122), 0), (8,))
    row = first_forced(judged(last, name, dtype))
    assert (row.op, row.tap, row.index) == ("linear_fwd", "logits", (3, 122))
    grown = after(be, "linear_fwd", lambda y: y.__setitem__((3, 125), 1), (8,))
    assert not judged(grown, name, dtype).agree  # in the padding


def test_faults_of_the_loss_are_seen_with_a_padded_vocabulary() -> None:
    be = overlay(reference, pad_vocab=True)
    for name in ("end_of_the_vocabulary_left_out", "gradient_summed_not_averaged", "loss_of_other_rows"):
        row = catalogue.bisect(FAULTS[name], be, "float32", "qwen2-tiny").first
        assert row is not None
        assert (row.op, row.stage) == ("cross_entropy", "loss"), name


def test_the_tolerance_is_that_of_the_rule() -> None:
    """Of plain NumPy's own error on the same inputs: here the first product of a model, done again."""
    seen: list[Any] = []

    def linear_fwd(*args: Any) -> None:
        cpu.linear_fwd(*args)
        seen.append([None if a is None else np.array(a) for a in args])

    report = judged(overlay(cpu, linear_fwd=linear_fwd), "llama-tiny", "float32")
    row = next(r for r in report.rows if r.tap == "0.qkv" and r.mode == FORCED)
    _, x, w, _ = seen[0]
    true = x.astype(np.float64) @ w.astype(np.float64).T
    plain = np.empty_like(seen[0][0])
    reference.linear_fwd(plain, x, w, None)
    error = np.abs(plain - true).max()
    assert row.tol == pytest.approx(2 * error + 2 * 2.0**-23 * np.abs(true).max(), rel=1e-6)
    assert row.err == pytest.approx(np.abs(seen[0][0] - true).max(), rel=1e-6)
    assert rule.tolerance(1.0, 3.0, 0.5, 2) == 5


MADE = {  # tap -> op, which of its arguments, which of its calls
    "0.qkv": ("linear_fwd", 0, 0),
    "1.act": ("swiglu_fwd", 0, 1),
    "logits": ("linear_fwd", 0, 8),
    # a call before each finds the size of the gradient
    "grad.1.wdown": ("linear_bwd", 1, 3),
    "0.d_att": ("linear_bwd", 0, 15),
}


@pytest.mark.parametrize("tap", MADE)
def test_what_is_just_within_passes_and_what_is_just_beyond_fails(tap: str) -> None:
    """One element, a small one so that it can be moved finely, by a share of the tolerance that the report names."""
    sound = next(r for r in judged(cpu, "llama-tiny", "float32").rows if r.tap == tap and r.mode == FORCED)
    op, output, number = MADE[tap]

    def moved(share: float) -> ArrayComparison:
        count = [0]

        def call(*args: Any) -> None:
            wide = [None if a is None else np.array(a, np.float64) for a in args]
            getattr(reference, op)(*wide)
            getattr(cpu, op)(*args)
            if count[0] == number:
                want = wide[output]
                assert want is not None
                at = np.unravel_index(np.abs(want).argmin(), want.shape)
                args[output][at] = want[at] + share * sound.tol
            count[0] += 1

        rows = judged(overlay(cpu, **{op: call}), "llama-tiny", "float32").rows
        return next(r for r in rows if r.tap == tap and r.mode == FORCED)

    within, beyond = moved(0.95), moved(-1.05)
    assert within.ok
    assert not beyond.ok
    assert within.tol == beyond.tol == sound.tol
    assert within.ratio == pytest.approx(0.95, abs=0.01)
    assert beyond.ratio == pytest.approx(1.05, abs=0.01)
    assert beyond.err == pytest.approx(abs(beyond.got - beyond.want))


@pytest.mark.parametrize("be", [rule.rounded(rule.flash()), cpu], ids=["rounded", "cpu"])
@pytest.mark.parametrize("name", catalogue.TINY)
def test_a_side_that_stores_bfloat16_agrees(name: str, be: Any) -> None:
    """Plain NumPy with every array rounded, the flash way of attention, and the cpu backend: no GPU is needed."""
    report = judged(be, name, "bfloat16", Plan())
    assert report.agree, report.guilty[:3]


@pytest.mark.parametrize(
    "name", ["one_head_two_percent_off", "bias_dropped", "rope_pairs_neighbours", "ignored_targets_counted"]
)
def test_faults_are_seen_in_bfloat16(name: str) -> None:
    fault = FAULTS[name]
    for be in (rule.rounded(), cpu):
        row = catalogue.bisect(fault, be, "bfloat16").first
        assert row is not None
        assert catalogue.Planted(fault, "", row, 0.0).is_named, row


def test_difference_names_the_worst_element() -> None:
    rng = np.random.default_rng(0)
    want = rng.standard_normal((3, (1 << 17) + 5))  # looked at in pieces
    got = want.astype(np.float32)
    got[2, 17] += 1
    d = watch.difference(got, want)
    assert np.unravel_index(d.flat, d.shape) == (2, 17)
    assert d.err == pytest.approx(1, abs=1e-6)
    assert d.largest == np.abs(want).max()
    assert (d.got, d.want) == (got[2, 17], want[2, 17])
    got[1, 3] = np.nan
    d = watch.difference(got, want)
    assert np.isnan(d.err)
    assert np.unravel_index(d.flat, d.shape) == (1, 3)
    assert watch.difference(np.zeros((0, 3)), np.zeros((0, 3))).err == 0
    assert watch.difference(np.array([np.inf]), np.array([1.0])).err == np.inf


# Upload


@pytest.fixture
def uploaded() -> tuple[Model, np.ndarray]:
    """A model with its weights, and what was sent."""
    weights = catalogue.weights_of(QWEN2)
    return Side(cpu, QWEN2, "float32").model(weights, SHAPE), weights


def red(rows: list[ArrayComparison]) -> list[str]:
    return [r.tap for r in rows if not r.ok]


def test_upload_sees_every_kind_of_change(uploaded: tuple[Model, np.ndarray]) -> None:
    model, weights = uploaded
    names = model.layout.by_hf
    wo = names["model.layers.1.self_attn.o_proj.weight"]
    assert red(upload.upload(model, weights)) == []

    def with_change(at: Any, value: float) -> list[ArrayComparison]:
        kept = model.w[at].copy()
        model.w[at] = value
        rows = upload.upload(model, weights)
        model.w[at] = kept
        return [r for r in rows if not r.ok]

    at = wo.offset + 2 * wo.shape[1] + 5
    (row,) = with_change(at, weights[at] + np.float32(1e-4))
    assert (row.tap, row.index, row.layer) == ("1.wo", (2, 5), 1)
    assert row.want == weights[at]
    (row,) = with_change(at, np.nextafter(weights[at], np.float32(9)))  # the last bit
    assert row.tap == "1.wo"
    (row,) = with_change(slice(wo.offset, wo.offset + wo.size), np.nan)  # never filled
    assert row.tap == "1.wo"
    assert not row.err <= 0
    embed = names["model.embed_tokens.weight"]
    (row,) = with_change(embed.offset + embed.size, 1e-9)
    assert (row.tap, row.cause) == ("padding", "what lies between parameters is not 0")
    (row,) = with_change(embed.offset + embed.size, np.nan)
    assert row.tap == "padding"
    assert red(upload.upload(model, weights)) == []
    tables = rope_tables(replace(QWEN2, rope_theta=1e4), SHAPE[1])
    for table, values in zip((model.cos, model.sin), tables, strict=True):
        cpu.from_host(table, values)
    assert red(upload.upload(model, weights)) == ["cos", "sin"]


def test_a_negative_zero_is_another_value(uploaded: tuple[Model, np.ndarray]) -> None:
    model, weights = uploaded
    at = model.layout.by_hf["model.norm.weight"].offset
    weights = weights.copy()
    weights[at], model.w[at] = 0.0, -0.0
    (row,) = (r for r in upload.upload(model, weights) if not r.ok)
    assert (row.tap, row.err) == ("final_norm", np.inf)


@pytest.mark.parametrize("name", catalogue.TINY)
@pytest.mark.parametrize(("be", "dtype"), [(cpu, "float32"), (reference, "float64")], ids=["cpu", "float64"])
def test_tables_of_angles(name: str, be: Any, dtype: str) -> None:
    """llama3-tiny has frequencies of all three kinds: kept, stretched, between."""
    cfg = PRESETS[name]
    model = Model(cfg, be, 1, 64, dtype)
    assert [(r.tap, r.ok) for r in upload.tables(model)] == [("cos", True), ("sin", True)]
    wrong = [replace(cfg, rope_theta=cfg.rope_theta * 1.001)]
    if cfg.rope_scaling:
        scaling = cfg.rope_scaling
        wrong += [
            replace(cfg, rope_scaling=None),
            replace(cfg, rope_scaling=replace(scaling, high_freq_factor=4.1)),
            replace(cfg, rope_scaling=replace(scaling, factor=4.1)),
        ]
    for other in wrong:
        for table, values in zip((model.cos, model.sin), rope_tables(other, 64), strict=True):
            be.from_host(table, values)
        assert red(upload.tables(model)) == ["cos", "sin"]


def test_a_buffer_that_no_op_is_given_is_seen() -> None:
    cfg = replace(QWEN2, tie_word_embeddings=False)
    model = Side(cpu, cfg, "float32").model(catalogue.weights_of(cfg), SHAPE)
    passed = passes.forced(cfg, model, batches.at_random(cfg, SHAPE, 0), optimizer=True).passed
    rows = upload.all_used(model.layout, passed, trained=True)
    assert red(rows) == []
    assert len(rows) == 2 * len(model.layout.slots)
    without = {
        "1.wqkv": ["1.wq", "1.wk", "1.wv"],
        "grad.0.bqkv": ["grad.0.bq", "grad.0.bk", "grad.0.bv"],
        "head": ["head"],
        "grad.embed": ["grad.embed"],
        "0.mlp_norm": ["0.mlp_norm"],
    }
    for name, parts in without.items():
        assert name in passed
        assert red(upload.all_used(model.layout, passed - {name}, trained=True)) == parts
    only = {n for n in passed if not n.startswith("grad.")}
    assert red(upload.all_used(model.layout, only, trained=False)) == []


# The numbers that kernels are launched with


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that launches nothing; the names of the kernels that it is asked for."""
    asked: list[str] = []
    machine = SimpleNamespace(
        kernel=lambda module, name, act, **_: lambda *a, **k: asked.append(name),
        scratch=lambda shape, dtype, slot: np.empty(shape, dtype),
        address=lambda x: int(x.ctypes.data),
        shared_bytes=1 << 16,
        clusters=True,
    )
    monkeypatch.setattr(cuda_ops, "machine", machine)
    return asked


def launch(eps: float, window: int, sign: int) -> None:
    """The ops that are given numbers of the configuration."""
    f = np.float32
    x, rows, w = np.ones((5, 40), f), np.ones(5, f), np.ones(40, f)
    heads, kv = np.ones((1, 5, 4, 10), f), np.ones((1, 5, 4, 10), f)
    cuda_ops.add_rmsnorm_fwd(x, x, rows, x, None, w, eps)
    cuda_ops.rope(heads, np.ones((5, 5), f), np.ones((5, 5), f), sign)
    cuda_ops.attention_fwd(heads, np.ones((1, 4, 5), f), heads, kv, kv, None, window)
    flat = np.ones(64, f)
    cuda_ops.adamw(flat, flat, flat, flat, np.ones(1), flat, np.ones(1), 0.1, 0.9, 0.95, 1e-8, 0.1, 3)


def given_to_kernels(cfg: ModelConfig, *calls: tuple[float, int, int]) -> list[ArrayComparison]:
    seen: dict[tuple[str, str], set[float]] = {}
    with cuda_ops.noted_numbers(seen):
        for call in calls:
            launch(*call)
    return upload.kernels_given(cfg, seen)


def test_kernels_are_given_the_numbers_of_the_configuration(launched: list[str]) -> None:
    cfg = PRESETS["mistral-tiny"]
    right = (cfg.rms_norm_eps, cfg.sliding_window, 1)
    before = cuda_ops.machine.kernel
    rows = given_to_kernels(cfg, right, (*right[:2], -1))
    assert cuda_ops.machine.kernel is before
    assert {r.tap for r in rows} == {"eps", "window", "sign"}
    assert red(rows) == []
    assert len(launched) == 10  # they were launched, AdamW with an eps of its own too
    assert any(name.startswith("adamw") for name in launched)
    for wrong, tap in (
        ((1e-3, *right[1:]), "eps"),
        ((right[0], right[1] + 1, 1), "window"),
        ((*right[:2], 2), "sign"),
    ):
        rows = given_to_kernels(cfg, wrong)
        assert red(rows) == [tap]
        rows = given_to_kernels(cfg, right, wrong)  # once right, once wrong
        assert red(rows) == [tap]
        assert all(r.stage == "configuration" for r in rows)


def test_an_epsilon_that_is_baked_in_is_named(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = cuda_ops._run

    def baked(module: str, name: str, act: Any, grid: Any, block: Any, *args: Any, shared: int = 0) -> None:
        own = [1e-3 if module == "norm" and isinstance(a, float) else a for a in args]
        real(module, name, act, grid, block, *own, shared=shared)

    monkeypatch.setattr(cuda_ops, "_run", baked)
    (row,) = (r for r in given_to_kernels(QWEN2, (QWEN2.rms_norm_eps, 0, 1)) if not r.ok)
    assert row.op.startswith("add_rmsnorm_fwd")
    assert (row.tap, row.got, row.want) == ("eps", [1e-3], [QWEN2.rms_norm_eps])


def test_without_cuda_no_kernel_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "machine", None)
    seen: dict[tuple[str, str], set[float]] = {}
    with cuda_ops.noted_numbers(seen):
        pass
    assert upload.kernels_given(QWEN2, seen) == []


# The optimizer


def optimizer_rows(be: Any) -> list[ArrayComparison]:
    weights = catalogue.weights_of(QWEN2)
    model = Side(be, QWEN2, "float32").model(weights, SHAPE)
    given = batches.at_random(QWEN2, SHAPE, 0)
    model.forward(given.ids)
    model.loss(given.targets, 1 / given.count)
    model.backward()
    return optimizer_steps.optimizer_steps(model)


def adamw(position: int, change: Callable[[Any], Any]) -> Any:
    """A backend whose AdamW gets one argument changed: 7 is lr, 9 beta2, 10 eps, 11 decay."""

    def call(*args: Any) -> None:
        cpu.adamw(*args[:position], change(args[position]), *args[position + 1 :])

    return overlay(cpu, adamw=call)


def test_a_sound_step_of_adamw() -> None:
    rows = optimizer_rows(cpu)
    assert red(rows) == []
    assert [r.tap for r in rows] == [
        *(f"w.{s.hf}" for s in Layout(QWEN2).in_order()),
        "factor of NaN",
        "square",
        "g",
    ]
    assert sum(r.err > 0 for r in rows) > len(rows) // 2


def test_another_learning_rate_is_named_with_its_ratio() -> None:
    rows = optimizer_rows(adamw(7, lambda lr: 3 * lr))
    assert red(rows) == [r.tap for r in rows[:-3]]
    words = "the update is 3 times what it should be: another learning rate was applied"
    assert {r.cause for r in rows[:-3]} == {words}


def test_decay_on_norms_is_seen_in_norms_and_biases_alone() -> None:
    rows = optimizer_rows(adamw(11, lambda decay: passes.DECAY))
    flat = {f"w.{s.hf}" for s in Layout(QWEN2).slots if len(s.shape) == 1}
    assert set(red(rows)) == flat
    assert not any("learning rate" in r.cause for r in rows)
    rows = optimizer_rows(adamw(11, lambda decay: 0.0))
    assert set(red(rows)) == {f"w.{s.hf}" for s in Layout(QWEN2).slots} - flat


def test_gradients_that_are_not_cleared_are_seen() -> None:
    def fill(x: Any, value: float) -> None:
        if x.size != Layout(QWEN2).size or value != 0:
            cpu.fill(x, value)

    (row,) = (r for r in optimizer_rows(overlay(cpu, fill=fill)) if not r.ok)
    assert (row.op, row.tap, row.cause) == ("AdamW.step", "g", "the gradients were not set to zero")


def test_weights_that_do_not_move_are_seen() -> None:
    rows = optimizer_rows(overlay(cpu, adamw=lambda *a: None))
    assert red(rows) == [*(r.tap for r in rows[:-3]), "square"]
    assert {r.cause for r in rows[:-3]} == {"it did not move"}


def test_clipping_that_is_left_out_is_seen_by_the_step() -> None:
    """The first step of Adam does not depend on the size of gradients, but for those near eps."""
    be = overlay(cpu, clip_factor=lambda factor, sum_sq, most: cpu.fill(factor, 1e-6))
    assert red(optimizer_rows(be))


# State


def state_rows(be: Any, name: str = "qwen2-tiny") -> dict[str, list[ArrayComparison]]:
    """Rows by what was looked at."""
    cfg = PRESETS[name]
    side = Side(be, cfg, "float32")
    with np.errstate(all="ignore"):
        rows = state.state(side, catalogue.weights_of(cfg), batches.at_random(cfg, SHAPE, 0), {})
    out: dict[str, list[ArrayComparison]] = {}
    for r in rows:
        assert r.stage == "state"
        out.setdefault(r.op, []).append(r)
    return out


WHAT = {
    "two_runs",
    "evaluate_again",
    "evaluate",
    "after_evaluation",
    "scratch_starts_as_nan",
    "recorded_pass",
    "recorded_again",
    "recorded_before",
    "begins_anew",
    "future_changed",
    "other_input",
}


def failing(be: Any, name: str = "qwen2-tiny") -> set[str]:
    rows = state_rows(be, name)
    assert set(rows) == WHAT
    return {op for op, found in rows.items() if not all(r.ok for r in found)}


@pytest.mark.parametrize("be", [cpu, overlay(reference, pad_vocab=True)], ids=["cpu", "padded"])
@pytest.mark.parametrize("name", catalogue.TINY)
def test_sound_state(name: str, be: Any) -> None:
    assert failing(be, name) == set()


def evaluations(change: Callable[[int, Any, bool], None]) -> Any:
    """A backend that calls change(evaluations so far, losses, whether this is one) after each cross_entropy."""
    count = [0]

    def cross_entropy(loss: Any, logits: Any, targets: Any, scale: float | None, z: float) -> None:
        cpu.cross_entropy(loss, logits, targets, scale, z)
        count[0] += scale is None
        change(count[0], loss, scale is None)

    return overlay(cpu, cross_entropy=cross_entropy)


def test_an_evaluation_that_computes_another_loss() -> None:
    def change(count: int, loss: Any, evaluates: bool) -> None:
        if evaluates:
            loss *= np.float32(1.000001)

    assert failing(evaluations(change)) == {"evaluate"}


def test_an_evaluation_that_is_not_repeated() -> None:
    def change(count: int, loss: Any, evaluates: bool) -> None:
        if evaluates and count == 2:
            loss *= np.float32(1.000001)

    assert failing(evaluations(change)) == {"evaluate_again"}


def test_an_evaluation_that_changes_the_step_after_it() -> None:
    """Such as dropout that is left off: only the step after the second evaluation differs, in its gradients."""
    told = [0]

    def change(count: int, loss: Any, evaluates: bool) -> None:
        told[0] = 2 if evaluates and count == 2 else max(0, told[0] - 1)

    def embedding_bwd(dw: Any, dy: Any, ids: Any) -> None:
        cpu.embedding_bwd(dw, dy, ids)
        if told[0]:
            dw[int(ids[0])] *= np.float32(1.000001)

    be = overlay(evaluations(change), embedding_bwd=embedding_bwd)
    assert failing(be) == {"after_evaluation"}
    told[0] = 0
    rows = state_rows(overlay(evaluations(change), embedding_bwd=embedding_bwd))["after_evaluation"]
    assert [r.tap for r in rows if not r.ok] == ["grad.model.embed_tokens.weight"]


def test_scratch_that_is_read_before_it_is_written() -> None:
    def swiglu_bwd(dgu: Any, dy: Any, gu: Any) -> None:
        before = dgu.copy()
        cpu.swiglu_bwd(dgu, dy, gu)
        dgu += 0 * before

    found = failing(overlay(cpu, swiglu_bwd=swiglu_bwd))
    assert found == {"scratch_starts_as_nan", "recorded_pass", "begins_anew"}  # the NaN stays


def test_a_mask_that_shows_the_future() -> None:
    rows = state_rows(FAULTS["mask_shows_the_next_token"].backend(cpu, QWEN2))
    (row,) = rows["future_changed"]
    assert not row.ok
    assert row.cause.endswith("the mask")
    assert row.shape[:2] == (2, 8)
    assert row.index[1] == 7  # the last position before what was changed


def test_ids_that_are_stale() -> None:
    """The first ids that are sent stay: another input gives the same loss."""
    kept: dict[int, np.ndarray] = {}

    def from_host(x: Any, host: np.ndarray) -> None:
        if x.dtype == np.int32:
            host = kept.setdefault(x.ctypes.data, host.copy())
        cpu.from_host(x, host)

    assert failing(overlay(cpu, from_host=from_host)) == {"other_input"}


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("not_deterministic", "two_runs"),
        ("recorded_pass_is_stale", "recorded_pass"),
    ],
)
def test_the_faults_of_the_catalogue_turn_it_red_too(fault: str, what: str) -> None:
    assert what in failing(FAULTS[fault].backend(cpu, QWEN2))


def test_a_batch_is_the_sum_of_its_sequences() -> None:
    """Within the tolerances of the free pass; without those it is not looked at."""

    def rows(be: Any) -> list[ArrayComparison]:
        found = judged(be, "qwen2-tiny", "float32", Plan()).rows
        return [r for r in found if r.op == "sequence_by_sequence"]

    sound = rows(cpu)
    assert red(sound) == []
    # Of fused q, k and v the few elements of v may hold most of the error: alone they are no measure.
    layers = range(QWEN2.num_layers)
    fused = {f"grad.{i}.{name}" for i in layers for name in ("wqkv", "bqkv", "wgu")}
    alone = {f"grad.{s.hf}" for s in Layout(QWEN2).slots if s.param.name not in upload.FUSED_IN}
    assert {r.tap for r in sound} == fused | alone
    assert all(r.tol > 0 for r in sound)
    assert red(rows(FAULTS["mean_over_the_micro_batch"].backend(cpu, QWEN2)))


# What was found wrong


def test_one_position_is_refused_and_two_are_compared(apr: Apr) -> None:
    done = apr("bisect", "qwen2-tiny", *SIDE, "--batch-size", 1, "--seq-length", 1)
    assert done.code == 2
    assert "at least 2" in done.err
    assert apr("bisect", "qwen2-tiny", *SIDE, "--batch-size", 1, "--seq-length", 2).code == 0


def test_text_that_is_not_utf8_is_malformed(apr: Apr, text_model: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    done = apr("bisect", text_model[0], *SIDE, "--text", "latin1.txt")
    assert done.code == 4
    assert "latin1.txt" in done.err


def test_a_dataset_of_another_vocabulary(apr: Apr, text_model: tuple[Path, Path]) -> None:
    done = apr("bisect", "qwen2-tiny", *SIDE, "--dataset", text_model[1])
    assert done.code in (5, 9)


def test_what_is_not_honoured_beside_a_trace_is_refused(apr: Apr, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    path = trace(apr, tmp_path / "t.safetensors")
    assert apr("bisect", "qwen2-tiny", *SIDE, "--against", path, "--text", "t.txt").code == 2


def test_a_picture_that_cannot_be_written(apr: Apr, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is looked at before anything is computed; what fails later does not lose the report."""
    done = apr("bisect", "qwen2-tiny", "--sides", "cpu", "--no-free", "--picture", "no/such/p.png")
    assert done.code == 7
    assert "--picture no/such/p.png: the folder no/such does not exist" in done.err
    assert done.out == ""
    assert apr("bisect", "qwen2-tiny", "--sides", "cpu", "--no-free", "--picture", ".").code == 7

    def full(report: Report, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(command, "picture", full)
    done = apr("bisect", "qwen2-tiny", "--sides", "cpu", "--no-free", "--picture", "p.png")
    assert done.code == 7
    assert "p.png" in done.err
    assert "arrays agree" in done.words
    assert "picture: p.png" not in done.words


def test_the_reference_beside_itself_is_noted(apr: Apr) -> None:
    done = apr("bisect", "qwen2-tiny", "--sides", "reference", "--no-free", "--picture", "")
    assert done.code == 0
    assert "compared with itself" in done.words


def test_a_trace_of_another_configuration_is_named(
    apr: Apr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights alone do not tell: the trace says what its side believed."""
    path = trace(apr, tmp_path / "t.safetensors")
    sound = PRESETS["qwen2-tiny"]
    monkeypatch.setitem(PRESETS, "qwen2-tiny", replace(sound, rms_norm_eps=0.1))
    done = apr("bisect", "qwen2-tiny", *SIDE, "--against", path, "--json")
    assert done.code == 9
    first = done.document["reports"][0]["first"]
    assert (first["stage"], first["op"], first["tap"]) == ("configuration", "config", "rms_norm_eps")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--catalogue --sides cuda", "--sides does not go with --catalogue"),
        ("qwen2-tiny --catalogue", "MODEL does not go with --catalogue"),
        ("qwen2-tiny --against x --no-backward", "--no-backward does not go with --against x"),
        ("qwen2-tiny --against hf --no-free", "--no-free does not go with --against hf"),
        ("qwen2-tiny --tokens 1,2,3 --batch-size 5", "--batch-size does not go with --tokens"),
    ],
)
def test_options_that_would_change_nothing_are_refused(apr: Apr, line: str, said: str) -> None:
    done = apr("bisect", *line.split())
    assert done.code == 2
    assert said in done.err


def test_no_two_sides_share_a_picture(apr: Apr) -> None:
    done = apr("bisect", "llama-tiny", "--sides", "cpu,cpu/float32", "--no-free", "--json")
    assert done.code == 2 or len(set(done.document["pictures"])) == 2


def test_weights_that_are_not_rounded_from_their_master_are_seen() -> None:
    """In bfloat16 a step moves most weights by less than their rounding: the comparison alone would not show it."""
    sound = rule.rounded()

    def adamw(w: Any, master: Any, *rest: Any) -> None:
        sound.adamw(np.empty_like(w), master, *rest)

    cfg = PRESETS["qwen2-tiny"]
    for be, first in ((sound, None), (overlay(sound, adamw=adamw), "adamw")):
        report = Report("", ("", ""), "")
        stages.run(
            cfg, Side(be, cfg, "bfloat16"), catalogue.weights_of(cfg),
            batches.at_random(cfg, (2, 17), 0), report, Plan(free=False, state=False),
        )  # fmt: skip
        assert (report.first and report.first.op) == first
        if report.first is not None:
            assert report.first.tap.startswith("w.")
            assert np.isnan(report.first.err)


def test_where_arrays_of_a_gpu_overlap() -> None:
    def array(start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return SimpleNamespace(data=SimpleNamespace(ptr=start), shape=shape, strides=strides, itemsize=4)

    rows = array(1000, (3, 4), (16, 4))  # 1000 .. 1048
    assert makers.overlap(makers.span(rows), makers.span(array(1044, (1,), (4,))))
    assert makers.overlap(makers.span(array(900, (26,), (4,))), makers.span(rows))
    assert not makers.overlap(makers.span(rows), makers.span(array(1048, (8,), (4,))))
    assert not makers.overlap(makers.span(array(900, (25,), (4,))), makers.span(rows))
