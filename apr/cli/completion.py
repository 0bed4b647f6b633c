"""`apr completion SHELL`: print the script that lets TAB complete commands, options and their values in bash, zsh or fish.

  bash  source <(apr completion bash)                                        in ~/.bashrc
  zsh   source <(apr completion zsh)                                         in ~/.zshrc, behind compinit
  fish  apr completion fish > ~/.config/fish/completions/apr.fish            once

The script holds every option: pressing TAB starts no program.

Example: apr completion bash > ~/.local/share/bash-completion/completions/apr"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UsageError
from ..common.options import json_option, option, parse

Table = dict[str, dict[str, Any]]
# Made of the commands' options by tools/docs.py, which says what the kinds of options are.
TABLE = Path(__file__).with_name("completion.json")
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Flags:
    """Options of `apr completion`."""

    shell: str = option("shell whose script to print", positional=True, choices=SHELLS)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr completion", __doc__ or "")
    if f.shell not in SHELLS:
        raise UsageError(f"{f.shell}: no such shell; choose one of {', '.join(SHELLS)}")
    text = script(f.shell)
    print(json.dumps({"shell": f.shell, "script": text}) if f.json else text, end="\n" if f.json else "")
    return 0


def script(shell: str) -> str:
    """Make the completion script for one of SHELLS."""
    table: Table = json.loads(TABLE.read_text(encoding="utf-8"))
    makers: dict[str, Callable[[Table], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
    return makers[shell](table)


def groups(table: Table) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Map first words to their help texts, and each command with sub-commands to the help texts of those."""
    first: dict[str, str] = {}
    inner: dict[str, dict[str, str]] = {}
    for name, entry in table.items():
        head, _, sub = name.partition(" ")
        if sub:
            inner.setdefault(head, {})[sub] = entry["text"]
        first.setdefault(head, entry["text"] if not sub else "")
    for head, subs in inner.items():
        first[head] = ", ".join(subs)
    return first, inner


