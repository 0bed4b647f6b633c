"""A chat template is a program in somebody else's file: whatever it does, it is refused in time, by name, without a traceback."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import pytest

from apr.cli.main import main
from apr.common.errors import Refused
from apr.data.conversations.render import Encoder
from apr.data.conversations.shapes import Example
from apr.tokenizer import template_process
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.template_process import SCRIPT, TemplateStopped
from apr.tokenizer.training import train_tokenizer
from processes import children_running

DEEP = 3000
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOO_MUCH = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "squares": "{% set n=namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x*n.x %}{% endfor %}{{ n.x > 1 }}",
    "doubling": '{% set n=namespace(x="x") %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}',
    "a width of a % format": '{{ "%8000000000d" % 1 }}',
    "a width known only late": '{{ ("%" ~ messages|length ~ "000000000d") % 1 }}',
    "a width of format": '{{ "{:8000000000d}".format(1) }}',
    "a width of center": '{{ "x"|center(8000000000) }}',
    "indent": '{{ "x\ny"|indent(8000000000) }}',
    "tojson": "{{ messages|tojson(indent=8000000000) }}",
    "expandtabs": '{{ "a\tb".expandtabs(2000000000) }}',
    "batch": "{{ [1]|batch(1000000000,0)|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "a long text": '{% for i in range(90) %}{{ "x" * 1000000 }}{% endfor %}',
    "lists in lists": "{% set n=namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
}
WRONG = {
    "break outside a loop": ("{% break %}", "chat template, 'break' outside loop"),
    "parentheses": ("{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}", "chat template, .*recursion"),
    "blocks in blocks": ("{% if 1 %}" * DEEP + "{% endif %}" * DEEP, "chat template"),
    "an open block": ("{% if messages %}", "chat template, line 1"),
    "not closed": ("a\n{{ messages", "chat template, line 2"),
    "an unknown filter": ("{{ 1|nothing }}", "chat template, line 1"),
    "half a character": (r'{{ "\ud800" }}', "a lone surrogate"),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a list in itself": (
        "{% set n=namespace(x=[]) %}{% for i in range(9999) %}{% set n.x=[n.x] %}{% endfor %}{{ n.x }}",
        "recursion",
    ),
    "a helper's own error": ("{{ cycler() }}", "at least one item"),
    "an encoding": ('{{ "a".encode("nothing") }}', "unknown encoding"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ lipsum.__globals__.os.system('id') }}", "unsafe"),
    "a format that looks inside": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "attr": ("{{ (messages|attr('__class__')).mro() }}", "unsafe"),
    "the template itself": ("{{ self.__init__.__globals__ }}", "unsafe"),
    "another file": ("{% extends '/etc/passwd' %}", "loader"),
}


def say(text="hi"):
    return [{"role": "user", "content": text}] * 8


@pytest.fixture(autouse=True)
def nothing_left():
    """No process of a template outlives it."""
    gc.collect()
    before = set(children_running(SCRIPT))
    yield
    gc.collect()
    assert set(children_running(SCRIPT)) <= before


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_that_takes_too_much_is_stopped_and_not_asked_again(name, monkeypatch):
    limits = r"^here: its chat template .* a template may take 2 s of CPU time"
    made = []

    def make_and_render():
        made.append(ChatTemplate(TOO_MUCH[name], "here"))
        made[0].render(say())

    with pytest.raises(TemplateStopped, match=limits):
        make_and_render()
    # jinja2 computes constants while it compiles: then there is no template.
    for template in made:
        assert template._process._process is None
        monkeypatch.setattr(template_process.subprocess, "Popen", lambda *a, **k: pytest.fail("asked again"))
        with pytest.raises(TemplateStopped, match=limits):
            template.render(say())


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_template_is_refused_in_its_own_words(name):
    text, words = WRONG[name]
    with pytest.raises(Refused, match=f"^here: .*{words}") as e:
        ChatTemplate(text, "here").render(say())
    assert not isinstance(e.value, TemplateStopped)


def test_a_refused_conversation_does_not_spoil_the_next():
    template = ChatTemplate(
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}yes", "t"
    )
    for _ in range(3):
        with pytest.raises(Refused, match="no"):
            template.render(say("no"))
        assert template.render(say()) == "yes"


def test_long_conversations_are_rendered():
    text = "long \u00e9 " * 3_000_000
    assert ChatTemplate(TURNS, "t").render([{"role": "user", "content": text}]) == f"user: {text}\n"


def test_values_reach_a_template_as_they_are():
    got = ChatTemplate("{{ a }} {{ b }} {{ c[1] }} {{ messages[0].x }}", "t").render(
        [{"role": "user", "x": (1, 2)}], a={"k": None}, b=1.5, c={1: "int"}
    )
    assert got == "{'k': None} 1.5 int (1, 2)"
    with pytest.raises(Refused, match="cannot be given"):
        ChatTemplate(TURNS, "t").render([{"role": "user", "content": lambda: 1}])


def test_one_process_renders_a_whole_corpus(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def counted(*args, **keywords):
        started.append(args)
        return popen(*args, **keywords)

    monkeypatch.setattr(template_process.subprocess, "Popen", counted)
    tokenizer = train_tokenizer(["user: a\nassistant: b\n"] * 3, 260, tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = Encoder(tokenizer, ChatTemplate(TURNS, "t"))
    encoded = encoder([Example(f"line {i}", "", turns) for i in range(200)])
    assert all(e.trained.any() for rows in encoded for e in rows)
    # One for the template as it stands, one for the template with marks of answers.
    assert len(started) == 2


def test_a_stopped_template_ends_the_preparation(tmp_path):
    tokenizer = train_tokenizer(["user: a\nassistant: b\n"] * 3, 260, tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = Encoder(tokenizer, ChatTemplate(TOO_MUCH["doubling"], "t"))
    with pytest.raises(TemplateStopped, match="memory"):
        encoder([Example(f"line {i}", "", turns) for i in range(3)])


def test_a_killed_process_is_an_error_with_a_name():
    template = ChatTemplate(TURNS, "t")
    template._process._process.kill()
    with pytest.raises(TemplateStopped, match=r"t: its chat template ends the process .*signal 9"):
        template.render(say())


def test_a_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(template_process.sys, "executable", "/no/such/python")
    with pytest.raises(Refused, match="/no/such/python"):
        ChatTemplate(TURNS, "t")


def test_without_jinja2(monkeypatch):
    monkeypatch.setattr(template_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="jinja2"):
        ChatTemplate(TURNS, "t")


def test_the_process_knows_nothing_of_the_environment(monkeypatch):
    """A hole in jinja2's sandbox finds no tokens and no packages of this process."""
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    template = ChatTemplate(TURNS, "t")
    pid = template._process._process.pid
    assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert template.render(say()[:1]) == "user: hi\n"


@pytest.mark.parametrize("text", ["{% break %}", "{% for %}", '{{ "%8000000000d" % 1 }}'])
def test_the_command_says_so_in_one_line(data, tmp_path, capsys, text):
    (tmp_path / "x.jinja").write_text(text)
    args = ["run", str(data("stories260K/hf")), "hi", "--chat", "--chat-template", str(tmp_path / "x.jinja")]
    assert main([*args, "--max-tokens", "1"]) == 5
    said = capsys.readouterr().err
    assert "x.jinja: " in said
    assert "Traceback" not in said
