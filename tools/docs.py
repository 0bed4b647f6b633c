"""Write the files generated from the commands' options: the tables in docs/commands/*.md and the table behind `apr
completion`. `--check` compares instead of writing, and ends with 1 when something differs.

A page is written by hand but for its generated blocks, which stand between two comments:
  <!-- options: COMMAND -->  the options of a command ("tokenize train" for one of a command's own)
  <!-- commands -->          every command with its purpose
  <!-- exit codes -->        the exit codes of errors.py
  <!-- presets -->           preset names with their sizes
each ended by <!-- end -->. Those of docs/faults.md come from tests, from the faults of the campaigns and from their record:
  <!-- edits of kernels -->, <!-- faults of gates -->, <!-- first campaign -->, <!-- second campaign -->, <!-- third campaign -->,
  <!-- fourth campaign -->, <!-- fifth campaign -->
and those of docs/stories.md from the records of its runs:
  <!-- stories of toy -->, <!-- stories of real -->, <!-- steps of pretraining -->
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import docs_faults
import docs_stories

from apr.cli.main import COMMANDS, MODULES
from apr.common import errors
from apr.common.options import field_types, flag, groups
from apr.model.params import Layout
from apr.model.presets import PRESETS

PAGES = ROOT / "docs" / "commands"
TABLE = ROOT / "apr" / "cli" / "completion.json"
BLOCK = re.compile(
    r"(<!-- (options: [a-z -]+|commands|exit codes|presets|(?:edits|faults|steps) of [a-z]+|[a-z]+ campaign|stories of [a-z]+)"
    r" -->\n).*?(<!-- end -->)",
    re.S,
)
OTHER_CODES = {
    0: ("done", ""),
    9: ("finished, but", "a verdict of FAIL or SUSPECT, or a difference that was found"),
}
# Exit code -> name.
CODES = {
    1: "failed",
    2: "usage",
    3: "not found",
    4: "malformed",
    5: "refused",
    6: "aborted",
    7: "cannot write",
    8: "device",
    10: "rank lost",
    130: "interrupted",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command or sub-command: what it does in one line, the docstring of its module, its options (a dataclass)."""

    text: str
    doc: str
    flags: type


def commands() -> dict[str, Command]:
    """Collect every command that takes options, by name; sub-commands as "tokenize train"."""
    out = {}
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"apr.cli.{MODULES.get(name, name)}")
        if hasattr(module, "flags_and_main"):
            for sub, words in module.COMMANDS.items():
                flags, main = module.flags_and_main(sub)
                out[f"{name} {sub}"] = Command(words, inspect.getmodule(main).__doc__ or "", flags)
        else:
            out[name] = Command(text, module.__doc__ or "", module.Flags)
    return out


def option_names(f: dataclasses.Field[Any], kind: type) -> list[str]:
    """List the words by which an option is given: its metavar where it is positional."""
    if f.metadata["positional"]:
        return [f.name.upper()]
    # Of a switch the word that changes something; the other word is the default.
    long = flag(f"no_{f.name}" if kind is bool and f.default else f.name)
    return [long, "-" + f.metadata["short"]] if f.metadata["short"] else [long]


