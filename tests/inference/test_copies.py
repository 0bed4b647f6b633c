"""Copies of a model: by copy and pickle, in other processes that were started anew or forked."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import apr
from apr import backends
from apr.checkpoints.hf import write_hf
from apr.common.errors import DeviceError, Refused
from apr.inference.language_model import LanguageModel
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.ranks.watch import RankFailed
from apr.tokenizer.training import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen2 with a tokenizer and a chat template, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, 280, path / "tok")
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=tokenizer.vocab_size)
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(host, 3, 0.2)
    write_hf(path / "hf", cfg, Layout(cfg).named(host), tokenizer_json=tokenizer.json)
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    (path / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


def answers(model: LanguageModel) -> tuple[object, ...]:
    """A loss, and texts of a model."""
    talk = [{"role": "user", "content": "x"}]
    return (
        model.loss(model.tokenizer.encode("def f(x)")),
        model.generate("def", max_tokens=5, seed=2),
        model.chat(talk, max_tokens=5, seed=2),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_copy_answers_alike_and_has_weights_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.chdir(folder)
    model = apr.load("hf", device="cpu", dtype=dtype)
    want = answers(model)
    data = pickle.dumps(model)
    # Another process may have another working folder.
    monkeypatch.chdir("/")
    for made in (copy.deepcopy(model), pickle.loads(data)):
        assert answers(made) == want
        assert repr(made) == repr(model)
        if dtype != "int8":
            assert made.weights.ctypes.data % 64 == 0
            made.weights[:] = 0
    assert answers(model) == want


def test_weights_and_a_template_of_the_callers_own_are_copied(folder: Path) -> None:
    model = apr.load(folder / "hf", device="cpu")
    before = answers(model)
    model.weights[:1000] *= 2
    model.chat_template = type(model.chat_template)("{{ messages[0].content }}!", "mine")
    want = answers(model)
    assert want != before
    assert answers(pickle.loads(pickle.dumps(model))) == answers(copy.deepcopy(model)) == want


def test_a_model_on_a_gpu_says_what_to_do(folder: Path) -> None:
    model = apr.load(folder / "hf", device="cpu")
    model.backend = backends.overlay(model.backend, name="cuda")
    for act in (pickle.dumps, copy.deepcopy):
        with pytest.raises(Refused, match="on a GPU is neither copied nor pickled; load it again"):
            act(model)


def test_a_model_goes_to_a_process_that_is_spawned(folder: Path) -> None:
    model = apr.load(folder / "hf", device="cpu")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(model.generate, ["def"]) == [model.generate("def")]


def test_a_fork_of_a_process_with_threads_says_so(folder: Path) -> None:
    """OpenMP would end the fork without a word, and a Pool start it again for ever."""
    code = """
        import multiprocessing, sys
        import apr
        from apr.common.errors import DeviceError
        folder = sys.argv[1]
        models = [apr.load(folder, device="cpu", dtype=d) for d in ("float32", "int8")]
        for m in models:
            m.generate("def", max_tokens=2)
        tries = [lambda: apr.load(folder, device="cpu"), *(lambda m=m: m.generate("def") for m in models)]
        tries += [lambda: models[0].loss([1, 2, 3])]

        def work(i):
            return tries[i]()

        context = multiprocessing.get_context("fork")
        for i in range(len(tries)):
            with context.Pool(1) as pool:
                try:
                    pool.apply_async(work, [i]).get(timeout=60)
                except DeviceError as e:
                    print(e)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(folder / "hf")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('start processes with multiprocessing.get_context("spawn")') == 4, done.stdout


def test_a_fork_before_the_first_use_works(folder: Path) -> None:
    code = """
        import multiprocessing, sys
        import apr, apr.api

        def work(text):
            model = apr.load(sys.argv[1], device="cpu")
            return model.generate(text, max_tokens=3)

        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.apply_async(work, ["def"]).get(timeout=60))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(folder / "hf")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    model = apr.load(folder / "hf", device="cpu")
    assert done.stdout.rstrip("\n") == model.generate("def", max_tokens=3).rstrip("\n"), done.stderr


def every_error() -> list[type]:
    """All classes of errors that a user can meet."""
    found, left = [], [apr.AprError]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return found


def test_errors_come_back_from_other_processes() -> None:
    """An exception that does not come out of its pickle lets a multiprocessing.Pool wait for ever."""
    import apr.cli.main  # noqa: F401  which loads all of apr

    assert DeviceError in every_error()
    for kind in every_error():
        made = kind(9, "LOST", "a: b") if kind is RankFailed else kind("a: b")
        error = pickle.loads(pickle.dumps(made))
        assert type(error) is kind
        assert (str(error), error.exit_code, error.status) == ("a: b", made.exit_code, made.status)


def test_a_copy_leaves_the_number_of_threads(folder: Path) -> None:
    model = apr.load(folder / "hf", device="cpu", threads=1)
    for made in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert made.backend.describe()["threads"] == "1"
