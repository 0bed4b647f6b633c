"""Write commands that a message offers to copy: names in them come out of files and folders of strangers."""

from __future__ import annotations

import json
import re
import shlex


def word(value: object) -> str:
    """Quote a path or text as one word of a shell, which no command takes for an option."""
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def python(code: str, *args: object) -> str:
    """Write a call of Python whose code finds `args` in sys.argv[1:]: quoted for the shell, they could still end a string."""
    quoted = f'"{code}"' if not re.search(r'["$`\\!]', code) else shlex.quote(code)
    return " ".join(["python3 -c", quoted, *map(word, args)])


def jq_path(key: str) -> str:
    """Write the path of a key as jq reads it."""
    return f".{key}" if re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII) else f".[{json.dumps(key)}]"
