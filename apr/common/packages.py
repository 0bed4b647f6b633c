"""Name the command that installs a missing package where this program finds it."""

from __future__ import annotations

import os
import shlex
import sys

# Package: what its extra in setup.cfg asks of its version.
OPTIONAL = {
    "pyarrow": ">=17",
    "huggingface_hub": ">=0.30",
    "gguf": ">=0.17",
    "tensorboardX": ">=2.6",
    "wandb": ">=0.17",
    "lm_eval": ">=0.4.3",
    "jinja2": ">=3.1",
}


def pip_install(*what: str) -> str:
    """Spell the command that installs packages, or an extra such as ".[cuda13]", into this process's environment.

    apr itself is on no package index, and the pip of the PATH may belong to another Python: so the packages by their own
    names, and the interpreter by its path."""
    python = sys.executable or "python3"
    below = os.path.relpath(python)
    python = python if below.startswith("..") else below
    return shlex.join([python, "-m", "pip", "install", *(w + OPTIONAL.get(w, "") for w in what)])