def _flags(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [o for o in entry["options"] if not o["positional"]]


def _positional(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [o for o in entry["options"] if o["positional"]]


# bash

BASH = """# bash completion of apr, made by `apr completion bash`
_apr() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} from=2
  local options= takes= words= kind=option place=0 i
  COMPREPLY=()
  compopt +o default 2>/dev/null
  if [[ $cur == = ]]; then cur=  # bash cuts --device=cpu into three words
  elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}
  fi
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W @FIRST@ -- "$cur"))
    return
  fi
  case $command in
@INNER@
  esac
  case $command in
@COMMANDS@
    *) return ;;
  esac
  if [[ $kind == option && $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$cur"))
    return
  fi
  if [[ $kind == option ]]; then  # an argument without a name: count its place
    for (( i = from; i < COMP_CWORD; i++ )); do
      case ${COMP_WORDS[i]} in
        -*) if [[ $takes == *" ${COMP_WORDS[i]} "* ]]; then
              [[ ${COMP_WORDS[i+1]} == = ]] && (( i += 2 )) || (( i += 1 ))
            fi ;;
        *) (( place += 1 )) ;;
      esac
    done
    case $command:$place in
@PLACES@
      *) kind=file ;;
    esac
  fi
  case $kind in
    word) COMPREPLY=($(compgen -W "$words" -- "$cur")) ;;
    name)
      COMPREPLY=($(compgen -W "$words" -- "$cur"))
      local IFS=$'\\n'
      COMPREPLY+=($(compgen -f -- "$cur"))
      compopt -o filenames 2>/dev/null ;;
    file) compopt -o default 2>/dev/null ;;
  esac
}
complete -o default -F _apr apr
"""


def bash(table: Table) -> str:
    """Make a function for `complete` that works from the typed words and starts no program."""
    first, inner = groups(table)
    nested = []
    for head, subs in inner.items():
        nested += [
            f"    {head})",
            "      if (( COMP_CWORD == 2 )); then",
            f'        COMPREPLY=($(compgen -W {_quote([*subs, "--help"])} -- "$cur"))',
            "        return",
            "      fi",
            '      command="$command ${COMP_WORDS[2]}" from=3 ;;',
        ]
    cases, places = [], []
    for name, entry in table.items():
        options = _flags(entry)
        names = [n for o in options for n in o["names"]] + ["--help"]
        takes = [n for o in options if o["kind"] != "switch" for n in o["names"]]
        cases += [
            f"    {_word(name)})",
            f"      options={_quote(names)}",
            f"      takes={_quote(['', *takes, ''])}",
        ]
        cases += ["      case $prev in"]
        for kind, values, of in _by_value(options):
            cases.append(f"        {'|'.join(of)}) kind={kind}{_words(values)} ;;")
        cases += ["      esac ;;"]
        for i, o in enumerate(_positional(entry)):
            if o["kind"] != "file":
                places.append(f"      {_word(f'{name}:{i}')}) kind={o['kind']}{_words(o['values'])} ;;")
    parts = {
        "FIRST": _quote([*first, "--help", "--version"]),
        "INNER": "\n".join(nested),
        "COMMANDS": "\n".join(cases),
        "PLACES": "\n".join(places),
    }
    return re.sub("@([A-Z]+)@", lambda m: parts[m[1]], BASH)


def _by_value(options: Iterable[dict[str, Any]]) -> list[tuple[str, list[str], list[str]]]:
    """Group options that take a value by (kind, values); (kind, values, names of the options) of each group."""
    out: list[tuple[str, list[str], list[str]]] = []
    for o in options:
        if o["kind"] == "switch":
            continue
        for kind, values, names in out:
            if (kind, values) == (o["kind"], o["values"]):
                names += o["names"]
                break
        else:
            out.append((o["kind"], o["values"], list(o["names"])))
    return out


def _words(values: list[str]) -> str:
    return f" words={_quote(values)}" if values else ""


def _word(text: str) -> str:
    return f'"{text}"' if " " in text else text


def _quote(words: Iterable[str]) -> str:
    """Join words to one shell word."""
    return "'" + " ".join(words).replace("'", r"'\''") + "'"


# zsh


def zsh(table: Table) -> str:
    """Make a completion function for compinit, to be sourced or to lie in $fpath as _apr."""
    first, inner = groups(table)
    out = [
        "#compdef apr",
        "# zsh completion of apr, made by `apr completion zsh`",
        "_apr_names() {",
        '  local -a names=("$@")',
        "  _alternative 'names:name:compadd -a names' 'files:file:_files'",
        "}",
        "_apr() {",
        "  local curcontext=$curcontext",
        "  local -a commands",
        "  if (( CURRENT == 2 )); then",
        *_described(first, "    "),
        "    commands+=(--help:'list the commands' --version:'print the version')",
        "    _describe -t commands 'apr command' commands",
        "    return",
        "  fi",
        "  local command=$words[2]",
        "  shift words; (( CURRENT-- ))",
        "  case $command in",
    ]
    for head, subs in inner.items():
        out += [
            f"    {head})",
            "      if (( CURRENT == 2 )); then",
            *_described(subs, "        "),
            f"        _describe -t commands 'apr {head} command' commands",
            "        return",
            "      fi",
            '      command="$command $words[2]"',
            "      shift words; (( CURRENT-- )) ;;",
        ]
    out += ["  esac", "  case $command in"]
    for name, entry in table.items():
        out += [f"    {_word(name)}) _arguments \\"]
        specs = [spec for o in _flags(entry) for spec in _zsh_option(o)] + ["'--help[list the options]'"]
        specs += [_zsh_place(i, o) for i, o in enumerate(_positional(entry), 1)]
        out += [f"      {spec} \\" for spec in specs[:-1]] + [f"      {specs[-1]} ;;"]
    out += [
        "  esac",
        "}",
        'if [[ $funcstack[1] == _apr ]]; then _apr "$@"; else compdef _apr apr; fi',
    ]
    return "\n".join(out) + "\n"


def _described(entries: dict[str, str], indent: str) -> list[str]:
    rows = [f"{indent}  '{name}:{_zsh_text(text, colon=True)}'" for name, text in entries.items()]
    return [f"{indent}commands=(", *rows, f"{indent})"]


def _zsh_text(text: str, colon: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("'", r"'\''").replace("[", r"\[").replace("]", r"\]")
    return text.replace(":", r"\:") if colon else text


def _zsh_action(o: dict[str, Any]) -> str:
    """Choose the action of `_arguments` for a value; a leading space keeps arguments of compadd away."""
    values = " ".join(o["values"])
    actions = {"word": f"({values})", "name": f" _apr_names {values}", "file": "_files"}
    return actions.get(o["kind"], " ")


def _zsh_option(o: dict[str, Any]) -> list[str]:
    """List the words of `_arguments` for an option, whose names exclude each other."""
    text, names = _zsh_text(o["text"]), o["names"]
    star = "*" if o["repeated"] else ""
    others = "" if star or len(names) == 1 else f"({' '.join(names)})"
    if o["kind"] == "switch":
        return [f"'{others}{name}[{text}]'" for name in names]
    value = names[0].lstrip("-").split("-")[-1]
    return [f"'{others}{star}{name}[{text}]:{value}:{_zsh_action(o)}'" for name in names]


def _zsh_place(number: int, o: dict[str, Any]) -> str:
    where = "*" if o["repeated"] else number
    return f"'{where}:{o['names'][0].lower()}:{_zsh_action(o)}'"


# fish

FISH = """# fish completion of apr, made by `apr completion fish`
function __apr_at -d 'tests if the words behind apr begin with these'
    set -l typed (commandline -opc)
    set -l n (count $argv)
    test (count $typed) -gt $n
    and test "$typed[2.."(math $n + 1)"]" = "$argv"
end
function __apr_first -d 'tests if the command is still to come, behind these words'
    set -l typed (commandline -opc)
    set -l n (count $argv)
    test (count $typed) -eq (math $n + 1)
    and test $n -eq 0 -o "$typed[2.."(math $n + 1)"]" = "$argv"
end
complete -c apr -e
complete -c apr -f
complete -c apr -n __apr_first -l help -d 'list the commands'
complete -c apr -n __apr_first -l version -d 'print the version'
"""


def fish(table: Table) -> str:
    """Make `complete` lines, each with the command before it as its condition."""
    first, inner = groups(table)
    out = []
    for name, text in first.items():
        out.append(f"complete -c apr -n __apr_first -a {name} -d {_fish(text)}")
    for head, subs in inner.items():
        for name, text in subs.items():
            out.append(f"complete -c apr -n '__apr_first {head}' -a {name} -d {_fish(text)}")
    for name, entry in table.items():
        at = f"complete -c apr -n '__apr_at {name}'"
        for o in _flags(entry):
            short = [n[1:] for n in o["names"] if not n.startswith("--")]
            for long in (n[2:] for n in o["names"] if n.startswith("--")):
                letters = [f"-s {s}" for s in short]
                parts = [at, f"-l {long}", *letters, _fish_values(o), f"-d {_fish(o['text'])}"]
                out.append(" ".join(part for part in parts if part))
        out.append(f"{at} -l help -d 'list the options'")
        for o in _positional(entry):
            if o["values"]:
                out.append(f"{at} -a {_fish(' '.join(o['values']))}")
            if o["kind"] in ("file", "name"):
                out.append(f"{at} -F")
    return FISH + "\n".join(out) + "\n"


def _fish_values(o: dict[str, Any]) -> str:
    values = _fish(" ".join(o["values"]))
    kinds = {"switch": "", "word": f"-x -a {values}", "name": f"-r -F -a {values}", "file": "-r -F"}
    return kinds.get(o["kind"], "-x")


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", r"\'") + "'"
