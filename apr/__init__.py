"""apr: pretrain and fine-tune decoder language models with mathematics written by hand.

    model = apr.load("runs/demo/ckpt/epoch-010.apr")
    print(model.generate("def read(path):", max_tokens=64, temperature=0))

What is in __all__ is loaded when it is first used: `import apr` itself loads nothing.
"""

from __future__ import annotations

from .common.version import __version__ as __version__

TYPE_CHECKING = False  # true for type checkers; to import typing takes longer than all the rest here
if TYPE_CHECKING:
    from typing import Any

    from .api import RunResult, load, train
    from .common.errors import AprError
    from .inference.language_model import LanguageModel
    from .inference.sampling import Sampling
    from .training.callbacks import Callback

__all__ = ["AprError", "Callback", "LanguageModel", "RunResult", "Sampling", "load", "train"]

# Modules of the names that are not in api.
_PLACES = {
    "AprError": "common.errors",
    "Callback": "training.callbacks",
    "LanguageModel": "inference.language_model",
    "Sampling": "inference.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'apr' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_PLACES.get(name, 'api')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
