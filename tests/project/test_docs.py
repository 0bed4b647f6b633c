"""The documentation tells the truth: its generated parts are up to date, its links lead somewhere, its commands parse, its Python
runs, its messages are those of the program."""

from __future__ import annotations

import ast
import base64
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from apr.cli.main import COMMANDS, MODULES, main
from apr.common.options import given, option

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOK = DOCS / "notebooks" / "look-inside.ipynb"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
IDS = [str(p.relative_to(DOCS)) for p in PAGES]


def load_tool():
    """tools/docs.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool()


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown and code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", text), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in heads}


def env(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", **more}


# What is generated


def test_generated_parts_are_what_the_options_say(tool):
    for path, text in tool.made().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is out of date: python tools/docs.py"


def test_every_command_has_its_page_and_its_table(tool):
    blocks = [m[2] for path in tool.PAGES.glob("*.md") for m in tool.BLOCK.finditer(path.read_text())]
    assert sorted(b for b in blocks if b.startswith("options: ")) == sorted(
        f"options: {n}" for n in tool.commands()
    )
    for name in COMMANDS:
        text = (tool.PAGES / f"{name}.md").read_text()
        assert text.startswith(f"# apr {name}\n")
        assert "## Exit codes" in text
        assert re.search(r"^\$ apr " + name, text, re.M), f"{name}: no example with its output"
        if "## Options" in text:
            assert text.count("<!-- options: ") == 1


def test_a_changed_option_is_seen(tool):
    @dataclasses.dataclass
    class Flags:
        steps: int = option("a | b <c>", 3, short="s")

    table = tool.options_table(Flags)
    assert table.splitlines()[2] == r"| `--steps`, `-s` | whole number | `3` | a \| b &lt;c&gt; |"
    known = {"plan": tool.Command("", "", Flags)}
    page = (tool.PAGES / "plan.md").read_text()
    assert tool.page(page, known) != page


# Help


def examples(text: str) -> list[list[str]]:
    """The words of the example lines of a help text, "apr" left out."""
    block = re.search(r"^Examples?:(.*?)(?:\n\n|\Z)", text, re.M | re.S)
    if not block:
        return []
    lines = [re.search(r"\bapr ([^#]+)$", line.split("  #")[0]) for line in block[1].split("\n")]
    return [shlex.split(re.split(r"[)>](?:\s|$)", m[1])[0].replace("$'", "'")) for m in lines if m]


def parsed(words: list[str]) -> dict[str, object]:
    """The options of a command line without "apr". Raises UsageError."""
    name, *args = words
    module = importlib.import_module(f"apr.cli.{MODULES.get(name, name)}")
    if hasattr(module, "flags_and_main"):
        return given(module.flags_and_main(args[0])[0], args[1:], name, "")
    return given(module.Flags, args, name, "")


def help_of(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_help_has_an_example_that_parses(tool, capsys):
    for name in [*COMMANDS, *(n for n in tool.commands() if " " in n)]:
        found = examples(help_of(name.split(), capsys))
        assert found, f"apr {name} --help has no example"
        assert any(words[: len(name.split())] == name.split() for words in found), name
        for words in found:
            assert parsed(words), words


def test_a_help_without_an_example_is_seen():
    assert examples("usage: apr plan [-h]\n\n`apr plan`: says much.\n\noptions:\n  --json") == []
    assert examples("x\n\nExample: apr plan --model llama-tiny\n\noptions:\n") == [
        ["plan", "--model", "llama-tiny"]
    ]


# Pages


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", re.sub(FENCE, "", text))):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert target.is_relative_to(DOCS), f"{page.name}: {link} leads out of the site"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_list_has_an_empty_line_before_it(page):
    """Python-Markdown would make it part of the paragraph."""
    lines = re.sub(FENCE, "\n", page.read_text()).splitlines()
    item = re.compile(r"([-*]|\d+\.) ")
    for before, line in itertools.pairwise(lines):
        if item.match(line):
            assert not before.strip() or item.match(before) or before.startswith(("  ", "#")), line


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_on_pages_parse(page):
    for language, block in FENCE.findall(page.read_text()):
        if language:
            continue
        lines = block.replace("\\\n", " ").splitlines()
        typed = [
            line[2:] for line in lines if line.startswith("$ ")
        ] or lines  # with "$ ", the others are output
        for line in typed:
            words = re.match(r"(?:\.venv/bin/)?apr (.+)", line)
            if not words or words[1].split()[0] not in COMMANDS or re.search(r"\[|<TAB>", line):
                continue
            command = re.split(r"   +|\s[|>#]\s", words[1])[0]
            assert parsed(shlex.split(command.replace("$'", "'"))) is not None, line


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_and_machines(page):
    text = page.read_text()
    for path in set(re.findall(r"`((?:apr|tools|tests|bench|docs)/[\w/.-]+?)`", text)):
        assert "OP.cu" in path or (ROOT / path).exists(), f"{page.name}: {path}"
    assert not re.search(r"/work/|/home/|/root/|/tmp/", text)


def test_python_on_pages_compiles():
    count = 0
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            if language == "python":
                compile(block, str(page), "exec")
                count += 1
    assert count > 8


def test_the_walk_names_what_there_is():
    walk = (DOCS / "how-it-works.md").read_text().split("## One batch through the code")[1].split("\n## ")[0]
    named = re.findall(r"`(apr/[\w/]+\.py)` `(\w+)`", walk)
    assert len(named) > 15
    for path, name in named:
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(), re.M), (
            f"{path} has no {name}"
        )
    reference = (ROOT / "apr/backends/reference.py").read_text()
    for op in set(re.findall(r"`(\w+_(?:fwd|bwd)|rope|adamw|cross_entropy|add_sum_sq|clip_factor)`", walk)):
        assert f"\ndef {op}(" in reference, op


def source_strings() -> list[str]:
    """Every string in apr's source, with "\0" where a value is put in."""
    out = []
    for path in (ROOT / "apr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                out.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return out


def found(message: str, strings: list[str]) -> bool:
    """Whether a message, "..." for what varies, may come from one of the strings."""
    parts = [re.escape(p.strip()) for p in message.split("...") if p.strip()]
    wanted = re.compile(".*".join(parts), re.S)
    return any(wanted.search(s) for s in strings)


def test_messages_are_those_of_the_program():
    strings = source_strings()
    tables = re.findall(
        r"^\| message \|.*?\n\|[-|]+\n(.*?)\n\n", (DOCS / "troubleshooting.md").read_text(), re.M | re.S
    )
    messages = [m for table in tables for m in re.findall(r"^\| `([^`]+)` \|", table, re.M)]
    assert len(messages) > 35
    missing = [m for m in messages if not found(m, strings)]
    assert not missing
    assert not found("the job needs no memory", strings)


def test_gates_of_troubleshooting_are_gates():
    from apr.evidence import gates

    text = (DOCS / "troubleshooting.md").read_text()
    source = Path(gates.__file__).read_text()
    named = re.findall(r"`((?:before|start|run|end)\.[\w-]+)`", text)
    assert len(named) > 10
    for gate in named:
        assert f'"{gate}"' in source, gate


def test_numbers_of_gates_and_faults_are_those_of_the_program():
    from apr.bisect.planted.faults import FAULTS
    from apr.bisect.planted.kernel_faults import KERNEL_FAULTS
    from apr.evidence.gates import GATES

    for page, text, number in (
        ("README.md", r"(\d+) gates measure", len(GATES)),
        ("README.md", r"\[(\d+) planted faults\]", len(FAULTS)),
        ("docs/bisect.md", r"(\d+) of ops, weights,", len(FAULTS)),
        ("docs/bisect.md", r"(\d+) edits of CUDA kernels", len(KERNEL_FAULTS)),
        ("docs/bisect.md", r"plants the (\d+) in some seconds", len(FAULTS)),
    ):
        assert re.findall(text, (ROOT / page).read_text()) == [str(number)], (page, text)


def test_the_python_page_runs(tmp_path):
    """All its examples in one process, one after the other, as a reader would."""
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join(
        (library / f"{m}.py").read_text() for m in ("argparse", "ast", "inspect", "tarfile", "typing")
    )
    (tmp_path / "notes.txt").write_text(text)
    code = "".join(
        b for language, b in FENCE.findall((DOCS / "python.md").read_text()) if language == "python"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, cwd=tmp_path, env=env(APR_CACHE=str(tmp_path / "cache")), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "10 steps, 2 evaluations" in done.stdout
    assert "3 no/such/model" in done.stdout


def test_every_extra_is_listed():
    extras = (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1].split("\n[")[0]
    table = (DOCS / "getting-started.md").read_text().split("| extra | for |")[1].split("\n\n")[0]
    named = [
        name
        for row in table.splitlines()
        for name in re.findall(r"`([\w-]+)`", row.split("|")[1] if "|" in row else "")
    ]
    assert sorted(named) == sorted(re.findall(r"^([\w-]+) =$", extras, re.M))


# The notebook


def cells() -> list[dict[str, object]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def code_of(cell) -> str:
    return "".join(cell["source"])


def test_the_notebook_is_one_with_its_outputs():
    nb = json.loads(NOTEBOOK.read_text())
    assert (nb["nbformat"], nb["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert nb["nbformat_minor"] >= 5
    assert len({c["id"] for c in nb["cells"]}) == len(nb["cells"])
    numbers, pictures, printed = [], 0, ""
    for c in nb["cells"]:
        assert c["cell_type"] in ("code", "markdown")
        if c["cell_type"] == "code":
            compile(code_of(c), "cell", "exec")
            numbers.append(c["execution_count"])
            for output in c["outputs"]:
                assert output["output_type"] in ("stream", "display_data")
                printed += "".join(output.get("text", ""))
                if "image/png" in output.get("data", {}):
                    assert base64.b64decode("".join(output["data"]["image/png"])).startswith(b"\x89PNG")
                    pictures += 1
    assert numbers == list(range(1, len(numbers) + 1)), (
        "run it from the first cell to the last before it is stored"
    )
    assert pictures >= 5
    assert "cause  bias missing: the difference is the bias, for every token" in printed
    assert "forced: 0.qkv 1.qkv 2.qkv 3.qkv" in printed
    assert NOTEBOOK.stat().st_size < 500_000
    assert not re.search(r"/work/|/home/|/root/|/tmp/|\x1b", printed)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Its code in one process, with shorter training. The planted fault must still be found."""
    code = "\n".join(code_of(c) for c in cells() if c["cell_type"] == "code")
    short = code.replace('"num_steps": 300', '"num_steps": 60')
    assert short != code
    run = [sys.executable, "-W", "ignore", "-c", short]
    told = env(APR_CACHE=str(tmp_path / "cache"), TMPDIR=str(tmp_path))
    done = subprocess.run(run, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "forced: 0.qkv 1.qkv 2.qkv 3.qkv" in done.stdout
    assert "bias missing" in done.stdout
