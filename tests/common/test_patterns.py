"""Patterns out of files: those that a search may never leave are refused, those in use are not."""

from __future__ import annotations

import pytest

from apr.common.patterns import MAX_LENGTH, compiled_end

NAME = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "layers.10.self_attn.q_proj",
        r"^model\.layers\.10\.self_attn\.q_proj",
        r"layers\.(0|1|10)\.(self_attn|mlp)\.(q|k|v|up)_proj",
        r".*layers\.([0-9]|1[0-9])\..*_proj",
        r"(?:.*?(?:layers|text).*?)?\.(?P<map>[q-v]_proj)",
        r"(?!.*mlp).*\.(q|v)_proj",
        r"layers\.\d{1,2}\.[a-z_]+[.]q_proj",
        r"[]()*+.\w]*(q)_proj(?#(a+)",
        r"self_attn\.(?P<x>q)_proj",
        rf"layers\.({'|'.join(map(str, range(80)))})\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        "|".join(f"model.layers.{n}.self_attn.(q|k|v)_proj" for n in range(60)),
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj))",
        r"layers\.([0-9]|[1-3][0-9])\.(self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj)",
        r"(?<=layers\.10\.)self_attn\.q_proj",
        "|".join(f"layers.{n}.(self_attn.q_proj|mlp.up_proj)" for n in range(60)),
        "|".join(f"model.layers.{n}.self_attn.q_proj" for n in range(100)),
        "(a|b|c|d)?" * 8 + "q_proj",
    ],
)
def test_patterns_in_use_match_as_they_are(pattern: str) -> None:
    assert compiled_end(pattern).match(NAME)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(([a-z._0-9])+)+X", "repeats a group"),
        (r"(?:a|aa)+X", "repeats a group"),
        (r"([a-z]*?\.?){1,30}X", "repeats a group"),
        (r"((x?)y){30}", "repeats a group"),
        (r".*.*.*.*.*X", "5 repeats"),
        (".?" * 30 + "X", "30 optional"),
        ("(?:.|[^/])" * 18 + "Z", "alternatives"),
        (r"(?:[a-z._]|[^/]|.|\D)" * 10 + "Z", "alternatives"),
        ("(m|mo)(d|od|odel)" * 10 + "Z", "alternatives"),
        ("(a|a)" * 18 + "Z", "alternatives"),
        ("(?:|a)" * 18 + "Z", "alternatives"),
        ("(?:.|[^/]|m)?" * 8 + "Z", "alternatives"),
        (r"((?<!(x>)y)[a-z_.]+)+Z", "repeats a group"),
        (r"((?<=(x>)y)[a-z_.]+)+Z", "repeats a group"),
        ("(?x:( #))\n[a-z_.]+)+)Z", r"inline flag \(\?x"),
        ("(?i:Q)_proj", "inline flag"),
        ("a" * (MAX_LENGTH + 1), "4,097 characters"),
        ("(", "not a regular expression"),
        ("[", "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        ("*", "not a regular expression"),
    ],
)
def test_patterns_that_may_never_end_are_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        compiled_end(pattern)