def _cell(text: str) -> str:
    """Escape text for a cell of a table; code in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    shown = [p if p.startswith("`") else html.escape(p, quote=False).replace("*", r"\*") for p in parts]
    return "".join(shown).replace("|", r"\|")


def options_table(flags: type) -> str:
    """Make Markdown tables of a dataclass of options, a table for each heading."""
    plain, parts = field_types(flags), []
    for heading, fields in groups(flags):
        rows = [f"**{heading}**", ""] if heading else []
        rows += ["| option | value | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join(rows + [_options_row(f, plain[f.name]) for f in fields]) + "\n")
    return "\n".join(parts)


def _options_row(f: dataclasses.Field[Any], kind: type) -> str:
    text = "path" if f.metadata["path"] else "text"
    kinds = {int: "whole number", float: "number", bool: "", tuple: f"{text}, several", str: text}
    value = ", ".join(f"`{c}`" for c in f.metadata["choices"]) or kinds[kind]
    is_needed = f.metadata["needed"] or (f.metadata["positional"] and f.default is None)
    default = "needed" if is_needed else ""
    if f.default not in (None, "", (), False):
        default = "on" if f.default is True else f"`{f.default}`"
    names = ", ".join(f"`{n}`" for n in option_names(f, kind))
    return f"| {names} | {value} | {default} | {_cell(f.metadata['help'])} |"


def commands_table() -> str:
    """Make a Markdown table of all commands with links to their pages."""
    rows = ["| command | does |", "|---|---|"]
    rows += [f"| [`apr {name}`]({name}.md) | {_cell(text)} |" for name, text in COMMANDS.items()]
    return "\n".join(rows) + "\n"


def exit_codes_table() -> str:
    """Make a Markdown table of exit codes, from the classes of errors.py."""
    kinds = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.AprError)]
    rows = {
        c.exit_code: (CODES[c.exit_code], (c.__doc__ or "").strip())
        for c in kinds
        if c is not errors.AprError
    }
    rows |= OTHER_CODES
    lines = [f"| {code} | {name} | {_cell(text)} |" for code, (name, text) in sorted(rows.items())]
    return "\n".join(["| code | word | when |", "|---|---|---|", *lines]) + "\n"


def presets_table() -> str:
    """Make a Markdown table of the presets."""
    rows = [
        "| preset | family | parameters | layers | width | heads, key/value heads | MLP | vocabulary | positions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in PRESETS.items():
        rows.append(
            f"| `{name}` | {c.family} | {Layout(c).num_parameters:,} | {c.num_layers} | {c.hidden_size} "
            f"| {c.num_heads}, {c.num_kv_heads} of {c.head_dim} | {c.intermediate_size} | {c.vocab_size:,} "
            f"| {c.max_position_embeddings:,} |"
        )
    return "\n".join(rows) + "\n"


TABLES = {
    "commands": commands_table,
    "exit codes": exit_codes_table,
    "presets": presets_table,
    "edits of kernels": docs_faults.kernels_table,
    "faults of gates": docs_faults.gates_table,
    "first campaign": lambda: docs_faults.campaign_table("first"),
    "second campaign": lambda: docs_faults.campaign_table("second"),
    "third campaign": lambda: docs_faults.campaign_table("third"),
    "fourth campaign": lambda: docs_faults.campaign_table("fourth"),
    "fifth campaign": lambda: docs_faults.campaign_table("fifth"),
    "stories of toy": lambda: docs_stories.beside_table("toy"),
    "stories of real": lambda: docs_stories.beside_table("real"),
    "steps of pretraining": docs_stories.steps_table,
}


def page(text: str, known: dict[str, Command]) -> str:
    """Replace the generated blocks of a page."""

    def block(m: re.Match[str]) -> str:
        what = m[2]
        name = what.removeprefix("options: ")
        made = TABLES[what]() if name == what else options_table(known[name].flags)
        return f"{m[1]}\n{made}\n{m[3]}"  # Markdown ends a comment at an empty line

    return BLOCK.sub(block, text)


def brief(text: str, most: int = 72) -> str:
    """Cut a help text to fit the narrow column of a shell's menu."""
    text = re.split(r"[;(]| such as ", text.replace("`", ""))[0].strip(" ,:")
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


def completion_option(f: dataclasses.Field[Any], kind: type) -> dict[str, Any]:
    """Describe an option for the shells: names, kind, values, text, and whether it is positional or may be repeated.

    Kinds: switch; number; text (nothing to complete); file; word (one of values); name (one of values, or a file)."""
    meta = f.metadata
    values = list(meta["choices"] or meta["names"])
    if values:
        shown = "name" if meta["path"] else "word"
    elif kind is bool:
        shown = "switch"
    else:
        shown = "number" if kind in (int, float) else "file" if meta["path"] else "text"
    return {
        "names": option_names(f, kind),
        "kind": shown,
        "values": values,
        "text": brief(meta["help"]),
        "positional": meta["positional"],
        "repeated": kind is tuple,
    }


def completion_table(known: dict[str, Command]) -> str:
    """Make the JSON behind `apr completion`: a line for each option, so that a change stays small."""
    parts = []
    for name, c in known.items():
        plain = field_types(c.flags)
        lines = [
            "   " + json.dumps(completion_option(f, plain[f.name]), ensure_ascii=True)
            for f in dataclasses.fields(c.flags)
        ]
        head = f' {json.dumps(name)}: {{"text": {json.dumps(brief(c.text))}, "options": [\n'
        parts.append(head + ",\n".join(lines) + "\n ]}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def made() -> dict[Path, str]:
    """Map every generated file to its content. Raises KeyError for a block of an unknown command."""
    known = commands()
    pages = [*sorted(PAGES.glob("*.md")), docs_faults.PAGE, docs_stories.PAGE]
    out = {path: page(path.read_text(), known) for path in pages}
    out[TABLE] = completion_table(known)
    return out


def main() -> int:
    """Write the generated files, or compare them; return 1 with --check when a file differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    differ = [p for p, text in made().items() if not p.exists() or p.read_text() != text]
    for path in differ:
        print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(made()[path])
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
