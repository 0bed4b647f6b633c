"""The Python interface: apr.load, apr.train and their callbacks; loggers."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import types
from functools import partial

import numpy as np
import pytest

import apr
from apr.checkpoints.hf import write_hf
from apr.checkpoints.registry import open_any, open_host
from apr.cli.main import main
from apr.common.errors import AprError, DeviceError, InputNotFound, Refused, UsageError
from apr.evidence.seal import compare
from apr.inference.sampling import Sampling
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer
from apr.training import loggers
from apr.training.callbacks import CallbackFailed
from apr.training.settings import Settings


def reference_logits(source, ids):
    """(B,T,V) in float64 from the reference backend."""
    from apr import backends
    from apr.model.transformer import Model

    be = backends.get("reference")
    model = Model(
        source.cfg, be, *ids.shape, "float64", train=False, loss_rows=ids.size, w=source.on(be, "float64")
    )
    out = []
    model.forward(ids.astype(np.int32))
    model.loss(
        np.full(ids.shape, -100, np.int32),
        tap=lambda _, name, x: out.append(be.to_host(x)) if name == "logits" else None,
    )
    return out[0].reshape(*ids.shape, -1)


TEXT = "def f(x):\n    return x + 1\nclass A:\n    pass\n"


def test_importing_apr_loads_nothing_heavy():
    code = (
        "import sys, apr; heavy = {'numpy', 'numba', 'tokenizers', 'jinja2', 'apr.api'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'load' in dir(apr); apr.AprError; assert 'numpy' not in sys.modules; "
        "assert apr.load.__module__ == 'apr.api'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing_such"):
        apr.nothing_such  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random qwen2 with a tokenizer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT] * 3, 280, path / "tok")
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=tokenizer.vocab_size)
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(host, 3, 0.2)
    write_hf(path / "hf", cfg, Layout(cfg).named(host), tokenizer_json=tokenizer.json)
    (path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 7]}))
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    (path / "hf" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "bos_token": "<b>"})
    )
    return path


@pytest.fixture(scope="module")
def model(folder):
    return apr.load(folder / "hf", device="cpu")


def test_logits_and_loss_are_those_of_the_reference(model, folder):
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (5, 40))
    want = reference_logits(open_host(str(folder / "hf"), "float64"), ids)
    got = model.logits(ids)
    assert got.dtype == np.float32
    assert got.shape == (5, 40, model.config.vocab_size)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    log_p = (
        want
        - np.log(np.exp(want - want.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - want.max(-1, keepdims=True)
    )
    nll = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], 2)
    assert abs(model.loss(ids) - nll.mean()) <= 1e-5
    targets = np.where(np.arange(40) % 3 == 0, -100, np.roll(ids, -1, 1))
    keep = targets[:, :-1] >= 0
    last = -np.take_along_axis(log_p[:, -1:], np.maximum(targets[:, -1:], 0)[..., None], 2)[
        targets[:, -1:] >= 0
    ]
    some = np.concatenate([nll[..., 0][keep], last.reshape(-1)])
    assert abs(model.loss(ids, targets) - some.mean()) <= 1e-5
    assert np.array_equal(model.logits(ids[0].tolist())[0], model.logits(ids[:1])[0])


def test_large_batches_go_through_in_pieces(model, monkeypatch):
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (7, 20))
    logits, loss = model.logits(ids), model.loss(ids)
    monkeypatch.setattr("apr.inference.language_model.MAX_BATCH_TOKENS", 45)  # two rows at a time
    assert np.abs(model.logits(ids) - logits).max() <= 1e-4 * np.abs(logits).max()
    assert abs(model.loss(ids) - loss) <= 1e-6


def test_text_in_text_out_and_ids_in_ids_out(model, capsys, folder):
    options = dict(max_tokens=30, temperature=0.8, seed=3)
    ids = [int(i) for i in model.tokenizer.encode("def f")]
    new = model.generate(ids, **options)
    assert all(isinstance(i, int) for i in new)
    assert (
        new == model.generate(np.array(ids), **options) == list(model.generate(ids, stream=True, **options))
    )
    text = model.generate("def f", **options)
    assert text == "".join(model.generate("def f", stream=True, **options))
    assert main(["run", str(folder / "hf"), "def f", "--max-tokens", "30", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "def f" + text + "\n"
    assert model.generate("def f", stop=[text[5:8]], **options) == text[: text.find(text[5:8])]
    cut = model.generate(ids, stop=[text[5:8]], **options)
    assert new[: len(cut)] == cut
    assert len(cut) < len(new)


def test_a_batch_equals_each_alone(model):
    prompts = ["def f(x):", "class", [5, 6, 7], "x", "return " * 5]
    got = model.generate_batch(prompts, Sampling(20, 0.9, seed=5), stop=["zz"], rows=3)
    for i, (prompt, row) in enumerate(zip(prompts, got, strict=True)):
        options = dict(max_tokens=20, temperature=0.9, seed=5 + i, stop=["zz"])
        want = model.generate(prompt, **options)
        assert (row.text if isinstance(prompt, str) else row.ids) == want
    assert [t.ended for t in model.generate_batch([[1]], Sampling(3, 0.0))] <= ["length"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.logits([[1, 2], [3]]), UsageError, "different lengths"),
        (lambda m: m.logits(np.zeros((2, 0), int)), UsageError, "ids are"),
        (lambda m: m.logits([0.5]), UsageError, "integers"),
        (lambda m: m.logits([99999]), Refused, "99999"),
        (lambda m: m.logits([-1]), Refused, "-1"),
        (lambda m: m.logits([1] * 65), Refused, "64"),
        (lambda m: m.loss([1]), UsageError, "at least 2"),
        (lambda m: m.loss([1, 2], [3]), UsageError, "targets"),
        (lambda m: m.loss([1, 2], [3, 99999]), Refused, "99999"),
        (lambda m: m.loss([1, 2], [-100, -100]), UsageError, "no target"),
        (lambda m: m.generate("x", tempreature=1), UsageError, "tempreature"),
        (lambda m: m.generate("x", top_p=0), UsageError, "--top-p"),
        (lambda m: m.generate([]), UsageError, "no tokens"),
        (lambda m: m.generate_batch(["x"], rows=0), UsageError, "rows"),
        (lambda m: m.generate_batch("Once"), UsageError, "not a list"),
        (lambda m: m.generate_batch(["x", "y"], [Sampling()]), UsageError, "1 Sampling for 2 prompts"),
        (lambda m: m.generate("x", stop=[7]), UsageError, "stop holds 7"),
        (
            lambda m: m.generate("x", max_tokens=2.5),
            UsageError,
            "--max-tokens must be a whole number, not 2.5",
        ),
        (lambda m: m.generate("x", top_k=None), UsageError, "--top-k must be a whole number, not None"),
        (
            lambda m: m.generate("x", temperature="0.5"),
            UsageError,
            "--temperature must be a number, not '0.5'",
        ),
        (lambda m: m.generate("x", seed=True), UsageError, "--seed must be a whole number"),
        (lambda m: apr.load("no/such"), InputNotFound, "no/such"),
        (lambda m: apr.load(m.source, threads="2"), UsageError, "threads is a whole number, not '2'"),
        (lambda m: apr.load(m.source, device=7), DeviceError, "--device 7: choose auto, cpu"),
        (lambda m: m.loss("Once upon"), UsageError, r"model\.tokenizer\.encode\(text\) gives them"),
        (lambda m: m.tokenizer.decode([[1], [2]]), UsageError, "decode each row"),
        (lambda m: m.generate_batch(["x"], {"max_tokens": 5}), UsageError, "options by name"),
        (lambda m: m.generate_batch(["x"], Sampling(), top_k=1), UsageError, "not both"),
        (lambda m: m.generate_batch(["x"], max_new_tokens=5), UsageError, "max_new_tokens"),
        (
            lambda m: m.save("m.gguf"),
            UsageError,
            "m.gguf: is the name of a GGUF file, and a Hugging Face folder",
        ),
        (lambda m: m.save("model.safetensors"), UsageError, "name a folder, or a file that ends in .apr"),
    ],
)
def test_bad_input(model, call, error, words):
    with pytest.raises(error, match=words):
        call(model)


def test_the_loss_of_65_ids_is_that_of_64_predictions(model):
    assert model.loss([1] * 65) > 0


def test_two_streams_of_one_model_do_not_mix(model):
    first = model.generate("def", stream=True, max_tokens=20)
    next(first)
    model.generate("class", max_tokens=20)
    with pytest.raises(UsageError, match="another generation"):
        list(first)


def test_one_stop_string_is_no_list_of_its_characters(model):
    text = model.generate("def f", max_tokens=30, seed=3)
    for stop, want in ((text[5:8], text[: text.find(text[5:8])]), (text[5] + "no", text)):
        assert model.generate("def f", max_tokens=30, seed=3, stop=stop) == want


def test_weights_put_in_the_place_of_others_are_those_that_speak(folder):
    """Say, the mean of two checkpoints, in a model that has generated before."""
    model, options = apr.load(folder / "hf", device="cpu"), dict(max_tokens=20, temperature=0)
    before = model.generate("def f", **options)
    weights = np.random.default_rng(1).standard_normal(model.weights.shape).astype(np.float32)
    model.weights = 0.2 * weights
    model.save(folder / "others.apr")
    want = apr.load(folder / "others.apr", device="cpu").generate("def f", **options)
    assert model.generate("def f", **options) == want != before


def test_targets_of_any_integer_below_0_are_left_out(model):
    ids, keep = np.arange(12), np.arange(12) % 2 == 0
    want = model.loss(ids, np.where(keep, ids + 1, -100))
    assert model.loss(ids, np.where(keep, ids + 1, np.iinfo(np.int64).min)) == want


def test_numbers_of_numpy_are_options(model):
    """Also such that a sum would wrap around: prompt i of a batch is drawn with the seed + i."""
    got = model.generate_batch(["x"] * 2, Sampling(np.int64(9), np.float32(0.5), seed=np.int8(127)))
    want = model.generate_batch(["x"] * 2, Sampling(9, 0.5, seed=127))
    assert [t.ids for t in got] == [t.ids for t in want]


def test_threads_that_share_a_model_are_kept_apart(folder, monkeypatch):
    """Nothing is computed in the buffers of a generator, and nothing drawn of them, but by the thread that has its lock."""
    model, seen = apr.load(folder / "hf", device="cpu"), []
    model.generate("def", max_tokens=12)
    generator = model._generator
    for name in ("forward", "step", "last_logits", "move_row"):

        def asked(name, was, *args, **more):
            seen.append((name, generator._lock.locked()))
            return was(*args, **more)

        monkeypatch.setattr(generator.model, name, partial(asked, name, getattr(generator.model, name)))
    model.generate("def", max_tokens=4, temperature=0)
    assert {name for name, _ in seen} == {"forward", "step", "last_logits"}
    assert all(held for _, held in seen)
    assert not generator._lock.locked()


def test_what_other_interfaces_take_is_taken(model):
    text = model.generate("def", max_tokens=4, temperature=0, stop=None)
    assert text == model.generate("def", max_tokens=4, temperature=0)
    (row,) = model.generate_batch(["def"], max_tokens=4, temperature=0)
    assert row.text == text
    assert model.tokenizer.decode(9) == model.tokenizer.decode([9])
    assert repr(model).endswith(": qwen2, 54,632 parameters, float32 on cpu>")


def test_a_path_may_begin_at_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.save("~/m.apr")
    assert apr.load("~/m.apr", device="cpu").weights.size == model.weights.size
    assert apr.load(os.fsencode(tmp_path / "m.apr"), device="cpu").weights.size == model.weights.size
    assert [p.name for p in tmp_path.iterdir()] == ["m.apr"]


@pytest.mark.parametrize("name", ["m.apr", "out"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_save_and_load_again(model, tmp_path, name, dtype):
    model.save(tmp_path / name, dtype)
    again = apr.load(tmp_path / name, device="cpu")
    if dtype is None:
        assert open_any(str(tmp_path / name)).sha256 == open_any(model.source).sha256
    else:
        off = np.abs(again.logits([1, 2, 3]) - model.logits([1, 2, 3])).max()
        assert 0 < off < 0.1 * np.abs(model.logits([1, 2, 3])).max()
    assert again.ends == model.ends == {model.tokenizer.eos_id, 7}
    assert again.chat_template.render([{"role": "user", "content": "a"}]) == "a;"
    assert again.chat_template.tokens["bos_token"] == "<b>"
    assert again.tokenizer.sha256 == model.tokenizer.sha256


# Training

JOB = dict(
    model="llama-demo",
    seq_length=32,
    batch_size=2,
    num_steps=6,
    eval_every=3,
    val_batches=2,
    lr=1e-3,
    spot_check=-1,
    device="cpu",
)


class Heard(apr.Callback):
    def __init__(self, fail=""):
        self.events, self.fail = [], fail

    def _hear(self, event, *args):
        self.events.append((event, *args))
        if event == self.fail:
            raise ValueError("planted")

    def on_step(self, line):
        self._hear("step", line)

    def on_evaluation(self, line):
        self._hear("evaluation", line)

    def on_checkpoint(self, path, facts):
        self._hear("checkpoint", path, facts)

    def on_end(self, result):
        self._hear("end", result)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Settings of a small run, but for its folder."""
    folder = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "print", "return", "x", "y", "(", ")", "\n"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 400)) + f" {i}\n")
    return {**JOB, "corpus": str(folder), "widen": "min_distinct=12,max_top_share=0.6"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("background", [True, False])
def test_train_tells_of_everything(job, tmp_path, capfd, background):
    heard = Heard()
    result = apr.train({**job, "run-dir": str(tmp_path / "run"), "background_saves": background}, [heard])
    if background:  # some steps later, and before the next evaluation
        names = [e[0] for e in heard.events]
        assert names.index("checkpoint") in range(5, 9)
        heard.events.insert(5, heard.events.pop(names.index("checkpoint")))
    names = [e[0] for e in heard.events]
    assert names == [
        "evaluation",
        *["step"] * 3,
        "evaluation",
        "checkpoint",
        *["step"] * 3,
        "evaluation",
        "checkpoint",
        "end",
    ]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [e[1] for e in heard.events if e[0] in ("step", "evaluation")]
    assert told == [m for m in logged if "train_loss" in m or "val_loss" in m]
    assert heard.events[-1][1] == result.details
    assert (result.status, result.steps, result.run_dir) == ("DONE", 6, tmp_path / "run")
    assert result.checkpoint == heard.events[-2][1]
    assert result.val_loss == told[-1]["val_loss"]
    assert compare(tmp_path / "run") == []
    assert capfd.readouterr().out == ""
    model = apr.load(result.checkpoint, device="cpu")
    assert model.generate("alpha", max_tokens=5)


def test_settings_come_in_three_ways(job, tmp_path):
    losses = []
    with_hyphens = {key.replace("_", "-"): value for key, value in job.items()}
    (tmp_path / "job.json").write_text(
        json.dumps({**with_hyphens, "run-dir": str(tmp_path / "b"), "num-steps": 3})
    )
    short = {**job, "num_steps": 3}
    as_settings = Settings(**{**short, "run_dir": str(tmp_path / "c")})
    for config in ({**short, "run_dir": str(tmp_path / "a")}, tmp_path / "job.json", as_settings):
        losses.append(apr.train(config).val_loss)
    assert losses[0] == losses[1] == losses[2]
    for config, words in (
        ({"nmu_steps": 3}, "nmu_steps"),
        ({"num_steps": "3"}, "num_steps"),
        ({}, "what to train on"),
    ):
        with pytest.raises(UsageError, match=words):
            apr.train(config)


@pytest.mark.parametrize(("event", "step"), [("step", 1), ("evaluation", 0), ("checkpoint", 3)])
def test_a_failing_callback_ends_the_run_with_its_state_saved(job, tmp_path, event, step):
    whole = apr.train({**job, "run_dir": str(tmp_path / "whole")})
    run = tmp_path / "run"
    after = Heard()
    with pytest.raises(CallbackFailed, match=r"Heard.on_\w+ raised ValueError: planted.*--resume") as raised:
        apr.train({**job, "run_dir": str(run), "background_saves": False}, [Heard(event), after])
    assert isinstance(raised.value.__cause__, ValueError)
    assert isinstance(raised.value, AprError)
    assert after.events[-1][0] == "end"  # the others are told all the same
    assert after.events[-1][1]["status"] == "ABORTED"
    assert "planted" in after.events[-1][1]["error"]
    assert json.loads((run / "verdict.json").read_text())["status"] == "ABORTED"
    assert [p.stem for p in (run / "ckpt" / "state").glob("*.apr")] == [f"step-{step:06d}"]
    resumed = apr.train({"resume": True, "run_dir": str(run)})
    assert resumed.val_loss == whole.val_loss  # bit for bit


def test_a_callback_that_fails_at_the_end_leaves_a_whole_run(job, tmp_path):
    with pytest.raises(CallbackFailed, match="on_end"):
        apr.train({**job, "run_dir": str(tmp_path / "run"), "num_steps": 3}, [Heard("end")])
    assert compare(tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["status"] == "DONE"


class Changes(apr.Callback):
    """Use lines as one's own, as who wants bits for nats does."""

    def on_step(self, line):
        line.update(train_loss=line.pop("train_loss") / np.log(2))

    def on_evaluation(self, line):
        line.update(val_loss=line.pop("val_loss") / np.log(2))
        del line["val_tokens"]

    def on_checkpoint(self, path, facts):
        facts.clear()

    def on_end(self, result):
        result.clear()


def test_what_a_callback_does_to_its_numbers_nobody_else_sees(job, tmp_path):
    results, heard = [], [Heard(), Heard()]
    for name, callbacks in (("plain", [heard[0]]), ("changed", [Changes(), heard[1]])):
        small = {**job, "run_dir": str(tmp_path / name), "num_steps": 3, "background_saves": False}
        results.append(apr.train(small, callbacks))
    assert results[0].val_loss == results[1].val_loss
    told = [
        [(e[0], *(x for x in e[-1].values() if not isinstance(x, float))) for e in h.events] for h in heard
    ]
    assert [t[0] for t in told[0]] == [t[0] for t in told[1]]
    losses = [
        [e[1].get("val_loss", e[1].get("train_loss")) for e in h.events if e[0] in ("step", "evaluation")]
        for h in heard
    ]
    assert losses[0] == losses[1]
    facts = [json.loads((r.checkpoint.parent / "epoch-001.metadata.json").read_text()) for r in results]
    assert facts[0]["val_loss"] == facts[1]["val_loss"] == results[0].val_loss


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (Heard(), "callbacks is of the type Heard; give a list"),
        (Heard, "callbacks is the class Heard"),
        ([Heard], r"callbacks\[0\] is the class Heard"),
        ([Heard(), print], r"callbacks\[1\] is of the type builtin"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_run(job, tmp_path, callbacks, words):
    with pytest.raises(UsageError, match=words):
        apr.train({**job, "run_dir": str(tmp_path / "run")}, callbacks)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_resumed_run_count_whatever_they_come_as(job, tmp_path, monkeypatch):
    """sys.exit in a callback is an end like another, the state is saved; a callback may go elsewhere, and the run stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    short = {
        **job,
        "run_dir": "run",
        "schedule": "constant",
        "num_steps": np.int64(3),
        "lr": np.float32(0.5**10),
    }

    class Leaves(apr.Callback):
        def on_evaluation(self, line):
            os.chdir(tmp_path / "elsewhere")

        def on_step(self, line):
            sys.exit(3)

    with pytest.raises(CallbackFailed, match="SystemExit: 3; stopped after step 1, state saved"):
        apr.train(short, [Leaves()])
    assert not list((tmp_path / "elsewhere").iterdir())
    run = {"resume": True, "run_dir": str(tmp_path / "run")}
    assert apr.train(Settings(**run, num_steps=4)).steps == 4
    with pytest.raises(Refused, match=r"--lr 0.5 differs from 0.0009765625"):
        apr.train(Settings(**run, lr=0.5))
    with pytest.raises(UsageError, match="num_steps = '5' is not of type int"):
        apr.train(Settings(**run, num_steps="5"))


def test_train_works_outside_the_main_thread(job, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(apr.train, {**job, "run_dir": str(tmp_path / "run"), "num_steps": 3}).result()
    assert result.status == "DONE"


# Loggers


def test_a_missing_package_is_one_clear_line_before_the_run(monkeypatch, capsys, job, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, (package, _) in loggers.LOGGERS.items():
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in job.items()]
        assert main(["pretrain", *flags, "--run-dir", str(tmp_path / name), "--log", name]) == 5
        err = capsys.readouterr().err
        assert "-m pip install" in err
        assert package in err
        assert not (tmp_path / name).exists()
    assert main(["pretrain", *flags, "--log", "tensorboard,excel"]) == 2
    assert "excel" in capsys.readouterr().err


def fake_package(monkeypatch, name, **functions):
    fake = types.ModuleType(name)
    fake.__spec__ = types.SimpleNamespace()
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, name, fake)


def test_trackio_and_mlflow_get_every_number(monkeypatch, tmp_path):
    """Both loggers, as the loop calls them, before and after a resume."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("trackio", step, values))

    def call(name, answer=None):
        return lambda *args, **more: calls.append((name, args, more)) or answer

    begun = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    fake_package(monkeypatch, "trackio", init=call("init", Run()), finish=call("finish"))
    names = ("log_params", "set_tags", "end_run")
    functions = {n: call(n) for n in names} | {"start_run": call("start_run", begun)}
    functions["log_metrics"] = lambda values, step: calls.append(("mlflow", step, values))
    fake_package(monkeypatch, "mlflow", **functions)
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"lr": 0.1, "init": None}, "model": {}}))
    for status in ("ABORTED", "DONE"):
        for logger in loggers.open_all("trackio,mlflow", tmp_path):
            logger.on_step({"step": 1, "train_loss": 2.0, "wall_ms": 5.0})
            logger.on_evaluation({"step": 1, "val_loss": 1.5})
            logger.on_end({"status": status, "verdict": "PASS", "steps": 1})
    for name in ("trackio", "mlflow"):
        got = [c[1:] for c in calls if c[0] == name]
        assert got == [(1, {"train/train_loss": 2.0, "speed/wall_ms": 5.0}), (1, {"val/val_loss": 1.5})] * 2
    assert [c[2] for c in calls if c[0] == "start_run"] == [{"run_name": tmp_path.name}, {"run_id": "abc"}]
    assert [c[1] for c in calls if c[0] == "log_params"] == [({"lr": "0.1"},)]
    assert [c[1][0]["status"] for c in calls if c[0] == "set_tags"] == ["ABORTED", "DONE"]
    assert {c[2]["name"] for c in calls if c[0] == "init"} == {tmp_path.name}
    assert len([c for c in calls if c[0] in ("finish", "end_run")]) == 4


