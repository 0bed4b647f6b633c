"""apr's models in lm-evaluation-harness: against a stand-in for its base class, and, where it is installed, against the
harness itself and its own Hugging Face model."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.hf import write_hf
from apr.common.errors import AprError, Refused, UsageError
from apr.evaluation.score import Window
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer
from checks import GOLDEN

HARNESS = "apr.evaluation.lm_eval"
ITEMS = json.loads((GOLDEN[0].parent / "eval.json").read_text())["choices"]
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play with her dog. One day, they went out."


class Request:
    """What the harness hands over: an Instance."""

    def __init__(self, *args):
        self.args = args


class Hook:
    def __init__(self):
        self.seen = []

    def add_partial(self, kind, args, result):
        self.seen.append((kind, args, result))


@pytest.fixture
def harness(monkeypatch):
    """The module, over a stand-in for lm_eval with what it uses of it."""

    class LM:
        def __init__(self):
            self.cache_hook = Hook()

        @classmethod
        def create_from_arg_obj(cls, args, more=None):
            return cls(**args, **{k: v for k, v in (more or {}).items() if v is not None})

    registered = {}

    def register_model(*names):
        def keep(cls):
            assert issubclass(cls, LM)
            registered.update(dict.fromkeys(names, cls))
            return cls

        return keep

    fakes = {
        name: types.ModuleType(name)
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    }
    fakes["lm_eval.api.model"].LM = LM
    fakes["lm_eval.api.registry"].register_model = register_model
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, HARNESS, raising=False)
    module = importlib.import_module(HARNESS)
    assert registered == {"apr": module.AprLM}
    yield module
    sys.modules.pop(HARNESS, None)


def test_without_the_harness_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, HARNESS, raising=False)
    with pytest.raises(AprError, match=r"-m pip install 'lm_eval>=0\.4\.3'"):
        importlib.import_module(HARNESS)


def test_loglikelihoods_are_those_of_transformers(harness, data):
    model = harness.AprLM(str(data("stories260K/hf")), device="cpu")
    requests, want = [], []
    from apr.evaluation.choices import _item

    for c in ITEMS:
        item = _item("i", c["item"])
        requests += [Request(item.context, text) for text in item.continuations]
        want += c["scores"]
    found = model.loglikelihood(requests)
    assert len(found) == len(want)
    for (logp, greedy), w in zip(found, want, strict=True):
        assert abs(logp - w["logp"]) < 1e-4
        assert greedy is w["greedy"]
    assert [x[2] for x in model.cache_hook.seen] == found
    alone = [model.loglikelihood([r])[0] for r in requests[:3]]
    assert np.allclose([x[0] for x in alone], [x[0] for x in found[:3]], atol=1e-4)


def test_a_token_that_spans_the_end_of_the_context(harness, data):
    """The value is that of the harness's own model (lm_eval 0.4.13, HFLM)."""
    model = harness.AprLM(str(data("stories260K/hf")), device="cpu")
    assert model.loglikelihood([Request("wan", "ted to play")])[0][0] == pytest.approx(-11.1338, abs=1e-3)


def test_rolling_windows_are_those_of_the_harness(harness):
    """The example in the docstring of the harness's LM.loglikelihood_rolling."""
    found = [(w.ids.tolist(), w.skip) for w in harness.rolling_windows(range(10), 99, 4)]
    assert found == [([99, 0, 1, 2, 3], 0), ([3, 4, 5, 6, 7], 0), ([5, 6, 7, 8, 9], 2)]
    assert list(harness.rolling_windows([], 99, 4)) == []
    assert [w.ids.tolist() for w in harness.rolling_windows([5], 99, 4)] == [[99, 5]]


def test_rolling_adds_up(harness, data):
    model = harness.AprLM(str(data("stories260K/hf")), device="cpu", max_length=16, batch_size=3)
    whole, twice = model.loglikelihood_rolling([Request(TEXT), Request(TEXT)])
    assert whole == pytest.approx(twice, abs=1e-4)
    long = harness.AprLM(str(data("stories260K/hf")), device="cpu").loglikelihood_rolling([Request(TEXT)])[0]
    assert whole < long < 0  # more context
    assert long == pytest.approx(model_loss(data), abs=1e-3)


def model_loss(data):
    """The same text scored as one continuation of nothing."""
    from apr.evaluation.score import Scorer, Window, open_model

    opened = open_model(str(data("stories260K/hf")), "cpu")
    ids = np.array([1, *opened.tokenizer.encode(TEXT)], np.int32)
    return -float(next(Scorer(opened, 128, 1).score([Window(ids)])).losses.sum())


