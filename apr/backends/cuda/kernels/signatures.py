"""Parameters of CUDA kernels, read from their declarations.

Read are `extern "C" __global__ void NAME(...)` with attributes in between, also where a macro of the same
text emits them. A parameter is a pointer to, or a scalar of, one of the types below, or a tensor map, by which
TMA copies boxes of an array: `const __grid_constant__ TensorMap NAME`. A pointer NAME may have one gap between
elements for every scalar NAME_...: with x_row, say, rows that do not follow each other. A pointer may be null
when it is const, or when a comment at it says so: `float* dw /* or null */`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

POINTERS = ("act", "float", "double", "int", "long long", "unsigned char", "signed char")
SCALARS = ("int", "long long", "float")
TENSOR_MAP = "TensorMap"
_EXTERN = re.compile(r'extern\s+"C"')
_HEAD = re.compile(r"(?:\s|static\b|void\b|__\w+__(?:\s*\((?:[^()]|\([^()]*\))*\))?)*(?P<name>\w+)\s*\(")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel. act stands for the type of activations."""

    name: str
    ctype: str
    pointer: bool = False
    const: bool = False
    nullable: bool = False  # takes None
    gaps: int = 0  # axes whose distance the kernel is told: 0 means C-contiguous


def parse(text: str, where: str) -> dict[str, tuple[Parameter, ...]]:
    """Every kernel of a translation unit. Raises ValueError, naming `where`, for what we cannot launch."""
    text = _expand(_without_comments(text))
    found: dict[str, tuple[Parameter, ...]] = {}
    for start in _EXTERN.finditer(text):
        head = _HEAD.match(text, start.end())
        if head is None:
            what = " ".join(text[start.start() : start.start() + 80].split())
            raise ValueError(f"{where}: cannot read the kernel declaration {what!r}")
        depth, at = 1, head.end()
        while depth and at < len(text):
            depth += (text[at] == "(") - (text[at] == ")")
            at += 1
        name = head["name"]
        parameters = _parameters(text[head.end() : at - 1], f"{where}: {name}")
        if found.setdefault(name, parameters) != parameters:
            raise ValueError(f"{where}: kernel {name} is declared twice with different parameters")
    return found


def _without_comments(text: str) -> str:
    """Comments removed, except that those which say null become /*null*/ and stand before the comma."""
    text = re.sub(r"//([^\n]*)", lambda m: f"/*{m[1].replace('*/', '')}*/", text)
    text = re.sub(
        r"/\*(.*?)\*/", lambda m: "/*null*/" if re.search(r"\bnull", m[1]) else " ", text, flags=re.S
    )
    return re.sub(r",[ \t]*/\*null\*/[ \t]*(?=\\?\n)", " /*null*/,", text)


def _parameters(inside: str, where: str) -> tuple[Parameter, ...]:
    found = [_parameter(p, where) for p in _split(inside) if p]
    scalars = [p.name for p in found if not p.pointer and p.ctype != TENSOR_MAP]
    return tuple(
        replace(p, gaps=sum(s.startswith(p.name + "_") for s in scalars)) if p.pointer else p for p in found
    )


def _parameter(text: str, where: str) -> Parameter:
    nullable = "/*null*/" in text
    plain = " ".join(
        re.sub(r"__restrict__|__grid_constant__|/\*null\*/", " ", text).replace("*", " * ").split()
    )
    read = re.fullmatch(r"(.*[\s*])(\w+)", plain)
    words = read[1].split() if read else []
    const, pointer = "const" in words, words.count("*") == 1 and words[-1] == "*"
    ctype = " ".join(w for w in words if w not in ("const", "*"))
    by_value = (*SCALARS, TENSOR_MAP) if "__grid_constant__" in text and const else SCALARS
    if read is None or words.count("*") > 1 or ctype not in (POINTERS if pointer else by_value):
        raise ValueError(
            f"{where}: parameter {plain!r} is none of: pointer to {', '.join(POINTERS)}; scalar {', '.join(SCALARS)}; "
            f"const __grid_constant__ {TENSOR_MAP}"
        )
    return Parameter(read[2], ctype, pointer, const, nullable or (pointer and const))


def _expand(text: str) -> str:
    """The text with those function-like macros expanded whose body declares a kernel."""
    text = re.sub(r"\\\n", " ", text)
    define = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)\(([^)]*)\)(.*)$", re.M)
    macros = {m[1]: (m[2], m[3]) for m in define.finditer(text) if 'extern "C"' in m[3]}
    text = define.sub("", text)

    def expanded(use: re.Match[str]) -> str:
        names, body = macros[use[1]]
        given = dict(zip(_split(names), _split(use[2]), strict=False))
        body = re.sub(r"\b\w+\b", lambda word: given.get(word[0], word[0]), body)
        return re.sub(r"\s*##\s*", "", body)

    if not macros:
        return text
    return re.sub(rf"^[ \t]*({'|'.join(macros)})[ \t]*\(([^)]*)\)", expanded, text, flags=re.M)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