def test_wandb_gets_every_number(monkeypatch, job, tmp_path):
    calls = []

    class Run:
        def __init__(self, **options):
            calls.append(("init", options))
            self.summary = {}

        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish", self.summary))

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.init = lambda **options: Run(**options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "run"
    with pytest.raises(CallbackFailed):
        apr.train({**job, "run_dir": str(run), "log": "wandb"}, [Heard("checkpoint")])
    apr.train({"resume": True, "run_dir": str(run), "log": "wandb"})
    inits = [c[1] for c in calls if c[0] == "init"]
    assert inits[0]["id"] == inits[1]["id"]  # the same run there
    assert inits[0]["name"] == "run"
    assert inits[0]["config"]["settings"]["num_steps"] == 6
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    want = {m["step"]: m["train_loss"] for m in logged if "train_loss" in m}
    assert {
        c[1]: c[2]["train/train_loss"] for c in calls if c[0] == "log" and "train/train_loss" in c[2]
    } == want
    assert {c[1] for c in calls if c[0] == "log" and "val/val_loss" in c[2]} == {0, 3, 6}
    assert [c[1].get("status") for c in calls if c[0] == "finish"] == ["ABORTED", "DONE"]
    assert compare(run) == []


def test_a_logger_that_cannot_start_is_one_clear_line(monkeypatch, job, tmp_path):
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()

    def init(**options):
        raise RuntimeError("no API key")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(Refused, match="--log wandb cannot start: RuntimeError: no API key"):
        apr.train({**job, "run_dir": str(tmp_path / "run"), "log": "wandb"})


def events(folder):
    """(step, tag, value) of every scalar in the event files of a folder: records of u64 length, u32 CRC, data, u32 CRC."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (n,) = struct.unpack_from("<Q", raw, at)
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + n])
            found += [
                (event.step, v.tag, v.simple_value)
                for v in event.summary.value
                if v.WhichOneof("value") == "simple_value"
            ]
            at += 12 + n + 4
        assert at == len(raw)
    return found


def test_tensorboard_files_hold_every_number(job, tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    run = tmp_path / "run"
    apr.train({**job, "run_dir": str(run), "log": "tensorboard"})
    got = {(step, tag): value for step, tag, value in events(run / "tensorboard")}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for m in logged:
        group = "train" if "train_loss" in m else "val"
        if group == "train" or "val_loss" in m:
            for key, value in m.items():
                tag = f"{'speed' if key in loggers.SPEED and group == 'train' else group}/{key}"
                if key != "step" and isinstance(value, int | float):
                    assert got.pop((m["step"], tag)) == np.float32(value)
    assert got == {}
    assert compare(run) == []  # nothing was written after the files were hashed