def test_generation_ends_before_a_stop_string(harness, data):
    model = harness.AprLM(str(data("stories260K/hf")), device="cpu")
    greedy = {"until": ["."], "do_sample": False, "max_gen_toks": 40}
    first, again = model.generate_until(
        [Request("Once upon a time", greedy), Request("Once upon a time", greedy)]
    )
    assert first == again
    assert first.startswith(", there was a")
    assert "." not in first
    more = model.generate_until([Request("Once upon a time", {**greedy, "until": []})])[0]
    assert more.startswith(first + ".")
    drawn = {"until": [], "temperature": 1.0, "do_sample": True, "max_gen_toks": 30, "top_p": 0.95}
    texts = model.generate_until([Request("Once", drawn), Request("Once", drawn)])
    assert texts[0] != texts[1]
    assert model.generate_until([Request("", greedy)])[0]
    with pytest.raises(UsageError, match="num_beams"):
        model.generate_until([Request("x", {"num_beams": 4})])
    with pytest.raises(UsageError, match="max_gen_toks = 512"):
        model.generate_until([Request("x", {"max_gen_toks": 512})])


def changed(data, tmp_path, **files):
    """The stories model with other side files."""
    folder = tmp_path / "m"
    shutil.copytree(data("stories260K/hf"), folder)
    for name, value in files.items():
        path = folder / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **value}))
    return str(folder)


def test_generation_ends_at_every_id_and_text_that_ends_a_text(harness, data, tmp_path):
    plain = harness.AprLM(str(data("stories260K/hf")), device="cpu")
    options = {"until": [], "do_sample": False, "max_gen_toks": 40}
    whole = plain.generate_until([Request("Once upon a time", options)])[0]
    tokenizer = Tokenizer.from_file(data("stories260K/hf"))
    prompt = tokenizer.encode("Once upon a time", add_special_tokens=True)
    new = tokenizer.encode("Once upon a time" + whole, add_special_tokens=True)[len(prompt) :].tolist()
    ends = sorted({2, new[9]})
    listed = changed(data, tmp_path, generation_config={"eos_token_id": ends})
    text = harness.AprLM(listed, device="cpu").generate_until([Request("Once upon a time", options)])[0]
    stopped = tokenizer.decode(new[: new.index(new[9])])
    assert text.strip() == stopped
    assert len(text) < len(whole)


def test_a_special_token_in_until_ends_the_text(harness, data, monkeypatch):
    model = harness.AprLM(str(data("stories260K/hf")), device="cpu")
    seen = {}

    def fake(*args, eos_id, **more):
        seen["ends"] = set(eos_id)
        return iter(model._tokenizer.encode("He said </s> and went").tolist())

    monkeypatch.setattr(harness, "generate", fake)
    options = {"until": ["<s>"], "max_gen_toks": 40}
    assert model.generate_until([Request("Lily", options)])[0].strip() == "He said"  # the text of the end
    assert seen["ends"] == {1, 2}


TEMPLATE = (
    "{% if messages[0].role == 'system' and deny %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def test_a_chat_template_makes_the_contexts(harness, data, tmp_path):
    folder = changed(data, tmp_path, tokenizer_config={"chat_template": TEMPLATE})
    model = harness.AprLM(folder, device="cpu")
    assert model.chat_template(True) == TEMPLATE
    assert model.chat_template(False) == ""
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is "}]
    assert model.apply_chat_template(chat[:1]) == "<s>user: Who?</s><s>assistant:"
    assert model.apply_chat_template(chat, False) == "<s>user: Who?</s><s>assistant: It is "
    context = model.apply_chat_template(chat[:1])
    found = model.loglikelihood([Request(context, " Lily")])[0][0]
    ids = [1, *plain_ids(model, "user: Who?"), 2, 1, *plain_ids(model, "assistant: Lily")]
    count = len(ids) - len(model._tokenizer.encode_marked(context))
    window = Window(np.array(ids, np.int32), len(ids) - 1 - count)
    assert model._tokenizer.encode_marked(context + " Lily").tolist() == ids
    want = -float(next(model._scorer([window]).score([window])).losses.sum())
    assert found == pytest.approx(want, abs=1e-4)
    assert model.generate_until([Request(context, {"max_gen_toks": 5})])[0]
    with pytest.raises(UsageError, match="default template"):
        model.chat_template("tool_use")
    with pytest.raises(Refused, match="no chat template"):
        harness.AprLM(str(data("stories260K/hf")), device="cpu").apply_chat_template(chat)


def plain_ids(model, text):
    return model._tokenizer.encode(text).tolist()


def test_a_template_that_refuses_a_system_message_is_asked_without(harness, data, tmp_path):
    template = TEMPLATE.replace("and deny ", "")
    model = harness.AprLM(changed(data, tmp_path, tokenizer_config={"chat_template": template}), device="cpu")
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(chat) == "<s>user: Hi</s><s>assistant:"


def test_arguments(harness, tmp_path):
    tokenizer = train_tokenizer(["def f(x): return x\n"] * 3, 260, tmp_path / "tok", eos_token=None)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=tokenizer.vocab_size)
    host = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(host, 1)
    write_hf(tmp_path / "m", cfg, Layout(cfg).named(host), tokenizer_json=tokenizer.json)
    write_hf(tmp_path / "bare", cfg, Layout(cfg).named(host))
    args = {"pretrained": str(tmp_path / "m"), "dtype": "auto", "batch_size": "auto"}
    model = harness.AprLM.create_from_arg_obj(args, {"device": "cpu", "max_batch_size": 2})
    assert model.max_length == cfg.max_position_embeddings
    assert model.tokenizer_name == tokenizer.sha256
    assert model.loglikelihood([Request("def", " f")])[0][0] < 0
    with pytest.raises(Refused, match="nothing before it"):
        model.loglikelihood([Request("", "x")])
    with pytest.raises(Refused, match="begins or ends a text"):
        model.loglikelihood_rolling([Request("x")])
    with pytest.raises(Refused, match="begins or ends a text"):
        model.generate_until([Request("", {"max_gen_toks": 4})])
    with pytest.raises(UsageError, match="'peft'"):
        harness.AprLM(str(tmp_path / "m"), peft="x")
    with pytest.raises(Refused, match="no tokenizer"):
        harness.AprLM(str(tmp_path / "bare"), device="cpu")


TASKS = {
    "choice": {
        "task": "apr_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "task": "apr_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "generate": {
        "task": "apr_generate",
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": " Lily",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_harness_itself_gives_both_models_the_same_scores(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = importlib.import_module(HARNESS)
    plain = [c["item"] for c in ITEMS if c["item"].get("context")]
    rows = [{**row, "answer": 0, "text": TEXT} for row in plain]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test",
    }
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, task in TASKS.items():
        (tasks / f"{name}.yaml").write_text(json.dumps({**common, **task}))  # JSON is YAML
    folder = str(data("stories260K/hf"))

    def both(bos, names):
        """Results of our model and of theirs."""
        models = (
            harness.AprLM(folder, device="cpu", batch_size=2, add_bos_token=bos, max_length=32),
            HFLM(folder, device="cpu", dtype="float32", batch_size=2, add_bos_token=bos, max_length=32),
        )
        for model in models:
            yield lm_eval.simple_evaluate(
                model=model,
                tasks=names,
                task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
            )

    ours, theirs = both(True, ["apr_choice", "apr_generate"])
    pairs = list(zip(ours["samples"]["apr_choice"], theirs["samples"]["apr_choice"], strict=True))
    assert len(pairs) == len(rows)
    for a, b in pairs:
        for (x, greedy), (y, other) in zip(flat(a), flat(b), strict=True):
            assert abs(x - y) < 1e-3
            assert greedy == other
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["apr_choice"][metric] == theirs["results"]["apr_choice"][metric]
    for a, b in zip(ours["samples"]["apr_generate"], theirs["samples"]["apr_generate"], strict=True):
        text, other = a["resps"][0][0], b["resps"][0][0]
        assert text
        assert (
            text.removeprefix(" ") == other
        )  # HFLM decodes new tokens alone, and loses the space before them
    # With True, HFLM also scores the <s> that this tokenizer puts before a text, behind another one.
    ours, theirs = both(False, ["apr_rolling"])
    bits = [r["results"]["apr_rolling"]["bits_per_byte,none"] for r in (ours, theirs)]
    assert bits[0] > 0.1
    assert abs(bits[0] - bits[1]) < 1e-4
    known = lm_eval.api.registry.get_model("apr")
    assert known is harness.AprLM


def flat(sample):
    """(log-probability, greedy) of each choice of a logged sample."""
    return [(float(r[0]), str(r[1]) == "True") for r in sample["filtered_resps"]]


def test_docs_name_every_argument():
    """docs/eval.md says what --model_args may hold."""
    text = (Path(__file__).parents[2] / "docs" / "eval.md").read_text()
    for name in ("pretrained", "dtype", "max_length", "add_bos_token", "batch_size", "threads", "seed"):
        assert name in text, name
